"""Who paints for Reason50K: the picture after out of words, and candidates for the picture before, led by the one after.

Any diffusers folder on this disk paints out of words; candidates need an IP-Adapter (Ye et al. 2023) for it, without which the
paper's results fall the most (its Table A7).
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any, Protocol

from ....reasonedit_core.errors import CheckpointError, ConfigError
from .annotators import Shown

GRID = 8
"""Sides that all pipelines take are multiples of it, whatever their VAE asks for."""

SCALE = 0.6
"""How much a candidate takes after its target."""


class Painter(Protocol):
    """name: part of every key and of every record; it must tell one set of weights and settings from another."""

    name: str

    def paint(
        self, prompt: str, seed: int, size: tuple[int, int] | None = None, like: Shown | None = None
    ) -> tuple[bytes, tuple[int, int]]:
        """(PNG, (width, height)). size: None for the painter's own; like: a picture that it is led by. The same arguments give
        the same picture. Called in a thread, one call at a time."""
        ...


class DiffusersPainter:
    """A text-to-image pipeline of diffusers, loaded when it is first needed.

    adapter: a file of IP-Adapter weights, with its image_encoder/ beside it unless the pipeline has one; steps, guidance,
    side (in pixels, of the square that is painted where no size is asked for): None for the pipeline's own. Raises ConfigError
    for files that are not there, CheckpointError for those that do not load.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path | None = None,
        *,
        scale: float = SCALE,
        steps: int | None = None,
        guidance: float | None = None,
        side: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"{folder}: expected a diffusers folder with model_index.json, found none. Check the path.")
        if adapter is not None and not adapter.is_file():
            raise ConfigError(f"{adapter}: expected a file of IP-Adapter weights, found none. Check the path.")
        self.folder, self.adapter, self.scale = folder, adapter, scale
        told = {"num_inference_steps": steps, "guidance_scale": guidance, "height": side, "width": side}
        self._given = {key: value for key, value in told.items() if value is not None}
        self._device, self._dtype, self._pipe, self._lock = device, dtype, None, threading.Lock()
        names = [folder.resolve().name, *([f"{adapter.stem}*{scale:g}"] if adapter else [])]
        self.name = "+".join(names) + "".join(f"@{name}={value:g}" for name, value in self._given.items())

    def paint(
        self, prompt: str, seed: int, size: tuple[int, int] | None = None, like: Shown | None = None
    ) -> tuple[bytes, tuple[int, int]]:
        """One picture, painted on the grid that the pipeline asks for and then brought to `size`."""
        import torch

        from ....reasonedit_core.images import load_image, to_pil

        pipe, options = self._get(), dict(self._given)
        if like is not None and self.adapter is None:
            raise ConfigError("expected an IP-Adapter to paint after a picture, found none. Name its weights (--ip-adapter).")
        if self.adapter is not None:
            # The adapted layers want a picture even where the words alone shall count: then it weighs nothing.
            options["ip_adapter_image"] = to_pil(load_image(like.path).rgb) if like is not None else _black()
        if size is not None:
            grid = max(GRID, pipe.vae_scale_factor)
            options |= {name: max(grid, side // grid * grid) for name, side in zip(("width", "height"), size, strict=True)}
        rng = torch.Generator().manual_seed(seed)
        with self._lock, torch.inference_mode():
            if self.adapter is not None:
                pipe.set_ip_adapter_scale(self.scale if like is not None else 0.0)
            made = pipe(prompt, generator=rng, **options).images[0].convert("RGB")
        if size is not None and made.size != tuple(size):
            from PIL import Image

            made = made.resize(tuple(size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        made.save(buffer, format="PNG")
        return buffer.getvalue(), made.size

    def _get(self) -> Any:
        with self._lock:
            if self._pipe is None:
                self._pipe = _load(self.folder, self.adapter, self._device, self._dtype)
            return self._pipe


def _black() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64))


def _load(folder: Path, adapter: Path | None, device: str, dtype: str) -> Any:
    import torch
    from diffusers import AutoPipelineForText2Image

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = (torch.float32 if place == "cpu" else torch.float16) if dtype == "auto" else getattr(torch, dtype)
    try:
        # A checker that blackens pictures would put black ones among the candidates; what is made here is looked at anyway.
        pipe = AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=kind, local_files_only=True, **_unchecked(folder))
        if adapter is not None:
            encoder = "image_encoder" if (adapter.parent / "image_encoder").is_dir() else None
            pipe.load_ip_adapter(
                adapter.parent, subfolder="", weight_name=adapter.name, image_encoder_folder=encoder, local_files_only=True
            )
            if getattr(pipe, "image_encoder", None) is None:
                raise ValueError(f"no image_encoder/ beside {adapter.name}")
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        told = f"{folder}" + (f" with {adapter}" if adapter else "")
        raise CheckpointError(
            f"{told}: expected a text-to-image pipeline of diffusers{' and an IP-Adapter made for it' if adapter else ''}, "
            f"found none ({first}). Name others."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _unchecked(folder: Path) -> dict[str, Any]:
    import json

    has = "safety_checker" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {"safety_checker": None, "requires_safety_checker": False} if has else {}
