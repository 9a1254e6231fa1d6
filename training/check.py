"""`reasonedit-train check`: a dry run. Everything that is wrong with recipe and data, what would be trained, how it is packed,
and how much memory a step needs. No weights are read and nothing is trained.

The memory is an estimate from shapes; what a card really needs depends on its kernels and is not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ..reasonedit_core.errors import ReasonEditError
from .assemble import prepare
from .config import BASE, PREVIOUS, Config
from .cost import GIB, Load, Work, dit_work, estimate, mllm_work, parked_bytes, vision_work
from .data.check import check_records
from .material import Material, draw_missing, make_documents, make_source, open_material
from .models import Base
from .presets import DIT, FULL, MLLM
from .run import starting_point
from .stages import REASONBRAIN, Plan, plan_stages
from .trainable import trainable_table
from .types import FM, NTP, ParamGroup

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TASK_PATCHES = 4
"""Patches of the vision tower for each token that it gives."""


@dataclass(slots=True)
class Findings:
    """What `check` says: text, and whether a run could start."""

    lines: list[str] = field(default_factory=list)
    faults: int = 0

    @property
    def text(self) -> str:
        """All of it."""
        verdict = "nothing stands in the way of a run" if self.good else f"{self.faults} things stand in the way of a run"
        return "\n".join([*self.lines, verdict])

    @property
    def good(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.faults

    def add(self, *lines: str) -> None:
        """Say something."""
        self.lines += lines

    def fault(self, error: object) -> None:
        """Say what stands in the way."""
        self.faults += 1
        self.lines.append(f"error: {error}")


def check(config: Config, *, pictures: bool = True) -> Findings:
    """Look at everything that can be looked at without weights in memory."""
    findings = Findings()
    try:
        draw_missing(config)
    except ReasonEditError as error:
        findings.fault(error)
    data = _check_data(config, findings, pictures)
    if config.model.system == REASONBRAIN:
        from .brain.room import check_stages

        try:
            findings.add(*check_stages(config, data))
        except ReasonEditError as error:
            findings.fault(error)
        return findings
    try:
        base = Base(config)
        mllm, dit = base.shell(), base.dit_shell()
    except ReasonEditError as error:
        findings.fault(error)
        return findings
    findings.add(
        f"weights: {config.model.system} {base.variant}, {base.parts.root}; device {base.device}, precision "
        f"{str(base.dtype).removeprefix('torch.')}"
    )
    material = None
    if data:
        try:
            material = open_material(config, base)
        except ReasonEditError as error:
            findings.fault(error)
    for plan in plan_stages(config):
        findings.add("", f"stage {plan.stage.name}: {plan.stage.steps:,} steps of {plan.stage.step}, {_start(plan)}")
        try:
            _check_stage(findings, base, material, plan, {MLLM: mllm.model, DIT: dit}, mllm)
        except ReasonEditError as error:
            findings.fault(error)
        mllm, dit = base.shell(), base.dit_shell()  # a stage puts its LoRA into them
    findings.add("")
    return findings


def _check_data(config: Config, findings: Findings, pictures: bool) -> bool:
    """The records, all problems of each; whether they can be read at all."""
    try:
        report = check_records(
            [config.place(path) for path in config.data.records], pictures=pictures, allow_resize=config.data.allow_resize
        )
    except ReasonEditError as error:
        findings.fault(error)
        return False
    findings.add(*report.lines())
    findings.faults += len(report.of("error"))
    return report.ok


def _check_stage(
    findings: Findings, base: Base, material: Material | None, plan: Plan, shells: dict[str, nn.Module], mllm: object
) -> None:
    wanted = {MLLM: plan.mllm, DIT: plan.dit}
    modules = {part: module for part, module in shells.items() if wanted[part]}
    if plan.mllm and not plan.speaks:
        modules[MLLM].lm_head = None
    # What an earlier stage of this run will have trained is not there yet; folders that are named must be.
    carried = {} if plan.stage.start == (PREVIOUS,) else starting_point(base.config, plan)
    groups: list[ParamGroup] = []
    for part, module in modules.items():
        groups += prepare(part, module, plan, carried.get(part), seed=base.config.run.seed)
    findings.add(trainable_table(groups, modules))
    loads = _check_packs(findings, base, material, plan, mllm) if material is not None else None
    loads = loads or _full_loads(plan)
    compute = BYTES[str(base.dtype).removeprefix("torch.")]
    memory = estimate(
        modules=modules,
        groups=groups,
        load=loads,
        compute_bytes=compute,
        checkpointing=plan.stage.checkpointing,
        optimizer_bytes=2 if plan.stage.optim.name == "adamw8bit" else 8,
        ema=plan.stage.optim.ema > 0,
        nf4=tuple(part for part in (MLLM, DIT) if getattr(base.config.model, f"{part}_weights") == "nf4"),
        swapped=base.config.model.swap_blocks if plan.dit else 0,
        cuda=base.device.type == "cuda",
    )
    text, image = loads.tokens
    findings.add(f"memory of one step on one device, with its fullest pack ({text:,} text, {image:,} picture tokens):")
    findings.add(*memory.lines())
    if base.config.model.swap_blocks and plan.dit:
        parked = parked_bytes(modules[DIT], base.config.model.swap_blocks) / GIB
        findings.add(f"  {'in main memory: swapped blocks':<44}{parked:>8.2f} GiB")
    if base.config.run.parallel == "fsdp2":
        findings.add("  with FSDP2 the weights, gradients and optimizer states are divided by the number of processes")
    findings.add(f"work of that step: {_operations(plan, modules, groups, loads) / 1e12:,.2f} TFLOP, counted")


def _check_packs(findings: Findings, base: Base, material: Material, plan: Plan, mllm: object) -> Load | None:
    """The packing table, what is left out, and the fullest pack."""
    from .data.cache import Cache

    documents = make_documents(material, base.shell())
    config = base.config
    source = make_source(material, plan, documents, Cache(config.place(config.data.cache)))
    made = source.plan(0)
    findings.add("packs of the first epoch, one process", made.table())
    for refused in source.unmade:
        findings.fault(refused)
    over = [one for one in made.refused if "mixture" not in one.why]
    if over:
        findings.faults += len(over)
        findings.add(*(f"error: {one}" for one in over))
    packs = [made.pack(number) for number in range(made.n_packs)]
    fullest = max(packs, key=lambda pack: _size([source.items[index] for index, _ in pack]))
    items = [source.items[index] for index, _ in fullest]
    texts = tuple(item.text for item in items if item.text)
    pictures = []
    for item in items:
        if item.loss == FM:
            record, task = source.sources[item.id]
            tokens = sum(documents.layout(record, task).tokens)
            pictures.append((item.image - tokens, tokens))
    spoken = sum(item.text for item in items if item.loss == NTP)  # of which about a quarter are answers
    return Load(texts, tuple(pictures), answers=spoken // 4, patches=TASK_PATCHES * sum(texts) // 2)


def _size(items: Sequence) -> int:
    return sum(item.text + item.image for item in items)


def _full_loads(plan: Plan) -> Load:
    """Packs filled to their budgets, where the data could not be read."""
    packs = plan.stage.packs
    text = (packs.text,) if plan.mllm else ()
    image = ((min(640, packs.image // 4), packs.image - min(640, packs.image // 4)),) if plan.dit else ()
    return Load(text, image, answers=packs.text // 4 if plan.speaks else 0)


def _operations(plan: Plan, modules: dict[str, nn.Module], groups: Sequence[ParamGroup], load: Load) -> float:
    """Of forward and backward of both parts."""
    total = 0.0
    kept = plan.stage.checkpointing
    if DIT in modules:
        total += dit_work(modules[DIT], load).step(trained=_how(plan, DIT), checkpointing=kept)
    if MLLM in modules:
        trained = _how(plan, MLLM)
        total += mllm_work(modules[MLLM], load).step(trained=trained, checkpointing=kept and bool(trained))
        seen: Work = vision_work(modules[MLLM], load)
        total += seen.step(trained="full" if "full" in trained else "", checkpointing=kept)
    return total


def _how(plan: Plan, part: str) -> str:
    modes = {one.mode for one in plan.of(part) if one.name != "connector"}
    return "" if not plan.of(part) else "full" if FULL in modes else "lora"


def _start(plan: Plan) -> str:
    start = plan.stage.start
    if start == (BASE,) or (start == (PREVIOUS,) and plan.index == 0):
        return "from the base weights"
    return "going on from the stage before" if start == (PREVIOUS,) else f"going on from {', '.join(start)}"
