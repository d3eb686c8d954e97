// key_scores: dot products of each query head with every key of its KV head. Grid: (CTAs, groups), as in decode.cu.
#include "keys.cuh"

struct ScoresParams {
    View view;
    u64 q;   // [q_heads, D]
    u64 out; // f32 [q_heads, view.tokens]; -inf past the head's length
    float scale;
    u32 q_dtype;
    u32 heads_per_kv;
    u32 groups_per_kv;
};

template <u32 DTYPE, u32 D>
__device__ __forceinline__ void key_scores(const ScoresParams& params) {
    __shared__ Word4 query[Keys<DTYPE, D>::QUERY_WORDS * 32];
    const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
    const u32 kv_head = blockIdx.y / params.groups_per_kv, part = blockIdx.y % params.groups_per_kv;
    const u32 first_head = kv_head * params.heads_per_kv + part * 8;
    const u32 heads = min(8u, params.heads_per_kv - part * 8);
    Keys<DTYPE, D>::store_query(query, reinterpret_cast<const void*>(params.q), params.q_dtype, first_head + g, g < heads);
    __syncthreads();

    const View& view = params.view;
    const u32 length = tokens_of(view, kv_head);
    const u32 step = gridDim.x * (blockDim.x / 32) * 16;
    float* out = reinterpret_cast<float*>(params.out);
    Keys<DTYPE, D> keys;
    Place at{0, 0};
    auto take = [&](u32 first) {
        const u32 count = length > first ? length - first : 0;
        if (count > 0) at = place(view, kv_head, first);
        keys.load(view, at.offset, count);
    };
    u32 first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 16;
    if (first < view.tokens) take(first);
    while (first < view.tokens) {
        const u32 count = length > first ? length - first : 0;
        float s[4], k_scale[2] = {1.0f, 1.0f};
        if constexpr (DTYPE == E4M3) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u64 offset = at.scale_offset + (g + 8 * i) * view.scale_token_stride;
                if (g + 8 * i < count) k_scale[i] = *reinterpret_cast<const float*>(view.k_scale + offset);
            }
        }
        keys.dot(s, query);
        const u32 next = first + step;
        if (next < view.tokens) take(next); // on their way while these scores are written
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 key = g + 8 * (i >> 1), head = 2 * t + (i & 1u);
            if (first + key < view.tokens && head < heads)
                out[u64(first_head + head) * view.tokens + first + key] =
                    key < count ? s[i] * k_scale[i >> 1] * params.scale : NEGATIVE_INFINITY;
        }
        first = next;
    }
}

#define SCORES(NAME, DTYPE, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 3) NAME(const __grid_constant__ ScoresParams params) {           \
        key_scores<DTYPE, D>(params);                                                                                  \
    }

SCORES(scores_bf16_64, BF16, 64)
SCORES(scores_bf16_128, BF16, 128)
SCORES(scores_f16_64, F16, 64)
SCORES(scores_f16_128, F16, 128)
SCORES(scores_e4m3_64, E4M3, 64)
SCORES(scores_e4m3_128, E4M3, 128)
