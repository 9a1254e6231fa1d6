"""Kernels behind one dispatch. Callers import names from here and never a backend module."""

from .cross_entropy import head_cross_entropy, linear_cross_entropy
from .dispatch import BACKENDS, Backend, Refused, attention, explain, select
from .mask import Mask

__all__ = [
    "BACKENDS",
    "Backend",
    "Mask",
    "Refused",
    "attention",
    "explain",
    "head_cross_entropy",
    "linear_cross_entropy",
    "select",
]
