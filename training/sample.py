"""Edits of held-out pictures with the weights that are being trained, as a contact sheet.

The pictures are made by the core's generator around the very modules of the trainer, so what is seen is what inference gives.
Draws come from a generator of their own seed, the same for every sheet: sheets of different steps compare picture by picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from ..reasonedit_core import flow
from ..reasonedit_core.detect import STEP1X
from ..reasonedit_core.errors import DataError
from ..reasonedit_core.files import write_whole
from ..reasonedit_core.generator import FlowGenerator, Step1XGeometry
from ..reasonedit_core.geometry import QwenGeometry
from ..reasonedit_core.images import load_image, to_pil
from ..reasonedit_core.sheet import draw_rows
from ..reasonedit_core.types import EditRequest
from . import rng
from .validate import evaluating, fresh

if TYPE_CHECKING:
    from ..reasonedit_core.interfaces import Codec, Conditioner
    from ..reasonedit_core.settings import Settings
    from .data.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One edit of a held-out record. Pictures are (1, 3, H, W) in 0..1; target: None where the record has none."""

    record: str
    instruction: str
    source: Tensor
    edited: Tensor
    target: Tensor | None = None


def make_generator(
    system: str,
    variant: str,
    *,
    conditioner: Conditioner,
    transformer: nn.Module,
    codec: Codec,
    settings: Settings,
    schedule: flow.FlowSchedule | None = None,
    plus: bool = True,
) -> FlowGenerator:
    """The generator of a system around modules that are loaded already, as `load_system` puts it together.

    schedule: of the checkpoint; None: the system's. plus: of Qwen-Image-Edit, whether it is of the Plus family.
    """
    if system == STEP1X:
        from ..reasonedit_core.denoisers.dit import Step1XDenoiser

        return FlowGenerator(
            conditioner,
            Step1XDenoiser(transformer, variant),
            codec,
            schedule or flow.STEP1X,
            geometry=Step1XGeometry(variant, settings.multiple, codec.patch),
            combine=flow.step1x_guidance(variant),
            default_negative="",
        )
    from ..reasonedit_core.denoisers.qwen_image import QwenImageDenoiser

    lightning = settings.schedule == "lightning"
    return FlowGenerator(
        conditioner,
        QwenImageDenoiser(transformer),
        codec,
        flow.LIGHTNING if lightning else schedule or flow.QWEN,
        geometry=QwenGeometry(plus, settings.condition_area, settings.multiple, codec.patch),
        combine=flow.combine_qwen,
        default_negative=" ",
    )


def choose_records(records: Iterable[Record], count: int) -> list[Record]:
    """The first `count` records that hold a picture to edit and words to edit it with."""
    fit = (record for record in records if "input" in record.files and record.editor_instruction)
    return [record for record, _ in zip(fit, range(count), strict=False)]


def sample_edits(
    generator: FlowGenerator,
    records: Sequence[Record],
    *,
    steps: int,
    guidance: float,
    size_level: int,
    seed: int = 0,
) -> list[Sample]:
    """Edit the input of every record with what its editor is told. Global generators and modes are left as they were.

    Further reference pictures are shown to Qwen-Image-Edit Plus, the one system here that takes them. What the MLLM keeps
    from before is forgotten first and afterwards, as training changes its weights.
    """
    samples = []
    with ExitStack() as stack:
        stack.enter_context(rng.isolated())
        stack.enter_context(fresh(generator.conditioner.mllm))
        for module in (generator.denoiser.transformer, generator.codec.vae):
            stack.enter_context(evaluating(module))
        for record in records:
            source = load_image(record.picture("input")).rgb
            names = record.references if getattr(generator.geometry, "plus", False) else ()
            references = tuple(load_image(record.picture(name)).rgb for name in names)
            request = EditRequest(
                source,
                record.editor_instruction,
                seed=seed,
                steps=steps,
                guidance=guidance,
                size_level=size_level,
                references=references,
            )
            draws = torch.Generator().manual_seed(seed)
            made = generator.edit(request, source, request.instruction, draws)
            target = load_image(record.picture("target")).rgb if "target" in record.files else None
            samples.append(Sample(record.id, request.instruction, source, made.image, target))
    return samples


def contact_sheet(samples: Sequence[Sample], title: str, note: str = "") -> Image.Image:
    """A page: per record its instruction, the source, the edit, and the target where there is one."""
    if not samples:
        raise DataError("sample edits: expected held-out records with a picture and an instruction, found none. Add some.")
    rows = []
    for sample in samples:
        pictures = [("source", to_pil(sample.source)), ("edit", to_pil(sample.edited))]
        if sample.target is not None:
            pictures.append(("target", to_pil(sample.target)))
        rows.append((f"{sample.instruction}  ({sample.record})", pictures))
    return draw_rows(title, rows, note)


def write_sheet(path: str | Path, samples: Sequence[Sample], title: str, note: str = "") -> Path:
    """Write the contact sheet as PNG, whole or not at all."""
    buffer = io.BytesIO()
    contact_sheet(samples, title, note).save(buffer, format="PNG")
    return write_whole(path, buffer.getvalue())
