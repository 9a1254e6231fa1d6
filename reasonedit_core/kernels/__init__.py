"""Kernels behind one dispatch. Callers import names from here and never a backend module."""

from .dispatch import BACKENDS, Backend, Refused, attention, explain, select

__all__ = ["BACKENDS", "Backend", "Refused", "attention", "explain", "select"]
