"""Compiles CUDA C++ with NVRTC and launches it: through `cuda.bindings` where that is importable, else by ctypes.

NVRTC is one of torch's own dependencies and compiles without a card. Launching goes through the driver's library, which every
machine with a card has.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch

from ..errors import BackendUnavailable


class BuildError(BackendUnavailable):
    """NVRTC or the driver refused; the message holds what it said."""


def missing(arch: int) -> str | None:
    """None, or why kernels cannot be compiled for compute capability arch / 10."""
    try:
        known = compiler().archs()
    except BuildError as error:
        return str(error)
    if not known or arch < min(known):
        return f"this NVRTC compiles for sm_{min(known, default=0)} and newer, the card is sm_{arch}"
    return None


def target(arch: int) -> str:
    """What to compile for: the card itself, or where NVRTC is older than the card the newest it knows, as PTX."""
    known = compiler().archs()
    return f"sm_{arch}" if arch in known else f"compute_{max(x for x in known if x <= arch)}"


@lru_cache(maxsize=256)
def build(source: str, options: tuple[str, ...], arch: str) -> bytes:
    """The compiled program: a cubin for "sm_89", PTX for "compute_89". Raises BuildError with the compiler's log."""
    flags = (f"--gpu-architecture={arch}", "--std=c++17", *options)
    return compiler().compile(source, flags, binary=arch.startswith("sm_"))


@lru_cache(maxsize=1)
def compiler() -> Bindings | Library:
    """NVRTC in whichever way it can be reached. Raises BuildError where it cannot."""
    try:
        from cuda.bindings import nvrtc

        found = Bindings(nvrtc)
        found.archs()  # the library behind the bindings is loaded by the first call
        return found
    except (ImportError, RuntimeError, BuildError):
        return Library(_library())


class Bindings:
    """NVRTC through `cuda.bindings.nvrtc`."""

    def __init__(self, nvrtc: object) -> None:
        self.nvrtc = nvrtc

    def archs(self) -> tuple[int, ...]:
        """Compute capabilities that it compiles for, times ten."""
        return tuple(self._call("nvrtcGetSupportedArchs"))

    def compile(self, source: str, flags: Sequence[str], *, binary: bool) -> bytes:
        """A cubin, or PTX."""
        program = self._call("nvrtcCreateProgram", source.encode(), b"reasonedit.cu", 0, [], [])
        try:
            (status,) = self.nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
            if int(status):
                log = bytearray(self._call("nvrtcGetProgramLogSize", program))
                self._call("nvrtcGetProgramLog", program, log)
                raise BuildError(f"NVRTC could not compile a kernel ({' '.join(flags)}): {_text(bytes(log))}")
            kind = "CUBIN" if binary else "PTX"
            code = bytearray(self._call(f"nvrtcGet{kind}Size", program))
            self._call(f"nvrtcGet{kind}", program, code)
            return bytes(code)
        finally:
            self.nvrtc.nvrtcDestroyProgram(program)

    def _call(self, name: str, *args: object) -> object:
        status, *found = getattr(self.nvrtc, name)(*args)
        if int(status):
            raise BuildError(f"{name} of NVRTC answered {status}")
        return found[-1] if found else None


class Library:
    """NVRTC by ctypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def archs(self) -> tuple[int, ...]:
        """Compute capabilities that it compiles for, times ten."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return tuple(found)

    def compile(self, source: str, flags: Sequence[str], *, binary: bool) -> bytes:
        """A cubin, or PTX."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"reasonedit.cu", 0, None, None)
        try:
            options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            if self.library.nvrtcCompileProgram(program, len(flags), options):
                log = self._read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                raise BuildError(f"NVRTC could not compile a kernel ({' '.join(flags)}): {_text(log)}")
            kind = "CUBIN" if binary else "PTX"
            return self._read(f"nvrtcGet{kind}Size", f"nvrtcGet{kind}", program)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, size_of: str, read: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        self._call(read, program, found)
        return found.raw

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            raise BuildError(f"{name} of NVRTC answered {status}")


def _text(log: bytes) -> str:
    return log.decode(errors="replace").rstrip("\0\n ")


def _library() -> ctypes.CDLL:
    """The NVRTC that torch was installed with, else one that the system finds by name."""
    tried = []
    for name in candidates():
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
    raise BuildError(f"NVRTC is not installed ({tried[-1] if tried else 'no library of that name'})")


def candidates() -> list[str]:
    """Where NVRTC may lie: beside torch, in the packages that torch depends on, on the system's own path."""
    major = (torch.version.cuda or "").partition(".")[0]
    windows = sys.platform == "win32"
    name = re.compile(rf"nvrtc64_{major}\d*_0\.dll" if windows else rf"libnvrtc(-[0-9a-f]+)?\.so(\.{major})?(\.\d+)*")
    folders = [os.path.join(os.path.dirname(torch.__file__), "lib")]
    spec = find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        folders += sorted(glob.glob(os.path.join(place, "*", "bin" if windows else "lib")))
    found = [
        os.path.join(folder, file)
        for folder in folders
        if os.path.isdir(folder)
        for file in sorted(os.listdir(folder))
        if name.fullmatch(file)
    ]
    return [*found, f"nvrtc64_{major}0_0.dll"] if windows else [*found, f"libnvrtc.so.{major}", "libnvrtc.so"]


# --- launching ---


class Driver:
    """The few calls of the driver that a launch takes. The current context is torch's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def load(self, code: bytes, name: str) -> ctypes.c_void_p:
        """The kernel of that name in a compiled program."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(
        self, function: ctypes.c_void_p, grid: tuple[int, int], threads: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """Run `function` on grid x blocks with one structure of arguments."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        sizes = (*map(ctypes.c_uint, (*grid, 1, threads, 1, 1, 0)),)
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), pointers, None)

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            words = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(words))
            raise BuildError(f"{name} of the CUDA driver answered {status} ({(words.value or b'').decode()})")


@lru_cache(maxsize=1)
def driver() -> Driver:
    """The CUDA driver. Raises BuildError where there is none."""
    try:
        return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except OSError as error:
        raise BuildError(f"the CUDA driver is not installed ({error})") from None


Launch = Callable[[tuple[int, int], int, ctypes.Structure], None]
"""(grid, threads of a block, arguments) -> None."""


@lru_cache(maxsize=1024)
def kernel(name: str, source: str, options: tuple[str, ...], card: int) -> Launch:
    """A kernel of `source`, ready to be launched on card `card`, which is the current one."""
    major, minor = torch.cuda.get_device_capability(card)
    function = driver().load(build(source, options, target(10 * major + minor)), name)

    def run(grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        driver().launch(function, grid, threads, arguments, torch.cuda.current_stream(card).cuda_stream)

    return run
