// linear: out[m, n] = sum over k of x[m, k] w[n, k], rows of k lying whole in memory on both sides.
//
// Two kernels, and which one a row of x goes through is the caller's choice, never the size's: in each the sum of an element
// runs in an order that depends on k alone, so that a row has the same bits whatever other rows there are.
//
// `few` is for rows that are sampled from: bound by reading w once. Weights lie in the 16 rows of the tensor-core tile, 8
// rows of x in its columns, and both come straight from global memory: the sum over k may take its terms in any order, so
// a thread takes whole 16-byte words of both (see keys.cuh). A CTA's warps share k and join their sums in order. Behind its share a
// warp adds products of zeros, which change no bit.
//
// `many` is for a prompt: tiles of x and w come by cp.async into swizzled stages, two ahead of their use. linear_wide.cuh has
// Hopper's own way.
#include "linear_wide.cuh"

constexpr u32 FEW_WARPS = 8, FEW_N = 16;

template <bool IS_BF16, u32 TILES>
__device__ __forceinline__ void few(const LinearParams& params) {
    constexpr u32 ROWS = 8 * TILES;
    __shared__ float sums[FEW_WARPS][ROWS][FEW_N + 1];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
    const u32 first_n = blockIdx.x * FEW_N, first_m = blockIdx.y * ROWS;
    const u32 steps = params.k / 32, begin = steps * warp / FEW_WARPS, end = steps * (warp + 1) / FEW_WARPS;
    const bool there[2] = {first_n + g < params.n, first_n + g + 8 < params.n};
    const u16* w = reinterpret_cast<const u16*>(params.w) + u64(first_n + g) * params.k + 8 * t;
    const u16* x = reinterpret_cast<const u16*>(params.x) + u64(first_m + g) * params.k + 8 * t;
    const u64 eight = 8 * u64(params.k);

    // One batch of steps is on its way while the one before is multiplied; all of a batch's loads stand before its products, for
    // the compiler moves none of them.
    constexpr u32 BATCH = TILES <= 2 ? 2 : 1; // whole lines of w, where registers allow
    struct Loaded {
        Word4 w[BATCH][2], x[BATCH][TILES];
    };
    const auto load = [&](Loaded& to, u32 step) {
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            const bool inside = step + j < end;
            to.w[j][0] = inside && there[0] ? load_once(w + 32 * (step + j)) : Word4{0, 0, 0, 0};
            to.w[j][1] = inside && there[1] ? load_once(w + eight + 32 * (step + j)) : Word4{0, 0, 0, 0};
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
                to.x[j][i] = inside && first_m + 8 * i + g < params.m
                                 ? *reinterpret_cast<const Word4*>(x + i * eight + 32 * (step + j))
                                 : Word4{0, 0, 0, 0};
        }
    };
    float c[TILES][4];
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
    const auto multiply = [&](const Loaded& from) {
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            const Word4 &low = from.w[j][0], &high = from.w[j][1];
#pragma unroll
            for (u32 i = 0; i < TILES; ++i) {
                const Word4& b = from.x[j][i];
                mma<IS_BF16>(c[i], low.x, high.x, low.y, high.y, b.x, b.y);
                mma<IS_BF16>(c[i], low.z, high.z, low.w, high.w, b.z, b.w);
            }
        }
    };
    Loaded even, odd;
    load(even, begin);
    for (u32 step = begin; step < end; step += 2 * BATCH) {
        load(odd, step + BATCH);
        multiply(even);
        load(even, step + 2 * BATCH);
        multiply(odd);
    }
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) {
        sums[warp][8 * i + 2 * t][g] = c[i][0];
        sums[warp][8 * i + 2 * t + 1][g] = c[i][1];
        sums[warp][8 * i + 2 * t][g + 8] = c[i][2];
        sums[warp][8 * i + 2 * t + 1][g + 8] = c[i][3];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * FEW_N; i += 32 * FEW_WARPS) {
        const u32 row = i / FEW_N, column = i % FEW_N;
        if (first_m + row >= params.m || first_n + column >= params.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (u32 part = 0; part < FEW_WARPS; ++part) sum += sums[part][row][column];
        put<IS_BF16>(params, first_m + row, first_n + column, sum);
    }
}

template <bool IS_BF16, u32 BM, u32 BN>
__device__ __forceinline__ void many(const LinearParams& params) {
    constexpr u32 WM = BM / 2, WN = BN / 4, MT = WM / 16, NT = WN / 8;
    extern __shared__ u8 dynamic[];
    const u32 base = (shared_address(dynamic) + 127u) & ~127u;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
    const u32 from_m = (warp / 4) * WM, from_n = (warp % 4) * WN;

    // Eight row blocks of x after another share a row block of w, while it is in the cache.
    const u32 blocks_m = (params.m + BM - 1) / BM, blocks_n = (params.n + BN - 1) / BN;
    const u32 band = blockIdx.x / (8 * blocks_n), inside = blockIdx.x % (8 * blocks_n);
    const u32 high = min(8u, blocks_m - 8 * band);
    const u32 first_m = (8 * band + inside % high) * BM, first_n = inside / high * BN;

    const u32 word = threadIdx.x % 8, own = threadIdx.x / 8;
    const auto load = [&](u32 step, u32 to) {
        const u32 k = step * PRODUCTS_K + word * 8;
        const bool inside_k = k < params.k;
#pragma unroll
        for (u32 i = 0; i < BM / 32; ++i) {
            const u32 row = own + 32 * i;
            const bool there = inside_k && first_m + row < params.m;
            const u64 at = there ? u64(first_m + row) * params.k + k : 0;
            copy_async(to + swizzle<128>(row, word), reinterpret_cast<const u16*>(params.x) + at, there);
        }
#pragma unroll
        for (u32 i = 0; i < BN / 32; ++i) {
            const u32 row = own + 32 * i;
            const bool there = inside_k && first_n + row < params.n;
            const u64 at = there ? u64(first_n + row) * params.k + k : 0;
            copy_async(to + BM * 128 + swizzle<128>(row, word), reinterpret_cast<const u16*>(params.w) + at, there);
        }
    };

    float c[MT][NT][4];
    multiply_tile<IS_BF16, BM, BN>(c, base, (params.k + PRODUCTS_K - 1) / PRODUCTS_K, load);
    const bool pairs = params.n % 2 == 0;
#pragma unroll
    for (u32 i = 0; i < MT; ++i) {
#pragma unroll
        for (u32 j = 0; j < NT; ++j) {
            const u32 column = first_n + from_n + 8 * j + 2 * t;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 row = first_m + from_m + 16 * i + g + 8 * half;
                if (row >= params.m || column >= params.n) continue;
                const float low = c[i][j][2 * half], high_sum = c[i][j][2 * half + 1];
                if (pairs && params.how == STORE_16) {
                    reinterpret_cast<u32*>(params.out)[(u64(row) * params.n + column) / 2] =
                        round_pair<IS_BF16>(low, high_sum);
                } else if (pairs && params.how == ADD_F32) {
                    float2* out = reinterpret_cast<float2*>(params.out) + (u64(row) * params.n + column) / 2;
                    const float2 before = *out;
                    *out = float2{before.x + low, before.y + high_sum};
                } else {
                    put<IS_BF16>(params, row, column, low);
                    if (column + 1 < params.n) put<IS_BF16>(params, row, column + 1, high_sum);
                }
            }
        }
    }
}

#define FEW(NAME, IS_BF16, TILES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS, TILES == 1 ? 3 : 2) NAME(const __grid_constant__ LinearParams params) {  \
        few<IS_BF16, TILES>(params);                                                                                   \
    }

FEW(few_bf16_1, true, 1)
FEW(few_bf16_2, true, 2)
FEW(few_bf16_4, true, 4)
FEW(few_f16_1, false, 1)
FEW(few_f16_2, false, 2)
FEW(few_f16_4, false, 4)

#define MANY(NAME, IS_BF16, BM, BN)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME(const __grid_constant__ LinearParams params) {           \
        many<IS_BF16, BM, BN>(params);                                                                                 \
    }

MANY(many_bf16_64, true, 64, 64)
MANY(many_bf16_128, true, 128, 128)
MANY(many_f16_64, false, 64, 64)
MANY(many_f16_128, false, 128, 128)

#ifdef HAS_WGMMA
#define MANY_WIDE(NAME, IS_BF16, BN, STAGES)                                                                           \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) NAME(const __grid_constant__ WideParams params) {    \
        many_wide<IS_BF16, BN, STAGES>(params);                                                                        \
    }

MANY_WIDE(many_wide_bf16_64, true, 64, 8)
MANY_WIDE(many_wide_bf16_128, true, 128, 6)
MANY_WIDE(many_wide_bf16_192, true, 192, 5)
MANY_WIDE(many_wide_bf16_256, true, 256, 4)
MANY_WIDE(many_wide_f16_64, false, 64, 8)
MANY_WIDE(many_wide_f16_128, false, 128, 6)
MANY_WIDE(many_wide_f16_192, false, 192, 5)
MANY_WIDE(many_wide_f16_256, false, 256, 4)
#endif
