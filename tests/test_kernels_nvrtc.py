"""The CUDA C++ kernels without a card: compiled by NVRTC for every architecture it lists, and run on the CPU for numbers."""

from __future__ import annotations

import ctypes

import pytest
import torch

from reasonedit.reasonedit_core.errors import BackendUnavailable
from reasonedit.reasonedit_core.kernels import nvrtc_build, nvrtc_ops, trial
from reasonedit.tests import cuda_on_cpu
from reasonedit.tests import kernel_cases as cases

ARCHS = (75, 80, 86, 89, 90, 120)

PROGRAMS = {
    "qk_norm_rope": {"HEAD_DIM": 128, "CHUNK": 4, "ALIGNED": 1},
    "gate_norm_modulate": {"WIDTH": 3072, "CHUNK": 8, "ALIGNED": 1, "THREADS": 384, "GATED": 1, "NORMED": 1, "CLAMP": 0},
    "guided_step": {"CHANNELS": 64, "ALIGNED": 0, "GUIDED": 1, "RULE": 1, "VELOCITY": 1},
}


def reachable(make):
    try:
        found = make()
        found.archs()
        return found
    except (nvrtc_build.BuildError, ImportError, RuntimeError) as error:
        return str(error)


def bindings():
    from cuda.bindings import nvrtc

    return nvrtc_build.Bindings(nvrtc)


WAYS = {
    "bindings": reachable(bindings),
    "ctypes": reachable(lambda: nvrtc_build.Library(nvrtc_build._library())),
}


@pytest.fixture(params=WAYS)
def compiler(request):
    if isinstance(WAYS[request.param], str):
        pytest.skip(WAYS[request.param])
    return WAYS[request.param]


def compiled(compiler, name, arch, values=torch.bfloat16, weights=torch.bfloat16, **macros):
    options = nvrtc_ops.compile_options(values, weights, {**PROGRAMS[name], **macros})
    flags = (f"--gpu-architecture={arch}", "--std=c++17", *options)
    return compiler.compile(nvrtc_ops.program(name), flags, binary=arch.startswith("sm_"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_every_architecture_that_nvrtc_lists(compiler, name, arch):
    if arch not in compiler.archs():
        pytest.skip(f"this NVRTC does not list sm_{arch}")
    code = compiled(compiler, name, f"sm_{arch}")
    assert code.startswith(b"\x7fELF") and name.encode() in code


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_to_text_for_a_card_newer_than_nvrtc(compiler, name):
    newest = max(compiler.archs())
    assert f".entry {name}(".encode() in compiled(compiler, name, f"compute_{newest}")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_every_dtype(compiler, name, values, weights):
    assert compiled(compiler, name, f"sm_{min(compiler.archs())}", values, weights).startswith(b"\x7fELF")


VARIANTS = [
    ("qk_norm_rope", {"HEAD_DIM": 6, "CHUNK": 2, "ALIGNED": 0}),
    ("gate_norm_modulate", {"WIDTH": 37, "CHUNK": 1, "THREADS": 64, "NORMED": 0, "CLAMP": 1}),
    ("gate_norm_modulate", {"GATED": 0}),
    ("guided_step", {"CHANNELS": 33, "RULE": 2, "VELOCITY": 0}),
    ("guided_step", {"GUIDED": 0, "RULE": 0}),
]


@pytest.mark.parametrize("name,macros", VARIANTS, ids=str)
def test_compiles_in_every_form(compiler, name, macros):
    assert compiled(compiler, name, f"sm_{max(compiler.archs())}", torch.float16, **macros).startswith(b"\x7fELF")


def test_a_fault_in_the_source_is_told_with_the_compilers_words(compiler):
    with pytest.raises(BackendUnavailable, match=r'(?s)could not compile.*sm_.*identifier "nonsense" is undefined'):
        compiler.compile("__global__ void k() { nonsense; }", (f"--gpu-architecture=sm_{max(compiler.archs())}",), binary=True)


def test_the_target_is_the_card_or_the_newest_known(monkeypatch):
    class Old:
        def archs(self):
            return (75, 80, 89)

    monkeypatch.setattr(nvrtc_build, "compiler", Old)
    assert [nvrtc_build.target(arch) for arch in (75, 86, 89, 120)] == ["sm_75", "compute_80", "sm_89", "compute_89"]
    assert nvrtc_build.missing(90) is None
    assert nvrtc_build.missing(70) == "this NVRTC compiles for sm_75 and newer, the card is sm_70"


def test_without_nvrtc_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(nvrtc_build, "candidates", lambda: ["/nowhere/libnvrtc.so.0"])
    with pytest.raises(BackendUnavailable, match="NVRTC is not installed.*nowhere"):
        nvrtc_build._library()


def test_without_the_bindings_the_library_is_bound_by_ctypes(monkeypatch):
    if isinstance(WAYS["ctypes"], str):
        pytest.skip(WAYS["ctypes"])
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    nvrtc_build.compiler.cache_clear()
    try:
        assert isinstance(nvrtc_build.compiler(), nvrtc_build.Library)
    finally:
        nvrtc_build.compiler.cache_clear()


def test_a_launch_hands_the_driver_what_it_documents():
    """The driver's calls, on a stand-in: the grid, the block, the stream, and a pointer to the one structure."""
    calls = []

    class Pretend:
        def cuModuleLoadData(self, module, code):
            module._obj.value = 11
            assert code.value == b"cubin"
            return 0

        def cuModuleGetFunction(self, function, module, name):
            function._obj.value = 12
            assert (module.value, name) == (11, b"kernel")
            return 0

        def cuLaunchKernel(self, function, *rest):
            *sizes, stream, pointers, extra = rest
            calls.append((function.value, [size.value for size in sizes], stream.value, extra))
            inside = ctypes.cast(pointers[0], ctypes.POINTER(nvrtc_ops._Tokens)).contents
            assert (inside.data, inside.batch, inside.token) == (5, 6, 7)
            return 0

        def cuGetErrorString(self, status, words):
            words._obj.value = b"out of luck"
            return 0

    pretend = Pretend()
    driver = nvrtc_build.Driver(pretend)
    function = driver.load(b"cubin", "kernel")
    driver.launch(function, (3, 2), 64, nvrtc_ops._Tokens(5, 6, 7), 99)
    assert calls == [(12, [3, 2, 1, 64, 1, 1, 0], 99, None)]
    pretend.cuModuleGetFunction = lambda *call: 500
    with pytest.raises(BackendUnavailable, match=r"cuModuleGetFunction of the CUDA driver answered 500 \(out of luck\)"):
        driver.load(b"cubin", "kernel")


# --- numbers, by running the source on the CPU ---

NO_COMPILER = cuda_on_cpu.missing()
on_cpu = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
QUICK = {"groups", "cache", "rows-by-token", "odd-width", "step1x", "qwen"}
DTYPES = [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return cuda_on_cpu.Emulator(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def kernels(emulator, monkeypatch):
    emulator.calls.clear()
    monkeypatch.setattr(nvrtc_ops, "launch", emulator.launch)
    yield nvrtc_ops
    assert emulator.calls


def some(table):
    return [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in table.items()]


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", some(cases.LAYOUTS))
def test_k1_equals_the_plain_form(kernels, layout, dtype):
    cases.check_k1(kernels, layout, dtype, TOLERANCES[dtype])


@on_cpu
def test_k1_reads_rows_at_odd_addresses(kernels, emulator, monkeypatch):
    monkeypatch.setattr(cases, "MARGIN", 3)
    cases.check_k1(kernels, cases.LAYOUTS["groups"], torch.bfloat16, TOLERANCES[torch.bfloat16])
    assert "-DALIGNED=0" in emulator.calls[-1][1]


@on_cpu
@pytest.mark.slow
def test_k1_leaves_values_alone_and_refuses_rows_outside(kernels):
    cases.check_k1_without_values(kernels, torch.bfloat16, TOLERANCES[torch.bfloat16])
    cases.check_k1_rows_outside(kernels, torch.bfloat16)


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", some(cases.MODULATIONS))
def test_k2_equals_the_plain_form(kernels, case, dtype):
    cases.check_k2(kernels, case, dtype, TOLERANCES[dtype])


@on_cpu
@pytest.mark.slow
def test_k2_clamps_in_float16(kernels):
    cases.check_k2_clamp(kernels)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_k2_in_whole_chunks(kernels, emulator, dtype):
    """Contiguous tensors, as in the model: 16 bytes per access, on several warps, the last one not full."""
    draw = cases.Draw(dtype)
    x, y = draw(1, 2, 304).clone(), draw(1, 2, 304).clone()
    modulation = [draw(1, 304).clone() for _ in range(3)]
    residual, normed = (torch.full_like(x, cases.NAN) for _ in range(2))
    kernels.gate_norm_modulate(x, y, *modulation, None, residual, normed, 1e-6, False)
    wanted = cases.plain.gate_norm_modulate(*cases.wide((x, y, *modulation)))
    cases.close(residual, wanted[0], TOLERANCES[dtype])
    cases.close(normed, wanted[1], TOLERANCES[dtype] * 2)
    assert f"-DCHUNK={16 // x.element_size()}" in emulator.calls[-1][1]


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", some(cases.STEPS))
def test_k4_equals_the_plain_form(kernels, case, dtype):
    cases.check_k4(kernels, case, dtype, TOLERANCES[dtype])


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("op", ["gate_norm_modulate", "guided_step"])
def test_the_trial_of_a_card_passes(kernels, op):
    assert trial.run(op, "nvrtc", torch.device("cpu")) is None


@on_cpu
def test_bfloat16_is_rounded_to_nearest_even(kernels):
    """Against torch's own rounding, through a norm-free step: halves, ties, NaN, infinities, tiny numbers."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x00000001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, -0x400000])
    values = torch.cat([bits.int().view(torch.float32), torch.randn(24, generator=torch.Generator().manual_seed(0))])
    latents, out = values[None, None], torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    zero = torch.zeros(())
    kernels.guided_step(latents, torch.zeros_like(out), None, zero, zero, out, None, 1.0, "plain", 0.4, 0.0)
    assert torch.equal(out.isnan(), values.isnan()[None, None])
    wanted = values.bfloat16()[None, None]
    assert torch.equal(out[~out.isnan()], wanted[~wanted.isnan()])
