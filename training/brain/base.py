"""The parts that a ReasonBrain is trained around: found, named by a hash, loaded once a stage."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...reasonedit_core import flow
from ...reasonedit_core.brain.generator import BrainGeometry
from ...reasonedit_core.brain.layout import BrainParts, find_brain_parts
from ...reasonedit_core.errors import CheckpointError, ConfigError
from ...reasonedit_core.load import DTYPES, choose_device, choose_dtype
from ...reasonedit_core.models.reasonbrain.spec import PRESETS, BrainSpec, Switches
from ...reasonedit_core.settings import Settings, read_settings
from ...reasonedit_core.weightfiles import read_json, read_shapes
from ..config import BrainModel as BrainTable
from ..config import Config

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ...reasonedit_core.brain.model import BrainModel
    from ...reasonedit_core.interfaces import RegionFinder
    from ...reasonedit_core.latents import FluxCodec, SDCodec
    from ...reasonedit_core.models.reasonbrain.brain import ReasonBrain


class BrainBase:
    """What `models.Base` is for ReasonEdit. Raises CheckpointError where parts are missing, ConfigError for the recipe."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        self.config = config
        self.system = config.model.system
        self.device = device or choose_device(config.run.device)
        self.dtype = DTYPES[choose_dtype(config.run.precision, self.device)]
        self.parts: BrainParts = find_brain_parts(config.place(config.model.weights), trained=False)
        self.table = config.model.brain or BrainTable()
        self.spec = _spec(self.table.preset, self.table.spec)
        self.switches = _switches(self.table.switches)
        self.blip2 = None if self.table.blip2 is None else config.place(self.table.blip2)
        self._model: BrainModel | None = None
        self._finder: RegionFinder | None = None

    @property
    def places(self) -> dict[str, Path]:
        """The folders of all parts that have weights, by name."""
        names = ("llava", "network", "vae", "text_encoder", "text_encoder_2", "segmenter")
        return {name: place for name in names if (place := getattr(self.parts, name)) is not None}

    @property
    def identity(self) -> str:
        """A hash of what the parts are, as `models.Base.identity` has it, and of the widths and switches."""
        digest = hashlib.sha256(repr((self.spec, self.switches)).encode())
        places = {**self.places, **({"blip2": self.blip2} if self.blip2 is not None else {})}
        for name, place in places.items():
            if name == "segmenter":  # what it has found is in the hash of the records' features
                continue
            files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
            sizes = [(file.name, file.stat().st_size) for file in files]
            digest.update(repr((name, sorted(read_shapes(place).items()), sizes)).encode())
        return digest.hexdigest()

    def settings(self) -> Settings:
        """Steps, guidance and sizes: those of the folder, with the recipe's size in their place."""
        found = read_settings(self.parts.root, f"reasonbrain-{self.parts.kind}")
        return Settings.model_validate({**found.model_dump(), "size_level": self.config.data.size_level})

    def geometry(self, patch: int) -> BrainGeometry:
        """Sizes of pictures. patch: pixels of a latent token."""
        return BrainGeometry(self.settings().multiple, patch)

    def model(self) -> BrainModel:
        """The model as training begins: base models as they are, new modules from the seed. Kept until `take`."""
        if self._model is None:
            from ...reasonedit_core.brain.model import new_brain_model

            self._model = new_brain_model(
                self.parts,
                self.spec,
                switches=self.switches,
                dtype=self.dtype,
                vae_dtype=torch.float32,  # latents are encoded once and kept, so its speed does not matter
                device=self.device,
                seed=self.config.run.seed,
            )
            if self.switches != Switches():
                _start_as_whole(self._model.brain, self.config.run.seed)
            if self.blip2 is not None:
                taken = self._model.brain.qformer.init_from_blip2(self.blip2)
                if not taken.copied:
                    raise CheckpointError(
                        f"{self.blip2}: expected a QFormer of width {self.spec.qformer}, found none of whose "
                        f"{len(taken.differing)} tensors fits. Name another BLIP-2, or leave model.brain.blip2 out."
                    )
                log.info(
                    "%s: %d tensors of the QFormer taken, %d are of another shape (%s), %d are not there; those stay as drawn",
                    self.blip2, len(taken.copied), len(taken.differing), ", ".join(taken.differing[:2]), len(taken.missing),
                )  # fmt: skip
        return self._model

    def take(self) -> BrainModel:
        """The model, for one stage to change."""
        model, self._model = self.model(), None
        return model

    def finder(self) -> RegionFinder | None:
        """Who finds regions in pictures, as reasonbrain.json says; None where the region branch is off or none is named."""
        if self._finder is None and self.switches.region_branch:
            from ...reasonedit_core.brain.cues import make_finder

            settings = self.parts.settings
            self._finder = make_finder(
                settings.segmenter, root=self.parts.root, segmenter=self.parts.segmenter, device=self.device
            )
        return self._finder

    def reader(self) -> SDCodec | FluxCodec:
        """A codec without weights, to read kept moments by."""
        from diffusers import AutoencoderKL

        from ...reasonedit_core.latents import FluxCodec, SDCodec

        with torch.device("meta"):
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(str(self.parts.vae), local_files_only=True))
        return (SDCodec if self.parts.kind == "sd" else FluxCodec)(vae)

    def schedule(self) -> flow.FlowSchedule:
        """How FLUX shifts its sigmas with the size of a picture; of no use for SD."""
        file = self.parts.scheduler / "scheduler_config.json" if self.parts.scheduler else None
        if self.parts.kind == "sd" or file is None or not file.is_file():
            return flow.STEP1X
        return flow.FlowSchedule.from_config(read_json(file))

    def release(self) -> None:
        """Forget what is loaded."""
        self._model = self._finder = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _start_as_whole(brain: ReasonBrain, seed: int) -> None:
    """Give a model with parts left out the weights that the whole one of this seed begins with, where it has them: what is
    built later would else be drawn otherwise, and ablations would not start alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = type(brain)(brain.spec, Switches()).state_dict()
    for name, tensor in brain.state_dict().items():
        if name in whole and whole[name].shape == tensor.shape:
            tensor.copy_(whole[name])


def _spec(preset: str, changes: Mapping[str, Any]) -> BrainSpec:
    if "taps" in changes:
        changes = {**changes, "taps": tuple(changes["taps"])}
    try:
        return replace(PRESETS[preset], **changes)
    except TypeError as error:
        known = ", ".join(BrainSpec.__dataclass_fields__)
        raise ConfigError(f"model.brain.spec: expected fields out of {known}, found {', '.join(changes)}.") from error


def _switches(changes: Mapping[str, Any]) -> Switches:
    try:
        return Switches(**changes)
    except TypeError as error:
        known = ", ".join(Switches.__dataclass_fields__)
        raise ConfigError(f"model.brain.switches: expected fields out of {known}, found {', '.join(changes)}.") from error
