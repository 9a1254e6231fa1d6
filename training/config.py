"""What a training run is told: the tables of a recipe, typed. Reading recipes and overriding values is `config_file.py`.

A recipe is one TOML file: [run], [model], [data], [export], and an ordered list of [[stage]]; [every_stage] fills what a
stage leaves out. No torch here, so that the command line answers at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

OUT = "{out}"
"""How a path in a recipe says that it lies in the run folder."""

PREVIOUS, BASE = "previous", "base"
"""What a stage starts from, beside the folder of another run or stage."""

# TOML reads 2026 as a number and 2026-01-01 as a date; as the name of a folder both are fine.
AnyPath = Annotated[Path, BeforeValidator(lambda value: value if isinstance(value, Path) else str(value))]
Starts = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class Table(BaseModel):
    """A table of the recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Table):
    """out: the run folder, the only place that is written to. name: stem of exported files. precision: what forward and
    backward compute in; auto: bfloat16 on CUDA devices that have it, float32 on the CPU. workers: processes that prepare
    packs. parallel: how several processes share the work. context_parallel: ranks that share one sequence (untested on
    GPUs so far)."""

    out: AnyPath
    name: str = Field("reasonedit", pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    workers: int = Field(0, ge=0, le=256)
    deterministic: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    context_parallel: int = Field(1, ge=1)
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 leaves them alone")


class DrawnCheckpoint(Table):
    """A tiny random checkpoint of the core's builder. std: deviation of its matrices; config: overrides by component."""

    system: str
    seed: int = 0
    std: Positive = 0.05
    config: dict[str, dict[str, Any]] = {}


class BrainModel(Table):
    """How a ReasonBrain is built around the parts in model.weights. preset: 7b, 3b or flux; spec: fields of
    `models.reasonbrain.spec.BrainSpec` that differ from it (what the parts decide is taken from them); switches: parts that are
    left out, fields of `Switches` there; blip2: a BLIP-2 (folder or file) whose QFormer the new one starts from, as the paper's
    does."""

    preset: Literal["7b", "3b", "flux"] = "3b"
    spec: dict[str, Any] = {}
    switches: dict[str, bool | str] = {}
    blip2: AnyPath | None = None


class Model(Table):
    """weights: a folder in a released layout, or the file of a DiT; text_encoder, vae, tokenizer: parts that lie elsewhere.
    mllm_weights, dit_weights: how frozen weights are kept. swap_blocks: DiT blocks whose frozen weights wait in
    main memory until their turn. drawn: made at `weights` when nothing is there. brain: of ReasonBrain, whose weights are a
    folder as `brain/layout.py` has it, with or without trained tensors."""

    system: Literal["reasonedit-s", "reasonedit-q", "reasonbrain"]
    weights: AnyPath
    text_encoder: AnyPath | None = None
    vae: AnyPath | None = None
    tokenizer: AnyPath | None = None
    variant: Literal["auto", "v1.0", "v1.1", "v1.2"] = "auto"
    dialogue: AnyPath | None = None
    mllm_weights: Literal["full", "fp8", "nf4"] = "full"
    dit_weights: Literal["full", "fp8", "nf4"] = "full"
    swap_blocks: int = Field(0, ge=0)
    attention: str = "auto"
    drawn: DrawnCheckpoint | None = None
    brain: BrainModel | None = None


class DrawnRecords(Table):
    """A small set of drawn records. counts: by kind; held_out: the share of them that is not trained on; size: side of the
    pictures in pixels."""

    counts: dict[str, int] = {"think": 24, "reflect": 25, "edit": 24, "t2i": 24}
    held_out: Share = 0.2
    size: int = Field(64, ge=24)
    languages: tuple[str, ...] = ("en",)
    seed: int = 0


class Data(Table):
    """records: JSONL files or folders with records.jsonl; a record's `split` says whether it trains or is held out. cache:
    where latents and states are kept; runs may share one. size_level: square root of the area pictures are trained at. tasks:
    what is learnt of reasoning records; none: those of the paper. reflection: the form in which reflect records are told;
    others than multi-round are for comparison (the paper's Table 4). conditioner_pixels, reasoner_pixels: (min, max) areas
    at which the MLLM sees pictures; none: the checkpoint's. allow_resize: pairs of different shapes are meant."""

    records: tuple[AnyPath, ...] = Field(min_length=1)
    cache: AnyPath = Path(OUT) / "cache"
    size_level: int = Field(1024, ge=16, le=8192)
    tasks: tuple[str, ...] = ()
    reflection: Literal["multi-round", "single-image", "dual-image"] = "multi-round"
    conditioner_pixels: tuple[int, int] | None = None
    reasoner_pixels: tuple[int, int] | None = None
    allow_resize: bool = False
    drawn: DrawnRecords | None = None


class TrainSet(Table):
    """A trainable set: the name of a preset and what differs from it, or a set of one's own (part, mode, include).

    include, exclude: regular expressions that a whole name must match: of modules with mode lora, of parameters with mode
    full. rank ... rslora: of LoRA; alpha None: the rank. init: random draws the set's weights anew (training from nothing);
    std: deviation of matrices drawn so, by default what Qwen2.5 and the DiTs state; narrow networks need more. master: dtype
    that trained weights are kept in.
    """

    lr: Rate
    weight_decay: float | None = Field(None, ge=0.0)
    part: Literal["mllm", "dit", "brain", "llava", "denoiser"] | None = None
    mode: Literal["lora", "full"] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rank: int = Field(64, ge=1)
    alpha: Positive | None = None
    dropout: Share = 0.0
    dora: bool = False
    rslora: bool = False
    init: Literal["checkpoint", "random"] | None = None
    std: Positive = 0.02
    master: Literal["float32", "bfloat16"] = "float32"

    @field_validator("include", "exclude")
    @classmethod
    def _expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            try:
                re.compile(one)
            except re.error as error:
                raise ValueError(f"expected a regular expression, found {one!r} ({error})") from error
        return value


class Mixture(Table):
    """What an epoch is made of. kinds: kinds of records with their shares by count; none: every record once. mandatory: losses
    (ntp, fm) of which every rank has a document in every optimizer step. shortest: an epoch ends when the first kind has come
    once, not the last."""

    kinds: dict[str, Positive] = {}
    mandatory: tuple[Literal["ntp", "fm"], ...] = ()
    shortest: bool = False


class Packs(Table):
    """Budgets in tokens: text of the MLLM stream, image of the DiT stream (text tokens of its documents counted). window:
    packs a rank plans at a time. accumulation: packs of a rank per optimizer step. pad: multiple that packs are padded to, so
    that compiled kernels see few lengths; 0: not at all."""

    text: int = Field(8192, ge=16)
    image: int = Field(8832, ge=16)
    accumulation: int = Field(1, ge=1)
    window: int = Field(64, ge=1)
    pad: int = Field(0, ge=0)


class Optim(Table):
    """name: adamw, adamw8bit (bitsandbytes), or a dotted path to an optimizer class; options: its further arguments. floor:
    the share of the learning rate that linear and cosine end at. decay_vectors: whether norms and biases are decayed.
    ema_lora: whether LoRAs have a moving average too. clip: largest gradient norm of each group; 0: none."""

    name: str = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.01, ge=0.0)
    options: dict[str, Any] = {}
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup: int = Field(0, ge=0)
    floor: Share = 0.0
    clip: float = Field(1.0, ge=0.0)
    decay_vectors: bool = True
    ema: float = Field(0.0, ge=0.0, lt=1.0)
    ema_lora: bool = False


class Loss(Table):
    """ntp, fm: weights of the two losses. balance: what an answer, or a target picture, counts: as much as its tokens, as one,
    or as the root of its tokens. two_phase: DiT and MLLM are taken back one after the other (equal to one graph, less
    memory)."""

    ntp: float = Field(1.0, ge=0.0)
    fm: float = Field(1.0, ge=0.0)
    balance: Literal["token", "sample", "sqrt"] = "token"
    two_phase: bool = True


class Timesteps(Table):
    """How sigma is drawn (1 = noise). shift: with kind shift; mean, std: with logit_normal; steps: of a Lightning grid."""

    kind: Literal["uniform", "logit_normal", "shift", "dynamic", "lightning"] = "uniform"
    shift: Positive = 3.1582
    mean: float = 0.0
    std: Positive = 1.0
    steps: int = Field(4, ge=1)


class Dropout(Table):
    """Shares of documents whose condition is left out: text by the unconditional prompt, reference pictures."""

    text: Share = 0.1
    reference: Share = 0.0


class Cached(Table):
    """What is computed once and kept. states: of the MLLM, where it is frozen; it is then not loaded for the steps."""

    latents: bool = True
    states: bool = False


class Validation(Table):
    """Every `every` steps, beside before and after a stage: losses on at most `records` held-out records, FM loss at fixed
    `sigmas`; `verdicts`: reflect records whose verdict the MLLM is asked for. every 0: only before and after."""

    every: int = Field(0, ge=0)
    records: int = Field(64, ge=0)
    verdicts: int = Field(0, ge=0)
    sigmas: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


class Samples(Table):
    """Every `every` steps, and at the end of a stage: edits of held-out records as a contact sheet. 0: only on demand."""

    every: int = Field(0, ge=0)
    records: int = Field(4, ge=1)
    steps: int = Field(28, ge=1)
    guidance: float = Field(6.0, ge=0.0)
    seed: int = Field(0, ge=0)


class BrainStage(Table):
    """Of ReasonBrain's steps. batch: records of a micro-step. mllm, dm, align: weights of L_MLLM, L_DM and of the distance of V̂
    to the text encoder's states. drop_text, drop_image: shares of records whose condition is left out, drop_both of them both
    (the three-pass guidance needs them). features: whether what the frozen encoders see is kept; without, they run in every
    step. guidance: input of FLUX's distilled guidance in training. image_guidance: of sample edits. token_select, tame_gamma:
    our reading of what the paper takes from SID and TAME (`mllm/focus.py`), in training alone; 0 is off."""

    batch: int = Field(16, ge=1)
    mllm: float = Field(1.0, ge=0.0)
    dm: float = Field(1.0, ge=0.0)
    align: float = Field(1.0, ge=0.0)
    drop_text: Share = 0.10
    drop_image: Share = 0.10
    drop_both: Share = 0.05
    features: bool = True
    guidance: float = Field(1.0, ge=0.0)
    image_guidance: float = Field(1.5, ge=0.0)
    token_select: Share = 0.0
    tame_gamma: float = Field(0.0, ge=0.0, le=10.0)

    @model_validator(mode="after")
    def _shares(self) -> BrainStage:
        most = min(self.drop_text, self.drop_image)
        if self.drop_both > most or self.drop_text + self.drop_image - self.drop_both > 1:
            raise ValueError(
                f"expected drop_both of at most drop_text and drop_image, and all drops together of at most 1, found "
                f"{self.drop_text}, {self.drop_image} and {self.drop_both}"
            )
        return self


class Stage(Table):
    """A stage is (step, trainable sets, mixture). start: `previous` (base for the first), `base`, or folders of other runs or
    stages whose trained weights it goes on with (of two that hold the same part the later counts)."""

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    step: str
    steps: int = Field(ge=1)
    start: Starts = (PREVIOUS,)
    train: dict[str, TrainSet] = Field(min_length=1)
    mixture: Mixture = Mixture()
    packs: Packs = Packs()
    optim: Optim = Optim()
    loss: Loss = Loss()
    timesteps: Timesteps = Timesteps()
    dropout: Dropout = Dropout()
    cached: Cached = Cached()
    validation: Validation = Validation()
    samples: Samples = Samples()
    brain: BrainStage | None = None
    checkpointing: bool = True
    save_every: int = Field(500, ge=0)
    keep: int = Field(2, ge=1)
    log_every: int = Field(1, ge=1)


class Export(Table):
    """formats: what is written at the end of a run, beside the folder that training goes on from."""

    formats: tuple[Literal["comfyui", "peft", "merged"], ...] = ("comfyui",)


class Config(Table):
    """A whole recipe."""

    run: Run
    model: Model
    data: Data
    stage: tuple[Stage, ...] = Field(min_length=1)
    export: Export = Export()

    @model_validator(mode="after")
    def _stages(self) -> Config:
        names = [stage.name for stage in self.stage]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"expected stages with names of their own, found several called {', '.join(double)}")
        return self

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.run.out

    def place(self, path: Path) -> Path:
        """A path of the recipe with `{out}` filled in."""
        parts = path.parts
        return self.out.joinpath(*parts[1:]) if parts and parts[0] == OUT else path
