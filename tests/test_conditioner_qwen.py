"""The Qwen-Image conditioner: the prompt out of diffusers' source, the dropped head, several pictures, refusals."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.qwen_image import QwenImageConditioner, QwenTemplate, read_template
from reasonedit.reasonedit_core.errors import BackendUnavailable, CheckpointError, ConfigError

EDIT = QwenTemplate("<|im_start|>user\nlook<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\nok")
PLUS = QwenTemplate("<|im_start|>user\nlook\n{}<|im_end|>\nok", "Number {}: <|vision_start|><|image_pad|><|vision_end|>")


class WordMllm:
    """Splits text as Qwen's tokenizer splits it before merging, and keeps a record of what it is asked.

    The states are the positions 0, 1, 2, ... so that a test sees which of them were handed on.
    """

    def __init__(self):
        self.vocabulary: dict[str, int] = {}
        self.texts: list[str] = []
        self.seen: list[tuple] = []

    def tokenize(self, text):
        self.texts.append(text)
        return [self.vocabulary.setdefault(piece, len(self.vocabulary)) for piece in split(text)]

    def vision(self, image, *, min_pixels, max_pixels, max_side=None):
        self.seen.append((image, min_pixels, max_pixels, max_side))
        return len(self.seen) - 1

    def embed(self, ids, features):
        self.features = list(features)
        return torch.arange(len(ids)).view(1, -1, 1).float()

    def positions(self, ids, features):
        return torch.full((3, 1, len(ids)), 5)

    def states(self, embeds, positions):
        assert (positions == 5).all()  # the conditioner hands explicit positions on
        return embeds


def split(text):
    pieces = []
    for part in re.split(r"(<\|\w+\|>)", text):
        words = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\w]?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+"
        pieces += [part] if part.startswith("<|") else re.findall(words, part)
    return pieces


def picture(value=0.5):
    return torch.full((1, 3, 28, 28), value)


@pytest.mark.parametrize("plus", [False, True])
def test_dropped_head_equals_the_pipelines_constant(plus):
    """Every word of the head is one token of the real vocabulary, so splitting alone counts what diffusers hard-codes."""
    import diffusers

    name = f"pipeline_qwenimage_edit{'_plus' if plus else ''}.py"
    tree = ast.parse((Path(diffusers.__file__).parent / "pipelines" / "qwenimage" / name).read_text(encoding="utf-8"))
    constants = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.prompt_template_encode_start_idx"
    ]
    assert constants == [QwenImageConditioner(WordMllm(), plus=plus).drop]


@pytest.mark.parametrize("plus", [False, True])
def test_template_reads_as_the_pipeline_reads_it(plus):
    import diffusers

    # __init__ with no modules at all: only the attributes that it sets afterwards are of interest here.
    cls = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    stock = cls(**dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")))
    template = read_template(plus=plus)
    assert template.dialogue == stock.prompt_template_encode
    one = template.prompt("turn {it} 'blue'!", 1)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    label = f"Picture 1: {block}" if plus else ""
    assert one == stock.prompt_template_encode.format(label + "turn {it} 'blue'!")
    if plus:
        assert template.prompt("x", 3) == stock.prompt_template_encode.format(
            "".join(f"Picture {n}: {block}" for n in (1, 2, 3)) + "x"
        )


def test_template_is_not_in_the_repository():
    root = Path(__file__).resolve().parent.parent
    sentence = max(read_template(plus=True).head.split("."), key=len).strip()
    rooms = ("reasonedit_core", "nodes", "training", "tests", "workflows")
    texts = [path for room in rooms for path in (root / room).rglob("*.*") if path.suffix in (".py", ".toml", ".json", ".md")]
    assert len(sentence) > 40 and texts
    assert not [path for path in texts if sentence[:40] in path.read_text(encoding="utf-8", errors="ignore")]


def test_changed_diffusers_is_named(tmp_path):
    with pytest.raises(BackendUnavailable, match="pipeline_qwenimage_edit.py cannot be read"):
        read_template(plus=False, folder=tmp_path)
    folder = tmp_path / "pipelines" / "qwenimage"
    folder.mkdir(parents=True)
    for text in ("x = 1\n", "a = '<|im_start|>one {}'\nb = '<|im_start|>two {}'\n", "a = '<|im_start|>no picture {}'\n"):
        (folder / "pipeline_qwenimage_edit.py").write_text(text)
        with pytest.raises(BackendUnavailable, match="expected one prompt in diffusers' pipeline_qwenimage_edit.py"):
            read_template(plus=False, folder=tmp_path)
    (folder / "pipeline_qwenimage_edit_plus.py").write_text("a = '<|im_start|>{}'\n")
    with pytest.raises(BackendUnavailable, match="one prompt and one picture label"):
        read_template(plus=True, folder=tmp_path)
    renamed = "def f():\n    any_name = '<|im_start|>head {}'\n    other = 'P{}<|image_pad|>'\n"
    (folder / "pipeline_qwenimage_edit_plus.py").write_text(renamed)
    assert read_template(plus=True, folder=tmp_path) == QwenTemplate("<|im_start|>head {}", "P{}<|image_pad|>")


def test_edit_places_one_picture_before_the_instruction():
    mllm = WordMllm()
    conditioner = QwenImageConditioner(mllm, plus=False, template=EDIT, min_pixels=100, max_pixels=200)
    made = conditioner.condition(picture(), "make it red", grid=(2, 2))
    assert mllm.texts[-1] == EDIT.dialogue.replace("{}", "make it red")
    assert conditioner.drop == 4  # <|im_start|>, user, line end, look
    assert made.tokens[0, :, 0].tolist() == list(range(4, len(split(mllm.texts[-1]))))
    assert made.mask is None
    assert [bounds for _, *bounds in mllm.seen] == [[100, 200, None]]


def test_plus_numbers_the_pictures_and_keeps_their_order():
    mllm = WordMllm()
    conditioner = QwenImageConditioner(mllm, plus=True, template=PLUS)
    pictures = [picture(value) for value in (0.1, 0.2, 0.3)]
    conditioner.condition(pictures[0], "mix", grid=(2, 2), references=pictures[1:], released=True)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    labels = "".join(f"Number {n}: {block}" for n in (1, 2, 3))
    assert mllm.texts[-1] == f"<|im_start|>user\nlook\n{labels}mix<|im_end|>\nok"
    assert [image is expected for (image, *_), expected in zip(mllm.seen, pictures, strict=True)] == [True] * 3
    assert mllm.features == [0, 1, 2]


def test_braces_in_the_instruction_are_text():
    mllm = WordMllm()
    QwenImageConditioner(mllm, plus=True, template=PLUS).condition(picture(), "draw {} and {0}", grid=(2, 2))
    assert "draw {} and {0}" in mllm.texts[-1]


def test_stated_number_of_dropped_tokens_wins():
    mllm = WordMllm()
    conditioner = QwenImageConditioner(mllm, plus=False, template=EDIT, drop=2)
    assert conditioner.condition(picture(), "x", grid=(2, 2)).tokens[0, 0, 0] == 2


def test_refusals():
    edit = QwenImageConditioner(WordMllm(), plus=False, template=EDIT)
    with pytest.raises(ConfigError, match="expected one picture, found 2.*EditPlus"):
        edit.condition(picture(), "x", grid=(2, 2), references=[picture()])
    with pytest.raises(ConfigError, match=r"control token <\|image_pad\|>"):
        edit.condition(picture(), "add <|image_pad|>", grid=(2, 2))
    joining = QwenTemplate("<|im_start|>user loo{}<|im_end|>", PLUS.picture)
    plus = QwenImageConditioner(WordMllm(), plus=True, template=joining)
    with pytest.raises(CheckpointError, match="dropped_tokens"):
        plus.condition(picture(), "x", grid=(2, 2))
    QwenImageConditioner(WordMllm(), plus=True, template=joining, drop=3).condition(picture(), "x", grid=(2, 2))
