"""Kernels behind one dispatch. Callers import names from here and never a backend module."""

from .chosen import attend_with
from .cross_entropy import head_cross_entropy, linear_cross_entropy
from .dispatch import BACKENDS, Backend, Refused, attention, chosen_backends, explain, select
from .linear import hasten, linear_gelu
from .mask import Intervals, Mask
from .ops import gate_norm_modulate, guided_step, has_kernel, qk_norm_rope
from .reference_ops import Heads

__all__ = [
    "BACKENDS",
    "Backend",
    "Heads",
    "Intervals",
    "Mask",
    "Refused",
    "attend_with",
    "attention",
    "chosen_backends",
    "explain",
    "gate_norm_modulate",
    "guided_step",
    "has_kernel",
    "hasten",
    "head_cross_entropy",
    "linear_cross_entropy",
    "linear_gelu",
    "qk_norm_rope",
    "select",
]
