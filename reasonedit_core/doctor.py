"""`reasonedit doctor`: what is installed, what would run and why, and which known breakages this machine has.

It must work where nothing else does, so every check stands alone: libraries are first imported in processes of their own, and
whatever fails becomes a line with its remedy.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from .errors import ReasonEditError

DISTRIBUTION = "comfyui-reasonedit"
ROOT = Path(__file__).resolve().parents[1]
IMPORT_SECONDS = 180
WEIGHTS_BYTES = 60 * 10**9
"""What the weights of one system need on the disk, roughly."""

IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration",
    "diffusers": "from diffusers import AutoencoderKL, QwenImageTransformer2DModel",
    "peft": "import peft",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: what to do about a problem."""

    level: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def examine(weights: Path | None = None) -> list[Finding]:
    """All checks in order; with `weights`, also what lies in that checkpoint folder."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        check_python,
        check_packages,
        check_torchaudio,
        check_imports,
        check_devices,
        check_attention,
        check_qwen_positions,
        check_fonts,
        check_host,
        check_disk,
    ]
    if weights is not None:
        checks.append(lambda: check_weights(weights))
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # a check that breaks is itself a finding, and the others still run
            name = getattr(check, "__name__", "check")
            findings.append(Finding("problem", f"{name} broke: {type(error).__name__}: {error}"))
    return findings


def render(findings: Iterable[Finding]) -> str:
    """The report as text."""
    lines, problems = [], 0
    for finding in findings:
        mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.level]
        lines.append(f"{mark}  " + finding.text.replace("\n", "\n         "))
        if finding.remedy:
            lines.append(f"         -> {finding.remedy}")
        problems += finding.level == "problem"
    lines.append("")
    lines.append("no problems found" if not problems else f"{problems} problem{'s' if problems > 1 else ''} found")
    return "\n".join(lines)


# --- the installation ---


def check_python() -> list[Finding]:
    """Python and the operating system."""
    return [Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")]


def check_packages() -> list[Finding]:
    """The core dependencies and their floors."""
    findings = []
    for name, floor in floors().items():
        version = installed(name)
        if version is None:
            findings.append(Finding("problem", f"{name} is not installed (needs >= {floor})", f'pip install "{name}>={floor}"'))
        elif release(version) < release(floor):
            text = f"{name} {version} is older than {floor}"
            findings.append(Finding("problem", text, f'pip install --upgrade "{name}>={floor}"'))
        else:
            findings.append(Finding("ok", f"{name} {version} (needs >= {floor})"))
    for name, use in (("scikit-image", "photographs for the demo"), ("matplotlib", "plots of training and evaluation")):
        if installed(name) is None:
            findings.append(Finding("note", f"{name} is not installed; only needed for {use}"))
    return findings


def floors() -> dict[str, str]:
    """Core dependency -> lowest version, from the installed distribution or, in a bare checkout, from pyproject.toml."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        stated = [line for line in importlib.metadata.requires(DISTRIBUTION) or () if "extra ==" not in line]
    found = (re.match(r"\s*([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)", line) for line in stated)
    return {match[1]: match[2] for match in found if match}


def installed(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 2.15.0+cu130 -> (2, 15, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def check_torchaudio() -> list[Finding]:
    """torchaudio built for another CUDA than torch: transformers imports it where it is installed, and dies of it."""
    audio, torch_version = installed("torchaudio"), installed("torch")
    if audio is None:
        return []
    error = try_imports({"torchaudio": "import torchaudio"})["torchaudio"]
    if error is None:
        return [Finding("ok", f"torchaudio {audio} loads (nothing here needs it)")]
    tags = [version.partition("+")[2] for version in (audio, torch_version or "")]
    builds = f", built for {tags[0]} and {tags[1]}" if all(tags) and tags[0] != tags[1] else ""
    return [
        Finding(
            "problem",
            f"torchaudio {audio} does not load beside torch {torch_version}{builds}: {error}\n"
            "transformers imports torchaudio whenever it is installed, so Qwen2.5-VL, diffusers and peft fail with it",
            "pip uninstall torchaudio (nothing here needs it), or install the torchaudio that matches your torch",
        )
    ]


def check_imports() -> list[Finding]:
    """Whether the heavy libraries import, each in a process of its own."""
    findings = []
    for name, error in import_errors().items():
        if error is None:
            findings.append(Finding("ok", f"{name} imports"))
            continue
        remedy = "see torchaudio above" if "torchaudio" in error.lower() else f"pip install --force-reinstall --no-deps {name}"
        findings.append(Finding("problem", f"{name} does not import: {error}", remedy))
    return findings


@cache
def import_errors() -> dict[str, str | None]:
    """For each heavy library that is installed: None when it imports, else why not."""
    return try_imports({name: code for name, code in IMPORTS.items() if installed(name) is not None})


def try_imports(codes: dict[str, str]) -> dict[str, str | None]:
    """Runs every statement in a process of its own, all at once. None when it works, else what Python said.

    A crash of the interpreter or a hang is an answer as well.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        for name, code in codes.items()
    }
    answers: dict[str, str | None] = {}
    for name, process in started.items():
        try:
            errors = process.communicate(timeout=IMPORT_SECONDS)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            answers[name] = f"no answer in {IMPORT_SECONDS} s"
            continue
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        # the innermost cause names the library at fault; what transformers raises on top of it often does not
        causes = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]
        words = " <- ".join(dict.fromkeys(causes[-1:] + causes[:1])) or (said[-1] if said else "")
        answers[name] = None if process.returncode == 0 else (words or f"the process ended with {process.returncode}")
    return answers


# --- the machine ---


def check_devices() -> list[Finding]:
    """CPU, memory, and what torch can compute on."""
    findings = [Finding("ok", f"{os.cpu_count()} CPU cores{_memory_words()}")]
    if import_errors().get("torch", "missing") is not None:
        return findings
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ("ROCm" if torch.version.hip else "CPU only")
    if not torch.cuda.is_available():
        text = f"torch {torch.__version__} ({build}) sees no GPU: everything runs on the CPU, slowly at full size"
        if shutil.which("nvidia-smi") and not torch.version.cuda:
            remedy = "this torch was built without CUDA; install a CUDA build of it"
            return [*findings, Finding("problem", text, remedy)]
        return [*findings, Finding("note", text)]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        words = f"GPU {index}: {about.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} GB free), sm_{about.major}{about.minor}"
        findings.append(Finding("ok", f"{words}; torch {torch.__version__} for {build}"))
        # Step1X in bfloat16: 24.9 GB of DiT and 16.6 GB of MLLM
        advice = "" if total > 46e9 else "--offload component" if total > 30e9 else "--offload block"
        if advice:
            findings.append(Finding("note", f"GPU {index} does not hold DiT and MLLM in bfloat16 at once", f"use {advice}"))
        if about.major < 8:
            findings.append(Finding("note", f"GPU {index} does not compute in bfloat16; --dtype auto takes float16"))
    return findings


def _memory_words() -> str:
    try:
        count = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every system
        return ""
    return f", {count / 1e9:.0f} GB of memory"


def check_attention() -> list[Finding]:
    """Which attention backend would run, and why."""
    if import_errors().get("torch", "missing") is not None:
        return [Finding("note", "attention backends are not known: torch does not import")]
    import torch

    from .kernels.dispatch import explain

    return [Finding("ok", explain("cuda" if torch.cuda.is_available() else "cpu"))]


def check_qwen_positions() -> list[Finding]:
    """A fault of other people's code that users take for ours."""
    version = installed("transformers")
    if version is None or release(version) < (5,) or installed("diffusers") is None:
        return []
    return [
        Finding(
            "note",
            f"transformers {version}: diffusers' own Qwen-Image-Edit pipelines may compute wrong text positions with it "
            "(huggingface/diffusers#14194); reasonedit states all positions itself and is not concerned",
        )
    ]


def check_fonts() -> list[Finding]:
    """Whether sheet.png can show Chinese."""
    from .sheet import has_chinese_font

    if has_chinese_font():
        return [Finding("ok", "a font with Chinese characters is installed")]
    text = "no font with Chinese characters found: sheet.png tells Chinese words by their number, trace.json holds them"
    return [Finding("note", text, "install one if you need it, for example Noto Sans CJK")]


def check_host() -> list[Finding]:
    """Whether this checkout is loaded by ComfyUI."""
    if "comfy" in sys.modules or find_spec("comfy") is not None:
        return [Finding("ok", "ComfyUI can be imported here")]
    if ROOT.parent.name == "custom_nodes":
        return [Finding("ok", f"this checkout lies in ComfyUI's {ROOT.parent}")]
    return [Finding("note", "ComfyUI is not here; the command line and the library do not need it")]


def check_disk() -> list[Finding]:
    """Room for weights, in the current folder and in the cache of huggingface_hub."""
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface").expanduser()
    findings = []
    for name, folder in (("the current folder", Path.cwd()), ("the Hugging Face cache", cache)):
        standing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(standing).free
        enough = free >= WEIGHTS_BYTES
        need = "" if enough else f"; the weights of a system need about {WEIGHTS_BYTES / 1e9:.0f} GB"
        text = f"{free / 1e9:.0f} GB free in {name}{need}"
        findings.append(Finding("ok" if enough else "note", text))
    return findings


# --- a checkpoint folder ---


def check_weights(path: Path) -> list[Finding]:
    """What a checkpoint folder or file holds, and what is missing in it. Reads headers only."""
    from .detect import detect

    if not path.exists():
        return [Finding("problem", f"--weights: nothing at {path}", "check the path, or `reasonedit download`")]
    if (path / "brain.safetensors").is_file():
        return _check_brain(path)
    try:
        layout = detect(path)
    except ReasonEditError as error:
        return [Finding("problem", str(error))]
    what = " ".join(word for word in (layout.system, layout.variant, f"({layout.kind})") if word)
    findings = [Finding("ok", f"{path}: {what}")]
    parts = layout.components if layout.kind == "pipeline" else {layout.kind: layout.path}
    for name in ("transformer", "text_encoder", "vae"):
        if name in parts:
            findings.extend(_check_part(name, parts[name]))
        elif layout.kind == "pipeline":
            text = f"{path}: expected a transformer, a text_encoder and a vae, found no {name}"
            findings.append(Finding("problem", text, "put the file into this folder, or finish the download"))
    if layout.kind != "pipeline":
        text = f"this is a {layout.kind} alone; `reasonedit edit` takes a folder with a transformer, text_encoder and vae"
        findings.append(Finding("note", text))
    elif layout.system == "reasonedit-s":
        findings.append(_check_pack((path if path.is_dir() else path.parent) / "dialogue.toml"))
    return findings


def _check_brain(path: Path) -> list[Finding]:
    """A folder of ReasonBrain: what was trained, and the parts it was trained around."""
    from .brain.layout import find_brain_parts

    try:
        parts = find_brain_parts(path)
    except ReasonEditError as error:
        return [Finding("problem", str(error))]
    findings = [Finding("ok", f"{path}: reasonbrain ({parts.kind})"), *_check_part("ReasonBrain", path / "brain.safetensors")]
    for name, place in (("llava", parts.llava), ("denoiser", parts.network), ("vae", parts.vae)):
        findings.extend(_check_part(name, place))
    if parts.segmenter is None and parts.settings.segmenter == "auto":
        text = "no segmenter: a model that sees regions needs SAM or SAM 2 in `segmenter`"
        findings.append(Finding("note", text, 'put one there, or set {"segmenter": "grid"} in reasonbrain.json'))
    return findings


def _check_part(name: str, path: Path) -> list[Finding]:
    from .weightfiles import read_shapes, weight_files

    try:
        files, shapes = weight_files(path), read_shapes(path)
    except (ReasonEditError, OSError) as error:
        return [Finding("problem", str(error), "`reasonedit download` again fetches what is missing")]
    size = sum(file.stat().st_size for file in files)
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    findings = [Finding("ok", f"{name}: {count}, {len(shapes)} tensors, {_size_words(size)}")]
    if name == "text_encoder" and not any(key.endswith("lm_head.weight") for key in shapes):
        text = "text_encoder: no lm_head, so it conditions but does not reason (a 3B MLLM needs none)"
        findings.append(Finding("note", text, "use --reasoner qwen:DIR, remote:URL or none, or a file with lm_head"))
    return findings


def _size_words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _check_pack(path: Path) -> Finding:
    from .dialogue.prompts import load_pack

    if not path.is_file():
        text = "no dialogue pack beside the weights: our own wording is used, these weights know the released one better"
        return Finding("note", text, f"reasonedit dialogue import SOURCE --out {path}")
    try:
        return Finding("ok", f"dialogue pack {load_pack(path).name!r} at {path}")
    except ReasonEditError as error:
        return Finding("problem", str(error))
