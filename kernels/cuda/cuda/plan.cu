// plan: a Vertical-Slash list from the prompt itself. The attention of a part's last 64 queries, summed by key and by diagonal,
// without the 64 x N matrix ever being in memory; then a head's tiles from its best diagonals.
//
// Rows come in parts, each planned for from its own queries and the keys up to its end; a launch takes some heads of some parts,
// an *item* each. For FlexPrefill, which looks at the last 128 queries, a part has two: one for each 64 of them. Both passes over
// the keys give a warp 16 of the 64 queries and all of a CTA's keys, 64 at a time. Which keys a CTA has follows from their positions
// alone, so that an item's sums have the same bits in any company and on any GPU.
#include "planner.cuh"
#include "softmax.cuh"
#include "tile.cuh"

struct EstimateParams {
    View view;
    u64 q;         // [rows, q_heads, D], of the keys' type
    u64 plans;     // HeadPlan [q_heads]
    u64 heads;     // u32 [gridDim.y]: query heads of the launch
    u64 stats;     // f32 [items, splits, 64, 2]: maximum and sum of each query over a split's keys
    u64 columns;   // f32 [items, width]
    u64 diagonals; // f32 [items, width], which the first pass clears and the second adds to
    u64 lengths;   // u32 [2, items, 2]: of the columns, then of the diagonals, how many there are and how many are kept
    float scale;   // of the scores, times log2(e); positive
    Parts parts;
    u32 q_heads, heads_per_kv;
    u32 splits; // gridDim.x, and CTAs that the longest item needs
    u32 width;  // numbers from one item's sums to the next one's
    u32 halves; // items of a part and head: 1, or 2
};

constexpr u32 QUERIES = 64, TILE = 64, THREADS = 128;
constexpr u32 STRETCH = 32; // tiles of a CTA

// What a CTA works for.
struct Item {
    u32 index, head, kv_head;    // of the launch
    u32 first_row, rows, tokens; // of its part; keys up to the part's end
    u32 begin, end;              // tiles of this CTA; none for the last CTAs of an item that is shorter than others
};

// With the grid (.., heads, halves of parts).
__device__ __forceinline__ Item item_of(const EstimateParams& params, u32 nth_head, u32 nth_half) {
    Item item;
    item.index = nth_half * gridDim.y + nth_head;
    item.head = __ldg(reinterpret_cast<const u32*>(params.heads) + nth_head);
    const Part part = params.parts.part(params.parts.first + nth_half / params.halves);
    // The first half is of the queries before the last 64, if there are any.
    const u32 behind = min((params.halves - 1 - nth_half % params.halves) * QUERIES, part.rows);
    item.kv_head = item.head / params.heads_per_kv;
    item.rows = part.rows - behind;
    item.tokens = part.end - behind;
    item.first_row = part.first_row;
    item.begin = blockIdx.x * STRETCH;
    item.end = item.rows > 0 ? min(item.begin + STRETCH, (item.tokens + TILE - 1) / TILE) : item.begin;
    return item;
}

__device__ __forceinline__ const HeadPlan& plan_of(u64 plans, u32 head) {
    return reinterpret_cast<const HeadPlan*>(plans)[head];
}

template <bool IS_BF16, u32 D>
struct Estimate {
    static constexpr u32 STEPS = D / 16, WORDS = D / 8, BYTES = D * 2;
    u32 q[STEPS][4];

    __device__ __forceinline__ void load_query(const EstimateParams& params, const Item& item) {
        const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const int row = int(item.rows) - int(QUERIES) + int(threadIdx.x / 32 * 16 + g + 8 * i);
            const u32* from = reinterpret_cast<const u32*>(params.q) +
                              (u64(item.first_row + (row < 0 ? 0 : row)) * params.q_heads + item.head) * (D / 2) + t;
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                q[step][i] = row >= 0 ? __ldg(from + step * 8) : 0;
                q[step][i + 2] = row >= 0 ? __ldg(from + step * 8 + 4) : 0;
            }
        }
    }

    __device__ __forceinline__ static void load(const EstimateParams& params, const Item& item, u32 first, u32 to) {
#pragma unroll
        for (u32 i = 0; i < TILE * WORDS / THREADS; ++i) {
            const u32 row = (threadIdx.x + i * THREADS) / WORDS, word = threadIdx.x % WORDS;
            const bool there = first + row < item.tokens;
            u64 from = 0;
            if (there) {
                const Place at = place(params.view, item.kv_head, (first + row) & ~15u);
                from = at.offset + (row & 15u) * params.view.token_stride;
            }
            copy_async(to + swizzle<BYTES>(row, word), reinterpret_cast<const void*>(params.view.k + from + word * 16),
                       there);
        }
        commit_copies();
    }

    // Whether all of the 64 queries are there and see all keys of a tile; so it is for all but the last tiles of an item.
    __device__ __forceinline__ static bool whole(const Item& item, u32 first) {
        return item.rows >= QUERIES && first + TILE + QUERIES <= item.tokens + 1;
    }

    // Scores of rows g and g + 8 with keys 8n + 2t, + 1: as they are of a whole tile, otherwise -inf where a query does not
    // see the key.
    template <bool WHOLE>
    __device__ __forceinline__ void scores(float (&s)[8][4], const Item& item, u32 base, u32 first) const {
        const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < STEPS; i += 2) {
                u32 b[4];
                load_matrices(b, base + swizzle<BYTES>(8 * n + (lane & 7u), 2 * i + (lane >> 3)));
                mma<IS_BF16>(s[n], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
                mma<IS_BF16>(s[n], q[i + 1][0], q[i + 1][1], q[i + 1][2], q[i + 1][3], b[2], b[3]);
            }
            if constexpr (!WHOLE) {
                const int position = int(item.tokens) - int(QUERIES) + int(threadIdx.x / 32 * 16 + g);
                const int begin = int(item.tokens) - int(item.rows); // the first query's position
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const int at = position + int(8 * (i >> 1)), key = int(first + 8 * n + 2 * t + (i & 1u));
                    if (at < begin || key > at) s[n][i] = NEGATIVE_INFINITY;
                }
            }
        }
    }

    // Takes a tile into the rows' maxima (of scores times the scale) and sums.
    template <bool WHOLE>
    __device__ __forceinline__ void add(float (&m)[2], float (&l)[2], float scale, const Item& item, u32 base,
                                        u32 first) const {
        float s[8][4];
        scores<WHOLE>(s, item, base, first);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float most = NEGATIVE_INFINITY;
#pragma unroll
            for (u32 n = 0; n < 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            const float top = fmaxf(m[i], most * scale);
            // A row that has seen nothing yet: whatever is taken from -inf is -inf.
            const float shift = !WHOLE && top == NEGATIVE_INFINITY ? 0.0f : top;
            float sum[2] = {l[i] * weight(m[i], top), 0.0f};
#pragma unroll
            for (u32 n = 0; n < 8; ++n) {
                sum[0] += exp2_fast(s[n][2 * i] * scale - shift);
                sum[1] += exp2_fast(s[n][2 * i + 1] * scale - shift);
            }
            m[i] = top;
            l[i] = sum[0] + sum[1];
        }
    }
};

template <bool IS_BF16, u32 D>
__device__ __forceinline__ void estimate_stats(const EstimateParams& params) {
    __shared__ alignas(128) u8 tiles[2][TILE * D * 2];
    Estimate<IS_BF16, D> body;
    __shared__ Item item; // not in registers, of which there are too few
    if (threadIdx.x == 0) item = item_of(params, blockIdx.y, blockIdx.z);
    __syncthreads();
    const u32 g = (threadIdx.x & 31u) >> 2, begin = item.begin;
    if (begin >= item.end) return;
    body.load_query(params, item);
    float* diagonals = reinterpret_cast<float*>(params.diagonals) + u64(item.index) * params.width;
    for (u32 i = begin * TILE + threadIdx.x; i < min(item.end * TILE, item.tokens); i += THREADS) diagonals[i] = 0.0f;
    float m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, l[2] = {0.0f, 0.0f};
    body.load(params, item, begin * TILE, shared_address(tiles[begin & 1u]));
    for (u32 tile = begin; tile < item.end; ++tile) {
        if (tile + 1 < item.end) {
            body.load(params, item, (tile + 1) * TILE, shared_address(tiles[(tile + 1) & 1u]));
        } else {
            commit_copies();
        }
        wait_copies<1>();
        __syncthreads();
        const u32 base = shared_address(tiles[tile & 1u]);
        if (body.whole(item, tile * TILE)) {
            body.template add<true>(m, l, params.scale, item, base, tile * TILE);
        } else {
            body.template add<false>(m, l, params.scale, item, base, tile * TILE);
        }
        __syncthreads();
    }
    float* stats = reinterpret_cast<float*>(params.stats) + (u64(item.index) * params.splits + blockIdx.x) * QUERIES * 2;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
#pragma unroll
        for (u32 step = 1; step < 4; step *= 2) {
            const float other_m = __shfl_xor_sync(FULL_WARP, m[i], step), other_l = __shfl_xor_sync(FULL_WARP, l[i], step);
            const float top = fmaxf(m[i], other_m);
            l[i] = l[i] * weight(m[i], top) + other_l * weight(other_m, top);
            m[i] = top;
        }
        if ((threadIdx.x & 3u) == 0) {
            stats[(threadIdx.x / 32 * 16 + g + 8 * i) * 2] = m[i];
            stats[(threadIdx.x / 32 * 16 + g + 8 * i) * 2 + 1] = l[i];
        }
    }
}

constexpr u32 WEIGHT_STRIDE = TILE + 8; // floats; the eight rows that a warp writes at once lie in different banks

template <bool IS_BF16, u32 D>
__device__ __forceinline__ void estimate_sums(const EstimateParams& params) {
    extern __shared__ Word4 dynamic[]; // two tiles of keys, then weights [QUERIES, WEIGHT_STRIDE]
    __shared__ float lse[QUERIES];
    constexpr u32 TILE_BYTES = TILE * D * 2;
    const u32 tiles = shared_address(dynamic);
    float* weights = reinterpret_cast<float*>(dynamic + 2 * TILE_BYTES / 16);
    Estimate<IS_BF16, D> body;
    __shared__ Item item; // not in registers, of which there are too few
    if (threadIdx.x == 0) item = item_of(params, blockIdx.y, blockIdx.z);
    __syncthreads();
    const u32 begin = item.begin, end = item.end;
    if (begin >= end) return;
    const u32 row = threadIdx.x / 32 * 16 + ((threadIdx.x & 31u) >> 2), t = threadIdx.x & 3u;
    body.load_query(params, item);
    const float* stats = reinterpret_cast<const float*>(params.stats) + u64(item.index) * params.splits * QUERIES * 2;
    if (threadIdx.x < QUERIES) {
        float m = NEGATIVE_INFINITY, l = 0.0f;
        const u32 splits = (item.tokens + STRETCH * TILE - 1) / (STRETCH * TILE);
#pragma unroll 4
        for (u32 i = 0; i < splits; ++i) {
            const float part_m = stats[(i * QUERIES + threadIdx.x) * 2], part_l = stats[(i * QUERIES + threadIdx.x) * 2 + 1];
            const float top = fmaxf(m, part_m);
            l = l * weight(m, top) + part_l * weight(part_m, top);
            m = top;
        }
        lse[threadIdx.x] = l > 0.0f ? m + __log2f(l) : 0.0f;
    }
    body.load(params, item, begin * TILE, tiles + (begin & 1u) * TILE_BYTES);
    float* columns = reinterpret_cast<float*>(params.columns) + u64(item.index) * params.width;
    float* diagonals = reinterpret_cast<float*>(params.diagonals) + u64(item.index) * params.width;
    // Of a tile, query r and key (r - 1 - i) mod 64: two diagonals, of which that of the queries up to i goes on in the next tile
    // where the other one is in this.
    const u32 own = threadIdx.x % TILE;
    float carried = 0.0f;
    const auto give = [&](int distance, float sum) {
        if (sum > 0.0f && distance >= 0 && distance < int(item.tokens)) atomicAdd(diagonals + distance, sum);
    };
    for (u32 tile = begin; tile < end; ++tile) {
        if (tile + 1 < end) {
            body.load(params, item, (tile + 1) * TILE, tiles + ((tile + 1) & 1u) * TILE_BYTES);
        } else {
            commit_copies();
        }
        wait_copies<1>();
        __syncthreads();
        const u32 first = tile * TILE;
        float s[8][4];
        if (body.whole(item, first)) {
            body.template scores<true>(s, item, tiles + (tile & 1u) * TILE_BYTES, first);
        } else {
            body.template scores<false>(s, item, tiles + (tile & 1u) * TILE_BYTES, first);
        }
        const float low = lse[row], high = lse[row + 8];
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
            float2* at = reinterpret_cast<float2*>(weights + row * WEIGHT_STRIDE + 8 * n + 2 * t);
            at[0] = {exp2_fast(s[n][0] * params.scale - low), exp2_fast(s[n][1] * params.scale - low)};
            at[8 * WEIGHT_STRIDE / 2] = {exp2_fast(s[n][2] * params.scale - high), exp2_fast(s[n][3] * params.scale - high)};
        }
        __syncthreads();
        // Half of the threads sum a column each, half two diagonals.
        float near = 0.0f, far = 0.0f;
        if (threadIdx.x < TILE) {
#pragma unroll 16
            for (u32 r = 0; r < QUERIES; r += 2) {
                near += weights[r * WEIGHT_STRIDE + own];
                far += weights[(r + 1) * WEIGHT_STRIDE + own];
            }
            const u32 sink = __ldg(&plan_of(params.plans, item.head).sink);
            if (first + own < item.tokens) columns[first + own] = first + own < sink ? LARGEST : near + far;
        } else {
#pragma unroll 16
            for (u32 r = 0; r < QUERIES; ++r) {
                const float x = weights[r * WEIGHT_STRIDE + ((r - 1 - own) & (TILE - 1))];
                near += r <= own ? x : 0.0f;
                far += r <= own ? 0.0f : x;
            }
            give(int(item.tokens) - int(QUERIES) - int(first) + 1 + int(own), far + carried);
            carried = near;
        }
    }
    if (threadIdx.x >= TILE)
        give(int(item.tokens) - int(QUERIES) - int((end - 1) * TILE) - int(TILE - 1 - own), carried);
}

// The nearest diagonals are chosen whatever their sums are; and how many numbers there are to choose from. Grid: (1, heads, parts).
extern "C" __global__ void favour(const __grid_constant__ EstimateParams params) {
    const Item item = item_of(params, blockIdx.y, blockIdx.z);
    const HeadPlan& plan = plan_of(params.plans, item.head);
    float* diagonals = reinterpret_cast<float*>(params.diagonals) + u64(item.index) * params.width;
    for (u32 i = threadIdx.x; i < min(plan.near, item.tokens); i += blockDim.x) diagonals[i] = LARGEST;
    if (threadIdx.x > 0) return;
    u32* columns = reinterpret_cast<u32*>(params.lengths) + 2 * item.index;
    u32* slashes = columns + 2 * gridDim.y * gridDim.z;
    columns[0] = slashes[0] = item.tokens;
    columns[1] = min(plan.verticals, item.tokens);
    slashes[1] = min(plan.slashes, item.tokens);
}

#define ESTIMATE(NAME, IS_BF16, D)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) estimate_stats_##NAME(                                    \
        const __grid_constant__ EstimateParams params) {                                                               \
        estimate_stats<IS_BF16, D>(params);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) estimate_sums_##NAME(                                    \
        const __grid_constant__ EstimateParams params) {                                                               \
        estimate_sums<IS_BF16, D>(params);                                                                             \
    }

ESTIMATE(bf16_64, true, 64)
ESTIMATE(bf16_128, true, 128)
ESTIMATE(f16_64, false, 64)
ESTIMATE(f16_128, false, 128)

struct BuildParams {
    u64 plans;   // as above
    u64 heads;   // as above
    u64 slashes; // u32 [items, slash_room], of each as many as there are, rising
    u64 lists;   // List [q_heads, row_blocks]: see prefill.cuh
    u64 numbers; // per item room for tiles, columns (which are there already, rising), cover
    Parts parts;
    u32 row_blocks; // of the call
    u32 first_number, column_room, slash_room, tile_room, cover_words;
};

// One CTA per item, grid (1, heads, parts). A slash covers (slash, slash + ROWS]; tiles cover the union from the near end on, in runs without gaps.
// Only a slash that is more than ROWS away from the one before can begin a run, and such are few: all threads find them,
// one thread walks through them and says where each run begins and ends, all write the tiles. Then each tile marks what it
// covers.
extern "C" __global__ void __launch_bounds__(1024) vs_build(const __grid_constant__ BuildParams params) {
    constexpr u32 BATCH = 2048, WARPS = 1024 / 32;
    // Slashes that may begin a run, and those before them; then the runs: where they begin, and how many tiles were there.
    __shared__ u32 openers[BATCH + 1], befores[BATCH + 1], found_by[WARPS + 1], run_count, tile_count;
    const u32 head = __ldg(reinterpret_cast<const u32*>(params.heads) + blockIdx.y);
    const Part part = params.parts.part(params.parts.first + blockIdx.z);
    const HeadPlan& plan = plan_of(params.plans, head);
    const u32 slash_count = min(plan.slashes, part.end), column_count = min(plan.verticals, part.end);
    const u32 stride = params.tile_room + params.column_room + params.cover_words;
    // Lists of a part stay while later parts are planned for.
    const u32 first_number = params.first_number + ((params.parts.first + blockIdx.z) * gridDim.y + blockIdx.y) * stride;
    u32* tiles = reinterpret_cast<u32*>(params.numbers) + first_number;
    u32* cover = tiles + params.tile_room + params.column_room;
    const u32* slashes =
        reinterpret_cast<const u32*>(params.slashes) + u64(blockIdx.z * gridDim.y + blockIdx.y) * params.slash_room;
    for (u32 i = threadIdx.x; i < params.cover_words; i += blockDim.x) cover[i] = 0;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u, below_lane = (1u << lane) - 1u;
    u32 count = 0, start = slash_count > 0 ? slashes[0] : 0; // tiles of the runs that ended; begin of the open one
    for (u32 begin = 0; begin < slash_count; begin += BATCH) {
        const u32 here = min(BATCH, slash_count - begin);
        u32 before[BATCH / 1024], slash[BATCH / 1024], mine[BATCH / 1024], total = 0;
#pragma unroll
        for (u32 i = 0; i < BATCH / 1024; ++i) {
            const u32 at = warp * (BATCH / WARPS) + i * 32 + lane;
            slash[i] = at < here ? slashes[begin + at] : 0;
            before[i] = at < here && begin + at > 0 ? slashes[begin + at - 1] : slash[i];
            const u32 ballot = __ballot_sync(FULL_WARP, slash[i] > before[i] + ROWS);
            mine[i] = slash[i] > before[i] + ROWS ? total + __popc(ballot & below_lane) : ~0u;
            total += __popc(ballot);
        }
        if (lane == 0) found_by[warp] = total;
        __syncthreads();
        u32 first = 0;
        for (u32 i = 0; i < warp; ++i) first += found_by[i];
#pragma unroll
        for (u32 i = 0; i < BATCH / 1024; ++i) {
            if (mine[i] == ~0u) continue;
            openers[first + mine[i]] = slash[i];
            befores[first + mine[i]] = before[i];
        }
        if (threadIdx.x == 1023) found_by[WARPS] = first + total;
        __syncthreads();
        if (threadIdx.x == 0) {
            const u32 found = found_by[WARPS];
            const bool last = begin + here == slash_count;
            u32 runs = 0;
            for (u32 i = 0; i < found + u32(last); ++i) {
                const u32 up_to = (i < found ? befores[i] : slashes[slash_count - 1]) + ROWS;
                const u32 needed = (up_to - start + TILE - 1) / TILE;
                if (i < found && openers[i] <= start + needed * TILE) continue; // the run's last tile reaches it
                const u32 opener = i < found ? openers[i] : 0;
                // Entry `runs` is at most `i`, which has been read.
                openers[runs] = start;
                befores[runs++] = count;
                count += needed;
                start = opener;
            }
            run_count = runs;
            tile_count = count;
        }
        __syncthreads();
        const u32 runs = run_count, from = runs > 0 ? befores[0] : 0, to = min(tile_count, params.tile_room);
        for (u32 i = from + threadIdx.x; i < (runs > 0 ? to : from); i += blockDim.x) {
            u32 low = 0, high = runs; // the last run that begins at or before tile i
            while (high - low > 1) {
                const u32 middle = (low + high) / 2;
                if (befores[middle] <= i) {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            tiles[i] = openers[low] + (i - befores[low]) * TILE;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) tile_count = min(count, params.tile_room);
    __syncthreads();
    const u32 blocks = (part.rows + ROWS - 1) / ROWS;
    u32* lists = reinterpret_cast<u32*>(params.lists) +
                 (u64(head) * params.row_blocks + params.parts.before / ROWS + part.first_row / ROWS) * LIST_WORDS;
    for (u32 i = threadIdx.x; i < blocks; i += blockDim.x) {
        u32* list = lists + i * LIST_WORDS;
        list[0] = first_number;
        list[1] = tile_count;
        list[2] = first_number + params.tile_room;
        list[3] = column_count;
        list[4] = first_number + params.tile_room + params.column_room;
        list[5] = params.cover_words * 32;
        list[6] = 0;
    }
    for (u32 i = threadIdx.x; i < tile_count; i += blockDim.x) {
        const u32 word = tiles[i] / 32, bit = tiles[i] & 31u;
        if (word < params.cover_words) atomicOr(cover + word, 0xffffffffu << bit);
        if (word + 1 < params.cover_words) atomicOr(cover + word + 1, 0xffffffffu);
        if (bit != 0 && word + 2 < params.cover_words) atomicOr(cover + word + 2, (1u << bit) - 1u);
    }
}

struct ListsParams {
    u64 plans; // as above
    u64 heads; // HeadLists [q_heads]: see prefill.cuh
    u64 lists; // List [q_heads, row_blocks]
    Parts parts;
    u32 row_blocks; // of the call
    u32 dense[LIST_WORDS];
};

// Lists that no queries decide: those of heads whose tiles are fixed, and of all heads outside the sparse rows.
// Grid: (row blocks / 128, query heads).
extern "C" __global__ void __launch_bounds__(128) fixed_lists(const __grid_constant__ ListsParams params) {
    const u32 head = blockIdx.y, block = blockIdx.x * 128 + threadIdx.x;
    const HeadPlan* plan = reinterpret_cast<const HeadPlan*>(params.plans) + head;
    if (block == 0) {
        u32* entry = reinterpret_cast<u32*>(params.heads) + 2 * head;
        entry[0] = head * params.row_blocks;
        entry[1] = 1;
    }
    const u32 first = params.parts.before / ROWS, end = first + (params.parts.rows + ROWS - 1) / ROWS;
    const bool sparse = first <= block && block < end;
    if (block >= params.row_blocks || (sparse && plan->kind != FIXED)) return;
    u32* list = reinterpret_cast<u32*>(params.lists) + (u64(head) * params.row_blocks + block) * LIST_WORDS;
#pragma unroll
    for (u32 i = 0; i < LIST_WORDS; ++i) list[i] = sparse ? plan->list[i] : params.dense[i];
}
