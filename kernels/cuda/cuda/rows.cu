// What a forward does to the rows of its tokens between products and attention: embedding, norm, rope, gate, rounding.
//
// The residual stream is f32; what products are made of has 16 bits. Every row is the work of one CTA or of threads of
// their own, so a row's bits do not depend on the others.
#include "types.cuh"

template <bool IS_BF16>
__device__ __forceinline__ float widen(u16 bits) {
    return IS_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

template <bool IS_BF16>
__device__ __forceinline__ u32 round_pair(float low, float high) {
    if constexpr (IS_BF16) return pack_bf16(low, high);
    constexpr float MOST = 65504.0f; // beyond it f16 has only infinity
    return pack_f16(fminf(fmaxf(low, -MOST), MOST), fminf(fmaxf(high, -MOST), MOST));
}

template <bool IS_BF16>
__device__ __forceinline__ u16 round_one(float x) {
    return u16(round_pair<IS_BF16>(x, 0.0f));
}

struct EmbedParams {
    u64 table;  // [vocab, hidden], 16 bits
    u64 tokens; // u32 [rows], below vocab
    u64 out;    // f32 [rows, hidden]
    u32 hidden;
};

template <bool IS_BF16>
__device__ __forceinline__ void embed(const EmbedParams& params) {
    const u32 row = blockIdx.x, token = reinterpret_cast<const u32*>(params.tokens)[row];
    const u32* from = reinterpret_cast<const u32*>(params.table) + u64(token) * (params.hidden / 2);
    float2* to = reinterpret_cast<float2*>(params.out) + u64(row) * (params.hidden / 2);
    for (u32 i = threadIdx.x; i < params.hidden / 2; i += blockDim.x) {
        const u32 pair = from[i];
        to[i] = float2{widen<IS_BF16>(u16(pair)), widen<IS_BF16>(u16(pair >> 16))};
    }
}

struct NormParams {
    u64 x;      // f32 [rows, hidden]
    u64 weight; // f32 [hidden]
    u64 out;    // [rows, hidden], 16 bits
    u32 hidden; // a multiple of 4
    float epsilon;
};

constexpr u32 NORM_THREADS = 256;

template <bool IS_BF16>
__device__ __forceinline__ void norm(const NormParams& params) {
    __shared__ float parts[NORM_THREADS / 32];
    const float4* x = reinterpret_cast<const float4*>(params.x) + u64(blockIdx.x) * (params.hidden / 4);
    const float4* weight = reinterpret_cast<const float4*>(params.weight);
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < params.hidden / 4; i += NORM_THREADS) {
        const float4 v = x[i];
        sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    if ((threadIdx.x & 31u) == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < NORM_THREADS / 32; ++i) sum += parts[i];
    const float factor = rsqrtf(sum / float(params.hidden) + params.epsilon);
    uint2* out = reinterpret_cast<uint2*>(params.out) + u64(blockIdx.x) * (params.hidden / 4);
    for (u32 i = threadIdx.x; i < params.hidden / 4; i += NORM_THREADS) {
        const float4 v = x[i], w = weight[i];
        out[i] = uint2{round_pair<IS_BF16>(v.x * factor * w.x, v.y * factor * w.y),
                       round_pair<IS_BF16>(v.z * factor * w.z, v.w * factor * w.w)};
    }
}

struct GateParams {
    u64 gate_up; // [rows, 2, inner], 16 bits
    u64 out;     // [rows, inner], 16 bits
    u32 inner;   // a multiple of 2
};

// silu(gate) * up, with silu(x) = x / (1 + e^-x).
template <bool IS_BF16>
__device__ __forceinline__ void gate(const GateParams& params) {
    const u32 pairs = params.inner / 2;
    const u32* gates = reinterpret_cast<const u32*>(params.gate_up) + u64(blockIdx.x) * 2 * pairs;
    u32* out = reinterpret_cast<u32*>(params.out) + u64(blockIdx.x) * pairs;
    for (u32 i = blockIdx.y * blockDim.x + threadIdx.x; i < pairs; i += gridDim.y * blockDim.x) {
        const u32 a = gates[i], b = gates[pairs + i];
        const float low = widen<IS_BF16>(u16(a)), high = widen<IS_BF16>(u16(a >> 16));
        out[i] = round_pair<IS_BF16>(low / (1.0f + __expf(-low)) * widen<IS_BF16>(u16(b)),
                                     high / (1.0f + __expf(-high)) * widen<IS_BF16>(u16(b >> 16)));
    }
}

struct RopeParams {
    u64 qkv;       // [rows, q_heads + 2 kv_heads, d], 16 bits
    u64 positions; // u32 [rows]
    u64 slots;     // u32 [rows]: page * page_tokens + row in the page; NOWHERE is not written
    u64 turns;     // f32 [positions, dims / 2, 2]: cosine, sine
    u64 q;         // [rows, q_heads, d], 16 bits
    u64 pool;      // pages of [2, kv_heads, page_tokens, d], 16 bits; 0: queries alone
    u32 q_heads, kv_heads, d;
    u32 dims;        // rotated elements of a head, even
    u32 halves;      // pairs are (i, i + dims / 2); else (2 i, 2 i + 1)
    u32 page_tokens;
    u32 heads;       // of a row of `qkv`
};

constexpr u32 NOWHERE = 0xffffffffu;

// Rotates queries and keys, and puts keys and values into their pages. A thread takes one pair of elements.
template <bool IS_BF16>
__device__ __forceinline__ void rope(const RopeParams& params) {
    const u32 row = blockIdx.x, pairs = params.d / 2, turned = params.dims / 2;
    const u32 position = reinterpret_cast<const u32*>(params.positions)[row];
    const u32 slot = params.pool == 0 ? NOWHERE : reinterpret_cast<const u32*>(params.slots)[row];
    const float2* turns = reinterpret_cast<const float2*>(params.turns) + u64(position) * turned;
    const u16* from = reinterpret_cast<const u16*>(params.qkv) + u64(row) * params.heads * params.d;
    const u64 plane = u64(params.kv_heads) * params.page_tokens * params.d;
    u16* page = reinterpret_cast<u16*>(params.pool) + u64(slot / params.page_tokens) * 2 * plane;
    const u32 inside = slot % params.page_tokens;
    const u32 last = slot == NOWHERE ? params.q_heads : params.q_heads + 2 * params.kv_heads;
    for (u32 i = threadIdx.x; i < last * pairs; i += blockDim.x) {
        const u32 head = i / pairs, pair = i % pairs;
        const bool is_value = head >= params.q_heads + params.kv_heads;
        u32 first = 2 * pair, second = first + 1;
        if (params.halves && pair < turned) {
            first = pair;
            second = pair + turned;
        }
        const float a = widen<IS_BF16>(from[head * params.d + first]), b = widen<IS_BF16>(from[head * params.d + second]);
        float2 turn = {1.0f, 0.0f};
        if (!is_value && pair < turned) turn = turns[pair];
        u16* to;
        if (head < params.q_heads) {
            to = reinterpret_cast<u16*>(params.q) + (u64(row) * params.q_heads + head) * params.d;
        } else {
            const u32 kv_head = is_value ? head - params.q_heads - params.kv_heads : head - params.q_heads;
            to = page + (is_value ? plane : 0) + (u64(kv_head) * params.page_tokens + inside) * params.d;
        }
        to[first] = round_one<IS_BF16>(a * turn.x - b * turn.y);
        to[second] = round_one<IS_BF16>(a * turn.y + b * turn.x);
    }
}

struct RoundParams {
    u64 from; // f32
    u64 to;   // 16 bits
    u32 pairs;
};

template <bool IS_BF16>
__device__ __forceinline__ void round_all(const RoundParams& params) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= params.pairs) return;
    const float2 x = reinterpret_cast<const float2*>(params.from)[i];
    reinterpret_cast<u32*>(params.to)[i] = round_pair<IS_BF16>(x.x, x.y);
}

struct NoiseParams {
    u64 to; // 16 bits
    u64 pairs;
    u64 seed;
    float most; // times 2^-31
};

// Numbers that look random and depend on nothing but the seed and their place; the mixing is splitmix64's.
template <bool IS_BF16>
__device__ __forceinline__ void noise(const NoiseParams& params) {
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < params.pairs; i += u64(gridDim.x) * blockDim.x) {
        u64 x = params.seed + (i + 1) * 0x9e3779b97f4a7c15ull;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        reinterpret_cast<u32*>(params.to)[i] =
            round_pair<IS_BF16>(float(int(u32(x))) * params.most, float(int(u32(x >> 32))) * params.most);
    }
}

#define BOTH(NAME, PARAMS, WORK)                                                                                       \
    extern "C" __global__ void NAME##_bf16(const __grid_constant__ PARAMS params) { WORK<true>(params); }              \
    extern "C" __global__ void NAME##_f16(const __grid_constant__ PARAMS params) { WORK<false>(params); }

BOTH(embed, EmbedParams, embed)
BOTH(norm, NormParams, norm)
BOTH(gate, GateParams, gate)
BOTH(rope, RopeParams, rope)
BOTH(round, RoundParams, round_all)
BOTH(noise, NoiseParams, noise)
