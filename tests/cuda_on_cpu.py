"""Runs the CUDA C++ of our kernels on the CPU: the same source behind a prelude that makes a thread of every CUDA thread.

Blocks run one after the other. Needs a C++20 compiler; it says nothing about speed, and nothing about the few instructions in
`nvrtc_source.HALF`, which have no meaning on a CPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from reasonedit.reasonedit_core.kernels import nvrtc_ops

PRELUDE = r"""
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
struct Index { unsigned int x, y, z; };
static thread_local Index threadIdx, blockIdx, blockDim;
static std::unique_ptr<std::barrier<>> whole;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static float lanes[1024];

inline unsigned int __float_as_uint(float x) { unsigned int bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned int bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void __syncthreads() { whole->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned int, float x, int lane) {
    std::barrier<>& warp = *warps[threadIdx.x / 32];
    lanes[threadIdx.x] = x;
    warp.arrive_and_wait();
    const float found = lanes[threadIdx.x ^ lane];
    warp.arrive_and_wait();
    return found;
}

inline float half_to_float(unsigned short bits) {
    const int sign = bits >> 15 ? -1 : 1, exponent = bits >> 10 & 31, rest = bits & 1023;
    if (exponent == 31) return rest ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf(1024 + rest, exponent - 25) : ldexpf(rest, -24));
}

inline unsigned short float_to_half(float x) {
    const unsigned short sign = std::signbit(x) << 15;
    x = fabsf(x);
    if (std::isnan(x)) return 0x7fff;
    if (x >= 65520.0f) return sign | 0x7c00;
    if (x < 6.103515625e-05f) return sign | (unsigned short)nearbyintf(ldexpf(x, 24));
    int exponent;
    const float mantissa = nearbyintf(ldexpf(frexpf(x, &exponent), 11));  // 1024 ... 2048, ties to even
    return sign | (unsigned short)((exponent + 13) * 1024 + (int)mantissa);
}
"""

RUN = r"""
extern "C" int run(unsigned int blocks_x, unsigned int blocks_y, unsigned int threads, const void* packed, int size) {
    if (size != (int)sizeof(Arguments)) return sizeof(Arguments);
    Arguments arguments;
    memcpy(&arguments, packed, sizeof(arguments));
    for (unsigned int y = 0; y < blocks_y; y++)
        for (unsigned int x = 0; x < blocks_x; x++) {
            whole = std::make_unique<std::barrier<>>(threads);
            warps.clear();
            for (unsigned int warp = 0; warp < threads / 32; warp++) warps.push_back(std::make_unique<std::barrier<>>(32));
            std::vector<std::thread> all;
            for (unsigned int thread = 0; thread < threads; thread++)
                all.emplace_back([=] {
                    threadIdx = {thread, 0, 0}, blockIdx = {x, y, 0}, blockDim = {threads, 1, 1};
                    ENTRY(arguments);
                });
            for (auto& thread : all) thread.join();
        }
    return 0;
}
"""


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    probe = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    found = subprocess.run(probe, input="#include <barrier>\nstd::barrier<> x(1);", capture_output=True, text=True)
    return "g++ knows no C++20" if found.returncode else None


class Emulator:
    """Takes the place of `nvrtc_ops.launch`. calls: the kernels that ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.built, self.calls = folder, {}, []

    def launch(self, name, values, weights, macros, grid, threads, arguments) -> None:
        options = nvrtc_ops.compile_options(values.dtype, weights.dtype, macros)
        library = self._build(name, options)
        size = ctypes.sizeof(arguments)
        wanted = library.run(*grid, threads, ctypes.byref(arguments), size)
        assert wanted == 0, f"the arguments of {name} have {wanted} bytes in C++ and {size} in Python"
        self.calls.append((name, options))

    def _build(self, name: str, options: tuple[str, ...]) -> ctypes.CDLL:
        key = (name, options)
        if key not in self.built:
            source = self.folder / f"{len(self.built)}.cpp"
            # `static` variables of one kernel stand for a block's shared memory, which all of its threads see.
            source.write_text(PRELUDE + nvrtc_ops.program(name, half="") + RUN)
            library = source.with_suffix(".so")
            flags = ["-std=c++20", "-O1", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-w", f"-DENTRY={name}"]
            subprocess.run(["g++", *flags, *options, str(source), "-o", str(library)], check=True)
            self.built[key] = ctypes.CDLL(str(library))
        return self.built[key]
