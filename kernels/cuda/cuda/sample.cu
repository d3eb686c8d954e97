// sample: a token of each row of logits, the likeliest or drawn by temperature and top-p, and the logarithm of its share.
//
// Three launches: the largest logit by parts of a row; weights relative to it, summed by parts and by coarse bins; then one CTA
// per row draws. Weights are f32 by a fixed polynomial, taken as whole numbers of 2^-42: their sums are the same in any order,
// so the token hangs neither on the grid nor on who comes first, and src/reference/sample.rs finds the same one.
//
// To draw "the first token at which the falling weights sum to `needed`" is radix selection by mass: 1,345 coarse bins, then 512
// and 512 finer ones end at one weight, and the tokens that share it are counted by id. The first pass over a row keeps a list of
// the tokens at and above its bin; if they fit, as all but flat rows do, nothing reads the row again.
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
    u64 drawn;       // u32 token, f32 logarithm [rows]
    u32 vocab, parts;
};

constexpr u32 PART = 8192, THREADS = 256, DRAWERS = 1024, LIST = 2048;
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
    p = __fmaf_rn(p, r, 5.0000001e-1f);
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

// Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS) sample_best(const __grid_constant__ SampleParams params) {
    __shared__ u64 slots[THREADS / 32];
    const float* logits = reinterpret_cast<const float*>(params.logits) + u64(blockIdx.y) * params.vocab;
    const u32 begin = blockIdx.x * PART, end = min(begin + PART, params.vocab);
    u64 most = 0;
#pragma unroll 8
    for (u32 id = begin + threadIdx.x; id < end; id += THREADS) {
        const u64 one = (u64(ordered(logits[id])) << 32) | u32(~id);
        most = one > most ? one : most;
    }
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(FULL_WARP, most, step);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 i = 1; i < THREADS / 32; ++i) most = slots[i] > most ? slots[i] : most;
    reinterpret_cast<u64*>(params.best)[u64(blockIdx.y) * params.parts + blockIdx.x] = most;
}

// Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS) sample_weigh(const __grid_constant__ SampleParams params) {
    __shared__ u64 slot, masses_of[THREADS / 32];
    __shared__ float sums_of[THREADS / 32];
    __shared__ u32 words[3][BINS];
    const Row row(params, blockIdx.y, &slot);
    const u64 at = u64(blockIdx.y) * params.parts + blockIdx.x;
    const u32 begin = blockIdx.x * PART, end = min(begin + PART, params.vocab);
    const bool drawn = row.is_drawn(), by_weight = drawn && row.has_nucleus();
    const Masses<BINS> masses{words};
    if (by_weight) masses.clear();
    float sum = 0.0f;
    u64 mass = 0;
    for (u32 first = begin + threadIdx.x / 32 * 32; first < end; first += THREADS) {
        const u32 id = first + (threadIdx.x & 31u);
        const float logit = id < end ? row.logits[id] : NEGATIVE_INFINITY;
        if (logit == logit) sum += exp2_fast((logit - row.high) * 1.44269504f);
        if (!drawn) continue;
        const float weight = weigh(logit, row.high, row.how.temperature);
        const u64 one = whole(weight);
        mass += one;
        const u32 active = __ballot_sync(FULL_WARP, by_weight && one > 0);
        if (by_weight && one > 0) masses.add(active, key_of(weight) >> COARSE, one);
    }
    sum = sum_of_all(sum, sums_of);
    mass = sum_of_all(mass, masses_of);
    if (threadIdx.x == 0) {
        reinterpret_cast<float*>(params.sums)[at] = sum;
        reinterpret_cast<u64*>(params.part_masses)[at] = mass;
    }
    if (!by_weight) return;
    u64* to = reinterpret_cast<u64*>(params.masses) + u64(blockIdx.y) * BINS;
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) {
        const u64 one = masses[bin];
        if (one > 0) atomicAdd(to + bin, one);
    }
}

// A weight, the mass above it, and the mass that is asked for of the tokens that have it.
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

struct Drawing {
    u64 coarse[BINS]; // masses of the row
    u32 fine[3][FINE_BINS];
    u64 sums[DRAWERS];
    u32 list_keys[LIST], list_ids[LIST];
    u32 listed; // tokens that belong on the list, whether it had room or not
    u32 floor;  // coarse bin at and above which tokens are listed; above all while there is no list
    Place place;
    u32 token;
    u64 slot;
};

// The weight at which tokens of falling weight sum to `needed`; of those that have it, the `rank`-th by id, from 1, is the one.
struct Spot {
    u32 key, rank;
    u64 before; // the mass of the tokens before those with this key
};

// Calls `visit(there, key, id)` for the tokens of at least coarse bin `floor`, and perhaps for others; whole warps together.
template <class Visit>
__device__ __forceinline__ void each(const Row& row, u32 vocab, const Drawing& held, Visit visit) {
    if (held.floor < BINS && held.listed <= LIST) {
        for (u32 first = threadIdx.x / 32 * 32; first < held.listed; first += DRAWERS) {
            const u32 i = first + (threadIdx.x & 31u);
            const bool there = i < held.listed;
            visit(there, there ? held.list_keys[i] : 0, there ? held.list_ids[i] : 0);
        }
        return;
    }
#pragma unroll 4
    for (u32 first = threadIdx.x / 32 * 32; first < vocab; first += DRAWERS) {
        const u32 id = first + (threadIdx.x & 31u);
        const float weight = id < vocab ? row.weight(id) : 0.0f;
        const bool there = whole(weight) > 0;
        visit(there, there ? key_of(weight) : 0, id);
    }
}

// Called by all threads.
__device__ __forceinline__ Spot find(const Row& row, u32 vocab, Drawing& held, u64 needed) {
    if (threadIdx.x < 32) {
        const Place place = select_bin<BINS>(needed, [&](u32 bin) { return held.coarse[bin]; });
        if (threadIdx.x == 0) held.place = place;
    }
    __syncthreads();
    const bool lists = held.floor == BINS; // nobody changes it before the next barrier
    const u32 coarse = held.place.bin;
    u64 rest = held.place.rest;
    const Masses<FINE_BINS> fine{held.fine};
    u32 key = coarse;
#pragma unroll
    for (u32 pass = 0; pass < 2; ++pass) {
        const u32 shift = pass == 0 ? 9 : 0;
        fine.clear();
        each(row, vocab, held, [&](bool there, u32 one, u32 id) {
            const bool alike = there && (one >> (shift + 9)) == key;
            const u32 active = __ballot_sync(FULL_WARP, alike);
            if (alike) fine.add(active, (one >> shift) & (FINE_BINS - 1), whole(weight_of(one)));
            if (pass > 0 || !lists) return;
            if (there && (one >> COARSE) >= coarse) {
                const u32 to = atomicAdd(&held.listed, 1u);
                if (to < LIST) {
                    held.list_keys[to] = one;
                    held.list_ids[to] = id;
                }
            }
        });
        __syncthreads();
        if (pass == 0 && lists && threadIdx.x == 0) held.floor = coarse;
        if (threadIdx.x < 32) {
            const Place place = select_bin<FINE_BINS>(rest, [&](u32 bin) { return fine[bin]; });
            if (threadIdx.x == 0) held.place = place;
        }
        __syncthreads();
        key = (key << 9) | held.place.bin;
        rest = held.place.rest;
    }
    const u64 one = whole(weight_of(key));
    return {key, u32((rest + one - 1) / one), needed - rest};
}

// The id in [begin, end) at which `mass(id)` sum to `needed`, which they do. Called by all threads.
template <class Mass>
__device__ __forceinline__ u32 walk(Drawing& held, u32 begin, u32 end, u64 needed, Mass mass) {
    const u32 stretch = (end - begin + DRAWERS - 1) / DRAWERS;
    const u32 low = min(begin + threadIdx.x * stretch, end), high = min(low + stretch, end);
    u64 own = 0;
    for (u32 id = low; id < high; ++id) own += mass(id);
    held.sums[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < 32) {
        // It counts from the highest bin down, and ids rise.
        const Place place = select_bin<DRAWERS>(needed, [&](u32 bin) { return held.sums[DRAWERS - 1 - bin]; });
        if (threadIdx.x == 0) held.place = {DRAWERS - 1 - place.bin, place.rest};
    }
    __syncthreads();
    if (threadIdx.x == held.place.bin) {
        u64 rest = held.place.rest;
        u32 id = low;
        for (u64 one = mass(id); rest > one; one = mass(id)) {
            rest -= one;
            ++id;
        }
        held.token = id;
    }
    __syncthreads();
    return held.token;
}

// The token of a spot. Called by all threads.
__device__ __forceinline__ u32 locate(const Row& row, u32 vocab, Drawing& held, const Spot& spot) {
    if (held.listed > LIST) {
        const auto has = [&](u32 id) -> u64 {
            const float weight = row.weight(id);
            return whole(weight) > 0 && key_of(weight) == spot.key ? 1 : 0;
        };
        return walk(held, 0, vocab, spot.rank, has);
    }
    for (u32 i = threadIdx.x; i < held.listed; i += DRAWERS) {
        if (held.list_keys[i] != spot.key) continue;
        u32 rank = 1;
        for (u32 j = 0; j < held.listed; ++j) rank += held.list_keys[j] == spot.key && held.list_ids[j] < held.list_ids[i];
        if (rank == spot.rank) held.token = held.list_ids[i];
    }
    __syncthreads();
    return held.token;
}

// floor(uniform * mass), below the mass, and one more: a draw is the first at which the sum is more than that.
__device__ __forceinline__ u64 chance(double uniform, u64 mass) {
    const u64 below = __double2ull_rd(__dmul_rn(uniform, __ull2double_rn(mass)));
    return (below < mass ? below : mass - 1) + 1;
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(DRAWERS, 1) sample_draw(const __grid_constant__ SampleParams params) {
    __shared__ Drawing held;
    const u32 index = blockIdx.x;
    const Row row(params, index, &held.slot);
    u32 token = row.likeliest;
    if (row.is_drawn() && row.has_nucleus()) {
        u64* masses = reinterpret_cast<u64*>(params.masses) + u64(index) * BINS;
        u64 all = 0;
        for (u32 bin = threadIdx.x; bin < BINS; bin += DRAWERS) {
            all += held.coarse[bin] = masses[bin];
            masses[bin] = 0;
        }
        if (threadIdx.x == 0) {
            held.floor = BINS;
            held.listed = 0;
        }
        all = sum_of_all(all, held.sums);
        if (threadIdx.x == 0) held.slot = all;
        __syncthreads();
        all = held.slot;
        u64 needed = __double2ull_ru(__dmul_rn(double(row.how.top_p), __ull2double_rn(all)));
        needed = needed < 1 ? 1 : needed < all ? needed : all;
        const Spot last = find(row, params.vocab, held, needed);
        const u64 nucleus = last.before + last.rank * whole(weight_of(last.key));
        token = locate(row, params.vocab, held, find(row, params.vocab, held, chance(row.how.uniform, nucleus)));
    } else if (row.is_drawn()) {
        const u64* masses = reinterpret_cast<const u64*>(params.part_masses) + u64(index) * params.parts;
        u64 all = 0;
        for (u32 part = 0; part < params.parts; ++part) all += masses[part];
        u64 rest = chance(row.how.uniform, all);
        u32 part = 0;
        for (; rest > masses[part]; ++part) rest -= masses[part];
        const u32 begin = part * PART, end = min(begin + PART, params.vocab);
        token = walk(held, begin, end, rest, [&](u32 id) { return whole(row.weight(id)); });
    }
    if (threadIdx.x > 0) return;
    const float* sums = reinterpret_cast<const float*>(params.sums) + u64(index) * params.parts;
    float sum = 0.0f;
    for (u32 part = 0; part < params.parts; ++part) sum += sums[part];
    const float share = row.logits[token] - row.high - log2_fast(sum) * 0.693147181f;
    u32* drawn = reinterpret_cast<u32*>(params.drawn) + 2 * u64(index);
    drawn[0] = token;
    drawn[1] = u32(__float_as_int(share));
}
