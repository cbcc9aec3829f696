"""Floating-point operations of a traced function: the package's own counter."""

from mpisjax.analysis.flops import Counter, count

__all__ = ["Counter", "count"]
