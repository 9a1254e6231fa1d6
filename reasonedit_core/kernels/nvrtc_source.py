"""The element-wise kernels in CUDA C++, compiled on the user's machine by NVRTC: no compiler, no header, no wheel per version.

They compute what `reference_ops` says, in float32, and round once. Macros of a compilation: KIND and WEIGHT_KIND say how
tensors and weights (or modulation, or latents) are stored: 0 float32, 1 float16, 2 bfloat16. Structures of arguments have
members of 8 bytes only; `nvrtc_ops` mirrors them.
"""

from __future__ import annotations

HALF = r"""
__device__ inline float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ inline unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
"""
"""float16 by the card's own instructions: cuda_fp16.h is a header that users do not have."""

COMMON = r"""
typedef long long i64;

template <int kind> struct Stored;

template <> struct Stored<0> {
    typedef float type;
    static __device__ inline float widen(float x) { return x; }
    static __device__ inline float narrow(float x) { return x; }
};

template <> struct Stored<1> {
    typedef unsigned short type;
    static __device__ inline float widen(unsigned short x) { return half_to_float(x); }
    static __device__ inline unsigned short narrow(float x) { return float_to_half(x); }
};

template <> struct Stored<2> {
    typedef unsigned short type;
    static __device__ inline float widen(unsigned short x) { return __uint_as_float((unsigned int)x << 16); }
    static __device__ inline unsigned short narrow(float x) {
        unsigned int bits = __float_as_uint(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // adding to a NaN could make it infinite
        return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
    }
};

typedef Stored<KIND> Value;
typedef Stored<WEIGHT_KIND> Weight;
typedef Value::type value_t;
typedef Weight::type weight_t;

template <typename T, int n> struct alignas(ALIGNED ? sizeof(T) * n : sizeof(T)) Chunk { T at[n]; };

__device__ inline float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ inline i64 row_number(const void* rows, i64 bytes, i64 at) {
    return bytes == 4 ? (i64)((const int*)rows)[at] : ((const i64*)rows)[at];
}
"""

K1 = r"""
// One token per block, one head per warp: q, then k, then v. HEAD_DIM, and CHUNK elements per access.

struct Heads { void* data; i64 batch, row, head; };
struct Table { const float* data; i64 batch, row, pair; };
struct Arguments {
    Heads q, k, v, out_q, out_k, out_v;
    const void *q_weight, *k_weight;
    Table cos, sin;
    const void* rows;
    i64 row_bytes, start, length, heads, key_heads, values, compact;
    double eps;
};

typedef Chunk<value_t, CHUNK> Piece;
static const int PIECES = HEAD_DIM / CHUNK;
static const int PER_LANE = (PIECES + 31) / 32;

__device__ inline const Piece* read(const Heads& x, i64 batch, i64 row, i64 head) {
    return (const Piece*)((const value_t*)x.data + batch * x.batch + row * x.row + head * x.head);
}

__device__ inline Piece* write(const Heads& x, i64 batch, i64 row, i64 head) {
    return (Piece*)((value_t*)x.data + batch * x.batch + row * x.row + head * x.head);
}

extern "C" __global__ void qk_norm_rope(const Arguments a) {
    const i64 token = blockIdx.x, batch = blockIdx.y;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const i64 row = a.row_bytes ? row_number(a.rows, a.row_bytes, a.start + token) : a.start + token;
    const bool known = row >= 0 && row < a.length;
    const float* cos = a.cos.data + batch * a.cos.batch + row * a.cos.row;
    const float* sin = a.sin.data + batch * a.sin.batch + row * a.sin.row;
    const i64 jobs = a.heads + a.key_heads + (a.values ? a.key_heads : 0);
    for (i64 job = warp; job < jobs; job += warps) {
        const bool query = job < a.heads, key = !query && job < a.heads + a.key_heads;
        const i64 head = query ? job : key ? job - a.heads : job - a.heads - a.key_heads;
        const Piece* from = read(query ? a.q : key ? a.k : a.v, batch, token, head);
        Piece* to = write(query ? a.out_q : key ? a.out_k : a.out_v, batch, query && a.compact ? a.start + token : row, head);
        if (!query && !key) {
            if (known)
                for (int piece = lane; piece < PIECES; piece += 32) to[piece] = from[piece];
            continue;
        }
        const weight_t* weight = (const weight_t*)(query ? a.q_weight : a.k_weight);
        float x[PER_LANE][CHUNK];
        float squares = 0.0f;
        #pragma unroll
        for (int turn = 0; turn < PER_LANE; turn++) {
            const int piece = turn * 32 + lane;
            if (piece < PIECES) {
                const Piece loaded = from[piece];
                #pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    x[turn][i] = Value::widen(loaded.at[i]);
                    squares += x[turn][i] * x[turn][i];
                }
            }
        }
        const float factor = rsqrtf(warp_sum(squares) / HEAD_DIM + (float)a.eps);
        if (!known && !(query && a.compact)) continue;
        #pragma unroll
        for (int turn = 0; turn < PER_LANE; turn++) {
            const int piece = turn * 32 + lane;
            if (piece < PIECES) {
                Piece turned;
                #pragma unroll
                for (int i = 0; i < CHUNK; i += 2) {
                    const int at = piece * CHUNK + i;
                    const float c = known ? cos[at / 2 * a.cos.pair] : 0.0f, s = known ? sin[at / 2 * a.sin.pair] : 0.0f;
                    const float real = x[turn][i] * factor * Weight::widen(weight[at]);
                    const float imaginary = x[turn][i + 1] * factor * Weight::widen(weight[at + 1]);
                    turned.at[i] = Value::narrow(real * c - imaginary * s);
                    turned.at[i + 1] = Value::narrow(imaginary * c + real * s);
                }
                to[piece] = turned;
            }
        }
    }
}
"""

K2 = r"""
// One token per block, its row in registers. WIDTH, CHUNK elements per access, THREADS; GATED, NORMED, CLAMP.

struct Tokens { void* data; i64 batch, token; };
struct Modulation { const void* data; i64 row; };
struct Arguments {
    Tokens x, y, residual, normed;
    Modulation gate, scale, shift;
    const void* rows;
    i64 row_bytes, rows_batch, count;
    double eps;
};

typedef Chunk<value_t, CHUNK> Piece;
typedef Chunk<weight_t, CHUNK> Part;
static const int PIECES = WIDTH / CHUNK;
static const int PER_THREAD = (PIECES + THREADS - 1) / THREADS;

__device__ inline float block_sum(float x, float* shared) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
    __syncthreads();
    x = (threadIdx.x & 31) < THREADS / 32 ? shared[threadIdx.x & 31] : 0.0f;
    x = warp_sum(x);
    __syncthreads();
    return x;
}

__device__ inline Piece* place(const Tokens& x, i64 batch, i64 token) {
    return (Piece*)((value_t*)x.data + batch * x.batch + token * x.token);
}

__device__ inline const Part* part(const Modulation& x, i64 row) {
    return (const Part*)((const weight_t*)x.data + row * x.row);
}

extern "C" __global__ void gate_norm_modulate(const Arguments a) {
    __shared__ float shared[32];
    const i64 token = blockIdx.x, batch = blockIdx.y;
    i64 row = a.count > 1 ? batch : 0;
    if (a.row_bytes) row = row_number(a.rows, a.row_bytes, batch * a.rows_batch + token);
    const bool taken = row >= 0 && row < a.count;
    if (!taken) row = 0;
    const Piece *x = place(a.x, batch, token), *y = place(a.y, batch, token);
    Piece *residual = place(a.residual, batch, token), *normed = place(a.normed, batch, token);
    const Part *gate = part(a.gate, row), *scale = part(a.scale, row), *shift = part(a.shift, row);
    float kept[PER_THREAD][CHUNK];
    float sum = 0.0f;
    #pragma unroll
    for (int turn = 0; turn < PER_THREAD; turn++) {
        const int piece = turn * THREADS + threadIdx.x;
        if (piece < PIECES) {
            const Piece loaded = x[piece];
            #pragma unroll
            for (int i = 0; i < CHUNK; i++) kept[turn][i] = Value::widen(loaded.at[i]);
            if (GATED) {
                const Piece change = y[piece];
                const Part factor = gate[piece];
                Piece rounded;
                #pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    float value = kept[turn][i] + (taken ? Weight::widen(factor.at[i]) : 0.0f) * Value::widen(change.at[i]);
                    if (CLAMP) value = value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;  // NaN stays
                    rounded.at[i] = Value::narrow(value);
                    kept[turn][i] = Value::widen(rounded.at[i]);
                }
                residual[piece] = rounded;
            }
            #pragma unroll
            for (int i = 0; i < CHUNK; i++) sum += kept[turn][i];
        }
    }
    if (!NORMED) return;
    const float mean = block_sum(sum, shared) / WIDTH;
    float squares = 0.0f;
    #pragma unroll
    for (int turn = 0; turn < PER_THREAD; turn++) {
        if (turn * THREADS + threadIdx.x < PIECES) {
            #pragma unroll
            for (int i = 0; i < CHUNK; i++) squares += (kept[turn][i] - mean) * (kept[turn][i] - mean);
        }
    }
    const float factor = rsqrtf(block_sum(squares, shared) / WIDTH + (float)a.eps);
    #pragma unroll
    for (int turn = 0; turn < PER_THREAD; turn++) {
        const int piece = turn * THREADS + threadIdx.x;
        if (piece < PIECES) {
            const Part by = scale[piece], plus = shift[piece];
            Piece out;
            #pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const float value = (kept[turn][i] - mean) * factor;
                const float wide = taken ? value * (1.0f + Weight::widen(by.at[i])) + Weight::widen(plus.at[i]) : value;
                out.at[i] = Value::narrow(wide);
            }
            normed[piece] = out;
        }
    }
}
"""

K4 = r"""
// One token per warp. CHANNELS; GUIDED, RULE (0 plain, 1 step1x, 2 qwen), VELOCITY. Latents are stored as weights are.

struct Tokens { void* data; i64 batch, token; };
struct Arguments {
    Tokens latents, cond, uncond, out, velocity;
    const float *sigma, *sigma_next;
    i64 tokens;
    double scale, power, truncate;
};

static const int PER_LANE = (CHANNELS + 31) / 32;

__device__ inline i64 place(const Tokens& x, i64 batch, i64 token) { return batch * x.batch + token * x.token; }

extern "C" __global__ void guided_step(const Arguments a) {
    const i64 token = (i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), batch = blockIdx.y;
    const int lane = threadIdx.x & 31;
    if (token >= a.tokens) return;  // whole warps at a time
    const float sigma = *a.sigma, step = *a.sigma_next - sigma;
    const value_t* cond = (const value_t*)a.cond.data + place(a.cond, batch, token);
    float v[PER_LANE];
    #pragma unroll
    for (int turn = 0; turn < PER_LANE; turn++) {
        const int at = turn * 32 + lane;
        v[turn] = at < CHANNELS ? Value::widen(cond[at]) : 0.0f;
    }
    if (GUIDED) {
        const value_t* uncond = (const value_t*)a.uncond.data + place(a.uncond, batch, token);
        float base[PER_LANE], change[PER_LANE];
        float wanted = 0.0f, length = 0.0f, found = 0.0f;
        #pragma unroll
        for (int turn = 0; turn < PER_LANE; turn++) {
            const int at = turn * 32 + lane;
            base[turn] = at < CHANNELS ? Value::widen(uncond[at]) : 0.0f;
            change[turn] = v[turn] - base[turn];
            wanted += v[turn] * v[turn];
            length += change[turn] * change[turn];
        }
        float divisor = 1.0f;
        if (RULE == 1) {
            length = sqrtf(warp_sum(length));
            if (length > 1.0f && (a.truncate <= 0.0 || sigma > (float)a.truncate)) divisor = powf(length, (float)a.power);
        }
        #pragma unroll
        for (int turn = 0; turn < PER_LANE; turn++) {
            v[turn] = base[turn] + (float)a.scale * (change[turn] / divisor);
            found += v[turn] * v[turn];
        }
        if (RULE == 2) {
            const float factor = sqrtf(warp_sum(wanted)) / sqrtf(warp_sum(found));
            #pragma unroll
            for (int turn = 0; turn < PER_LANE; turn++) v[turn] *= factor;
        }
    }
    const weight_t* latents = (const weight_t*)a.latents.data + place(a.latents, batch, token);
    value_t* out = (value_t*)a.out.data + place(a.out, batch, token);
    value_t* velocity = (value_t*)a.velocity.data + place(a.velocity, batch, token);
    #pragma unroll
    for (int turn = 0; turn < PER_LANE; turn++) {
        const int at = turn * 32 + lane;
        if (at < CHANNELS) {
            out[at] = Value::narrow(Weight::widen(latents[at]) + step * v[turn]);
            if (VELOCITY) velocity[at] = Value::narrow(v[turn]);
        }
    }
}
"""

KERNELS = {"qk_norm_rope": K1, "gate_norm_modulate": K2, "guided_step": K4}
