// sample: a token of each row of logits, the likeliest or drawn by temperature and top-p, and the logarithm of its share.
//
// Four launches: the largest logit by parts of a row; weights relative to it, summed by parts and by coarse bins; a list of the
// tokens that may be in the nucleus; then one CTA per row draws. Weights are f32 by a fixed polynomial, taken as whole numbers of
// 2^-42: their sums are the same in any order, so the token hangs neither on the grid nor on who comes first, and
// src/reference/sample.rs finds the same one.
//
// To draw "the first token at which the falling weights sum to `needed`" is radix selection by mass: 1,345 coarse bins, then 512
// and 512 finer ones end at one weight, and the tokens that share it are counted by id. The list has the tokens at and above the
// coarse bin in which the nucleus ends; if they fit, as all but flat rows do, drawing reads no row.
#include "sample.cuh"

// Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_best(const __grid_constant__ SampleParams params) {
    __shared__ u64 slots[THREADS / 32];
    const float* logits = reinterpret_cast<const float*>(params.logits) + u64(blockIdx.y) * params.vocab;
    float own[AT_ONCE];
    ask(own, logits, blockIdx.x * PART, params.vocab);
    u64 most = 0;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) {
        const u32 id = blockIdx.x * PART + i * THREADS + threadIdx.x;
        const u64 one = (u64(ordered(own[i])) << 32) | u32(~id);
        if (id < params.vocab && one > most) most = one;
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
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_weigh(const __grid_constant__ SampleParams params) {
    __shared__ u64 slot, masses_of[THREADS / 32];
    __shared__ float sums_of[THREADS / 32];
    __shared__ u32 words[3][BINS];
    float own[AT_ONCE];
    ask(own, reinterpret_cast<const float*>(params.logits) + u64(blockIdx.y) * params.vocab, blockIdx.x * PART, params.vocab);
    const Row row(params, blockIdx.y, &slot);
    const u64 at = u64(blockIdx.y) * params.parts + blockIdx.x;
    const bool drawn = row.is_drawn(), by_weight = drawn && row.has_nucleus();
    const Masses<BINS> masses{words};
    if (by_weight) masses.clear();
    float sum = 0.0f;
    u64 mass = 0;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) {
        const float logit = own[i];
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

// Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_list(const __grid_constant__ SampleParams params) {
    __shared__ u64 slot, sums[THREADS / 32], coarse[BINS];
    __shared__ u32 least;
    const u32 lane = threadIdx.x & 31u, index = blockIdx.y;
    float own[AT_ONCE];
    ask(own, reinterpret_cast<const float*>(params.logits) + u64(index) * params.vocab, blockIdx.x * PART, params.vocab);
    const Row row(params, index, &slot);
    if (!row.is_drawn() || !row.has_nucleus()) return;
    const u64 needed = nucleus_of(params, index, row.how.top_p, coarse, sums, &slot);
    if (threadIdx.x < 32) {
        const Place place = select_bin<BINS>(needed, [&](u32 bin) { return coarse[bin]; });
        if (threadIdx.x == 0) least = place.bin;
    }
    __syncthreads();
    u64* list = reinterpret_cast<u64*>(params.lists) + u64(index) * LIST;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) {
        const float weight = weigh(own[i], row.high, row.how.temperature);
        const bool take = whole(weight) > 0 && (key_of(weight) >> COARSE) >= least;
        const u32 takers = __ballot_sync(FULL_WARP, take);
        if (takers == 0) continue;
        u32 to = 0;
        if (lane == 0) to = atomicAdd(reinterpret_cast<u32*>(params.listed) + index, __popc(takers));
        to = __shfl_sync(FULL_WARP, to, 0) + __popc(takers & ((1u << lane) - 1u));
        const u32 id = blockIdx.x * PART + i * THREADS + threadIdx.x;
        if (take && to < LIST) list[to] = (u64(key_of(weight)) << 32) | id;
    }
}

struct Drawing {
    u64 coarse[BINS]; // masses of the row
    u32 fine[3][FINE_BINS];
    u64 sums[THREADS];
    const u64* list;
    u32 listed;
    Place place;
    u32 token;
    u64 slot;
};

// The weight at which tokens of falling weight sum to `needed`; of those that have it, the `rank`-th by id, from 1, is the one.
struct Spot {
    u32 key, rank;
    u64 before; // the mass of the tokens before those with this key
};

// Calls `visit(there, key)` for the tokens of at least the coarse bin in which the nucleus ends, and perhaps for others; whole
// warps together.
template <class Visit>
__device__ __forceinline__ void each(const Row& row, u32 vocab, const Drawing& held, Visit visit) {
    if (held.listed <= LIST) {
        for (u32 first = threadIdx.x / 32 * 32; first < held.listed; first += THREADS) {
            const u32 i = first + (threadIdx.x & 31u);
            const bool there = i < held.listed;
            visit(there, there ? u32(held.list[i] >> 32) : 0);
        }
        return;
    }
    for (u32 first = 0; first < vocab; first += PART) {
        float own[AT_ONCE];
        ask(own, row.logits, first, vocab);
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
            const float weight = weigh(own[i], row.high, row.how.temperature);
            const bool there = whole(weight) > 0;
            visit(there, there ? key_of(weight) : 0);
        }
    }
}

// Called by all threads.
__device__ __forceinline__ Spot find(const Row& row, u32 vocab, Drawing& held, u64 needed) {
    __syncthreads(); // others may still read the place that was found before
    if (threadIdx.x < 32) {
        const Place place = select_bin<BINS>(needed, [&](u32 bin) { return held.coarse[bin]; });
        if (threadIdx.x == 0) held.place = place;
    }
    __syncthreads();
    const Masses<FINE_BINS> fine{held.fine};
    u32 key = held.place.bin;
    u64 rest = held.place.rest;
#pragma unroll
    for (u32 pass = 0; pass < 2; ++pass) {
        const u32 shift = pass == 0 ? 9 : 0;
        fine.clear();
        each(row, vocab, held, [&](bool there, u32 one) {
            const bool alike = there && (one >> (shift + 9)) == key;
            const u32 active = __ballot_sync(FULL_WARP, alike);
            if (alike) fine.add(active, (one >> shift) & (FINE_BINS - 1), whole(weight_of(one)));
        });
        __syncthreads();
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
    const u32 stretch = (end - begin + THREADS - 1) / THREADS;
    const u32 low = min(begin + threadIdx.x * stretch, end), high = min(low + stretch, end);
    u64 own = 0;
    for (u32 id = low; id < high; ++id) own += mass(id);
    held.sums[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < 32) {
        // It counts from the highest bin down, and ids rise.
        const Place place = select_bin<THREADS>(needed, [&](u32 bin) { return held.sums[THREADS - 1 - bin]; });
        if (threadIdx.x == 0) held.place = {THREADS - 1 - place.bin, place.rest};
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
    for (u32 i = threadIdx.x; i < held.listed; i += THREADS) {
        if (u32(held.list[i] >> 32) != spot.key) continue;
        u32 rank = 1; // the key is the same, so the smaller entry has the lower id
        for (u32 j = 0; j < held.listed; ++j) rank += u32(held.list[j] >> 32) == spot.key && held.list[j] < held.list[i];
        if (rank == spot.rank) held.token = u32(held.list[i]);
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
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_draw(const __grid_constant__ SampleParams params) {
    __shared__ Drawing held;
    const u32 index = blockIdx.x;
    const Row row(params, index, &held.slot);
    u32 token = row.likeliest;
    if (row.is_drawn() && row.has_nucleus()) {
        const u64 needed = nucleus_of(params, index, row.how.top_p, held.coarse, held.sums, &held.slot);
        u32* listed = reinterpret_cast<u32*>(params.listed) + index;
        if (threadIdx.x == 0) {
            held.list = reinterpret_cast<const u64*>(params.lists) + u64(index) * LIST;
            held.listed = *listed;
            *listed = 0;
        }
        u64* masses = reinterpret_cast<u64*>(params.masses) + u64(index) * BINS;
        for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) masses[bin] = 0;
        __syncthreads();
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
