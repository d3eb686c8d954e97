// What the kernels of `sample` share: weights, their sums by bin, and the bin in which a sum ends.
#pragma once
#include "softmax.cuh"

struct SampleRow {
    float temperature, top_p;
    double uniform;
};

struct SampleParams {
    u64 logits;      // f32 [rows, vocab]
    u64 rows;        // SampleRow [rows]
    u64 best;        // u64 [rows, parts]: ordered logit, then the complement of the id
    u64 sums;        // f32 [rows, parts]: of exp(logit - largest)
    u64 part_masses; // u64 [rows, parts]
    u64 masses;      // u64 [rows, BINS], zeros between launches
    u64 lists;       // u64 [rows, LIST]: key, then id
    u64 listed;      // u32 [rows]: tokens that belong on the list, whether it had room or not; zeros between launches
    u64 drawn;       // u32 token, f32 logarithm [rows]
    u32 vocab, parts;
};

constexpr u32 PART = 8192, THREADS = 1024, LIST = 2048;
constexpr u32 AT_ONCE = PART / THREADS; // logits that a thread asks for before it looks at any
constexpr u32 LEAST = (127 - 42) << 23; // the bits of 2^-42
constexpr u32 BINS = 42 * 32 + 1, COARSE = 18, FINE_BINS = 512;
constexpr u64 UNIT = 1ull << 42;

// Greater for greater logits, the two zeros alike; 0 for NaN alone.
__device__ __forceinline__ u32 ordered(float logit) {
    if (!(logit == logit)) return 0;
    const u32 bits = logit == 0.0f ? 0 : u32(__float_as_int(logit));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(u32 key) {
    return __int_as_float(int(key & 0x80000000u ? key & 0x7fffffffu : ~key));
}

// exp((logit - high) / temperature), as the reference computes it.
__device__ __forceinline__ float weigh(float logit, float high, float temperature) {
    const float x = __fdiv_rn(__fsub_rn(logit, high), temperature);
    if (!(x > -30.0f)) return 0.0f;
    const float n = rintf(__fmul_rn(x, 1.44269504f));
    const float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -0.6933594f, x));
    float p = __fmaf_rn(1.9875691e-4f, r, 1.3982e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    const float near_one = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    return __int_as_float(__float_as_int(near_one) + (int(n) << 23));
}

__device__ __forceinline__ u64 whole(float weight) {
    const u64 mass = __float2ull_rz(__fmul_rn(weight, float(UNIT)));
    return mass < UNIT ? mass : UNIT - 1;
}

// The key of a weight of at least 2^-42; the rest of the weights have no mass.
__device__ __forceinline__ u32 key_of(float weight) { return u32(__float_as_int(weight)) - LEAST; }
__device__ __forceinline__ float weight_of(u32 key) { return __int_as_float(int(key + LEAST)); }

// A row: its largest logit, where that is, and how it is drawn.
struct Row {
    const float* logits;
    SampleRow how;
    float high;
    u32 likeliest;

    // Called by all threads; `slot` is in shared memory.
    __device__ __forceinline__ Row(const SampleParams& params, u32 row, u64* slot) {
        logits = reinterpret_cast<const float*>(params.logits) + u64(row) * params.vocab;
        how = reinterpret_cast<const SampleRow*>(params.rows)[row];
        if (threadIdx.x < 32) {
            const u64* best = reinterpret_cast<const u64*>(params.best) + u64(row) * params.parts;
            u64 most = threadIdx.x < params.parts ? best[threadIdx.x] : 0;
#pragma unroll
            for (u32 step = 16; step > 0; step /= 2) {
                const u64 other = __shfl_xor_sync(FULL_WARP, most, step);
                most = other > most ? other : most;
            }
            if (threadIdx.x == 0) *slot = most;
        }
        __syncthreads();
        const u32 key = u32(*slot >> 32);
        likeliest = ~u32(*slot);
        high = key == 0 ? NEGATIVE_INFINITY : logit_of(key);
    }

    __device__ __forceinline__ bool is_finite() const { return fabsf(high) < __int_as_float(0x7f800000); }
    __device__ __forceinline__ bool is_drawn() const {
        return is_finite() && how.temperature > 0.0f && how.temperature < __int_as_float(0x7f800000);
    }
    __device__ __forceinline__ bool has_nucleus() const { return how.top_p > 0.0f && how.top_p < 1.0f; }
    __device__ __forceinline__ float weight(u32 id) const { return weigh(logits[id], high, how.temperature); }
};

// Sum over the CTA, for the first thread, in an order of its own; `slots` has a place for each warp.
template <class T>
__device__ __forceinline__ T sum_of_all(T x, T* slots) {
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    if (threadIdx.x == 0)
        for (u32 i = 0; i < blockDim.x / 32; ++i) sum += slots[i];
    return sum;
}

// Sums of masses below 2^42, up to 2^18 of them, by bin: three words of 14 bits each, since shared memory adds words of 32.
template <u32 COUNT>
struct Masses {
    u32 (*words)[COUNT]; // [3]

    __device__ __forceinline__ void clear() const {
        for (u32 i = threadIdx.x; i < 3 * COUNT; i += blockDim.x) words[i / COUNT][i % COUNT] = 0;
        __syncthreads();
    }

    // All lanes of `active` call it.
    __device__ __forceinline__ void add(u32 active, u32 bin, u64 mass) const {
        const u32 part[3] = {u32(mass) & 0x3fffu, u32(mass >> 14) & 0x3fffu, u32(mass >> 28)};
        int alike;
        __match_all_sync(active, bin, &alike);
        if (alike) {
            // As in a flat row, where every thread would wait for the same words.
#pragma unroll
            for (u32 i = 0; i < 3; ++i) {
                const u32 sum = __reduce_add_sync(active, part[i]);
                if ((threadIdx.x & 31u) == u32(__ffs(int(active))) - 1) atomicAdd(&words[i][bin], sum);
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < 3; ++i) atomicAdd(&words[i][bin], part[i]);
        }
    }

    __device__ __forceinline__ u64 operator[](u32 bin) const {
        return u64(words[0][bin]) + (u64(words[1][bin]) << 14) + (u64(words[2][bin]) << 28);
    }
};

// The CTA's next logits from `first` on, one in THREADS to a thread; what is behind the row has no weight.
__device__ __forceinline__ void ask(float (&to)[AT_ONCE], const float* logits, u32 first, u32 vocab) {
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) {
        const u32 id = first + i * THREADS + threadIdx.x;
        to[i] = id < vocab ? logits[id] : NEGATIVE_INFINITY;
    }
}

// A bin, and the mass that is asked for of what is in it.
struct Place {
    u32 bin;
    u64 rest;
};

// The bin in which masses, from the highest down, sum to `needed` (at least 1, at most all), and what is asked for of it.
// By one warp.
template <u32 COUNT, class Mass>
__device__ __forceinline__ Place select_bin(u64 needed, Mass mass) {
    constexpr u32 PER_LANE = (COUNT + 31) / 32;
    const u32 lane = threadIdx.x & 31u, low = lane * PER_LANE, high = min(low + PER_LANE, COUNT);
    u64 own = 0;
    for (u32 bin = low; bin < high; ++bin) own += mass(bin);
    u64 above = own; // becomes: the mass of this lane's bins and those above
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_down_sync(FULL_WARP, above, step);
        if (lane + step < 32) above += other;
    }
    const u64 before = above - own;
    const bool mine = before < needed && needed <= above;
    Place found{0, 0};
    if (mine) {
        found = {high - 1, needed - before};
        for (u64 one = mass(found.bin); found.rest > one; one = mass(found.bin)) {
            found.rest -= one;
            --found.bin;
        }
    }
    const u32 owner = __ffs(int(__ballot_sync(FULL_WARP, mine))) - 1;
    found.bin = __shfl_sync(FULL_WARP, found.bin, owner);
    found.rest = __shfl_sync(FULL_WARP, found.rest, owner);
    return found;
}

// Copies a row's masses to `coarse`, and says how much of them the nucleus holds at least. Called by all threads; `sums` has a
// place for each warp.
__device__ __forceinline__ u64 nucleus_of(const SampleParams& params, u32 index, float top_p, u64* coarse, u64* sums, u64* slot) {
    const u64* masses = reinterpret_cast<const u64*>(params.masses) + u64(index) * BINS;
    u64 all = 0;
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) all += coarse[bin] = masses[bin];
    all = sum_of_all(all, sums);
    if (threadIdx.x == 0) {
        const u64 needed = __double2ull_ru(__dmul_rn(double(top_p), __ull2double_rn(all)));
        *slot = needed < 1 ? 1 : needed < all ? needed : all;
    }
    __syncthreads();
    return *slot;
}
