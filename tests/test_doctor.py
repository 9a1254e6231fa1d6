"""The doctor: what it says of broken environments, of checkpoints, and that no check can take the others down."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from reasonedit.reasonedit_core import doctor
from reasonedit.reasonedit_core.cli import main
from reasonedit.reasonedit_core.doctor import Finding
from reasonedit.tests.tiny import tiny_checkpoint


@pytest.fixture
def versions(monkeypatch):
    """Stated versions in place of the installed ones; a name that is not stated is not installed."""
    stated = {name: floor for name, floor in doctor.floors().items()}
    monkeypatch.setattr(doctor, "installed", stated.get)
    return stated


@pytest.fixture
def imports(monkeypatch):
    """What importing gives, by library; everything imports unless a test says otherwise."""
    answers: dict[str, str | None] = {}
    monkeypatch.setattr(doctor, "try_imports", lambda codes: {name: answers.get(name) for name in codes})
    doctor.import_errors.cache_clear()
    yield answers
    doctor.import_errors.cache_clear()


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_floors_are_those_of_pyproject():
    floors = doctor.floors()
    assert floors["torch"] == "2.11" and floors["transformers"] == "4.55" and len(floors) == 12


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.15.0+cu130", (2, 15, 0)), ("4.55.4", (4, 55, 4)), ("0.36.0.dev0", (0, 36, 0)), ("5", (5,)), ("odd", ())],
)
def test_release_numbers(version, numbers):
    assert doctor.release(version) == numbers


def test_packages_that_are_old_or_missing_come_with_the_command(versions):
    assert set(levels(doctor.check_packages())) == {"ok", "note"}
    versions["transformers"] = "4.49.0"
    del versions["peft"]
    problems = [finding for finding in doctor.check_packages() if finding.level == "problem"]
    assert [finding.text for finding in problems] == [
        "transformers 4.49.0 is older than 4.55",
        f"peft is not installed (needs >= {doctor.floors()['peft']})",
    ]
    assert problems[0].remedy == 'pip install --upgrade "transformers>=4.55"'


def test_versions_compare_as_numbers(versions):
    versions["torch"] = "2.100"
    assert "problem" not in levels(doctor.check_packages())


def test_torchaudio_of_another_cuda_is_named_with_its_cure(versions, imports):
    assert doctor.check_torchaudio() == []
    versions |= {"torchaudio": "2.11.0+cu130", "torch": "2.15.0+cu132"}
    assert levels(doctor.check_torchaudio()) == ["ok"]
    imports["torchaudio"] = "RuntimeError: Detected that PyTorch and TorchAudio were compiled with different CUDA versions"
    (finding,) = doctor.check_torchaudio()
    assert finding.level == "problem" and "built for cu130 and cu132" in finding.text and "different CUDA" in finding.text
    assert finding.remedy.startswith("pip uninstall torchaudio")


def test_a_torchaudio_that_does_not_load_is_found_in_a_process_of_its_own(tmp_path, monkeypatch):
    package = tmp_path / "torchaudio"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('compiled with different CUDA versions')")
    meta = tmp_path / "torchaudio-2.11.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.check_torchaudio()
    assert finding.level == "problem" and "different CUDA versions" in finding.text
    assert "torchaudio" not in sys.modules


def test_a_library_that_does_not_import_is_a_problem_and_torchaudio_is_pointed_at(versions, imports):
    imports["diffusers"] = "ImportError: no libfoo"
    imports["peft"] = "OSError: libtorchaudio.so: undefined symbol"
    by_name = {finding.text.split()[0]: finding for finding in doctor.check_imports()}
    assert by_name["torch"].level == "ok" and by_name["diffusers"].level == "problem"
    assert "no libfoo" in by_name["diffusers"].text and "--no-deps diffusers" in by_name["diffusers"].remedy
    assert by_name["peft"].remedy == "see torchaudio above"


def test_import_trials_survive_crash_error_and_hang(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 3)
    answers = doctor.try_imports(
        {
            "good": "x = 1",
            "error": "raise ImportError('libfoo is missing')",
            "chain": "try:\n    raise OSError('the cause')\nexcept OSError as e:\n    raise RuntimeError('on top') from e",
            "crash": "import os; os._exit(7)",
            "hang": "import time; time.sleep(60)",
        }
    )
    assert answers == {
        "good": None,
        "error": "ImportError: libfoo is missing",
        "chain": "RuntimeError: on top <- OSError: the cause",
        "crash": "the process ended with 7",
        "hang": "no answer in 3 s",
    }


def test_without_torch_the_rest_is_still_told(versions, imports):
    imports["torch"] = "OSError: libcudart.so.13: cannot open shared object file"
    findings = doctor.examine()
    text = doctor.render(findings)
    assert "PROBLEM  torch does not import: OSError: libcudart.so.13" in text
    assert "attention backends are not known" in text and "CPU cores" in text and "free in the current folder" in text
    assert text.endswith("1 problem found")


def test_a_check_that_breaks_is_a_finding(monkeypatch, versions, imports):
    def check_fonts():
        raise OSError("no fonts at all")

    monkeypatch.setattr(doctor, "check_fonts", check_fonts)
    findings = doctor.examine()
    assert Finding("problem", "check_fonts broke: OSError: no fonts at all") in findings
    assert any("free in the current folder" in finding.text for finding in findings)


def gpu(monkeypatch, memory: float, major: int, cuda: str | None = "13.2") -> list[Finding]:
    about = types.SimpleNamespace(name="Card", total_memory=memory, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (memory / 2, memory))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return doctor.check_devices()


@pytest.mark.parametrize(("memory", "remedy"), [(80e9, None), (40e9, "use --offload component"), (24e9, "use --offload block")])
def test_a_gpu_is_told_with_the_offload_it_needs(monkeypatch, versions, imports, memory, remedy):
    findings = gpu(monkeypatch, memory, 9)
    assert f"GPU 0: Card, {memory / 1e9:.0f} GB" in findings[1].text and "sm_90" in findings[1].text
    assert [finding.remedy for finding in findings[2:]] == ([remedy] if remedy else [])


def test_an_old_gpu_and_a_cpu_build_beside_a_driver(monkeypatch, versions, imports):
    assert "takes float16" in gpu(monkeypatch, 80e9, 7)[-1].text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = gpu(monkeypatch, 0, 9, cuda=None)[-1]
    assert finding.level == "problem" and "built without CUDA" in finding.remedy
    assert gpu(monkeypatch, 0, 9)[-1].level == "note"


def test_the_position_fault_of_diffusers_is_named_only_where_it_is(versions):
    versions["transformers"] = "4.57.1"
    assert doctor.check_qwen_positions() == []
    versions["transformers"] = "5.23.0"
    (finding,) = doctor.check_qwen_positions()
    assert finding.level == "note" and "is not concerned" in finding.text


def test_attention_says_which_backend_would_run(imports, versions):
    (finding,) = doctor.check_attention()
    assert finding.level == "ok" and "sdpa would run" in finding.text


def test_a_full_disk_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=2e9))
    assert all(finding.level == "note" and "2 GB free" in finding.text for finding in doctor.check_disk())


@pytest.mark.parametrize(
    ("system", "words"),
    [("step1x-v1p2", "reasonedit-s v1.2 (pipeline)"), ("qwen-edit-plus", "reasonedit-q edit-plus (pipeline)")],
)
def test_a_whole_checkpoint_has_no_problem(system, words):
    findings = doctor.check_weights(tiny_checkpoint(system))
    assert words in findings[0].text and "problem" not in levels(findings)
    assert [finding.text.split(":")[0] for finding in findings[1:4]] == ["transformer", "text_encoder", "vae"]
    assert any("no dialogue pack" in finding.text for finding in findings) == (system == "step1x-v1p2")


def copy_of(system: str, folder: Path) -> Path:
    for path in tiny_checkpoint(system).rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(tiny_checkpoint(system))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def test_what_is_missing_in_a_checkpoint_is_named(tmp_path):
    folder = copy_of("step1x-v1p2", tmp_path)
    shard = sorted((folder / "transformer").glob("*.safetensors"))[-1]
    shard.unlink()
    vae = next((folder / "vae").glob("*.safetensors"))
    vae.write_bytes(vae.read_bytes()[:-100])
    (folder / "dialogue.toml").write_text("not = [a pack")
    problems = [finding.text for finding in doctor.check_weights(folder) if finding.level == "problem"]
    assert len(problems) == 3
    assert shard.name in problems[0] and str(vae) in problems[1] and "dialogue.toml" in problems[2]


def test_a_text_encoder_without_lm_head_is_noted(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of("step1x-v1p2", tmp_path)
    index = folder / "text_encoder/model.safetensors.index.json"
    stated = json.loads(index.read_text())
    place = folder / "text_encoder" / stated["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(stated))
    save_file({key: value for key, value in load_file(place).items() if key != "lm_head.weight"}, place)
    notes = [finding for finding in doctor.check_weights(folder) if "no lm_head" in finding.text]
    assert [finding.level for finding in notes] == ["note"] and "remote:URL" in notes[0].remedy


def test_a_lone_part_and_nothing_at_all(tmp_path):
    findings = doctor.check_weights(tiny_checkpoint("qwen2.5-vl"))
    assert "problem" not in levels(findings) and any("text_encoder alone" in finding.text for finding in findings)
    assert levels(doctor.check_weights(tmp_path / "nope")) == ["problem"]
    assert levels(doctor.check_weights(tmp_path)) == ["problem"]


def test_the_command_prints_the_report_and_answers_with_its_exit_code(imports, versions, capsys, tmp_path):
    assert main(["doctor"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["doctor", "--weights", str(tmp_path / "nope")]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM  --weights: nothing at" in said and "-> check the path" in said and "1 problem found" in said
