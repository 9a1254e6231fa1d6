"""ReasonBrain's residuals in ComfyUI's own SD 1.5: added behind the first layer, to the rows they belong to.

ComfyUI batches conditionings as it sees fit and gives each a new identity per run, so neither the order of rows nor an identity
can be known when the model is patched. A wrapper around each evaluation notes which identities carry residuals (they travel in
the conditionings), and the patch behind the first layer looks up the rows of its batch. No comfy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..reasonedit_core.denoisers.unet import residual_map
from ..reasonedit_core.types import Conditioning

KEY = "reasonbrain"
FIRST = ("input", 0)
"""Where ComfyUI's UNet stands behind its first convolution."""


def note_residuals(executor: Callable, model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Mapping) -> Any:
    """A wrapper of ComfyUI's CALC_COND_BATCH: the residuals of these conditionings, by identity, for `add_residuals`."""
    found = {cond["uuid"]: cond[KEY] for row in conds for cond in row or () if KEY in cond}
    options = {**model_options.get("transformer_options", {}), KEY: found}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})


def add_residuals(h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """A patch of ComfyUI's input blocks. h (rows * B, c, h, w), of which each conditioning has B; others pass unchanged."""
    found = options.get(KEY)
    if not found or tuple(options["block"]) != FIRST:
        return h
    rows = h.chunk(len(options["uuids"]))
    return torch.cat([_added(row, found.get(uuid)) for row, uuid in zip(rows, options["uuids"], strict=True)])


def _added(row: torch.Tensor, carried: Conditioning | None) -> torch.Tensor:
    if carried is None:
        return row
    on_device = Conditioning(carried.tokens, residual=tuple(part.to(row.device) for part in carried.residual))
    return row + residual_map(on_device, row.shape[-2:], row.dtype)
