// flex_prefill: FlexPrefill's lists from the prompt itself (arXiv 2502.20766). For each part and head a test says whether the means of key blocks
// tell where the mass of the last queries is. Where they do, the best blocks of the part's map of means are taken, else
// whole blocks of columns and runs of diagonals; in both as many as hold a share of the mass.
//
// The sums of the last queries are plan.cu's, the means and their products blocks.cu's. Sparse rows begin at a multiple of 64, so that
// runs of diagonals are key blocks too, and all lists are of key blocks by row block. Sums run by position: what is chosen for a part depends
// on its own queries and the keys up to its end.
#include "share.cuh"
#include "softmax.cuh"

struct FlexParams {
    View view;      // its tokens end with the sparse rows
    u64 q;          // [rows, q_heads, D], of the keys' type
    u64 plans;      // HeadPlan [q_heads]
    u64 heads;      // u32 [heads_count]: query heads with this pattern
    u64 columns;    // f32 [parts, 2, heads, width]; the second of two becomes the sum of both
    u64 diagonals;  // likewise
    u64 pooled;     // f32 [parts, heads, 2, key_blocks]: columns and diagonals by 64
    u64 keys;       // means, [kv_heads, key_blocks, D]
    u64 estimated;  // f32 [parts, heads, key_blocks]: scores of means with the mean of the last queries
    u64 distances;  // f32 [parts, heads]: of the estimate from the truth; 2 where nobody asks
    u64 lengths;    // u32 [parts, heads, 2, 2]: blocks to choose from beside the first, and how many of them
    u64 chosen;     // u32 [parts, heads, 2, key_blocks]: those, less one, rising
    u64 map;        // f32 [heads, row blocks of the launch, key_blocks]: products of means, which become masses, u32
    u64 leasts;     // u32 [parts, heads]: mass of a block of the map that is taken
    u64 lists;      // List [q_heads, call_blocks]: see prefill.cuh
    u64 numbers;    // from `first_number` on, by `Triangle`
    Parts parts;    // the first one is that of the group of parts, all of whose sums are there
    float scale;    // of the scores, times log2(e); positive
    u32 q_heads, heads_per_kv, heads_count;
    u32 dim, is_bf16;
    u32 width, key_blocks, call_blocks;
    u32 first_head, first_part, first_block, blocks; // of the launch; the part from the group's first on, the row block from all
    u32 first_number;
};

// What the last queries are: see plan.cu.
constexpr u32 HALF = 64, LAST = 2 * HALF;

struct FlexItem {
    Part part;
    u32 nth, index, head; // head of the launch; of the sums and of all that is by part and head
    u32 blocks;           // of keys up to the part's end

    __device__ __forceinline__ FlexItem(const FlexParams& params, u32 nth_head, u32 nth_part) : nth(nth_head) {
        part = params.parts.part(params.parts.first + nth_part);
        index = nth_part * params.heads_count + nth_head;
        head = __ldg(reinterpret_cast<const u32*>(params.heads) + nth_head);
        blocks = (part.end + KEY_BLOCK - 1) / KEY_BLOCK;
    }
    __device__ __forceinline__ const HeadPlan& plan(const FlexParams& params) const {
        return reinterpret_cast<const HeadPlan*>(params.plans)[head];
    }
    // Sums of a half of the last queries.
    __device__ __forceinline__ float* sums(const FlexParams& params, u64 from, u32 nth_part, u32 half) const {
        return reinterpret_cast<float*>(from) + (u64(2 * nth_part + half) * params.heads_count + nth) * params.width;
    }
    __device__ __forceinline__ bool by_map(const FlexParams& params) const {
        return reinterpret_cast<const float*>(params.distances)[index] < plan(params).tau;
    }
};

// Joins both halves, and sums by 64. Grid: (key blocks / 8, 2 heads, parts of the group).
extern "C" __global__ void __launch_bounds__(256) flex_pool(const __grid_constant__ FlexParams params) {
    const u32 which = blockIdx.y & 1u, lane = threadIdx.x & 31u, block = blockIdx.x * 8 + threadIdx.x / 32;
    const FlexItem item(params, blockIdx.y / 2, blockIdx.z);
    if (block >= item.blocks) return;
    const u64 from = which == 0 ? params.columns : params.diagonals;
    float* sums = item.sums(params, from, blockIdx.z, 1);
    const float* earlier = item.sums(params, from, blockIdx.z, 0);
    const u32 earlier_end = item.part.rows > HALF ? item.part.end - HALF : 0;
    float pooled = 0.0f;
#pragma unroll
    for (u32 i = lane; i < KEY_BLOCK; i += 32) {
        const u32 at = block * KEY_BLOCK + i;
        if (at >= item.part.end) continue;
        const float sum = sums[at] + (at < earlier_end ? earlier[at] : 0.0f);
        sums[at] = sum;
        pooled += sum;
    }
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) pooled += __shfl_xor_sync(FULL_WARP, pooled, step);
    if (lane == 0) reinterpret_cast<float*>(params.pooled)[(u64(item.index) * 2 + which) * params.key_blocks + block] = pooled;
}

constexpr u32 CHOOSERS = 512;

// The sum, or the maximum, over a CTA in an order of its own, which all threads get.
template <bool MOST, u32 THREADS>
__device__ __forceinline__ float join(float x, float (&shared)[THREADS / 32]) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, x, step);
        x = MOST ? fmaxf(x, other) : x + other;
    }
    if ((threadIdx.x & 31u) == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    for (u32 i = 1; i < THREADS / 32; ++i) x = MOST ? fmaxf(x, shared[i]) : x + shared[i];
    __syncthreads();
    return x;
}

__device__ __forceinline__ float scalar(const FlexParams& params, u64 base, u64 index) {
    const u16 bits = reinterpret_cast<const u16*>(base)[index];
    return params.is_bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// The test: square root of the Jensen-Shannon divergence between where the means put the mass of the last queries and where it is, by
// key block, in base 2. Grid: (heads, parts of the group).
extern "C" __global__ void __launch_bounds__(CHOOSERS, 2) flex_test(const __grid_constant__ FlexParams params) {
    __shared__ float mean[128], shared[CHOOSERS / 32];
    const FlexItem item(params, blockIdx.x, blockIdx.y);
    float* out = reinterpret_cast<float*>(params.distances) + item.index;
    if (!(item.plan(params).tau > 0.0f)) {
        if (threadIdx.x == 0) *out = 2.0f;
        return;
    }
    const float* found = reinterpret_cast<const float*>(params.pooled) + u64(item.index) * 2 * params.key_blocks;
    const u32 last = min(LAST, item.part.rows), warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
    if (threadIdx.x < params.dim) {
        float sum = 0.0f;
#pragma unroll 8
        for (u32 i = 0; i < last; ++i) {
            const u64 row = item.part.first_row + item.part.rows - last + i;
            sum += scalar(params, params.q, (row * params.q_heads + item.head) * params.dim + threadIdx.x);
        }
        mean[threadIdx.x] = sum / float(last);
    }
    __syncthreads();
    float* estimated = reinterpret_cast<float*>(params.estimated) + u64(item.index) * params.key_blocks;
    const u64 keys = u64(item.head / params.heads_per_kv) * params.key_blocks;
    float most = NEGATIVE_INFINITY;
    for (u32 j = warp; j < item.blocks; j += CHOOSERS / 32) {
        float dot = 0.0f;
        for (u32 d = lane; d < params.dim; d += 32) dot += mean[d] * scalar(params, params.keys, (keys + j) * params.dim + d);
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) dot += __shfl_xor_sync(FULL_WARP, dot, step);
        dot *= params.scale;
        if (lane == 0) estimated[j] = dot;
        most = fmaxf(most, dot);
    }
    most = join<true, CHOOSERS>(most, shared);
    float sums[2] = {0.0f, 0.0f};
    for (u32 j = threadIdx.x; j < item.blocks; j += CHOOSERS) {
        sums[0] += exp2_fast(estimated[j] - most);
        sums[1] += found[j];
    }
    sums[0] = join<false, CHOOSERS>(sums[0], shared);
    sums[1] = join<false, CHOOSERS>(sums[1], shared);
    float divergence = 0.0f;
    for (u32 j = threadIdx.x; j < item.blocks; j += CHOOSERS) {
        const float p = exp2_fast(estimated[j] - most) / sums[0], q = found[j] / sums[1], middle = 0.5f * (p + q);
        if (p > 0.0f) divergence += 0.5f * p * __log2f(p / middle);
        if (q > 0.0f) divergence += 0.5f * q * __log2f(q / middle);
    }
    divergence = join<false, CHOOSERS>(divergence, shared);
    if (threadIdx.x == 0) *out = sqrtf(fmaxf(divergence, 0.0f));
}

// How many blocks of columns, and runs of diagonals, hold the share. Grid: (2 heads, parts of the group).
extern "C" __global__ void __launch_bounds__(CHOOSERS) flex_choose(const __grid_constant__ FlexParams params) {
    __shared__ ShareShared<CHOOSERS> shared;
    const u32 which = blockIdx.x & 1u;
    const FlexItem item(params, blockIdx.x / 2, blockIdx.y);
    const HeadPlan& plan = item.plan(params);
    u32 more = 0;
    if (!item.by_map(params)) {
        const float* sums = item.sums(params, which == 0 ? params.columns : params.diagonals, blockIdx.y, 1);
        const float whole = WHOLE / float(min(LAST, item.part.rows));
        const auto mass = [&](u32 i) { return whole_number(sums[i] * whole); };
        u32 total[1] = {0};
        for (u32 i = threadIdx.x; i < item.part.end; i += CHOOSERS) total[0] += mass(i);
        sum_all<CHOOSERS>(total, shared, 1);
        const u32 target = target_of(plan.share, total[0]);
        const u32 least = least_of_share<CHOOSERS>(item.part.end, target, shared, mass);
        const u32 count = count_of_share<CHOOSERS>(item.part.end, target, least, shared, mass);
        more = min(max(count / KEY_BLOCK + 1, plan.least), item.blocks) - 1;
    }
    if (threadIdx.x > 0) return;
    u32* lengths = reinterpret_cast<u32*>(params.lengths) + 4 * item.index + 2 * which;
    lengths[0] = item.blocks - 1;
    lengths[1] = more;
}

// Products of means become masses: a row block's add up to the same as any other's. Grid: (row blocks, heads of the launch).
extern "C" __global__ void __launch_bounds__(128) flex_map(const __grid_constant__ FlexParams params) {
    __shared__ float shared[4];
    const u32 block = params.first_block + blockIdx.x, part = block * ROWS / params.parts.part_rows - params.parts.first;
    const FlexItem item(params, params.first_head + blockIdx.y, part);
    if (!item.by_map(params)) return;
    const u32 seen = Seen::by(params.parts, params.view.tokens, block).all;
    float* map = reinterpret_cast<float*>(params.map) + (u64(blockIdx.y) * params.blocks + blockIdx.x) * params.key_blocks;
    float most = NEGATIVE_INFINITY, sum = 0.0f;
    for (u32 j = threadIdx.x; j < seen; j += 128) most = fmaxf(most, map[j] * params.scale);
    most = join<true, 128>(most, shared);
    for (u32 j = threadIdx.x; j < seen; j += 128) sum += exp2_fast(map[j] * params.scale - most);
    sum = join<false, 128>(sum, shared);
    const float whole = WHOLE / float((item.part.rows + ROWS - 1) / ROWS) / sum;
    for (u32 j = threadIdx.x; j < params.key_blocks; j += 128) {
        const u32 x = j < seen ? whole_number(exp2_fast(map[j] * params.scale - most) * whole) : 0;
        reinterpret_cast<u32*>(map)[j] = x;
    }
}

// The mass from which on blocks of a part's map are taken. Grid: (heads, parts of the launch).
extern "C" __global__ void __launch_bounds__(CHOOSERS) flex_cover(const __grid_constant__ FlexParams params) {
    __shared__ ShareShared<CHOOSERS> shared;
    const u32 nth_part = params.first_part + blockIdx.y;
    const FlexItem item(params, params.first_head + blockIdx.x, nth_part);
    if (!item.by_map(params)) return;
    const u32 rows = (item.part.rows + ROWS - 1) / ROWS, first = item.part.first_row / ROWS - params.first_block;
    const u32* map = reinterpret_cast<const u32*>(params.map) + (u64(blockIdx.x) * params.blocks + first) * params.key_blocks;
    const auto mass = [&](u32 i) { return map[i]; };
    const u32 n = rows * params.key_blocks;
    u32 total[1] = {0};
    for (u32 i = threadIdx.x; i < n; i += CHOOSERS) total[0] += map[i];
    sum_all<CHOOSERS>(total, shared, 1);
    const u32 least = least_of_share<CHOOSERS>(n, target_of(item.plan(params).share, total[0]), shared, mass);
    if (threadIdx.x == 0) reinterpret_cast<u32*>(params.leasts)[item.index] = max(least, 1u);
}

// Lists. Grid: (row blocks, heads of the launch).
extern "C" __global__ void __launch_bounds__(128) flex_build(const __grid_constant__ FlexParams params) {
    extern __shared__ u32 bits[];
    const u32 block = params.first_block + blockIdx.x, part = block * ROWS / params.parts.part_rows - params.parts.first;
    const FlexItem item(params, params.first_head + blockIdx.y, part);
    const Seen seen = Seen::by(params.parts, params.view.tokens, block);
    const u32 words = (seen.all + 31) / 32;
    if (item.by_map(params)) {
        const u32* map = reinterpret_cast<const u32*>(params.map) + (u64(blockIdx.y) * params.blocks + blockIdx.x) * params.key_blocks;
        const u32 least = reinterpret_cast<const u32*>(params.leasts)[item.index];
        for (u32 j = threadIdx.x; j < 32 * words; j += 128) {
            const u32 word = __ballot_sync(FULL_WARP, j < seen.all && map[j] >= least);
            if ((threadIdx.x & 31u) == 0) bits[j / 32] = word;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            // A row block whose mass is spread loses to others whose is not: the floor is for it.
            const u32 floor = item.plan(params).least;
            u32 count = 0;
            for (u32 i = 0; i < words; ++i) count += __popc(bits[i]);
            for (u32 back = 1; back <= min(floor, seen.before) && count < floor; ++back) {
                const u32 at = seen.before - back, bit = 1u << (at & 31u);
                count += (bits[at / 32] & bit) == 0;
                bits[at / 32] |= bit;
            }
        }
    } else {
        for (u32 i = threadIdx.x; i < words; i += 128) bits[i] = 0;
        __syncthreads();
        const u32* lengths = reinterpret_cast<const u32*>(params.lengths) + 4 * item.index;
        const u32* columns = reinterpret_cast<const u32*>(params.chosen) + u64(item.index) * 2 * params.key_blocks;
        const u32* runs = columns + params.key_blocks;
        const auto set = [&](u32 at) {
            if (at < seen.all) atomicOr(bits + at / 32, 1u << (at & 31u));
        };
        // Key block 0 is in every list.
        for (u32 i = threadIdx.x; i < lengths[1]; i += 128) set(columns[i] + 1);
        // A run of 64 diagonals meets a full row block in three key blocks; the nearest run is always there.
        const u32 end = params.parts.offset / KEY_BLOCK + (block + 1) * (ROWS / KEY_BLOCK);
        for (u32 i = threadIdx.x; i < lengths[3] + 1; i += 128) {
            const u32 run = i == 0 ? 0 : runs[i - 1] + 1;
            for (u32 tile = run; tile < run + 3 && tile < end; ++tile) set(end - 1 - tile);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32)
        put_list(params.lists, params.numbers, params.parts, item.head, params.call_blocks, block,
                 params.first_number + Triangle::of(params.parts).at(item.nth, block), bits, seen);
}
