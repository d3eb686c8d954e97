// Tiles of products x w^T whose sums stay in registers: by mma.sync anywhere, by wgmma and tensor copies on Hopper. Where the operands
// come from, and what becomes of the sums, is for those who call to say. Sums run in steps of 64 of k, four products of 16 each.
#pragma once
#include "hopper.cuh"
#include "tile.cuh"

constexpr u32 PRODUCTS_K = 64;

// The sums of BM rows of x and BN rows of w by eight warps, two by four; c[i][j] holds rows 16 i + g and + 8 and columns 8 j + 2 t and
// + 1 of the warp's own (BM / 2) x (BN / 4). `load(step, to)` begins the copies of a step's operands, 128 swizzled bytes a row: x at
// `to`, w behind it. `base` has room for three steps.
template <bool IS_BF16, u32 BM, u32 BN, class Load>
__device__ __forceinline__ void multiply_tile(float (&c)[BM / 32][BN / 32][4], u32 base, u32 steps, Load load) {
    constexpr u32 STAGES = 3, STAGE = (BM + BN) * 128, MT = BM / 32, NT = BN / 32;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
    const u32 from_m = warp / 4 * (BM / 2), from_n = warp % 4 * (BN / 4);
#pragma unroll
    for (u32 i = 0; i < MT; ++i) {
#pragma unroll
        for (u32 j = 0; j < NT; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; ++i) {
        if (i < steps) load(i, base + i * STAGE);
        commit_copies();
    }
    for (u32 step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        const u32 next = step + STAGES - 1;
        if (next < steps) load(next, base + next % STAGES * STAGE);
        commit_copies();
        const u32 at_x = base + step % STAGES * STAGE, at_w = at_x + BM * 128;
#pragma unroll
        for (u32 k = 0; k < PRODUCTS_K / 16; ++k) {
            u32 a[MT][4];
#pragma unroll
            for (u32 i = 0; i < MT; ++i)
                load_matrices(a[i], at_x + swizzle<128>(from_m + 16 * i + (lane & 15u), 2 * k + (lane >> 4)));
#pragma unroll
            for (u32 j = 0; j < NT; j += 2) {
                u32 b[4];
                load_matrices(b, at_w + swizzle<128>(from_n + 8 * (j + (lane >> 4)) + (lane & 7u),
                                                     2 * k + (lane >> 3 & 1u)));
#pragma unroll
                for (u32 i = 0; i < MT; ++i) {
                    mma<IS_BF16>(c[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma<IS_BF16>(c[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
        }
    }
}

#ifdef HAS_WGMMA

constexpr u32 WIDE_M = 128, WIDE_THREADS = 384, BOX_ROWS = 64, BOX_BYTES = BOX_ROWS * 128;
constexpr u32 COPIER_REGISTERS = 40, MULTIPLIER_REGISTERS = 232; // of a thread; together no more than 384 had at first
constexpr u32 MULTIPLYING_WARPS = 8;

// Tiles of WIDE_M rows of x by BN rows of w, one after another: a warpgroup copies, running ahead over the border of tiles; two
// multiply, 64 rows of x each, and put their sums while the next tile's operands arrive. A CTA has the tiles from blockIdx.x on
// that are gridDim.x apart, of those that `is_there(index)` is true of. `copy(index, step, to, barrier)` gives a step's tensor
// copies, x at `to` and w behind it, in boxes of 64 rows; `put(index, half, c)` takes the sums of rows from 64 half on, where a
// thread has rows g and g + 8 of its warp's 16.
template <bool IS_BF16, u32 BN, u32 STAGES, class There, class Copy, class Put>
__device__ __forceinline__ void multiply_wide(u32 tiles, u32 steps, There is_there, Copy copy, Put put) {
    constexpr u32 X_BYTES = WIDE_M * 128, STAGE = X_BYTES + BN * 128;
    extern __shared__ u8 dynamic[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    const u32 base = (shared_address(dynamic) + 1023u) & ~1023u, there = shared_address(barriers), free = there + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(there + 8 * i, 1);
            barrier_init(free + 8 * i, MULTIPLYING_WARPS);
        }
        barrier_publish();
    }
    __syncthreads();
    const u32 group = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    u32 stage = 0, phase = 0;
    const auto advance = [&] {
        const bool wraps = stage + 1 == STAGES;
        stage = wraps ? 0 : stage + 1;
        phase ^= u32(wraps);
    };
    if (group == 0) {
        registers_give_back<COPIER_REGISTERS>();
        if (threadIdx.x > 0) return;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            if (!is_there(index)) continue;
            for (u32 step = 0; step < steps; ++step) {
                // The first round finds every stage free.
                barrier_wait(free + 8 * stage, phase ^ 1u);
                barrier_expect(there + 8 * stage, STAGE);
                copy(index, step, base + stage * STAGE, there + 8 * stage);
                advance();
            }
        }
    } else {
        registers_take<MULTIPLIER_REGISTERS>();
        const auto release = [&](u32 stage) {
            __syncwarp();
            if ((threadIdx.x & 31u) == 0) barrier_arrive(free + 8 * stage);
        };
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            if (!is_there(index)) continue;
            float c[BN / 8][4];
            u32 before = 0;
            for (u32 step = 0; step < steps; ++step) {
                barrier_wait(there + 8 * stage, phase);
                const u32 x = base + stage * STAGE + (group - 1) * BOX_BYTES, w = base + stage * STAGE + X_BYTES;
                settle(c);
                wgmma_begin();
#pragma unroll
                for (u32 i = 0; i < PRODUCTS_K / 16; ++i)
                    wgmma_shared<IS_BF16>(c, wgmma_tile(x + 32 * i, 16), wgmma_tile(w + 32 * i, 16), step + i > 0);
                wgmma_commit();
                // The products of the step before are summed now.
                wgmma_wait<1>();
                if (step > 0) release(before);
                before = stage;
                advance();
            }
            wgmma_wait<0>();
            settle(c);
            release(before);
            put(index, group - 1, c);
        }
    }
}

#endif
