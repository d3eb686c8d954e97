// copy_rows: keys and values from one view to another, whatever their layouts, with conversion to or from e4m3.
//
// D / 8 threads (or D / 16 between e4m3 rows) hold a row's key and value in registers, 16 bytes of the wider side each,
// so both sides are read and written in whole words; to e4m3 they agree on the row's largest magnitude by shuffles.
#include "kv.cuh"

struct PackParams {
    View from, to;
    u32 kv_heads;
};

constexpr float E4M3_MAX = 448.0f;
constexpr float SMALLEST = 1e-30f; // rows below it become zeros: their scale's inverse would not be finite

template <u32 DTYPE>
__device__ __forceinline__ void unpack8(float (&x)[8], Word4 word) {
    const u32 raw[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u16 bits = u16(raw[i / 2] >> (16 * (i & 1)));
        x[i] = DTYPE == BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
}

template <u32 DTYPE>
__device__ __forceinline__ u32 pack2(float low, float high) {
    return DTYPE == BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// One row of D: this thread's part `lane` of it.
template <u32 FROM, u32 TO, u32 D>
__device__ __forceinline__ void copy_row(const char* from, const char* from_scale, char* to, char* to_scale, u32 lane,
                                         u32 mask) {
    if constexpr (FROM == TO) {
        *reinterpret_cast<Word4*>(to + 16 * lane) = load_once(from + 16 * lane);
        if (FROM == E4M3 && lane == 0) *reinterpret_cast<float*>(to_scale) = *reinterpret_cast<const float*>(from_scale);
    } else if constexpr (TO == E4M3) {
        float x[8];
        unpack8<FROM>(x, load_once(from + 16 * lane));
        float most = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
        for (u32 step = D / 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(mask, most, step));
        const bool small = most < SMALLEST;
        const float scale = small ? 1.0f : most / E4M3_MAX, inverse = small ? 1.0f : E4M3_MAX / most;
        u32 out[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            out[i] = pack_e4m3(x[4 * i] * inverse, x[4 * i + 1] * inverse) |
                     (pack_e4m3(x[4 * i + 2] * inverse, x[4 * i + 3] * inverse) << 16);
        reinterpret_cast<u32*>(to + 8 * lane)[0] = out[0];
        reinterpret_cast<u32*>(to + 8 * lane)[1] = out[1];
        if (lane == 0) *reinterpret_cast<float*>(to_scale) = scale;
    } else {
        const u32* words = reinterpret_cast<const u32*>(from + 8 * lane);
        const float scale = *reinterpret_cast<const float*>(from_scale);
        u32 out[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 pair = e4m3_to_f16((words[i / 2] >> (16 * (i & 1))) & 0xffffu);
            out[i] = pack2<TO>(f16_to_f32(u16(pair)) * scale, f16_to_f32(u16(pair >> 16)) * scale);
        }
        *reinterpret_cast<Word4*>(to + 16 * lane) = Word4{out[0], out[1], out[2], out[3]};
    }
}

template <u32 FROM, u32 TO, u32 D>
__device__ __forceinline__ void copy_rows(const PackParams& params) {
    constexpr u32 LANES = FROM == E4M3 && TO == E4M3 ? D / 16 : D / 8;
    const u32 lane = threadIdx.x % LANES;
    const u32 mask = LANES == 32 ? FULL_WARP : ((1u << LANES) - 1u) << ((threadIdx.x & 31u) / LANES * LANES);
    const u32 head = blockIdx.y;
    const u32 tokens = min(tokens_of(params.from, head), params.to.tokens);
    const u32 rows_per_cta = blockDim.x / LANES;
    for (u32 token = blockIdx.x * rows_per_cta + threadIdx.x / LANES; token < tokens; token += gridDim.x * rows_per_cta) {
        const u32 inside = token & 15u;
        Place source = place(params.from, head, token - inside), target = place(params.to, head, token - inside);
        source.offset += inside * params.from.token_stride;
        source.scale_offset += inside * params.from.scale_token_stride;
        target.offset += inside * params.to.token_stride;
        target.scale_offset += inside * params.to.scale_token_stride;
        auto in = [](u64 base, u64 offset) { return reinterpret_cast<const char*>(base + offset); };
        auto out = [](u64 base, u64 offset) { return reinterpret_cast<char*>(base + offset); };
        copy_row<FROM, TO, D>(in(params.from.k, source.offset), in(params.from.k_scale, source.scale_offset),
                              out(params.to.k, target.offset), out(params.to.k_scale, target.scale_offset), lane, mask);
        copy_row<FROM, TO, D>(in(params.from.v, source.offset), in(params.from.v_scale, source.scale_offset),
                              out(params.to.v, target.offset), out(params.to.v_scale, target.scale_offset), lane, mask);
    }
}

#define COPY(NAME, FROM, TO, D)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ PackParams params) {                \
        copy_rows<FROM, TO, D>(params);                                                                                \
    }

// Rows that are copied as they are: bf16 and f16 alike.
COPY(copy_16_64, BF16, BF16, 64)
COPY(copy_16_128, BF16, BF16, 128)
COPY(copy_e4m3_64, E4M3, E4M3, 64)
COPY(copy_e4m3_128, E4M3, E4M3, 128)
COPY(bf16_to_e4m3_64, BF16, E4M3, 64)
COPY(bf16_to_e4m3_128, BF16, E4M3, 128)
COPY(f16_to_e4m3_64, F16, E4M3, 64)
COPY(f16_to_e4m3_128, F16, E4M3, 128)
COPY(e4m3_to_bf16_64, E4M3, BF16, 64)
COPY(e4m3_to_bf16_128, E4M3, BF16, 128)
COPY(e4m3_to_f16_64, E4M3, F16, 64)
COPY(e4m3_to_f16_128, E4M3, F16, 128)

struct GatherParams {
    u64 from;  // pages
    u64 to;    // [gridDim.y] pages, end to end
    u64 pages; // u32 [gridDim.y]
    u32 words; // of 16 bytes, of a page
};

// Pages as they are, one behind the other.
extern "C" __global__ void __launch_bounds__(256) gather_pages(const __grid_constant__ GatherParams params) {
    const u64 page = reinterpret_cast<const u32*>(params.pages)[blockIdx.y];
    const Word4* from = reinterpret_cast<const Word4*>(params.from) + page * params.words;
    Word4* to = reinterpret_cast<Word4*>(params.to) + u64(blockIdx.y) * params.words;
    const u32 step = gridDim.x * 256;
#pragma unroll 4
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < params.words; i += step) to[i] = load_once(from + i);
}
