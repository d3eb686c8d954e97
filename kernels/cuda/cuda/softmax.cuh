// The online softmax in base 2, and how partial results join. A state is (m, l, o): o = sum of 2^(s - m) v and
// l = sum of 2^(s - m). The empty set is m = -inf, l = 0, o = 0, and joins with anything.
#pragma once
#include "types.cuh"

__device__ __forceinline__ float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

__device__ __forceinline__ float log2_fast(float x) {
    float out;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// 2^(part - whole) where whole >= part; 0, and not NaN, when both are -inf.
__device__ __forceinline__ float weight(float part, float whole) {
    return part == NEGATIVE_INFINITY ? 0.0f : exp2_fast(part - whole);
}

__device__ __forceinline__ float log_sum(float m, float l) { return l > 0.0f ? m + __log2f(l) : NEGATIVE_INFINITY; }
