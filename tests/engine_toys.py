"""Toy units, a toy plan and a toy step for the tests of the engine: real packs, models of a few hundred weights.

Use: `from reasonedit.tests.engine_toys import ...`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.packing import IGNORED, ImagePack, TextPack
from reasonedit.training.checkpoint import stored
from reasonedit.training.loop import TrainSettings
from reasonedit.training.optim import OptimSettings
from reasonedit.training.steps import joint_step
from reasonedit.training.types import FM, NTP, MicroStep, Models, ParamGroup

WORDS, WIDTH, CHANNELS = 12, 8, 4


class Block(nn.Module):
    """A residual layer. extra: a weight that only some packs use."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class ToyMLLM(nn.Module):
    """TextPack -> (states (L, D), cross entropy (answers,)); a label is predicted from the row before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH, dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, pack: TextPack) -> tuple[Tensor, Tensor]:
        x = self.embed(pack.ids)
        for layer in self.layers:
            x = layer(x)
        rows = (pack.labels != IGNORED).nonzero()[:, 0]
        logits = self.head(x[rows - 1])
        return x, nn.functional.cross_entropy(logits, pack.labels[rows], reduction="none")


class ToyDiT(nn.Module):
    """(ImagePack, states) -> velocity (N, C). `quoted` is used by packs that quote text only."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.quoted = nn.Parameter(torch.zeros(WIDTH))
        self.x_in = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, dropout) for _ in range(2))
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, pack: ImagePack, states: Tensor | None = None) -> Tensor:
        states = pack.states if states is None else states
        text = self.connector(states[pack.text_index])
        if pack.quoted is not None:
            text = text + self.quoted
        mean = torch.zeros(pack.n_documents, WIDTH, dtype=text.dtype).index_add(0, pack.text_doc, text)
        mean = mean / torch.bincount(pack.text_doc, minlength=pack.n_documents)[:, None]
        x = self.x_in(pack.noisy().to(text.dtype)) + mean[pack.image_doc] + pack.sigma[pack.image_doc][:, None].to(text.dtype)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def draw_micro(seed: str, quoted: bool = False, dtype: torch.dtype = torch.float32) -> MicroStep:
    """A micro-step with two documents in each stream, of lengths and contents that depend on `seed` alone."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    lengths = [4 + digest[8] % 5, 3 + digest[9] % 4]
    total = sum(lengths)
    ids = torch.randint(WORDS, (total,), generator=generator)
    doc = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    labels = torch.full((total,), IGNORED)
    for start, length in ((0, lengths[0]), (lengths[0], lengths[1])):
        labels[start + length - 2 : start + length] = (ids[start + length - 3 : start + length - 1] * 5 + 3) % WORDS
    names = (f"{seed}-a", f"{seed}-b")
    text = TextPack(
        ids, torch.zeros(3, total, dtype=torch.int64), doc, labels, torch.ones(total), torch.zeros(0, 1176), records=names
    )
    sizes = [2 + digest[10] % 3, 3 + digest[11] % 3]
    tokens = sum(sizes)
    image_doc = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    clean = torch.randn(tokens, CHANNELS, generator=generator, dtype=dtype)
    image = ImagePack(
        text_index=torch.arange(total),
        text_doc=doc,
        clean=clean,
        noise=torch.randn(tokens, CHANNELS, generator=generator, dtype=dtype),
        sigma=torch.rand(2, generator=generator),
        image_doc=image_doc,
        role=torch.zeros(tokens, dtype=torch.int64),
        loss_weight=torch.ones(tokens),
        grids=(((1, sizes[0]),), ((1, sizes[1]),)),
        quoted=torch.ones(total, dtype=torch.bool) if quoted else None,
        quoted_embeds=torch.zeros(total, WIDTH) if quoted else None,
        records=(f"{seed}-c", f"{seed}-d"),
    )
    return MicroStep(text, image, {NTP: float(text.n_answers), FM: float(tokens)})


@dataclass
class ToySource:
    """`total` micro-steps per optimizer step, dealt out to `world` ranks in runs.

    poison: (epoch, cursor) of a step whose first micro-step (of rank `victim`) has latents times `venom`. broken: one that
    cannot be loaded. repeat: every epoch is the first one. uneven: micro-steps of odd numbers have no picture pack. quotes:
    only micro-step 0 quotes text.
    """

    length: int = 3
    total: int = 2
    rank: int = 0
    world: int = 1
    poison: tuple[int, int] | None = None
    venom: float = float("nan")
    broken: tuple[int, int] | None = None
    victim: int = 0
    repeat: bool = False
    uneven: bool = False
    quotes: bool = False
    name: str = "toy"
    dtype: torch.dtype = torch.float32

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.length}-{self.total}"

    def __len__(self) -> int:
        return self.length

    def load(self, epoch: int, cursor: int) -> list[MicroStep]:
        if (epoch, cursor) == self.broken and self.rank == self.victim:
            raise DataError("record 'x' line 3: picture cannot be read; replace it")
        share = self.total // self.world
        micros = []
        for number in range(self.rank * share, (self.rank + 1) * share):
            seed = f"{self.name} {0 if self.repeat else epoch} {cursor} {number}"
            micro = draw_micro(seed, self.quotes and number == 0, self.dtype)
            if self.uneven and number % 2:
                micro = replace(micro, image=None, counts={NTP: micro.counts[NTP]})
            micros.append(micro)
        if (epoch, cursor) == self.poison and self.rank == self.victim:
            image = replace(micros[0].image, clean=micros[0].image.clean * self.venom)
            micros[0] = replace(micros[0], image=image)
        return micros


def toy_models(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Models:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Models(ToyMLLM(dropout).to(dtype), ToyDiT(dropout).to(dtype))


def toy_groups(models: Models, lr: float = 0.01) -> list[ParamGroup]:
    """One group per unit: mllm and dit."""
    return [ParamGroup(name, tuple(unit.named_parameters()), lr) for name, unit in models.units().items()]


def toy_settings(steps: int = 8, **changes: object) -> TrainSettings:
    optim = changes.pop("optim", OptimSettings(schedule="cosine", warmup=2))
    defaults = {"weights": {NTP: 0.1, FM: 1.0}, "save_every": 0, "tensorboard": False, "curves": False, "optim": optim}
    return TrainSettings(steps=steps, **{**defaults, **changes})


toy_step = joint_step


def digest_of(folder: Path) -> dict[str, str]:
    """sha256 by kind of tensor of a checkpoint: weights, ema, optimizer."""
    out = {}
    for stem in ("weights", "ema", "optimizer"):
        digest = hashlib.sha256()
        for name, tensor in sorted(stored(folder, stem)):
            digest.update(name.encode() + tensor.contiguous().view(-1).numpy().tobytes())
        out[stem] = digest.hexdigest()
    return out


def numbers(lines: list[dict], first: int = 1) -> list[tuple]:
    """What must be the same to the bit in two logs, from step `first` on."""
    keys = ("step", "epoch", "cursor", "loss", "losses", "grad_norm", "lr", "records")
    return [tuple(str(line[key]) for key in keys) for line in lines if line["event"] == "step" and line["step"] >= first]
