"""Convolutions compiled for this machine's processor, in place of XLA's on a CPU; see `mpisjax.native.convolutions`."""

from mpisjax.native.library import disabled, enabled

__all__ = ["disabled", "enabled"]
