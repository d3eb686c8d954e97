// What the kernels of `linear` share: parameters, and the way of a sum to its place.
#pragma once
#include "tile.cuh"

struct LinearParams {
    u64 w;   // [n, k], 16 bits
    u64 x;   // [m, k], 16 bits
    u64 out; // [m, n]: 16 bits or f32
    u32 m, n, k;
    u32 how; // what becomes of a sum
};

constexpr u32 STORE_16 = 0, STORE_F32 = 1, ADD_F32 = 2;
constexpr float F16_MOST = 65504.0f;

template <bool IS_BF16>
__device__ __forceinline__ u32 round_pair(float low, float high) {
    if constexpr (IS_BF16) return pack_bf16(low, high);
    // Beyond its range f16 has only infinity, which no later layer would recover from.
    return pack_f16(fminf(fmaxf(low, -F16_MOST), F16_MOST), fminf(fmaxf(high, -F16_MOST), F16_MOST));
}

template <bool IS_BF16>
__device__ __forceinline__ void put(const LinearParams& params, u32 row, u32 column, float sum) {
    const u64 at = u64(row) * params.n + column;
    if (params.how == STORE_16) {
        reinterpret_cast<u16*>(params.out)[at] = u16(round_pair<IS_BF16>(sum, 0.0f));
    } else {
        float* out = reinterpret_cast<float*>(params.out) + at;
        *out = params.how == ADD_F32 ? *out + sum : sum;
    }
}
