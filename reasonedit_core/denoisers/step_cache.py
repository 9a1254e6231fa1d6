"""Step caching: some steps take no forward, their predictions are extrapolated from those before them.

The extrapolation is diffusers' TaylorSeer (arXiv 2503.06923), on the velocity of each pass, which is what its lite mode does
inside a network. Its hooks are not used: they keep their state on the modules, where edits that run interleaved would mix, and
a block whose call they answer has been brought to the device for nothing. First-block caches do not fit: they measure a
residual between the first and the last block, and those of the Step1X DiT differ in what they take and give.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from ..flow import Predict
from ..regions import StepCache
from ..types import Conditioning


class PredictedSteps:
    """`predict` of one edit of `steps` steps, of which `cache` says which are computed. Made anew for every edit.

    Raises ConfigError where the installed diffusers has no TaylorSeer.
    """

    def __init__(self, predict: Predict, cache: StepCache, steps: int) -> None:
        self._predict, self._cache, self._steps = predict, cache, steps
        self._state = _taylor_state()
        self._passes: dict[int, Any] = {}

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """latents (B, N, C), sigma (B,), conditioning of batch B -> velocity (B, N, C)."""
        # A pass is known by its conditioning, which the edit holds as long as this lives.
        state = self._passes.get(id(conditioning))
        if state is None:
            state = self._passes[id(conditioning)] = self._state(latents.dtype, self._cache.order)
        state.current_step += 1
        if not self._cache.computes(state.current_step, self._steps):
            return state.predict()[0]
        velocity = self._predict(latents, sigma, conditioning)
        state.taylor_factors_dtype = velocity.dtype
        state.update((velocity,))
        return velocity


def _taylor_state() -> Any:
    try:
        from diffusers.hooks.taylorseer_cache import TaylorSeerState
    except ImportError as error:
        import diffusers

        raise ConfigError(
            f"step cache: expected a diffusers with TaylorSeer, found {diffusers.__version__}; upgrade it (pip install -U "
            "diffusers), or leave the step cache out"
        ) from error
    return TaylorSeerState
