"""Inputs that several nodes share, in the same words and with the same limits."""

from __future__ import annotations

from typing import Any

from ..reasonedit_core.loop import POLICIES
from .host import EditedSocket, io

MAX_SEED = 2**64 - 1


def seed_input(tooltip: str) -> io.Int.Input:
    """A seed that the frontend can step after each run."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def policy_input() -> io.Combo.Input:
    """Which of the two policies a node follows."""
    return io.Combo.Input(
        "policy",
        list(POLICIES),
        default="reasonedit",
        tooltip="reasonedit is ours; released repeats what the released Step1X-Edit v1p2 code does. Use one in a whole graph.",
    )


def scores_input() -> io.Combo.Input:
    """When edit and quality scores are asked for."""
    return io.Combo.Input(
        "scores",
        ["always", "lazy"],
        default="always",
        optional=True,
        tooltip="lazy: the scores that only compare rounds are not asked for where nothing is compared, as when the first "
        "round is accepted. The pictures are the same. The released policy always asks.",
    )


def generation_inputs() -> list[Any]:
    """How a picture is generated: steps, guidance, size, negative. 0 and the empty text stand for the checkpoint's own."""
    return [
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Denoising steps. 0: the checkpoint's own number."),
        io.Float.Input(
            "guidance",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How strongly to follow the instruction. 0: the checkpoint's own; up to 1: no second pass, twice as fast.",
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=8192,
            step=16,
            tooltip="Side of the square whose area is generated (1024: one megapixel). 0: the checkpoint's own. The result is "
            "brought back to the picture's size.",
        ),
        io.String.Input("negative", default="", multiline=True, tooltip="What to stay away from. Empty: the system's own."),
    ]


def previous_input() -> Any:
    """What an earlier edit made, for an edit that goes on from it."""
    return EditedSocket.Input(
        "previous",
        optional=True,
        tooltip="The output `edited` of the Edit that made this picture (inside a loop: Loop Open's). Its latents are used "
        "again, so that a chain of edits loses nothing to resizes and the VAE.",
    )


REGIONS = ("off", "auto", "mask")


def region_inputs() -> list[Any]:
    """Where to denoise: everywhere, where the edit turns out to be, or where a mask says."""
    return [
        io.Combo.Input(
            "region",
            list(REGIONS),
            default="off",
            optional=True,
            tooltip="Faster, not exact: after some full steps only the part that is edited goes on. auto: found from the "
            "picture; mask: what the mask marks; off: everything.",
        ),
        io.Mask.Input(
            "region_mask",
            optional=True,
            tooltip="With region = mask: where the picture shall change, over the picture to edit. One for all or one for "
            "each.",
        ),
    ]


def shortcut_inputs() -> list[Any]:
    """Where guidance acts, and which steps are computed: all of them, unless the user asks for less."""
    bounds = {"min": 0.0, "max": 1.0, "step": 0.01, "optional": True}
    return [
        io.Float.Input(
            "guidance_low",
            default=0.0,
            tooltip="Faster, not exact: guidance only at timesteps from guidance_low to guidance_high, where 1 is noise and 0 "
            "the finished picture; one pass elsewhere. 0 and 1: everywhere.",
            **bounds,
        ),
        io.Float.Input("guidance_high", default=1.0, tooltip="The upper end of it. 0 and 1: guidance everywhere.", **bounds),
        io.Int.Input(
            "step_cache",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Faster, not exact: after four steps only one of so many is computed, the others are extrapolated. 0: all "
            "are computed. Not together with a region.",
        ),
    ]


def no_text(name: str, value: Any, expected: str, remedy: str) -> bool | str:
    """The answer of `validate_inputs` for a text: a sentence when it is empty. A linked text is not known yet (None)."""
    if isinstance(value, str) and not value.strip():
        return f"{name}: expected {expected}, found an empty text. {remedy}"
    return True
