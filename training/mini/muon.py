"""Muon for kernels, Adam for vectors: one optimizer class that the engine takes by its dotted path.

Muon (Jordan et al. 2024) brings the momentum of a matrix to singular values of about one, so that all its directions are
learned at one pace; small convolutional networks need about half the steps. The update is scaled to the size of Adam's
(Liu et al. 2025), so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_SIZE = 0.2
"""Root mean square of Adam's updates, about."""


class Muon(torch.optim.Optimizer):
    """Tensors of two dimensions or more, as matrices (first dimension, rest), by Muon; the others by Adam.

    momentum: Nesterov's, of Muon. betas, eps: of Adam. adam: names of groups that are Adam's whole, as tables of embeddings
    should be: few of their rows have a gradient in one step. precision: what the iterations are computed in; auto: bfloat16,
    which is enough, where it is quick, else float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        adam: Collection[str] = (),
        precision: str = "float32",
    ) -> None:
        self._adam = frozenset(adam)
        rules = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": tuple(betas), "eps": eps}
        super().__init__(params, {**rules, "precision": precision})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every tensor that has a gradient."""
        assert closure is None
        for table in self.param_groups:
            matrices = table.get("name") not in self._adam
            for parameter in table["params"]:
                if parameter.grad is None:
                    continue
                change = (self._matrix if matrices and parameter.ndim > 1 else self._vector)(parameter, table)
                parameter.mul_(1 - table["lr"] * table["weight_decay"]).add_(change, alpha=-table["lr"])

    def _matrix(self, parameter: Tensor, table: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["momentum"].lerp_(parameter.grad, 1 - table["momentum"])
        ahead = torch.lerp(parameter.grad, state["momentum"], table["momentum"])
        name = table["precision"]
        if name == "auto":
            name = "bfloat16" if quick_bfloat16(parameter.device) else "float32"
        dtype = getattr(torch, name)
        return orthogonal(ahead.reshape(len(ahead), -1), dtype).view_as(parameter)

    def _vector(self, parameter: Tensor, table: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = table["betas"]
        state["first"].lerp_(parameter.grad, 1 - first)
        state["second"].lerp_(parameter.grad.square(), 1 - second)
        size = (state["second"] / (1 - second ** state["step"])).sqrt_() + table["eps"]
        return state["first"] / (1 - first ** state["step"]) / size


def quick_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are quicker than in float32: on accelerators, and on CPUs with instructions for them (AMX,
    AVX512-BF16). On others they are many times slower."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type != "cpu" or bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrix with all singular values about one, times what gives it the size of an update of Adam.

    matrix: (rows, columns). dtype: of the iterations, Newton-Schulz with coefficients that are quick and not exact. A zero
    matrix stays zero.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.float() if wide else matrix.float().T
    x = (x / (x.norm() + 1e-12)).to(dtype)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x if wide else x.T
    return (x * (_SIZE * max(matrix.shape) ** 0.5)).to(matrix.dtype)
