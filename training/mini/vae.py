"""The VAEs of the miniature, trained on drawn scenes by the engine of `loop.py`: one more unit, source and step for it.

What is asked of them beside sharp pictures: latents that are easy to learn and a decoder that forgives. So the mean latents of
every channel are held at mean 0 and deviation 1 (nothing collapses, nothing drifts), and the decoder is trained on latents
with noise of many strengths, as a small DiT never hits them exactly. The posterior's deviation is a constant, `DEVIATION`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_json, write_whole
from ...reasonedit_core.mini.configs import components
from .. import checkpoint
from ..config import Positive, Share, Table
from ..config_file import config_hash
from ..distributed import ParallelSettings
from ..log import read_log
from ..loop import Hook, Moment, Outcome, TrainSettings, train
from ..optim import OptimSettings
from ..types import Losses, MicroStep, Models, ParamGroup
from .blank import VAES
from .vae_flat import FlatKL, FlatQwen
from .vae_scenes import CHANNELS, Crops, as_pixels, as_tensor, plain_scenes

if TYPE_CHECKING:
    import numpy as np

    from ...reasonedit_core.interfaces import Codec

log = logging.getLogger(__name__)

LOSS = "picture"
DEVIATION = 0.05
"""Standard deviation of the posterior, of latents whose own is 1: what Step1X-Edit's sampling adds."""

BUILDS = {"mini-s": "step1x-v1p2", "mini-q": "qwen-edit-plus"}
"""The core's builder system that each miniature has the layout of."""

WEIGHTS = "diffusion_pytorch_model.safetensors"
REPORT = "report.json"
COUNTED = 1024
"""Training scenes that the statistics of the latents are taken over."""


class VaeSettings(Table):
    """How a VAE is trained. widths: fields of its config.json that differ from the builder's.

    crop: side of the crops in pixels, `batch` of them make a step; the last `whole` of the steps are on whole pictures, as
    many pixels each. noise: strongest noise on latents, drawn evenly from 0. objects: how much more a pixel of an object
    counts than one of the ground, as most of a scene is ground. square: weight of the squared error beside the absolute one.
    moments: weight of the distance of each channel's mean from 0 and deviation from 1. checked: held-out scenes that the
    result is measured on. device, save_every, check_every and checked may change when a run goes on.
    """

    system: Literal["mini-s", "mini-q"]
    widths: dict[str, Any]
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(4500, ge=1)
    batch: int = Field(16, ge=4)
    crop: int = Field(48, ge=16, le=96, multiple_of=16)
    whole: Share = 0.6
    lr: Positive = 3e-3
    warmup: int = Field(100, ge=0)
    optimizer: str = "reasonedit.training.mini.muon.Muon"
    clip: float = Field(1.0, ge=0)
    noise: float = Field(0.25, ge=0)
    objects: float = Field(3.0, ge=0)
    square: float = Field(4.0, ge=0)
    moments: float = Field(0.05, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    save_every: int = Field(500, ge=0)
    check_every: int = Field(1000, ge=0)
    checked: int = Field(400, ge=1)


def default_settings(system: str, **changes: Any) -> VaeSettings:
    """The settings that the shipped VAE of `system` was trained with, with `changes` (a recipe's table). Raises ConfigError."""
    if system not in VAES:
        raise ConfigError(f"expected a system of {', '.join(VAES)}, found {system!r}; name one of them.")
    try:
        return VaeSettings.model_validate({"system": system, "widths": VAES[system], **changes})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}; found {one['input']!r}" for one in error.errors()]
        known = ", ".join(VaeSettings.model_fields)
        raise ConfigError(f"settings of the VAE of {system}: {'; '.join(faults)}. They are {known}.") from None


# ---- unit, step ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VaeModels(Models):
    """vae: a `FlatKL` or a `FlatQwen`."""

    vae: nn.Module | None = None

    def units(self) -> dict[str, nn.Module]:
        """The one unit."""
        return {"vae": self.vae}


def new_vae(settings: VaeSettings) -> FlatKL | FlatQwen:
    """A fresh VAE on the CPU: random from the seed, with the constant posterior deviation."""
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    config = {key: value for key, value in vae_config(settings).items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.system == "mini-s":
            unit: FlatKL | FlatQwen = FlatKL(AutoencoderKL(**config))
        else:
            unit = FlatQwen(AutoencoderKLQwenImage(**config))
    unit.fix_deviation(DEVIATION)
    return unit


def vae_config(settings: VaeSettings) -> dict[str, Any]:
    """config.json of the VAE, with the statistics of its latents not yet known. Raises ConfigError for an unknown field."""
    return components(BUILDS[settings.system], torch.bfloat16, {"vae": settings.widths})["vae"].config


def pixels_per_latent(settings: VaeSettings) -> int:
    """Pixels per latent on each side. Raises ConfigError for an unknown field of widths."""
    config = vae_config(settings)
    return 2 ** (len(config["block_out_channels"]) - 1 if settings.system == "mini-s" else len(config["temperal_downsample"]))


def picture_step(settings: VaeSettings) -> Any:
    """The `Step` of VAE training: micro-steps are `vae_scenes.Pictures`."""

    def step(models: VaeModels, micro: MicroStep) -> Losses:
        device = next(models.vae.parameters()).device
        pixels = micro.pixels.to(device)
        mean = models.vae.encode(pixels).float()
        noisy = mean + micro.noise.to(device)
        apart = models.vae.decode(noisy).float() - pixels
        counted = 1 + settings.objects * micro.covered.to(device)
        counted = counted / counted.mean()
        absolute, square = (counted * apart.abs()).mean(), (counted * apart.square()).mean()
        deviation, centre = torch.std_mean(mean, dim=(0, 2, 3))
        moments = (centre.square() + (deviation - 1).square()).mean()
        count = float(len(pixels))
        total = absolute + settings.square * square + settings.moments * moments
        parts = {"absolute": absolute, "rms": square.sqrt() * 127.5, "moments": moments}
        return Losses({LOSS: total * count}, parts={name: (float(one.detach()) * count, count) for name, one in parts.items()})

    return step


# ---- the run -------------------------------------------------------------------------------------------------------------


def train_vae(settings: VaeSettings, out: str | Path, run: str | Path | None = None) -> Path | None:
    """Train the VAE of a miniature and write it to `out`: config.json, weights in bfloat16, and report.json with what was
    measured. Goes on from the last checkpoint of `run` (default: OUT.run beside it) where there is one.

    Returns `out`, or None where the run was asked to stop before its end (signals.py). Raises what `loop.train` raises.
    """
    out = Path(out)
    run = Path(run) if run is not None else out.with_name(f"{out.name}.run")
    unit = new_vae(settings)
    models = VaeModels(vae=unit)
    outcome = run_steps(settings, models, run)
    if not outcome.finished:
        return None
    unit.to("cpu", torch.float32)
    write_vae(settings, unit, out)
    spent = sum(line["step_s"] for line in read_log(run) if line["event"] == "step")
    found = {
        "steps": outcome.step,
        "minutes": round(spent / 60, 1),
        "threads": torch.get_num_threads(),
        **measure(settings, out),
    }
    write_json(out / REPORT, {"settings": settings.model_dump(mode="json"), **found})
    log.info("%s: %s", out, json.dumps(found))
    return out


def run_steps(settings: VaeSettings, models: VaeModels, run: Path) -> Outcome:
    """All optimizer steps that are left of the run in `run`."""
    own = settings.model_dump(mode="json", exclude={"device", "save_every", "check_every", "checked"})
    going = checkpoint.complete(run / "checkpoints")
    engine = TrainSettings(
        steps=settings.steps,
        weights={LOSS: 1.0},
        seed=settings.seed,
        optim=OptimSettings(name=settings.optimizer, schedule="cosine", warmup=settings.warmup, clip=settings.clip),
        parallel=ParallelSettings(device=settings.device, precision=settings.precision),
        save_every=settings.save_every,
        log_every=50,
        tensorboard=False,
        identity=own,
        resume="latest" if going else None,
    )
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device.replace("auto", "cpu")
    if device == "cpu" or torch.cuda.is_available():  # else the engine says what is wrong
        models.vae.to(device)
    groups = [ParamGroup("vae", tuple(models.vae.named_parameters()), settings.lr, 0.0)]
    source = Crops(
        seed=settings.seed,
        steps=settings.steps,
        batch=settings.batch,
        crop=settings.crop,
        whole_from=round(settings.steps * (1 - settings.whole)),
        noise=settings.noise,
        factor=pixels_per_latent(settings),
        fingerprint=config_hash(own),
        channels=vae_config(settings).get("latent_channels", CHANNELS),
    )

    def look(moment: Moment) -> Mapping[str, Any]:
        scenes = plain_scenes(48, "held_out", settings.seed)
        return read_back(scenes, lambda pixels: moment.models.vae.decode(moment.models.vae.encode(pixels.to(device))).cpu())

    hooks = [Hook("read_back", look, every=settings.check_every)]
    return train(models, groups, source, picture_step(settings), engine, run, hooks)


# ---- the result ----------------------------------------------------------------------------------------------------------


def write_vae(settings: VaeSettings, unit: FlatKL | FlatQwen, out: Path) -> Path:
    """Write a diffusers VAE folder, weights in bfloat16, with the statistics of its latents over whole training scenes."""
    from safetensors.torch import save

    state = {name: value.to(torch.bfloat16).contiguous() for name, value in unit.vae.state_dict().items()}
    unit.vae.load_state_dict({name: value.float() for name, value in state.items()})
    config = vae_config(settings) | statistics(settings, unit)
    write_whole(out / WEIGHTS, save(state, metadata={"format": "pt"}))
    write_json(out / "config.json", config)
    return out


@torch.no_grad()
def statistics(settings: VaeSettings, unit: FlatKL | FlatQwen) -> dict[str, Any]:
    """scaling_factor and shift_factor (S), or latents_mean and latents_std by channel (Q), over training scenes."""
    scenes = plain_scenes(COUNTED, "train", settings.seed)
    batches = [unit.encode(torch.stack([as_tensor(one) for one in scenes[at : at + 64]])) for at in range(0, COUNTED, 64)]
    means = torch.cat(batches).transpose(0, 1).flatten(1).double()
    if settings.system == "mini-s":
        return {"scaling_factor": _short(1 / means.std()), "shift_factor": _short(means.mean())}
    deviation, centre = torch.std_mean(means, dim=1)
    return {"latents_mean": [_short(one) for one in centre], "latents_std": [_short(one) for one in deviation]}


def _short(value: Tensor) -> float:
    return round(float(value), 4)


@torch.no_grad()
def measure(settings: VaeSettings, folder: Path) -> dict[str, Any]:
    """What the VAE in `folder` does to held-out scenes, through the core's own codec: share read back exactly, judge's
    quality; the same with noise of a fifth of the latents' deviation; bytes of the folder's weights."""
    codec = open_codec(settings.system, folder)
    scenes = plain_scenes(settings.checked, "held_out", settings.seed)

    def through(pixels: Tensor, strength: float) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        latents = [codec.sample(codec.encode(one[None]), rng) for one in pixels]
        latents = [one + strength * torch.randn(one.shape, generator=rng) for one in latents]
        return torch.cat([codec.decode(one) for one in latents])

    found = read_back(scenes, lambda pixels: through(pixels, 0.0))
    noisy = read_back(scenes[: max(1, settings.checked // 4)], lambda pixels: through(pixels, 0.2))
    size = (folder / WEIGHTS).stat().st_size
    return found | {f"{key}_with_noise": value for key, value in noisy.items()} | {"bytes": size, "scenes": len(scenes)}


def open_codec(system: str, folder: Path) -> Codec:
    """The core's codec on a VAE folder."""
    from ...reasonedit_core.latents import KLCodec, QwenCodec
    from ...reasonedit_core.weights import load_flux_vae, load_qwen_vae

    if system == "mini-s":
        return KLCodec(load_flux_vae(folder, dtype=torch.float32)[0])
    return QwenCodec(load_qwen_vae(folder, dtype=torch.float32)[0])


@torch.no_grad()
def read_back(scenes: Sequence[Any], through: Any, batch: int = 16) -> dict[str, float]:
    """Share of scenes that the exact judge reads back from `through`'s pictures (exact), and its mean mark 0..10 for how they
    are drawn (quality). through: pixels (B, 3, H, W) in -1..1 to the same."""
    from ...reasonedit_core.mini.judge import quality, read

    exact, marks = 0, 0.0
    for at in range(0, len(scenes), batch):
        some = scenes[at : at + batch]
        pictures: Sequence[np.ndarray] = as_pixels(through(torch.stack([as_tensor(one) for one in some])))
        for scene, picture in zip(some, pictures, strict=True):
            reading = read(picture)
            exact += reading.scene == scene and all(reading.readable)
            marks += quality(reading)
    return {"exact": exact / len(scenes), "quality": marks / len(scenes)}
