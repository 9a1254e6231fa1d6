"""Makes tests/golden/loop_rounds.safetensors and loop_edits.safetensors with the released Step1X-Edit v1.2 pipeline.

    PYTHONPATH=<released diffusers fork>/src python tests/peer/golden_loop.py [FOLDER]

FOLDER: where the files go instead of tests/golden.

The cases stand here, because the tests run the same ones through `reasonedit edit`. All words are our own: the scripted
replies, the instructions, and the conditioning prefix, which replaces the released one for the time of the run. Importing this
file needs neither the released code nor its environment.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401 - registers the checkout as `reasonedit`

from reasonedit.reasonedit_core import images  # noqa: E402
from reasonedit.tests.peer import cases  # noqa: E402

ROUNDS, EDITS = TESTS / "golden" / "loop_rounds.safetensors", TESTS / "golden" / "loop_edits.safetensors"
SYSTEM, STD = cases.SYSTEMS["v1.2"], cases.STD
# Chains of edits use weaker weights: those of `cases.STD` blow one pixel that rounds to the other side up a hundredfold per
# round (measured), these fourfold, and other words still move the picture by 4.5 of 255 on average (0.8 without guidance).
STD_CHAINED = 0.1
PREFIX, DROPPED = cases.PREFIX["v1.2"], 90
PHOTO, PHOTO_STRIDE = (640, 427), 7


@dataclass(frozen=True, slots=True)
class Loop:
    """One run of the loop. size: (width, height) of the source; replies: raw texts by task, in order; std: of the weights."""

    instruction: str
    replies: dict[str, list[str]] = field(repr=False)
    size: tuple[int, int] = (97, 61)
    level: int = 64
    steps: int = 2
    guidance: float = 6.0
    seed: int = 0
    think: bool = False
    reflect: bool = True
    rounds: int = 3
    std: float = STD_CHAINED


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit without a reasoner. size: (width, height) of the source; PHOTO is a photograph."""

    instruction: str
    size: tuple[int, int] = (97, 61)
    guidance: float = 6.0
    level: int = 96
    steps: int = 3
    seed: int = 0


def score(raw: float = 7.0, meets: str = "partial", major: int = 0, omissions: int = 0, reason: str = "half of it") -> str:
    """A reply to `score`."""
    values = {"meets_instruction": meets, "major_conflicts": major, "minor_conflicts": 1, "omissions": omissions}
    return json.dumps({**values, "raw_score": raw, "reason": reason})


def pair(*marks: float) -> str:
    """A reply to `edit_score` or `quality_score`."""
    return json.dumps({"score": list(marks), "reasoning": "so it looks"})


def refine(instruction: str) -> str:
    """A reply to `reflect`."""
    return f"<#Think> One thing is missing.\n<#Reflection> {instruction}\n"


FAILED = "<#Think> The whole scene is another one.\n<#Failed>"
SUCCESS = "<#Think> All that was asked for is there.\n<#Success>"
OTHERS = "<#Think> There is nothing to change here.\n<#Others>"


def replies(reflect: list[str], edit: list[str], quality: list[str], **more: list[str]) -> dict[str, list[str]]:
    """A script with one description, and a consistency score for every round."""
    return {
        "describe": ["A red cube stands on a table.\n"],
        "score": [score() for _ in edit],
        "reflect": reflect,
        "edit_score": edit,
        "quality_score": quality,
    } | more


LOOPS: dict[str, Loop] = {
    "refine_refine_success": Loop(
        "make the cube red",
        replies(
            [refine("give the cube a darker red"), refine('write "Hi!" on the cube\nand keep its edges'), SUCCESS],
            [pair(5, 6), pair(6, 7), pair(8, 9)],
            [pair(6, 6), pair(6, 8), pair(8, 7)],
            # a fence and a blank around it, a cap, a score on the scale from 0 to 1
            score=[score(9.5, "partial"), f"```json\n{score(6.25, 'no', major=1)}\n```", score(0.93, "yes", reason="done")],
        ),
        steps=3,
        level=96,
    ),
    "failed_restart": Loop(
        "turn the sky into a “night sky”!",
        replies([FAILED, SUCCESS], [pair(3, 4), pair(7, 7)], [pair(5, 5), pair(8, 8)]),
        size=(50, 131),
        std=STD,
    ),
    "refine_failed_restart": Loop(
        "add a small boat",
        replies(
            [refine("paint the boat white"), FAILED, FAILED],
            [pair(5, 5), pair(4, 4), pair(2, 9)],
            [pair(5, 5), pair(4, 4), pair(9, 9)],  # products of the minima: 25, 16, 18
        ),
    ),
    "success_at_once": Loop(
        "take the lamp away",
        replies([SUCCESS], [pair(9, 8)], [pair(7, 7)]),
        size=(64, 64),
        guidance=1.0,
        seed=7,
        std=STD,
    ),
    "others": Loop("do nothing at all", replies([OTHERS], [pair(9, 9)], [pair(9, 9)]), size=(50, 37)),
    "later_of_equals": Loop(
        "make it snow",
        replies(
            [refine("more snow on the roof"), refine("more snow on the ground"), refine("a little less snow")],
            [pair(6, 9), pair(4, 8), pair(7, 9)],
            [pair(8, 7), pair(7, 9), pair(6, 6)],  # products of the minima: 42, 28, 42
        ),
        guidance=1.0,
    ),
    "success_wins_tie": Loop(
        "paint the door green",
        replies([refine("a lighter green"), SUCCESS], [pair(6, 6), pair(4, 9)], [pair(4, 8), pair(6, 6)]),
        size=(131, 50),
    ),
    "success_loses": Loop(
        "remove the hat",
        replies(
            [refine("fill the gap with hair"), refine("smooth the hair"), SUCCESS],
            [pair(7, 6), pair(7, 6), pair(7, 6)],
            [pair(8, 8), pair(7, 8), pair(6, 8)],  # 48, 42, 36
        ),
    ),
    "thinking": Loop(
        "what will it look like after the rain?",
        replies(
            [refine("add “puddles”, three of them"), FAILED, SUCCESS],
            [pair(5, 5), pair(2, 2), pair(6, 8)],
            [pair(5, 5), pair(2, 2), pair(7, 7)],
            think=["  Make the street wet and the sky grey.\n"],
        ),
        think=True,
        seed=3,
    ),
    "thinking_chinese": Loop(
        "把它变成雨后的样子！",
        replies([SUCCESS], [pair(5, 5)], [pair(5, 5)], think=["把街道变湿，并在招牌上写“营业中”！"]),
        size=(61, 97),
        think=True,
        rounds=2,
        std=STD,
    ),
    "thinking_alone": Loop(
        "what was it before?", {"think": ["Make the wall whole again."]}, (64, 64), think=True, reflect=False
    ),
    "unreadable_then_good": Loop(
        "give the dog a collar",
        replies(
            ["<#Think> good <#Success> or <#Failed>?", "The collar is there.", refine("make the collar blue"), SUCCESS],
            ["```json\n{}\n```", pair(4, 5), "seven", '{"score": 7, "reasoning": "one number"}', pair(5, 6)],
            ["9", pair(5, 4), pair(6, 5)],
            score=["It fits well.", '{"raw_score": 4, ', score(4.0), score(5.5, "yes", omissions=1)],
        ),
    ),
    "junk_before_think": Loop(
        "open the window",
        replies([f"Here you are:\n{refine('open it wider')}", FAILED], [pair(5, 5), pair(1, 0)], [pair(5, 5), pair(9, 9)]),
        rounds=2,
    ),
    "one_round": Loop(
        "make the apple yellow",
        replies([refine("a brighter yellow")], [pair(1, 0)], [pair(0, 3)]),
        size=(37, 50),
        rounds=1,
        seed=2**40 + 1,
        std=STD,
    ),
}

SINGLE: dict[str, Edit] = {
    "plain": Edit("make the cube red"),
    "plain_unguided": Edit("make the cube red", guidance=1.0, seed=1),
    "straight": Edit('write "Open 24h" on the sign, and "closed" below', level=80),
    "curly": Edit("write “Grüße” on the “old” sign", (61, 97), level=80),
    "unclosed": Edit('add "no end, and “quotes” inside', (50, 37), level=64),
    "bang": Edit("Stop! Now ! or never!", (50, 37)),
    "bang_unguided": Edit("Stop! Now ! or never!", (50, 37), guidance=0.5),
    "chinese": Edit("把招牌上的字改成“营业中”，不要动别的！", (33, 250), level=96),
    "apostrophe": Edit("paint the girl's hat, don't touch 'this'", (50, 37), guidance=2.5),
    "photo": Edit('give the cat a red collar that says "Chelsea!"', PHOTO, level=128, steps=2),
    "photo_unguided": Edit("把这只猫变成黑色", PHOTO, guidance=1.0, level=96, steps=2),
}


def source(size: tuple[int, int]) -> Image.Image:
    """The picture of a case. PHOTO is scikit-image's cat, at another size than its own."""
    if size != PHOTO:
        return images.to_pil(cases.picture(size))
    from skimage import data

    return Image.fromarray(data.chelsea()).resize(size, Image.Resampling.BICUBIC)


def released_arguments(case: Loop | Edit) -> dict[str, Any]:
    """A case as the arguments of released.run_loop or released.run_edit."""
    return {key: value for key, value in asdict(case).items() if key not in ("size", "std")}


def stored(name: str, picture: torch.Tensor) -> torch.Tensor:
    """What of a picture uint8 (H, W, 3) is kept: of the photograph every PHOTO_STRIDEth pixel of a row and of a column."""
    return (picture[::PHOTO_STRIDE, ::PHOTO_STRIDE] if SINGLE[name].size == PHOTO else picture).contiguous()


@torch.no_grad()
def main() -> None:
    """Run every case and write the files."""
    import released

    from reasonedit.tests.tiny import tiny_checkpoint

    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS.parent
    folder.mkdir(parents=True, exist_ok=True)
    pipes = {std: released.load(tiny_checkpoint(SYSTEM, std=std), prefix=PREFIX, dropped=DROPPED) for std in (STD, STD_CHAINED)}
    pictures, records = {}, {}
    for name, case in LOOPS.items():
        record = released.run_loop(pipes[case.std], source(case.size), **released_arguments(case))
        records[name] = record.as_json()
        pictures |= {f"{name}/{i}": released.to_tensor(made) for i, made in enumerate(record.pictures)}
        sys.stdout.write(f"{name}: {records[name]}\n")
    save_file(pictures, folder / ROUNDS.name, metadata={"records": json.dumps(records, ensure_ascii=False)})
    edits = {}
    for name, case in SINGLE.items():
        made = released.run_edit(pipes[STD], source(case.size), **released_arguments(case))
        edits[name] = stored(name, released.to_tensor(made))
    save_file(edits, folder / EDITS.name)
    for path in (folder / ROUNDS.name, folder / EDITS.name):
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
