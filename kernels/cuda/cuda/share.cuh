// What the planners that choose key blocks by their share of the mass have in common: the smallest set with a share, and lists
// of key blocks that differ from row block to row block.
//
// Masses are whole numbers here, whose sums are the same in any order; all of a set add up to less than 2^32.
#pragma once
#include "planner.cuh"

constexpr u32 KEY_BLOCK = 64;

// What all masses of a set add up to, about: a rest of 2^31 is for what rounding adds.
constexpr float WHOLE = 2147483648.0f;

__device__ __forceinline__ u32 whole_number(float mass) { return __float2uint_rn(mass); }

template <u32 THREADS>
struct ShareShared {
    u32 sums[2][3][THREADS / 32];
};

// Sums over the CTA, which all of its threads get.
template <u32 THREADS, u32 N>
__device__ __forceinline__ void sum_all(u32 (&x)[N], ShareShared<THREADS>& shared, u32 round) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
        x[j] = __reduce_add_sync(FULL_WARP, x[j]);
        if (lane == 0) shared.sums[round & 1u][j][warp] = x[j];
    }
    // Two places, used by turns: who reads one has passed the barrier before the other is written again.
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < N; ++j)
        x[j] = __reduce_add_sync(FULL_WARP, lane < THREADS / 32 ? shared.sums[round & 1u][j][lane] : 0);
}

// The target of a share of `total`: at least 1.
__device__ __forceinline__ u32 target_of(float share, u32 total) {
    const double wanted = ceil(double(share) * double(total));
    return wanted < 1.0 ? 1 : wanted < double(total) ? u32(wanted) : total;
}

// The largest number such that entries of at least this mass add up to `target`, which is from 1 to the sum of all. Equal entries
// are taken together. By all threads of a CTA; `mass(i)` is asked several times.
template <u32 THREADS, class Mass>
__device__ __forceinline__ u32 least_of_share(u32 n, u32 target, ShareShared<THREADS>& shared, Mass mass) {
    u32 least = 0;
#pragma unroll 1
    for (u32 round = 0; round < 16; ++round) {
        const u32 shift = 30 - 2 * round, one = least | (1u << shift), two = least | (2u << shift), three = least | (3u << shift);
        u32 sums[3] = {0, 0, 0};
#pragma unroll 4
        for (u32 i = threadIdx.x; i < n; i += THREADS) {
            const u32 x = mass(i);
            sums[0] += x >= one ? x : 0;
            sums[1] += x >= two ? x : 0;
            sums[2] += x >= three ? x : 0;
        }
        sum_all<THREADS>(sums, shared, round);
        least = sums[2] >= target ? three : sums[1] >= target ? two : sums[0] >= target ? one : least;
    }
    return least;
}

// How many entries the smallest set has that adds up to `target`, given that number.
template <u32 THREADS, class Mass>
__device__ __forceinline__ u32 count_of_share(u32 n, u32 target, u32 least, ShareShared<THREADS>& shared, Mass mass) {
    u32 sums[2] = {0, 0};
#pragma unroll 4
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        const u32 x = mass(i);
        sums[0] += x > least ? x : 0;
        sums[1] += x > least;
    }
    sum_all<THREADS>(sums, shared, 0);
    const u32 rest = target > sums[0] ? target - sums[0] : 0;
    return sums[1] + (rest + max(least, 1u) - 1) / max(least, 1u);
}

// Lists of a head by row block, of which each has room for all key blocks that it sees.
struct Triangle {
    u32 blocks; // row blocks
    u32 first;  // key blocks that the first of them sees, were it full; each other one sees two more

    __device__ __forceinline__ static Triangle of(const Parts& parts) {
        return {(parts.rows + ROWS - 1) / ROWS, (parts.offset + ROWS + KEY_BLOCK - 1) / KEY_BLOCK};
    }
    __device__ __forceinline__ u32 at(u32 nth_head, u32 block) const {
        return nth_head * (blocks * first + blocks * (blocks - 1)) + block * first + block * (block - 1);
    }
};

// Key blocks that a row block sees any of, of `tokens`, and those that lie wholly before it.
struct Seen {
    u32 all, before;

    __device__ __forceinline__ static Seen by(const Parts& parts, u32 tokens, u32 block) {
        const u32 first = parts.offset + block * ROWS;
        return {(min(first + ROWS, tokens) + KEY_BLOCK - 1) / KEY_BLOCK, first / KEY_BLOCK};
    }
};

// Writes the list of a row block: the key blocks whose bits are set, the first one, and those on the diagonal. By the first warp.
__device__ __forceinline__ void put_list(u64 lists, u64 numbers, const Parts& parts, u32 head, u32 call_blocks, u32 block, u32 first,
                                         u32* bits, const Seen& seen) {
    const u32 lane = threadIdx.x;
    u32* to = reinterpret_cast<u32*>(numbers) + first;
    u32 count = 0;
    for (u32 begin = 0; begin * 32 < seen.all; begin += 32) {
        const u32 word = begin + lane, low = word * 32;
        u32 own = low < seen.all ? bits[word] : 0;
        if (low <= seen.before && seen.before < low + 32) own |= ~0u << (seen.before - low);
        if (low > seen.before) own = ~0u;
        if (word == 0) own |= 1u;
        if (low >= seen.all)
            own = 0;
        else if (seen.all - low < 32)
            own &= (1u << (seen.all - low)) - 1u;
        u32 up_to = __popc(own);
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(FULL_WARP, up_to, step);
            if (lane >= step) up_to += other;
        }
        u32 at = count + up_to - __popc(own);
        count += __shfl_sync(FULL_WARP, up_to, 31);
        for (; own != 0; own &= own - 1) to[at++] = (low + __ffs(own) - 1) * KEY_BLOCK;
    }
    if (lane > 0) return;
    const u32 entry[LIST_WORDS] = {first, count, 0, 0, 0, 0, 1};
    u32* list = reinterpret_cast<u32*>(lists) + (u64(head) * call_blocks + parts.before / ROWS + block) * LIST_WORDS;
#pragma unroll
    for (u32 i = 0; i < LIST_WORDS; ++i) list[i] = entry[i];
}
