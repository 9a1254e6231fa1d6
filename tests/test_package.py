"""The shape of the package: who may import whom (read from the syntax trees), what is packed, and what an import costs."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nodes", "reasonedit_core", "training")
CHECKOUT_ONLY = "training/mini/links/"
"""Links of the miniatures, for those who train on from them."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A module imports what stands in a line above its own, or its own room. A module that is in no line fails the test.
ORDER = (
    {"errors"},
    {"regions"},
    {"types"},
    {"compiling", "counting", "drafts", "frames", "interfaces", "files", "packing", "tracefile"},
    {"dialogue", "kernels", "flow", "images", "latents", "offload", "settings", "sheet", "sizes", "weightfiles"},
    {"detect", "fp8", "keymaps"},
    {"lora_keys", "mini", "parts"},
    {"mllm", "models"},
    {"weights", "lora", "drafter", "segmenters", "extractors"},
    {"conditioners", "denoisers", "reasoners"},
    {"generator", "loop"},
    {"brain", "geometry", "region_options", "report"},
    {"brain_options"},
    {"load_lora"},
    {"load"},
    {"run", "weight_options"},
    {"demo", "demo_random", "doctor", "download"},
    {"bench"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

COMFY = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "execution"}
COMFY |= {"folder_paths", "latent_preview", "nodes", "server"}
HEAVY = {"accelerate", "diffusers", "peft", "torchaudio", "torchvision", "transformers"}
TOO_HEAVY = {"torch", "numpy", "PIL", "pydantic", "huggingface_hub", "tqdm", "safetensors", "einops"} | HEAVY
"""For what only registers nodes or answers --help."""


@dataclass(frozen=True)
class Import:
    """One imported name. target: dotted, from the repository root for our own modules (`reasonedit_core.types`)."""

    source: str
    line: int
    target: str
    ours: bool
    lazy: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def python_files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> list[Import]:
    found: list[Import] = []
    name = path.relative_to(ROOT).as_posix()
    package = path.relative_to(ROOT).parent.parts

    def add(node: ast.Import | ast.ImportFrom, lazy: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            targets, ours = [alias.name for alias in node.names], False
        elif node.level == 0:
            targets, ours = [node.module or ""], False
        else:
            base = package[: len(package) - node.level + 1]
            assert node.level <= len(package) + 1, f"{name}:{node.lineno} reaches out of the package"
            head = ".".join((*base, *(node.module or "").split("."))).strip(".")
            targets = []
            for alias in node.names:  # `from . import flow` names a module, `from .flow import euler` a member
                inner = ROOT / head.replace(".", "/") / alias.name
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                targets.append(f"{head}.{alias.name}".strip(".") if is_module else head)
            ours = True
        found.extend(Import(name, node.lineno, target, ours, lazy, typing_only) for target in dict.fromkeys(targets))

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                add(child, lazy, typing_only)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                walk(child, lazy, True)
            else:
                inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                walk(child, lazy or inner, typing_only)

    walk(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


def all_imports() -> list[Import]:
    return [found for path in python_files() for found in imports_of(path)]


def room_of(dotted: str) -> str:
    """`reasonedit_core.mllm.vision` -> mllm; `reasonedit_core/mllm/vision.py` likewise; `nodes.host` -> nodes."""
    parts = dotted.removesuffix(".py").replace("/", ".").split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == "reasonedit_core" else parts[0]


def faults(imports: list[Import]) -> list[str]:
    """Every breach of the rules of "Who may import whom"."""
    out = []
    for found in imports:
        room, package = room_of(found.source), found.source.split("/")[0]
        top = found.target.split(".")[0]
        if top == "reasonedit" and not found.ours:
            out.append(f"{found}: relative imports only, the folder may have any name")
        if found.ours:
            other = top
            if package == "reasonedit_core" and other != "reasonedit_core":
                out.append(f"{found}: the core knows neither nodes nor training")
            elif {package, other} == {"nodes", "training"}:
                out.append(f"{found}: nodes and training never import each other")
            elif package == "reasonedit_core":
                target = room_of(found.target)
                if target and target != room and target != "__init__":
                    unknown = {room, target} - set(RANK) - {"__init__"}
                    if unknown:
                        out.append(f"{found}: give {', '.join(sorted(unknown))} a place in ORDER")
                    elif RANK[target] >= RANK[room]:
                        out.append(f"{found}: {room} stands before or beside {target}")
            continue
        if top in COMFY and found.source != "nodes/host.py":
            out.append(f"{found}: only nodes/host.py imports ComfyUI")
        flex = "flex_attention" in found.target and room != "bench"  # the benchmark runs torch's own beside ours
        if room != "kernels" and (top in ("triton", "cuda") or flex or "nvrtc" in found.target):
            out.append(f"{found}: only kernels/ does")
        if room == "dialogue" and top == "torch" and not found.typing_only:
            out.append(f"{found}: dialogue is text only")
        if top in HEAVY and room != "models" and not (found.lazy or found.typing_only):
            out.append(f"{found}: inside the function that needs it")
    return out


def test_imports_follow_the_rules():
    assert faults(all_imports()) == []


def test_every_module_has_a_place_in_the_order():
    modules = {room_of(path.relative_to(ROOT).as_posix()) for path in (ROOT / "reasonedit_core").rglob("*.py")}
    assert modules - set(RANK) - {"__init__"} == set()


def test_the_loop_knows_types_and_interfaces_only():
    """And `drafts`, a few pure functions of the types."""
    ours = {room_of(found.target) for found in imports_of(ROOT / "reasonedit_core/loop.py") if found.ours}
    assert ours <= {"types", "interfaces", "errors", "drafts"}


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("reasonedit_core/loop.py", "from .load import x", "loop stands before or beside load"),
        ("reasonedit_core/mllm/a.py", "def f():\n    from ..conditioners.step1x import x", "mllm stands before"),
        ("reasonedit_core/denoisers/a.py", "from .. import conditioners", "denoisers stands before or beside conditioners"),
        ("reasonedit_core/flow.py", "from . import wonderland", ""),
        ("reasonedit_core/dialogue/a.py", "import torch", "text only"),
        ("reasonedit_core/dialogue/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", ""),
        ("reasonedit_core/flow.py", "import transformers", "inside the function"),
        ("reasonedit_core/flow.py", "def f():\n    import transformers", ""),
        ("reasonedit_core/flow.py", "from torch.nn.attention.flex_attention import flex_attention", "only kernels/"),
        ("reasonedit_core/kernels/a.py", "import triton", ""),
        ("reasonedit_core/flow.py", "import comfy.utils", "only nodes/host.py"),
        ("nodes/think.py", "def f():\n    from comfy_api.latest import io", "only nodes/host.py"),
        ("nodes/host.py", "import comfy", ""),
        ("nodes/think.py", "from ..training import x", "never import each other"),
        ("reasonedit_core/cli.py", "from ..nodes import x", "neither nodes nor training"),
        ("reasonedit_core/cli.py", "from reasonedit.reasonedit_core import x", "relative imports only"),
    ],
)
def test_the_rules_see_what_breaks_them(tmp_path, monkeypatch, source, code, words):
    for name in ("conditioners", "mllm"):
        (tmp_path / "reasonedit_core" / name).mkdir(parents=True)
    path = tmp_path / source
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = faults(imports_of(path))
    assert words in found[0] if words else found == []


def test_root_init_imports_nothing_and_hides_nothing_from_comfyui():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    top = [type(node).__name__ for node in tree.body]
    assert top == ["Expr", "Assign", "AsyncFunctionDef"], "a docstring, WEB_DIRECTORY and comfy_entrypoint, nothing else"
    assert tree.body[1].targets[0].id == "WEB_DIRECTORY" and (ROOT / tree.body[1].value.value / "docs").is_dir()
    assert tree.body[2].name == "comfy_entrypoint"
    assert not any(isinstance(node, ast.Name) and node.id == "NODE_CLASS_MAPPINGS" for node in ast.walk(tree))


def test_packages_listed_are_the_folders():
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    names = {".".join(("reasonedit", *folder.relative_to(ROOT).parts)) for folder in folders}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == names | {"reasonedit"} and len(listed) == len(set(listed))
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_data_file_of_a_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*")):
        if not path.is_file() or path.suffix in (".py", ".pyc") or path.name.startswith("."):
            continue
        if path.is_relative_to(ROOT / CHECKOUT_ONLY):
            continue
        fits = False
        for package, patterns in listed.items():
            folder = ROOT.joinpath(*package.split(".")[1:])
            if path.is_relative_to(folder):
                inside = path.relative_to(folder).as_posix()
                fits = fits or any(fnmatch.fnmatch(inside, pattern) for pattern in patterns)
        assert fits, f"{path.relative_to(ROOT)} would be missing in the wheel: name it under package-data"


def test_requirements_are_the_dependencies_without_torch():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    stated = [line for line in lines if line and not line.startswith("#")]
    dependencies = PROJECT["project"]["dependencies"]
    assert stated == [line for line in dependencies if not re.match(r"torch\b", line)]
    assert [line for line in dependencies if line.startswith("torch")] == [f"torch>={floor(dependencies, 'torch')}"]


def floor(dependencies: list[str], name: str) -> str:
    return next(line.partition(">=")[2] for line in dependencies if line.startswith(f"{name}>="))


def test_dependencies_have_floors_and_no_ceilings():
    dependencies = PROJECT["project"]["dependencies"]
    assert all(re.fullmatch(r"[A-Za-z_]+>=[0-9.]+", line) for line in dependencies), dependencies
    assert float(floor(dependencies, "transformers")) <= 4.55
    assert tuple(map(int, floor(dependencies, "torch").split("."))) <= (2, 11)
    names = {line.partition(">=")[0] for line in dependencies}
    core = "torch transformers diffusers peft accelerate safetensors einops numpy pillow pydantic huggingface_hub tqdm"
    assert names == set(core.split())


def test_nothing_stands_where_comfyui_or_pytest_would_trip_over_it():
    assert not (ROOT / "tests/__init__.py").exists() and not (ROOT / "conftest.py").exists()
    assert "tests/" in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert os.access(ROOT / ".ci/run", os.X_OK) or os.name == "nt"


BARE = (
    "import importlib.util, sys; root = sys.argv[1]; "
    "s = importlib.util.spec_from_file_location('some_odd-name', root + '/__init__.py', submodule_search_locations=[root]); "
    "m = importlib.util.module_from_spec(s); sys.modules['some_odd-name'] = m; s.loader.exec_module(m); "
)


def loaded_by(code: str, *args: str) -> set[str]:
    """Top-level modules in memory after `code` ran in a process that loads the folder as ComfyUI does."""
    code = BARE + code + "; print(chr(10).join(sorted({n.partition('.')[0] for n in sys.modules})))"
    run = [sys.executable, "-c", code, str(ROOT), *args]
    return set(subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT.anchor).stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import importlib; importlib.import_module('some_odd-name.nodes')",
        "import importlib; importlib.import_module('some_odd-name.reasonedit_core.types')",
        "import importlib; importlib.import_module('some_odd-name.reasonedit_core.cli').build_parser()",
    ],
)
def test_loading_the_folder_imports_nothing_heavy(code):
    assert loaded_by(code) & TOO_HEAVY == set()


def test_the_loader_of_systems_imports_neither_transformers_nor_diffusers():
    names = "('load', 'loop', 'report', 'run')"
    code = f"import importlib; [importlib.import_module('some_odd-name.reasonedit_core.' + n) for n in {names}]"
    assert loaded_by(code) & HEAVY == set()
    # Its import makes a folder among the temporary files; `reasonedit-train` says before where that may lie.
    unwanted = "import sys; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", f"{BARE}{code}; {unwanted}", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_answered_without_anything_heavy():
    answer = "importlib.import_module('some_odd-name.reasonedit_core.cli').main(['edit', '--help'])"
    held = "contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said"
    code = f"import contextlib, importlib, io\nwith {held}: {answer}"
    assert loaded_by(f"{code}\nassert '--weights-dtype' in said.getvalue()") & TOO_HEAVY == set()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed")
def test_the_wheel_holds_every_file_and_nothing_else(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the package is not known")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    copy = tmp_path / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "README.md").touch()
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    own = (name for name in names if name.split("/")[0] in ROOMS and not name.startswith(CHECKOUT_ONLY))
    wanted = {f"reasonedit/{name}" for name in own if (ROOT / name).is_file()}
    assert inside == wanted | {"reasonedit/__init__.py"}
