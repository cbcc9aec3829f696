"""Convolutions for a CPU: compiled for this processor, or with fewer multiplications; see the README in this folder."""

from mpisjax.cpu.library import disabled, enabled

__all__ = ["disabled", "enabled"]
