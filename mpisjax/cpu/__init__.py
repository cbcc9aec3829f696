"""Convolutions for a CPU: compiled for it, or with fewer multiplications; see the README in this folder."""

from mpisjax.cpu.library import disabled, enabled

__all__ = ["disabled", "enabled"]
