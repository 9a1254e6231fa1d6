"""The pretrained parts that mini-brain is built around, trained by the engine: its LLaVA, and its editor.

LLaVA learns to look and to read (descriptions, questions, plain instructions; the book `words` says why nothing else). The
editor is an InstructPix2Pix in small: the UNet of 8 channels and CLIP's text encoder learn clear edits. Neither meets a
hypothetical instruction. Every step draws new scenes from counters, so nothing lies on the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...reasonedit_core.brain.generator import sd_schedule
from ...reasonedit_core.brain.layout import find_brain_parts
from ...reasonedit_core.denoisers.unet import load_unet
from ...reasonedit_core.latents import SDCodec
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.edits import EDIT_KINDS
from ...reasonedit_core.mini.items import item, scene
from ...reasonedit_core.mllm.llava import VICUNA
from ...reasonedit_core.models.reasonbrain.losses import denoising_loss, noised
from ...reasonedit_core.weightfiles import read_json
from .. import checkpoint
from ..config import Positive, Share, Table
from ..config_file import config_hash
from ..distributed import ParallelSettings
from ..loop import Outcome, TrainSettings, train
from ..optim import OptimSettings
from ..timesteps import shifted
from ..types import Losses, Models, ParamGroup
from .brain_tokens import LANGUAGE
from .readings import read_cells, read_instructions, read_meant, read_places, read_scene
from .vae_scenes import as_tensor

log = logging.getLogger(__name__)

ANSWER, NOISE = "answer", "noise"
"""Names of the two losses."""

IGNORED = -100
_FREE = ("device", "save_every")
_HARD = {"move": 4, "recolour": 4, "replace": 4, "add": 2, "remove": 2, "resize": 2, "state": 3, "background": 1, "label": 1}

_READINGS = (read_cells, read_scene, read_instructions, read_places, read_places, read_meant)
"""What is asked about a scene. To find a thing by what it looks like is learnt last, so it is asked more often."""


class PartSettings(Table):
    """How a part is trained. batch: scenes of a step. shift: of the editor's timesteps towards noise, where what an edit does
    is decided. compound: share of instructions that ask for two things. device and save_every may change on resume."""

    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(..., ge=1)
    batch: int = Field(32, ge=1)
    lr: Positive = 2e-3
    warmup: int = Field(100, ge=0)
    optimizer: str = "reasonedit.training.mini.muon.Muon"
    options: dict[str, Any] = {"betas": [0.9, 0.95], "precision": "auto"}
    ema: float = Field(0.0, ge=0.0, lt=1.0)
    shift: Positive = 3.0
    compound: Share = 0.2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    save_every: int = Field(500, ge=0)


WORDS = PartSettings(steps=5000)
EDITOR = PartSettings(steps=8000, ema=0.995)


@dataclass(frozen=True, eq=False)
class PartModels(Models):
    """part: the one unit."""

    part: nn.Module | None = None

    def units(self) -> dict[str, nn.Module]:
        """The unit."""
        return {"part": self.part}


# ---- LLaVA ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """A micro-step: ids, labels (B, L) int64 with IGNORED where nothing is learnt, keep (B, L) bool, pixels (B, 3, H, W)
    in -1..1."""

    records: tuple[str, ...]
    ids: Tensor
    labels: Tensor
    keep: Tensor
    pixels: Tensor
    counts: Mapping[str, float]
    text: None = None
    image: None = None


class Conversations:
    """A `PackSource` of one epoch: conversations about scenes, each row as LLaVA's prompt has it."""

    def __init__(self, config: Any, tokenizer: Any, settings: PartSettings, fingerprint: str) -> None:
        self.tokenizer, self.settings, self.fingerprint = tokenizer, settings, fingerprint
        vision = config.vision_config
        self.image = [config.image_token_id] * (vision.image_size // vision.patch_size) ** 2

    def __len__(self) -> int:
        return self.settings.steps

    def load(self, epoch: int, cursor: int) -> list[Answers]:
        """The conversations of one step."""
        rows, pictures, names = [], [], []
        for number in range(self.settings.batch):
            dice = Dice("brain part words", self.settings.seed, epoch, cursor, number)
            shown = scene(dice.below(1 << 62), "train")
            read = dice.pick(_READINGS)
            turns = read(shown, LANGUAGE, dice) or read_scene(shown, LANGUAGE, dice)
            rows.append(self.row(turns))
            pictures.append(as_tensor(shown))
            names.append(f"{cursor}-{number}")
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids, _ in rows])
        labels = torch.tensor([[*said, *[IGNORED] * (length - len(said))] for _, said in rows])
        keep = torch.tensor([[n < len(ids) for n in range(length)] for ids, _ in rows])
        count = float((labels != IGNORED).sum())
        return [Answers(tuple(names), ids, labels, keep, torch.stack(pictures), {ANSWER: count})]

    def row(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and the labels: those of the answers with their end, IGNORED elsewhere."""
        ids: list[int] = []
        labels: list[int] = []

        def tokens(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        for number, (question, answer) in enumerate(turns):
            asked = [*tokens(VICUNA[0]), *(() if number else self.image), *tokens(VICUNA[1].format(question))]
            told = [*tokens(f" {answer}"), self.tokenizer.eos_token_id]
            ids += [*asked, *told]
            labels += [*[IGNORED] * len(asked), *told]
        return ids, labels


class LlavaUnit(nn.Module):
    """Cross entropy of the answers, summed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Answers) -> Tensor:
        """-> scalar, the sum over answer tokens."""
        device = next(self.parameters()).device
        ids, labels, keep = (x.to(device) for x in (batch.ids, batch.labels, batch.keep))
        states = self.model.model(
            input_ids=ids, attention_mask=keep.long(), pixel_values=batch.pixels.to(device), use_cache=False
        ).last_hidden_state
        follows = labels[:, 1:] != IGNORED
        logits = self.model.lm_head(states[:, :-1][follows])
        return functional.cross_entropy(logits.float(), labels[:, 1:][follows], reduction="sum")


def train_llava(settings: PartSettings, folder: Path, out: Path, run: Path) -> Path | None:
    """Train the LLaVA in `folder` (its weights as they are, all of them) and write it to `out`, in bfloat16. Goes on from the
    last checkpoint of `run`. Returns `out`, or None where the run was asked to stop."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    own = settings.model_dump(mode="json", exclude=set(_FREE))
    source = Conversations(model.config, tokenizer, settings, config_hash({"part": "llava", **own}))

    def step(models: PartModels, micro: Answers) -> Losses:
        total = models.part(micro)
        return Losses({ANSWER: total}, parts={ANSWER: (float(total.detach()), micro.counts[ANSWER])})

    tables = ("embed_tokens", "position_embedding", "lm_head")
    outcome = _run(settings, LlavaUnit(model), source, step, ANSWER, run, tables)
    if not outcome.finished:
        return None
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    _copy(folder, out, ("config.json",))
    return out


# ---- the editor ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edits:
    """A micro-step: texts of B clear edits, source and target (B, 3, H, W) in -1..1, noise (B, C, h, w), t (B,) in 0..1."""

    records: tuple[str, ...]
    texts: tuple[str, ...]
    source: Tensor
    target: Tensor
    noise: Tensor
    t: Tensor
    counts: Mapping[str, float]
    text: None = None
    image: None = None


class ClearEdits:
    """A `PackSource` of one epoch: clear edits, the hard kinds more often. latent: (C, h, w)."""

    def __init__(self, settings: PartSettings, latent: tuple[int, int, int], fingerprint: str) -> None:
        self.settings, self.latent, self.fingerprint = settings, latent, fingerprint
        assert set(_HARD) == set(EDIT_KINDS)
        self.kinds = tuple(kind for kind, often in _HARD.items() for _ in range(often))

    def __len__(self) -> int:
        return self.settings.steps

    def load(self, epoch: int, cursor: int) -> list[Edits]:
        """The edits of one step."""
        settings, items = self.settings, []
        for number in range(settings.batch):
            dice = Dice("brain part edits", settings.seed, epoch, cursor, number)
            kind = "compound" if dice.chance(settings.compound) else dice.pick(self.kinds)
            items.append(item(dice.below(1 << 62), kind, "train", LANGUAGE))
        rng = torch.Generator().manual_seed(Dice("brain part noise", settings.seed, epoch, cursor).below(1 << 62))
        uniform = torch.rand(len(items), generator=rng)
        return [
            Edits(
                records=tuple(f"{cursor}-{number}" for number in range(len(items))),
                texts=tuple(one.instruction for one in items),
                source=torch.stack([as_tensor(one.source) for one in items]),
                target=torch.stack([as_tensor(one.target) for one in items]),
                noise=torch.randn((len(items), *self.latent), generator=rng),
                t=torch.tensor([shifted(float(u), settings.shift) for u in uniform]),
                counts={NOISE: float(len(items))},
            )
        ]


class EditorUnit(nn.Module):
    """UNet and text encoder. The autoencoder is frozen and no part of it."""

    def __init__(self, unet: nn.Module, encoder: nn.Module, tokenizer: Any, codec: SDCodec, scheduler: Any) -> None:
        super().__init__()
        self.unet, self.encoder = unet, encoder
        self.tokenizer, self.codec = tokenizer, codec
        self.alphas, self.kind = scheduler.alphas_cumprod, scheduler.config.prediction_type

    def forward(self, batch: Edits) -> Tensor:
        """-> scalar, L_DM summed over edits."""
        device = next(self.unet.parameters()).device
        with torch.no_grad():
            scale = self.codec.vae.config.scaling_factor
            source, target = (self.codec.encode(x.to(device))[0].float() for x in (batch.source, batch.target))
        length = self.encoder.config.max_position_embeddings
        ids = self.tokenizer(
            list(batch.texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        context = self.encoder(input_ids=ids.to(device)).last_hidden_state
        steps = (batch.t.to(device) * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        latents, aim = noised(target * scale, batch.noise.to(device), self.alphas, steps, self.kind)
        predicted = self.unet(torch.cat([latents, source], dim=1), steps, encoder_hidden_states=context).sample
        return denoising_loss(predicted, aim, "rows").sum()


def train_editor(settings: PartSettings, folder: Path, out: Path, run: Path) -> Path | None:
    """Train UNet and text encoder of the parts in `folder`, from their weights as they are, and write OUT/unet and
    OUT/text_encoder in bfloat16. Otherwise as `train_llava`."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextModel

    parts = find_brain_parts(folder, trained=False)
    encoder = CLIPTextModel.from_pretrained(str(parts.text_encoder), dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(parts.tokenizer), local_files_only=True)
    vae = AutoencoderKL.from_pretrained(str(parts.vae), torch_dtype=torch.float32, local_files_only=True)
    codec = SDCodec(vae.to(_device(settings)).eval().requires_grad_(False))
    scheduler = sd_schedule(read_json(parts.scheduler / "scheduler_config.json"))
    unit = EditorUnit(load_unet(parts.network), encoder, tokenizer, codec, scheduler)
    side = read_json(parts.vae / "config.json")["sample_size"] // codec.patch
    own = settings.model_dump(mode="json", exclude=set(_FREE))
    source = ClearEdits(settings, (codec.channels, side, side), config_hash({"part": "editor", **own}))

    def step(models: PartModels, micro: Edits) -> Losses:
        total = models.part(micro)
        return Losses({NOISE: total}, parts={NOISE: (float(total.detach()), micro.counts[NOISE])})

    outcome = _run(settings, unit, source, step, NOISE, run, ("token_embedding", "position_embedding"))
    if not outcome.finished:
        return None
    unit.to("cpu", torch.bfloat16)
    unit.unet.save_pretrained(out / "unet")
    unit.encoder.save_pretrained(out / "text_encoder")
    return out


# ---- shared ------------------------------------------------------------------------------------------------------------------


def _run(
    settings: PartSettings, unit: nn.Module, source: Any, step: Any, loss: str, run: Path, tables: Sequence[str]
) -> Outcome:
    """All optimizer steps that are left. tables: names of embeddings, which are Adam's, not Muon's."""
    unit.to(_device(settings))
    models = PartModels(part=unit)
    named = [(name, p) for name, p in unit.named_parameters() if p.requires_grad]
    looked_up = [one for one in named if any(table in one[0] for table in tables)]
    inner = [one for one in named if one not in looked_up]
    groups = [ParamGroup("tables", tuple(looked_up), settings.lr, 0.0), ParamGroup("part", tuple(inner), settings.lr, 0.0)]
    muon = settings.optimizer.endswith(".Muon")
    engine = TrainSettings(
        steps=settings.steps,
        weights={loss: 1.0},
        seed=settings.seed,
        optim=OptimSettings(
            name=settings.optimizer,
            options={**settings.options, **({"adam": ["tables"]} if muon else {})},
            schedule="linear",
            floor=0.02,
            warmup=settings.warmup,
            ema=settings.ema,
        ),
        parallel=ParallelSettings(device=settings.device, precision=settings.precision),
        save_every=settings.save_every,
        log_every=50,
        tensorboard=False,
        identity=settings.model_dump(mode="json", exclude=set(_FREE)),
        resume="latest" if checkpoint.complete(run / "checkpoints") else None,
    )
    outcome = train(models, groups, source, step, engine, run)
    if outcome.finished:
        checkpoint.apply_weights(outcome.checkpoint, models, average=True)
    return outcome


def _device(settings: PartSettings) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if settings.device == "auto" else settings.device)


def _copy(folder: Path, out: Path, leave: Sequence[str]) -> None:
    """What lies beside the weights (tokenizer, image statistics), where `out` has nothing of that name."""
    import shutil

    for file in folder.iterdir():
        if file.is_file() and file.name not in leave and not file.name.endswith((".safetensors", ".index.json")):
            if not (out / file.name).exists():
                shutil.copy2(file, out / file.name)
