"""Importing the released prompts from a user's own copy of the released code, by reading its syntax tree.

The wording belongs to that code and is never part of this project; weights that were trained with it are best driven with
it. The code is parsed, never run: literals, implicit concatenation, f-strings, `+`, `.replace`, `.join` and `.format` over
literals and the function's own simple assignments are enough. What is known of it are names: which method builds which
question, which variable stands for which value (the tables below, from reasonedit_s.md b4).
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files import write_whole
from .pack import TASKS, ConditioningPrompt, Pack, Part, Slot, TaskPrompt, Template, joined
from .packfile import format_pack, parse_pack
from .source import SourceFile, read_source

RELEASED_URLS = {
    "step1x-v1p2": "https://raw.githubusercontent.com/Peyton-Chen/diffusers/step1xedit_v1p2",
    "step1x-v1p1": "https://raw.githubusercontent.com/Peyton-Chen/diffusers/step1xedit_v1p2",
    "step1x-v1p0": "https://raw.githubusercontent.com/stepfun-ai/Step1X-Edit/main",
}
"""Where the released code of each variant is published: what `reasonedit download` imports from."""

# task of the pack -> (method that builds its messages, token budget that its caller asks for)
_BUILDERS = {
    "think": ("build_reformt_prompt", 512),
    "describe": ("build_descriptions_messages", 768),
    "score": ("_build_scoring_messages", 1024),
    "reflect_paired": ("_build_reflection_messages", 768),
    "edit_score_paired": ("_build_score1_messages", 768),
    "quality_score": ("_build_score2_messages", 768),
}
_SLOTS = {
    "original_instruction": "instruction",
    "instruction": "instruction",
    "instruction_cn": "instruction",
    "language_type": "language",
    "description": "target",
    "prior_score": "score",
    "prior_reason": "reason",
}
_IMAGES = {
    "source_image_data_url": "source",
    "src_img_data_url": "source",
    "tgt_img_data_url": "result",
    "img_data_url": "result",
}
# section of the pack -> (name of the prefix, leading tokens that the trained system drops when the source does not say)
_PREFIXES = {
    "step1x-v1p2": (("EDIT_PREFIX",), 90),
    "step1x-v1p1": (("QWEN25VL_PREFIX", "Qwen25VL_7b_PREFIX"), 217),
}
_LANGUAGE_FUNCTION = "analyze_text"
_TEMPERATURE, _TOP_P = 0.7, 0.9


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What was imported. text: the pack as TOML; found, missing: entries of the pack, missing ones with the reason."""

    text: str
    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def pack(self) -> Pack:
        """The pack itself."""
        return parse_pack(self.text, "imported pack")

    def write(self, path: str | Path) -> Path:
        """Write the pack, whole or not at all."""
        return write_whole(path, self.text.encode())


def import_released(source: str | Path, *, timeout: float = 30.0) -> ImportResult:
    """Read the released prompts from SOURCE (see `source.read_source`) and make a pack of them.

    Raises ConfigError when no prompt at all is found; what is missing beside others is named in the result.
    """
    sources = read_source(source, timeout=timeout)
    trees = [_parsed(file) for file in sources]
    tasks, missing = {}, []
    languages = _language_names(trees)
    if languages is None:
        missing.append(f"languages ({_LANGUAGE_FUNCTION} with two names was not found; plain names are used)")
    for name, (builder, budget) in _BUILDERS.items():
        try:
            tasks[name] = _task(name, _builder(trees, builder), budget)
        except _NotUnderstood as error:
            missing.append(f"task.{name} ({error})")
    conditioning = {}
    for key, (names, dropped) in _PREFIXES.items():
        try:
            conditioning[key] = _conditioning(trees, names, dropped)
        except _NotUnderstood as error:
            missing.append(f"conditioning.{key} ({error})")
    if not tasks and not conditioning:
        read = ", ".join(file.name for file in sources)
        raise ConfigError(
            f"{source}: expected the prompts of the released Step1X-Edit code, found none in {read}: {'; '.join(missing)}. "
            "Give a checkout of the branch that holds the v1.2 pipeline."
        )
    pack = Pack(
        name="released",
        language="any",
        version=1,
        tasks=tasks,
        conditioning=conditioning,
        languages=languages or {"en": "English", "zh": "Chinese"},
        imported=True,
        sources=tuple((file.name, hashlib.sha256(file.text.encode()).hexdigest()) for file in sources),
        path="imported pack",
    )
    text = format_pack(pack, _COMMENT)
    if parse_pack(text, pack.path) != pack:
        raise ConfigError(f"{source}: expected to read back the pack that was written, found another. Please report this.")
    found = (*(["languages"] if languages else []), *(f"task.{n}" for n in tasks), *(f"conditioning.{n}" for n in conditioning))
    return ImportResult(text, found, tuple(missing))


_COMMENT = (
    "Written by `reasonedit dialogue import`. The wording was read from the released code named at the end and is subject to",
    "that code's licence. Sampling and budgets are what the released code asks for.",
)


class _NotUnderstood(Exception):
    """A piece of the source is absent or of a shape that is not known; the message says which."""


def _parsed(file: SourceFile) -> ast.Module:
    try:
        return ast.parse(file.text, file.name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{file.name}: expected Python source, found a fault: {error}. Fetch the file again.") from error


# ---- finding things ------------------------------------------------------------------------------------------------------


def _builder(trees: list[ast.Module], name: str) -> ast.FunctionDef:
    """The method of that name; of several classes, the one whose name ends in _EN (the class that the release uses)."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    candidates = [(cls, f) for cls in classes for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == name]
    if not candidates:
        raise _NotUnderstood(f"no method {name}")
    return max(candidates, key=lambda pair: pair[0].name.endswith("_EN"))[1]


def _language_names(trees: list[ast.Module]) -> dict[str, str] | None:
    """The two names that the language function answers with: Chinese in its `if`, the other one after it."""
    for tree in trees:
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name == _LANGUAGE_FUNCTION:
                names = [_literal(node.value) for node in ast.walk(function) if isinstance(node, ast.Return)]
                inside = {
                    _literal(node.value)
                    for branch in ast.walk(function)
                    if isinstance(branch, ast.If)
                    for statement in branch.body
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Return)
                }
                zh = [name for name in names if name in inside]
                en = [name for name in names if name not in inside] or zh[1:]
                if zh and en and zh[0] and en[0]:
                    return {"en": en[0], "zh": zh[0]}
    return None


def _conditioning(trees: list[ast.Module], names: tuple[str, ...], dropped: int) -> ConditioningPrompt:
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(_name(target) in names for target in node.targets):
                # `self.X = NAME` only passes a prefix of another version on; the literal is the one that counts.
                if (prefix := _literal(node.value)) is not None:
                    return ConditioningPrompt(prefix, _dropped(tree) or dropped, _text_to_image_negative(tree))
    raise _NotUnderstood(f"no text called {' or '.join(names)}")


def _dropped(tree: ast.Module) -> int | None:
    """Leading tokens that the file drops: a stated length, or the one number at which sequences are cut (`x[0, 217:]`)."""
    stated = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and type(node.value.value) is int
        for target in node.targets
        if _name(target).endswith("PREFIX_LEN")
    }
    cuts = {
        part.lower.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
        for part in node.slice.elts
        if isinstance(part, ast.Slice) and part.upper is None and isinstance(part.lower, ast.Constant)
        if type(part.lower.value) is int and part.lower.value > 9  # smaller ones are steps of other arithmetic
    }
    numbers = stated or cuts
    return numbers.pop() if len(numbers) == 1 else None


def _text_to_image_negative(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp) and _name(node.targets[0]) == "negative_prompt":
            return _literal(node.value.orelse)
    return None


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _literal(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


# ---- reading a builder ---------------------------------------------------------------------------------------------------


def _task(name: str, function: ast.FunctionDef, budget: int) -> TaskPrompt:
    """The prompt whose messages `function` returns: a list of a system and a user message."""
    texts: dict[str, Template | _NotUnderstood] = {}
    for statement in function.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and _name(statement.targets[0]):
            try:
                texts[_name(statement.targets[0])] = _text(statement.value, texts)
            except _NotUnderstood as error:
                # Perhaps no text at all: it only matters if a message uses it.
                texts[_name(statement.targets[0])] = error
        if isinstance(statement, ast.Return):
            messages = {_literal(_entry(item, "role")): _entry(item, "content") for item in _elements(statement.value)}
            if not {"system", "user"} <= messages.keys():
                raise _NotUnderstood(f"{function.name} returns no system and user message")
            parts = tuple(_part(item, texts) for item in _elements(messages["user"]))
            images = tuple(part.image for part in parts if part.image)
            if sorted(images) != sorted(TASKS[name].images):
                raise _NotUnderstood(f"{function.name} shows the pictures {list(images)}")
            return TaskPrompt(_text(messages["system"], texts), parts, TASKS[name].form, budget, _TEMPERATURE, _TOP_P)
    raise _NotUnderstood(f"{function.name} returns nothing")


def _elements(node: ast.AST | None) -> list[ast.expr]:
    if not isinstance(node, ast.List):
        raise _NotUnderstood(f"line {getattr(node, 'lineno', '?')}: expected a list of messages or parts")
    return node.elts


def _entry(node: ast.AST, key: str) -> ast.expr:
    if isinstance(node, ast.Dict):
        for name, value in zip(node.keys, node.values, strict=True):
            if _literal(name) == key:
                return value
    raise _NotUnderstood(f"line {getattr(node, 'lineno', '?')}: expected a dictionary with {key!r}")


def _part(node: ast.expr, texts: dict[str, Template | _NotUnderstood]) -> Part:
    kind = _literal(_entry(node, "type"))
    if kind == "text":
        return Part(text=_text(_entry(node, "text"), texts))
    if kind == "image_url":
        variable = _name(_entry(_entry(node, "image_url"), "url"))
        if variable in _IMAGES:
            return Part(image=_IMAGES[variable])
        raise _NotUnderstood(f"line {node.lineno}: the picture {variable!r} is not known")
    raise _NotUnderstood(f"line {node.lineno}: the part {kind!r} is not known")


def _text(node: ast.expr, texts: dict[str, Template | _NotUnderstood]) -> Template:
    """The template that an expression makes, given the local texts."""
    if (literal := _literal(node)) is not None:
        return joined([literal])
    if isinstance(node, ast.Name):
        value = texts.get(node.id)
        if isinstance(value, tuple):
            return value
        if value is None and node.id in _SLOTS:
            return (Slot(_SLOTS[node.id]),)
        raise value or _NotUnderstood(f"line {node.lineno}: the name {node.id!r} is not known")
    if isinstance(node, ast.JoinedStr):
        return joined([piece for value in node.values for piece in _text(value, texts)])
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        return _text(node.value, texts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return joined([*_text(node.left, texts), *_text(node.right, texts)])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        return _method(node, texts)
    if isinstance(node, ast.Call) and _name(node.func) == _LANGUAGE_FUNCTION:
        return (Slot("language"),)
    raise _NotUnderstood(f"line {node.lineno}: {type(node).__name__} in a text is not known")


def _method(node: ast.Call, texts: dict[str, Template | _NotUnderstood]) -> Template:
    """`template.replace(literal, text)`, `literal.join([...])`, `template.format(text, ...)` with plain braces."""
    base, method = _text(node.func.value, texts), node.func.attr
    if method == "replace" and len(node.args) == 2 and (old := _literal(node.args[0])):
        return _replaced(base, old, _text(node.args[1], texts))
    if method == "join" and len(node.args) == 1 and isinstance(node.args[0], ast.List | ast.Tuple):
        pieces: list[str | Slot] = []
        for index, element in enumerate(node.args[0].elts):
            pieces += [*(base if index else ()), *_text(element, texts)]
        return joined(pieces)
    if method == "format" and all(isinstance(piece, str) for piece in base):
        fields = "".join(base).split("{}")
        if len(fields) == len(node.args) + 1 and not any(brace in field for field in fields for brace in "{}"):
            pieces = [fields[0]]
            for field, argument in zip(fields[1:], node.args, strict=True):
                pieces += [*_text(argument, texts), field]
            return joined(pieces)
    raise _NotUnderstood(f"line {node.lineno}: .{method}() in a text is not known")


def _replaced(base: Template, old: str, new: Template) -> Template:
    pieces: list[str | Slot] = []
    for piece in base:
        if isinstance(piece, Slot):
            pieces.append(piece)
            continue
        for index, text in enumerate(piece.split(old)):
            pieces += [*(new if index else ()), text]
    return joined(pieces)
