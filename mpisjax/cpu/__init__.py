"""Convolutions compiled for this machine's processor, in place of XLA's on a CPU; see `mpisjax.cpu.convolutions`."""

from mpisjax.cpu.library import disabled, enabled

__all__ = ["disabled", "enabled"]
