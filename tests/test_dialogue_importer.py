"""The importer reads prompts out of source of the released shape. The source here is of our own wording; the released one is
compared where it is at hand (REASONEDIT_PEER_SRC)."""

from __future__ import annotations

import ast
import os
import re
import textwrap
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.importer import _BUILDERS, _builder, _task, import_released
from reasonedit.reasonedit_core.dialogue.pack import Slot, language_of
from reasonedit.reasonedit_core.dialogue.prompts import find_pack, load_pack, render
from reasonedit.reasonedit_core.dialogue.source import raw_url, read_source
from reasonedit.reasonedit_core.errors import ConfigError

# The code shapes of the released thinker: a class that is not used, `analyze_text`, implicit concatenation, f-strings with
# braces, local names, `.replace("<instruction>", ...)`, joined parts, text before or after the pictures.
THINKER = '''
"""A stand-in."""
import not_installed

def analyze_text(prompts):
    if isinstance(prompts, str):
        prompts = [prompts]
    count = sum(len(re.findall("[\\u4e00-\\u9fff]", text)) for text in prompts)
    if count > 1:
        return "tongue-zh"
    else:
        return "tongue-en"

class ImageEditEvaluator:
    def build_reformt_prompt(self, source_image_data_url, original_instruction):
        return [{"role": "system", "content": "WRONG CLASS"}, {"role": "user", "content": []}]

class ImageEditEvaluator_EN:
    def build_reformt_prompt(self, source_image_data_url: str, original_instruction: str) -> list:
        language_type = analyze_text(original_instruction)
        system_prompt = (
            "Sys one. "
            "Sys two \\u0020{braces}."
        )
        user_text = f\'\'\'Ask for: "{original_instruction}"
  indented, trailing blank \\

{{"json": [1]}} in {language_type}. \\\\ \\t tab
end {original_instruction}:\'\'\'  # noqa

        return [
            {"role": "system", "content": system_prompt},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": source_image_data_url}},
                    {"type": "text", "text": user_text},
                ],
            },
        ]

    def build_descriptions_messages(self, source_image_data_url, instruction_cn, language_type=None):
        # system_prompt = ("not this")
        language_type = analyze_text(instruction_cn)
        system_prompt = (
            "Say it "
            f"in {language_type} now. "
        )
        user_text = (
            f"A {language_type} text:\\n"
            "1. **rule** “curly”\\n\\n"
            f"Order: {instruction_cn}\\n"
        )
        return [
            {"role": "system", "content": system_prompt},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": source_image_data_url}},
                {"type": "text", "text": user_text},
            ]},
        ]

    def _build_scoring_messages(self, img_data_url, description, instruction):
        sys_prompt = "Judge."
        language_type = analyze_text(instruction)
        user_prompt = f"""Compare. {language_type}
            [I]
            {instruction}
            [D]
            {description}
            """
        return [
            {"role": "system", "content": sys_prompt},
            {"role": "user", "content": [
                {"type": "text", "text": user_prompt},
                {"type": "image_url", "image_url": {"url": img_data_url}},
            ]},
        ]

    def _build_reflection_messages(self, src_img_data_url, tgt_img_data_url, instruction_cn, prior_score, prior_reason):
        prior_text = f"""Two. {instruction_cn} <#Think> ...
        {prior_score} / {prior_reason}."""
        sys = "Be strict."
        return [
            {"role": "system", "content": sys},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": src_img_data_url}},
                {"type": "image_url", "image_url": {"url": tgt_img_data_url}},
                {"type": "text", "text": prior_text},
            ]},
        ]

    def _build_score1_messages(self, src_img_data_url, tgt_img_data_url, instruction_cn):

        PROMPT_PART_1 = """Part one {
        "score" : [...]
        }"""
        PROMPT_PART_2_RULES = "Part two"
        PROMPT_PART_3_SCALE = """Scale.
        Wanted: <instruction>
        again <instruction>"""
        final_prompt_part_3 = PROMPT_PART_3_SCALE.replace("<instruction>", instruction_cn)
        user_text = f"{PROMPT_PART_1}\\n\\n{PROMPT_PART_2_RULES}\\n\\n{final_prompt_part_3}"
        sys = "Critic."
        return [
            {"role": "system", "content": sys},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": src_img_data_url}},
                {"type": "image_url", "image_url": {"url": tgt_img_data_url}},
                {"type": "text", "text": user_text},
            ]},
        ]

    def _build_score2_messages(self, tgt_img_data_url, instruction_cn):
        PROMPT_PART_1_FORMAT = "One"
        user_text = "\\n\\n".join([PROMPT_PART_1_FORMAT, "Two" + "!"])
        sys = "Artist."
        return [
            {"role": "system", "content": sys},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": tgt_img_data_url}},
                {"type": "text", "text": user_text},
            ]},
        ]
'''.replace("trailing blank \\\n", "trailing blank   \n")

V1P2 = '''
EDIT_PREFIX = """Before and\\u0020
after. Do this:"""  # noqa: E501

class Pipe:
    def __init__(self):
        self.QWEN25VL_PREFIX = EDIT_PREFIX
        self.QWEN25VL_PREFIX_LEN = 77

    def __call__(self, image, negative_prompt=None):
        negative_prompt = "" if image is not None else "ugly things"
        x = emb[0, self.QWEN25VL_PREFIX_LEN:][: self.max_token_length]
'''
V1P1 = """
class Pipe:
    def __init__(self):
        self.QWEN25VL_PREFIX = '''Improve:
"it" \\n
now:'''

    def encode(self, emb):
        return min(640, emb.shape[1] - 217), emb[0, 211:][:640], emb[0, 1:]
"""
V1P0 = """
Qwen25VL_7b_PREFIX = '''Old prefix:'''
"""
FOLDER = "src/diffusers/pipelines/step1x_edit"


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for name, text in {
        f"{FOLDER}/pipeline_step1x_edit_thinker.py": THINKER,
        f"{FOLDER}/pipeline_step1x_edit_v1p2.py": V1P2,
        f"{FOLDER}/pipeline_step1x_edit.py": V1P1,
        f"{FOLDER}/__init__.py": "",
        "scripts/convert.py": "print('never run')",
        "README.md": "read me",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def released_messages(source: str, instruction: str) -> dict[str, list]:
    """What the builders of `source` themselves return: their functions are cut out and run."""
    tree = ast.parse(source)
    wanted = {builder for builder, _ in _BUILDERS.values()}
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("_EN"))
    cls.body = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    tree.body = [node for node in tree.body if node is cls or isinstance(node, ast.FunctionDef) and node.name == "analyze_text"]
    names: dict = {"re": re, "Any": object}
    exec(compile(tree, "released", "exec"), names)  # noqa: S102 - the comparison is with what this code does
    made = names[cls.name]()
    src, res = "SOURCE", "RESULT"
    return {
        "think": made.build_reformt_prompt(src, instruction),
        "describe": made.build_descriptions_messages(src, instruction),
        "score": made._build_scoring_messages(res, TARGET, instruction),
        "reflect_paired": made._build_reflection_messages(src, res, instruction, SCORE, REASON),
        "edit_score_paired": made._build_score1_messages(src, res, instruction),
        "quality_score": made._build_score2_messages(res, instruction),
    }


TARGET, SCORE, REASON = "A {red} kite. <instruction>", 8.99, 'because "of" {this}'
INSTRUCTIONS = [
    "make the kite red",
    "it's \"A {b}\" and '{c}' {{d}} {instruction} {language}",
    "replace <instruction> with {target}",
    "把天空变成“蓝色”",
    "红 kite",
    "a\\n\\ b\ttab\nline",
]


def assert_parity(source: str, pack) -> None:
    for instruction in INSTRUCTIONS:
        for task, messages in released_messages(source, instruction).items():
            values = {"instruction": instruction, "target": TARGET, "score": SCORE, "reason": REASON, "original": "unused"}
            query = render(pack, task, language_of(instruction), {"source": "SOURCE", "result": "RESULT"}, values)
            system, user = messages
            assert query.system == system["content"], task
            parts = [query.images[part] if isinstance(part, int) else part for part in query.parts]
            assert parts == [
                item["text"] if item["type"] == "text" else item["image_url"]["url"] for item in user["content"]
            ], task


def test_every_question_is_read_character_by_character(checkout):
    result = import_released(checkout)
    assert result.missing == ()
    assert len(result.found) == 1 + 6 + 2
    assert_parity(THINKER, result.pack)
    assert result.pack.languages == {"en": "tongue-en", "zh": "tongue-zh"}
    assert "tongue-zh" in render(result.pack, "describe", "zh", {"source": 0, "result": 1}, {"instruction": "x"}).system


def test_what_comes_with_the_wording(checkout):
    pack = import_released(checkout).pack
    v12, v11 = pack.conditioning_for("v1p2"), pack.conditioning_for("v1p1")
    assert (v12.prefix, v12.dropped_tokens, v12.text_to_image_negative) == ("Before and \nafter. Do this:", 77, "ugly things")
    assert (v11.prefix, v11.dropped_tokens) == ('Improve:\n"it" \n\nnow:', 211)
    budgets = {name: prompt.max_new_tokens for name, prompt in pack.tasks.items()}
    assert (budgets["think"], budgets["describe"], budgets["score"], budgets["reflect_paired"]) == (512, 768, 1024, 768)
    assert {(prompt.temperature, prompt.top_p) for prompt in pack.tasks.values()} == {(0.7, 0.9)}
    assert pack.imported and pack.language == "any"
    assert [name for name, _ in pack.sources][0] == f"{FOLDER}/pipeline_step1x_edit_thinker.py"
    assert all(len(digest) == 64 for _, digest in pack.sources)


def test_constants_where_the_source_states_none(checkout):
    (checkout / FOLDER / "pipeline_step1x_edit_v1p2.py").write_text('EDIT_PREFIX = "Do:"')
    (checkout / FOLDER / "pipeline_step1x_edit.py").write_text(V1P0)
    pack = import_released(checkout).pack
    assert (pack.conditioning_for("v1p2").dropped_tokens, pack.conditioning_for("v1p1").dropped_tokens) == (90, 217)


@pytest.mark.parametrize("place", ["", "src", FOLDER, "scripts", "scripts/convert.py", "README.md", f"{FOLDER}/__init__.py"])
def test_any_place_of_a_checkout_will_do(checkout, place):
    assert import_released(checkout / place).missing == ()
    assert import_released(str(checkout / place)).text


def test_installed_copies_and_single_files(checkout, tmp_path):
    site = tmp_path / "env" / "lib" / "site-packages" / "diffusers" / "pipelines"
    site.mkdir(parents=True)
    (checkout / FOLDER).rename(site / "step1x_edit")
    assert import_released(tmp_path / "env").missing == ()
    alone = tmp_path / "alone" / "renamed.py"
    alone.parent.mkdir()
    alone.write_text(THINKER, encoding="utf-8")
    result = import_released(alone)
    assert [entry.split()[0] for entry in result.missing] == ["conditioning.step1x-v1p2", "conditioning.step1x-v1p1"]
    assert result.pack.sources[0][0] == "renamed.py"


def test_the_original_repository_holds_a_prefix_only(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "conditioner.py").write_text(V1P0)
    result = import_released(tmp_path / "modules")
    assert result.found == ("conditioning.step1x-v1p1",)
    assert {entry.split()[0] for entry in result.missing} == {
        "languages", "conditioning.step1x-v1p2", *(f"task.{name}" for name in _BUILDERS)
    }  # fmt: skip
    assert result.pack.conditioning_for("v1p0").prefix == "Old prefix:"
    result.write(tmp_path / "dialogue.toml")
    chosen = find_pack(weights=tmp_path, variant="v1p2")
    assert "task.think" in chosen.filled and chosen.warning


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def build_reformt_prompt", "def build_other", "task.think .*no method build_reformt_prompt"),
        ("{original_instruction}", "{original_instructions}", "task.think .*'original_instructions' is not known"),
        ("{original_instruction}", "{original_instruction!r}", "task.think .*FormattedValue"),
        ("{original_instruction}", "{original_instruction.upper()}", r"task.think .*\.upper\(\)"),
        ("source_image_data_url}},", "other_url}},", "task.think .*'other_url' is not known"),
        ('"text": user_prompt}', '"text": prompts[0]}', "task.score .*Subscript"),
        ('{"type": "image_url", "image_url": {"url": img_data_url}},', "", r"task.score .*pictures \[\]"),
        ('"role": "system", "content": sys}', '"role": "tool", "content": sys}', "task.reflect_paired .*no system and user"),
        (
            "language_type = analyze_text(original_instruction)",
            "original_instruction = clean(original_instruction)",
            r"task.think .*Call in a text",
        ),
        ('return "tongue-en"', "return prompts", "languages"),
    ],
)
def test_what_is_not_found_is_named(checkout, old, new, message):
    path = checkout / FOLDER / "pipeline_step1x_edit_thinker.py"
    assert old in THINKER
    path.write_text(THINKER.replace(old, new), encoding="utf-8")
    missing = import_released(checkout).missing
    assert any(re.match(message, entry) for entry in missing), missing
    assert len(missing) <= 3  # the others were found


@pytest.mark.parametrize("method", ["build", "replace", "format", "plus"])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(INSTRUCTIONS))
def test_any_wording_survives_every_shape(method, before, after, instruction):
    plain = before.replace("@", "") + "@" + after.replace("@", "")
    shape = {
        "build": f"f{plain.replace('{', '{{').replace('}', '}}').replace('@', '{instruction_cn}')!r}",
        "replace": f"{plain!r}.replace('@', instruction_cn)",
        "format": f"{plain.replace('{', '').replace('}', '').replace('@', '{}')!r}.format(instruction_cn)",
        "plus": f"{plain.partition('@')[0]!r} + instruction_cn + {plain.partition('@')[2]!r}",
    }[method]
    source = THINKER.replace('"Critic."', shape)
    prompt = _task("edit_score_paired", _builder([ast.parse(source)], "_build_score1_messages"), 1)
    made = "".join(instruction if isinstance(piece, Slot) else piece for piece in prompt.system)
    assert made == released_messages(source, instruction)["edit_score_paired"][0]["content"]


def test_nothing_of_the_source_is_run(checkout):
    marker = checkout / "was_run"
    for name in ("pipeline_step1x_edit_thinker.py", "pipeline_step1x_edit_v1p2.py"):
        path = checkout / FOLDER / name
        path.write_text(f"open({str(marker)!r}, 'w')\n" + path.read_text("utf-8"), encoding="utf-8")
    assert import_released(checkout).missing == ()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "nothing there"),
        (lambda root: _file(root / "empty" / "x.txt", "").parent, "none of these files"),
        (lambda root: _file(root / "other" / "x.py", "a = 1"), "found none in x.py"),
        (lambda root: _file(root / "bad" / "x.py", "def ("), "x.py: expected Python source"),
        (lambda root: _file(root / "latin" / "x.py", b"\xff\xfe"), "UTF-8"),
        (lambda root: _file(root / "big" / "x.py", b"#" * ((4 << 20) + 1)), "at most"),
    ],
)
def test_unusable_sources_are_refused(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        import_released(make(tmp_path))


def _file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_written_whole_or_not_at_all(checkout, tmp_path, monkeypatch):
    result = import_released(checkout)
    path = result.write(tmp_path / "deep" / "dialogue.toml")
    assert load_pack(path).tasks == result.pack.tasks
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ConfigError, match="disk full"):
        result.write(path)
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["dialogue.toml"]


# ---- URLs ----------------------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.startswith("/broken"):
            self.send_error(500)
        else:
            super().do_GET()


@pytest.fixture
def served(checkout):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(checkout)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("place", ["", "/", f"/{FOLDER}", f"/{FOLDER}/", f"/{FOLDER}/pipeline_step1x_edit_thinker.py"])
def test_urls_of_raw_files(served, place):
    result = import_released(served + place)
    assert result.missing == ()
    assert_parity(THINKER, result.pack)
    assert result.pack.sources[0][0] == f"{served}/{FOLDER}/pipeline_step1x_edit_thinker.py"
    assert len(result.pack.sources) == 3


def test_url_of_the_original_file(served, checkout):
    _file(checkout / "v1" / "modules" / "conditioner.py", V1P0)
    for place in ("v1", "v1/modules", "v1/modules/conditioner.py"):
        assert import_released(f"{served}/{place}").found == ("conditioning.step1x-v1p1",)


@pytest.mark.parametrize(
    ("place", "message"), [("/scripts", "none of these files"), ("/none.py", "404"), ("/broken/x.py", "HTTP 500")]
)
def test_unusable_urls_are_refused(served, place, message):
    with pytest.raises(ConfigError, match=message):
        import_released(served + place)


def test_a_dead_address_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match="Check the address and the network"):
        read_source("http://127.0.0.1:9/x.py", timeout=2)


def test_pages_are_turned_into_raw_addresses():
    raw = "https://raw.githubusercontent.com/o/r"
    assert raw_url("https://github.com/o/r/tree/branch/src") == f"{raw}/branch/src"
    assert raw_url("https://github.com/o/r/blob/branch/a/b.py") == f"{raw}/branch/a/b.py"
    assert raw_url("https://github.com/o/r") == raw_url("https://github.com/o/r.git") == f"{raw}/HEAD"
    assert raw_url("http://example.org/tree/x") == "http://example.org/tree/x"


# ---- the released code itself --------------------------------------------------------------------------------------------


@pytest.mark.peer
def test_released_prompts_are_imported_character_by_character():
    peer = os.environ.get("REASONEDIT_PEER_SRC")
    if not peer:
        pytest.skip("REASONEDIT_PEER_SRC names no copy of the released code: the import of its prompts was not compared")
    result = import_released(peer)
    assert result.missing == ()
    (thinker,) = [file for file in read_source(peer) if file.name.endswith("_thinker.py")]
    assert_parity(thinker.text, result.pack)
    (v12,) = [file for file in read_source(peer) if file.name.endswith("_v1p2.py")]
    (assigned,) = [n for n in ast.parse(v12.text).body if isinstance(n, ast.Assign) and n.targets[0].id == "EDIT_PREFIX"]
    prompt = result.pack.conditioning_for("v1p2")
    assert prompt.prefix == ast.literal_eval(assigned.value)
    assert (prompt.dropped_tokens, result.pack.conditioning_for("v1p1").dropped_tokens) == (90, 217)


def test_stand_in_has_no_stray_indentation():
    assert textwrap.dedent(THINKER) == THINKER
