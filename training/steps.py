"""One forward of each kind of stage: a micro-step in, loss sums out.

Reasoning trains the MLLM by next tokens, editing the DiT by flow matching, joint both at once with gradients from the DiT
into the MLLM. What a stage trains is decided by the parameters, not here.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..reasonedit_core.errors import ConfigError, DataError
from ..reasonedit_core.packing import ImagePack, TextPack
from .losses import flow_matching, next_token
from .types import FM, NTP, Handover, Losses, MicroStep, Models

Pack = TypeVar("Pack", TextPack, ImagePack)


def reasoning_step(models: Models, micro: MicroStep) -> Losses:
    """Next-token prediction over the answers of a text pack. Raises DataError for a pack without answers."""
    text = _text(micro)
    if not text.n_answers:
        raise DataError(f"a reasoning step needs answers to learn from, found none in {_listed(micro)}. Check the mixture.")
    _, ce = _mllm(models)(text)
    return _losses(micro, {NTP: next_token(ce, text)})


def editing_step(models: Models, micro: MicroStep) -> Losses:
    """Flow matching over the targets of a picture pack.

    States come with the pack (cached), else from the frozen MLLM and the text pack of the micro-step, without a graph.
    """
    image, states = _image(micro), None
    if image.states is None:
        with torch.no_grad():
            states, _ = _mllm(models)(_text(micro))
        image = with_quotes(models, image, _text(micro))
    return _losses(micro, {FM: _flow(models, image, states)})


def joint_step(models: Models, micro: MicroStep, two_phase: bool = True) -> Losses:
    """Both losses. A micro-step that holds one stream only, or no answers, gives the losses that it has.

    two_phase: the DiT works on a leaf in place of the MLLM's states, and `losses.backward` carries the gradient over.
    False makes one graph of both, for tests: the same gradients, and both graphs in memory at once.
    """
    sums: dict[str, Tensor] = {}
    states = handover = None
    image = micro.image
    if micro.text is not None:
        states, ce = _mllm(models)(micro.text)
        if micro.text.n_answers:
            sums[NTP] = next_token(ce, micro.text)
    if image is not None:
        if image.states is not None:
            states = None
        elif states is None:
            raise _no_text(micro)
        else:
            image = with_quotes(models, image, _text(micro))
            if two_phase and states.requires_grad:
                handover = Handover(states, states.detach().requires_grad_())
                states = handover.leaf
        sums[FM] = _flow(models, image, states)
    if not sums:
        raise DataError(f"a joint step needs answers or pictures to learn from, found neither in {_listed(micro)}.")
    return _losses(micro, sums, handover)


def with_quotes(models: Models, image: ImagePack, text: TextPack) -> ImagePack:
    """The pack with the input embeddings of its quoted characters (Step1X-Edit v1.2), which documents made without weights
    do not hold. text: the pack whose states condition it."""
    if image.quoted is None or image.quoted_embeds is not None:
        return image
    ids = text.ids[image.text_index[image.quoted]]
    return dataclasses.replace(image, quoted_embeds=_mllm(models).input_embeddings(ids))


def moved(pack: Pack, device: torch.device) -> Pack:
    """The pack with its tensors on `device`."""
    tensors = {f.name: getattr(pack, f.name) for f in dataclasses.fields(pack)}
    there = {name: t.to(device, non_blocking=True) for name, t in tensors.items() if isinstance(t, Tensor)}
    return dataclasses.replace(pack, **there)


def device_of(unit: nn.Module) -> torch.device:
    """Where a unit computes: on the accelerator as soon as one of its weights is there (others may wait on the CPU)."""
    devices = {parameter.device for parameter in unit.parameters()} or {torch.device("cpu")}
    return min(devices, key=lambda device: (device.type == "cpu", str(device)))


def _flow(models: Models, image: ImagePack, states: Tensor | None) -> Tensor:
    if models.dit is None:
        raise ConfigError("this step needs a DiT, and the stage loaded none. Its trainable set and its mixture do not fit.")
    return flow_matching(models.dit(moved(image, device_of(models.dit)), states), image)


def _mllm(models: Models) -> nn.Module:
    if models.mllm is None:
        raise ConfigError("this step needs the MLLM, and the stage loaded none. Load it, or cache its states.")
    return models.mllm


def _text(micro: MicroStep) -> TextPack:
    if micro.text is None:
        raise _no_text(micro)
    return micro.text


def _no_text(micro: MicroStep) -> DataError:
    return DataError(f"expected a text pack or cached states, found neither for {_listed(micro)}. Cache them, or plan both.")


def _image(micro: MicroStep) -> ImagePack:
    if micro.image is None:
        raise DataError(f"an editing step needs a picture pack, found none for {_listed(micro)}. Check the mixture.")
    return micro.image


def _listed(micro: MicroStep) -> str:
    names = [f"record {name!r}" for name in micro.records[:3]]
    return ", ".join(names) + (", ..." if len(micro.records) > 3 else "") or "an empty micro-step"


def _losses(micro: MicroStep, sums: dict[str, Tensor], handover: Handover | None = None) -> Losses:
    """parts: each sum with the count of the micro-step, so that their quotient is what the loss would be alone."""
    parts = {name: (float(total.detach()), float(micro.counts[name])) for name, total in sums.items()}
    return Losses(sums, handover, parts)
