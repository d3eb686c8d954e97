// top_k: indices of each row's k largest scores, in rising order; ties go to the lower index. Of one or two sets of rows.
//
// Long rows have a CTA each. Radix selection on keys that order as the numbers do: three passes of 11, 11 and 10 bits find the k-th largest key
// exactly, then each warp counts and writes what its stretch of the row has above it, and as many equals as are left.
//
// Short rows, of which there are many (a list of key blocks for every row block and head), stay in the registers of a warp or of
// eight: the k-th largest key is found bit by bit, each by one count.
#include "types.cuh"

struct TopKSet {
    u64 scores;  // f32 [rows, n]
    u64 out;     // u32 [rows, k]
    u64 lengths; // u32 [rows, 2]: n and k of each row, at most those below; 0: those below
    u32 n;
    u32 k; // at most n
    u32 score_stride, out_stride;
};

struct TopKParams {
    TopKSet sets[2];
    u32 rows; // of the first set; the rest are the second's
    u32 all;
};

constexpr u32 THREADS = 1024, BINS = 2048, COPIES = 4;

// How many scores a row has (0), and how many are chosen (1).
__device__ __forceinline__ u32 length(const TopKSet& set, u64 row, u32 which) {
    if (set.lengths != 0) return __ldg(reinterpret_cast<const u32*>(set.lengths) + 2 * row + which);
    return which == 0 ? set.n : set.k;
}

// A total order of f32's bits: -NaN < -inf < ... < -0 = +0 < ... < inf < NaN.
__device__ __forceinline__ u32 ordered(u32 bits) {
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls `visit(key)` for scores [begin, end), in any order, by `step` threads of which this is `thread`: a row takes five
// passes, so all that counts is how many loads are in flight.
template <class Visit>
__device__ __forceinline__ void each(const u32* scores, u32 begin, u32 end, u32 thread, u32 step, Visit visit) {
    constexpr u32 WORDS = 4;
    const u32 head = min(end, begin + u32((16 - (u64(scores + begin) & 15u)) % 16 / 4)); // first 16-byte border
    if (begin + thread < head) visit(ordered(scores[begin + thread]));
    const Word4* words = reinterpret_cast<const Word4*>(scores + head);
    const u32 count = (end - head) / 4;
    u32 i = thread;
    for (; i + (WORDS - 1) * step < count; i += WORDS * step) {
        Word4 x[WORDS];
#pragma unroll
        for (u32 j = 0; j < WORDS; ++j) x[j] = words[i + j * step];
#pragma unroll
        for (u32 j = 0; j < WORDS; ++j) {
            visit(ordered(x[j].x));
            visit(ordered(x[j].y));
            visit(ordered(x[j].z));
            visit(ordered(x[j].w));
        }
    }
    for (; i < count; i += step) {
        const Word4 x = words[i];
        visit(ordered(x.x));
        visit(ordered(x.y));
        visit(ordered(x.z));
        visit(ordered(x.w));
    }
    const u32 tail = head + 4 * count + thread;
    if (tail < end) visit(ordered(scores[tail]));
}

struct Selected {
    u32 bin, rest;
};

// The bin in which the `wanted`-th entry from the top lies, and which one it is inside. By one warp.
__device__ __forceinline__ Selected select_bin(const u32* bins, u32 wanted) {
    constexpr u32 PER_LANE = BINS / 32;
    const u32 lane = threadIdx.x & 31u;
    u32 own = 0;
    for (u32 i = 0; i < PER_LANE; ++i) own += bins[lane * PER_LANE + ((i + lane) & (PER_LANE - 1))];
    u32 above = own; // becomes: entries in the bins of this lane and those above
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_down_sync(FULL_WARP, above, step);
        if (lane + step < 32) above += other;
    }
    const u32 before = above - own;
    Selected found{0, 0};
    if (before < wanted && wanted <= above) {
        u32 rest = wanted - before, bin = (lane + 1) * PER_LANE - 1;
        while (rest > bins[bin]) rest -= bins[bin--];
        found = {bin, rest};
    }
    const u32 owner = __ffs(__ballot_sync(FULL_WARP, before < wanted && wanted <= above)) - 1;
    found.bin = __shfl_sync(FULL_WARP, found.bin, owner);
    found.rest = __shfl_sync(FULL_WARP, found.rest, owner);
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS) top_k(const __grid_constant__ TopKParams params) {
    __shared__ u32 bins[COPIES][BINS];
    __shared__ Selected selected;
    __shared__ u32 above_of[THREADS / 32], equal_of[THREADS / 32];
    const bool second = blockIdx.x >= params.rows;
    const TopKSet& set = params.sets[second];
    const u64 row = blockIdx.x - (second ? params.rows : 0);
    const u32* scores = reinterpret_cast<const u32*>(set.scores) + row * set.score_stride;
    u32* out = reinterpret_cast<u32*>(set.out) + row * set.out_stride;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
    const u32 n = length(set, row, 0), k = length(set, row, 1);
    if (k == 0) return;

    u32 prefix = 0, wanted = k;
    const u32 shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
#pragma unroll
    for (u32 pass = 0; pass < 3; ++pass) {
        const u32 shift = shifts[pass], width = widths[pass];
        for (u32 i = threadIdx.x; i < COPIES * BINS; i += THREADS) (&bins[0][0])[i] = 0;
        __syncthreads();
        each(scores, 0, n, threadIdx.x, THREADS, [&](u32 key) {
            const bool alike = pass == 0 || (key >> (shift + width)) == prefix;
            if (alike) atomicAdd(&bins[warp % COPIES][(key >> shift) & ((1u << width) - 1u)], 1u);
        });
        __syncthreads();
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) {
            u32 sum = 0;
#pragma unroll
            for (u32 copy = 0; copy < COPIES; ++copy) sum += bins[copy][i];
            bins[0][i] = sum;
        }
        __syncthreads();
        if (warp == 0) {
            const Selected found = select_bin(bins[0], wanted);
            if (lane == 0) selected = found;
        }
        __syncthreads();
        prefix = (prefix << width) | selected.bin;
        wanted = selected.rest;
    }

    // Now `prefix` is the k-th largest key, and `wanted` of the keys equal to it are among the k largest.
    constexpr u32 BATCH = 8;
    const u32 stretch = (n + BATCH * THREADS - 1) / (BATCH * THREADS) * 32 * BATCH;
    const u32 begin = min(warp * stretch, n), end = min(begin + stretch, n);
    u32 above = 0, equal = 0;
    each(scores, begin, end, lane, 32, [&](u32 key) {
        above += key > prefix;
        equal += key == prefix;
    });
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) {
        above += __shfl_xor_sync(FULL_WARP, above, step);
        equal += __shfl_xor_sync(FULL_WARP, equal, step);
    }
    if (lane == 0) {
        above_of[warp] = above;
        equal_of[warp] = equal;
    }
    __syncthreads();
    above = equal = 0;
    for (u32 i = 0; i < warp; ++i) {
        above += above_of[i];
        equal += equal_of[i];
    }
    const u32 below_lane = (1u << lane) - 1u;
    for (u32 i = begin + lane; i < begin + stretch; i += 32 * BATCH) {
        u32 keys[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) keys[j] = i + 32 * j < end ? ordered(scores[i + 32 * j]) : 0;
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            const bool there = i + 32 * j < end;
            const u32 ups = __ballot_sync(FULL_WARP, there && keys[j] > prefix);
            const u32 ties = __ballot_sync(FULL_WARP, there && keys[j] == prefix);
            const u32 tie_rank = equal + __popc(ties & below_lane);
            const bool take = (ups >> lane & 1u) || ((ties >> lane & 1u) && tie_rank < wanted);
            if (take) out[above + __popc(ups & below_lane) + min(tie_rank, wanted)] = i + 32 * j;
            above += __popc(ups);
            equal += __popc(ties);
        }
    }
}

// A row of up to 32 * KEYS * WARPS scores by WARPS warps; four warps of a CTA have a row each, or eight one together.
template <u32 WARPS, u32 KEYS>
__device__ __forceinline__ void top_k_short(const TopKParams& params) {
    __shared__ u32 counts[2][8];
    const u32 lane = threadIdx.x & 31u, warp = threadIdx.x / 32, part = WARPS > 1 ? warp : 0;
    const u32 index = WARPS > 1 ? blockIdx.x : blockIdx.x * 4 + warp;
    if (index >= params.all) return;
    const bool second = index >= params.rows;
    const TopKSet& set = params.sets[second];
    const u64 row = index - (second ? params.rows : 0);
    const u32* scores = reinterpret_cast<const u32*>(set.scores) + row * set.score_stride;
    u32* out = reinterpret_cast<u32*>(set.out) + row * set.out_stride;
    const u32 first = part * KEYS * 32 + lane, n = length(set, row, 0), k = length(set, row, 1);
    if (k == 0) return;

    // Nothing that is there has key 0, but NaN of negative sign with all bits: it is never counted below, and last of all.
    u32 keys[KEYS];
#pragma unroll
    for (u32 i = 0; i < KEYS; ++i) keys[i] = first + 32 * i < n ? ordered(scores[first + 32 * i]) : 0;

    u32 round = 0;
    // Of all warps of the row; and, in `before`, of those before this one.
    const auto sum = [&](u32 own, u32& before) {
        own = __reduce_add_sync(FULL_WARP, own);
        before = 0;
        if constexpr (WARPS == 1) return own;
        if (lane == 0) counts[round & 1u][warp] = own;
        __syncthreads();
        u32 all = 0;
#pragma unroll
        for (u32 i = 0; i < WARPS; ++i) {
            const u32 one = counts[round & 1u][i];
            if (i < warp) before += one;
            all += one;
        }
        ++round;
        return all;
    };

    u32 least = 0, before; // the largest number that k keys are not below
    for (u32 bit = 0x80000000u; bit > 0; bit >>= 1) {
        u32 count = 0;
#pragma unroll
        for (u32 i = 0; i < KEYS; ++i) count += keys[i] >= (least | bit);
        if (sum(count, before) >= k) least |= bit;
    }
    u32 more = 0, same = 0;
#pragma unroll
    for (u32 i = 0; i < KEYS; ++i) {
        const bool there = first + 32 * i < n;
        more += keys[i] > least;
        same += there && keys[i] == least;
    }
    u32 above, equal;
    const u32 wanted = k - sum(more, above);
    sum(same, equal);
    const u32 below_lane = (1u << lane) - 1u;
#pragma unroll
    for (u32 i = 0; i < KEYS; ++i) {
        const bool there = first + 32 * i < n;
        const u32 ups = __ballot_sync(FULL_WARP, keys[i] > least);
        const u32 ties = __ballot_sync(FULL_WARP, there && keys[i] == least);
        const u32 tie_rank = equal + __popc(ties & below_lane);
        const bool take = (ups >> lane & 1u) || ((ties >> lane & 1u) && tie_rank < wanted);
        if (take) out[above + __popc(ups & below_lane) + min(tie_rank, wanted)] = first + 32 * i;
        above += __popc(ups);
        equal += __popc(ties);
    }
}

#define TOP_K_SHORT(N, WARPS, KEYS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS > 1 ? 256 : 128)                                                \
        top_k_##N(const __grid_constant__ TopKParams params) {                                                        \
        top_k_short<WARPS, KEYS>(params);                                                                              \
    }

TOP_K_SHORT(512, 1, 16)
TOP_K_SHORT(2048, 1, 64)
TOP_K_SHORT(16384, 8, 64)
