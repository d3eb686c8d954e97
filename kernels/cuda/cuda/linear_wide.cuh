// linear for many rows on Hopper: products by wgmma, tiles by the tensor copy engine.
//
// A row has the same bits in all widths, so the number of rows may choose.
#pragma once
#include "linear.cuh"
#include "products.cuh"

#ifdef HAS_WGMMA

struct WideParams {
    TensorMap x, w; // rows of k
    LinearParams base;
};

constexpr u32 BAND = 8;

// Where tile `index` begins: a band of row blocks of x shares a row block of w while it is in the cache.
struct WideTile {
    u32 first_m, first_n;

    __device__ __forceinline__ WideTile(u32 index, u32 blocks_m, u32 blocks_n, u32 width) {
        const u32 band = index / (BAND * blocks_n), inside = index % (BAND * blocks_n);
        const u32 high = min(BAND, blocks_m - BAND * band);
        first_m = (BAND * band + inside % high) * WIDE_M;
        first_n = inside / high * width;
    }
};

// Word i of lane t of each four becomes word t of lane i.
__device__ __forceinline__ void transpose_words(u32 (&x)[4], u32 t) {
#pragma unroll
    for (u32 step = 1; step < 4; step *= 2) {
        const bool upper = t & step;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (i & step) continue;
            const u32 other = __shfl_xor_sync(FULL_WARP, upper ? x[i] : x[i + step], step);
            if (upper)
                x[i] = other;
            else
                x[i + step] = other;
        }
    }
}

// Sums of a warpgroup's 64 rows; a thread has rows g and g + 8 of its warp's 16.
template <bool IS_BF16, u32 BN>
__device__ __forceinline__ void put_tile(const LinearParams& params, const float (&c)[BN / 8][4], u32 first_m, u32 first_n) {
    const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 row = first_m + threadIdx.x / 32 % 4 * 16 + g + 8 * half;
        const bool there = row < params.m;
        const u64 at = u64(there ? row : 0) * params.n + first_n;
        if (params.how == STORE_16 && params.n % 8 == 0) {
#pragma unroll
            for (u32 j = 0; j < BN / 8; j += 4) {
                u32 words[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) words[i] = round_pair<IS_BF16>(c[j + i][2 * half], c[j + i][2 * half + 1]);
                transpose_words(words, t);
                if (there && first_n + 8 * (j + t) < params.n)
                    *reinterpret_cast<Word4*>(reinterpret_cast<u16*>(params.out) + at + 8 * (j + t)) =
                        Word4{words[0], words[1], words[2], words[3]};
            }
        } else if (params.how != STORE_16 && params.n % 2 == 0) {
            float2* out = reinterpret_cast<float2*>(reinterpret_cast<float*>(params.out) + at) + t;
#pragma unroll
            for (u32 j = 0; j < BN / 8; j += 8) {
                float2 before[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    const bool inside = there && first_n + 8 * (j + i) + 2 * t < params.n;
                    before[i] = inside && params.how == ADD_F32 ? out[4 * (j + i)] : float2{0.0f, 0.0f};
                }
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    const bool inside = there && first_n + 8 * (j + i) + 2 * t < params.n;
                    const float2 sum = {before[i].x + c[j + i][2 * half], before[i].y + c[j + i][2 * half + 1]};
                    if (inside) out[4 * (j + i)] = sum;
                }
            }
        } else {
#pragma unroll
            for (u32 j = 0; j < BN / 8; ++j) {
                const u32 column = first_n + 8 * j + 2 * t;
                if (there && column < params.n) put<IS_BF16>(params, row, column, c[j][2 * half]);
                if (there && column + 1 < params.n) put<IS_BF16>(params, row, column + 1, c[j][2 * half + 1]);
            }
        }
    }
}

// Grid: any number of CTAs.
template <bool IS_BF16, u32 BN, u32 STAGES>
__device__ __forceinline__ void many_wide(const WideParams& params) {
    const u32 blocks_m = (params.base.m + WIDE_M - 1) / WIDE_M, blocks_n = (params.base.n + BN - 1) / BN;
    multiply_wide<IS_BF16, BN, STAGES>(
        blocks_m * blocks_n, (params.base.k + PRODUCTS_K - 1) / PRODUCTS_K, [](u32) { return true; },
        [&](u32 index, u32 step, u32 to, u32 barrier) {
            const WideTile tile(index, blocks_m, blocks_n, BN);
#pragma unroll
            for (u32 i = 0; i < WIDE_M / BOX_ROWS; ++i)
                copy_tensor(to + i * BOX_BYTES, params.x, barrier, step * PRODUCTS_K, int(tile.first_m + i * BOX_ROWS), 0, 0);
#pragma unroll
            for (u32 i = 0; i < BN / BOX_ROWS; ++i)
                copy_tensor(to + WIDE_M * 128 + i * BOX_BYTES, params.w, barrier, step * PRODUCTS_K,
                            int(tile.first_n + i * BOX_ROWS), 0, 0);
        },
        [&](u32 index, u32 half, const float (&c)[BN / 8][4]) {
            const WideTile tile(index, blocks_m, blocks_n, BN);
            put_tile<IS_BF16, BN>(params.base, c, tile.first_m + half * 64, tile.first_n);
        });
}

#endif
