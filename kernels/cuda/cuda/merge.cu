// merge: partials over disjoint sets of keys, joined. Grid: query heads; a thread takes elements of one head.
#include "softmax.cuh"

constexpr u32 MAX_SETS = 8;

struct MergeParams {
    u64 o[MAX_SETS];   // f32 [count, heads, head_dim]
    u64 lse[MAX_SETS]; // f32 [count, heads], base 2; -inf for an empty set, whose o is not read
    u32 count[MAX_SETS];
    u64 out;     // f32 [heads, head_dim]
    u64 out_lse; // f32 [heads]
    u32 sets;
    u32 heads;
    u32 head_dim;
};

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ MergeParams params) {
    const u32 head = blockIdx.x;
    float m = NEGATIVE_INFINITY;
    for (u32 set = 0; set < params.sets; ++set) {
        const float* lse = reinterpret_cast<const float*>(params.lse[set]);
        for (u32 i = 0; i < params.count[set]; ++i) m = fmaxf(m, lse[i * params.heads + head]);
    }
    for (u32 d = threadIdx.x; d < params.head_dim; d += blockDim.x) {
        float sum = 0.0f, out = 0.0f;
        for (u32 set = 0; set < params.sets; ++set) {
            const float* lse = reinterpret_cast<const float*>(params.lse[set]);
            const float* o = reinterpret_cast<const float*>(params.o[set]);
            for (u32 i = 0; i < params.count[set]; ++i) {
                const u64 row = u64(i) * params.heads + head;
                const float w = weight(lse[row], m);
                if (w > 0.0f) {
                    sum += w;
                    out += w * o[row * params.head_dim + d];
                }
            }
        }
        reinterpret_cast<float*>(params.out)[head * params.head_dim + d] = sum > 0.0f ? out / sum : 0.0f;
        if (d == 0) reinterpret_cast<float*>(params.out_lse)[head] = log_sum(m, sum);
    }
}
