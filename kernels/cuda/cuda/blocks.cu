// blocks: a Block-Sparse list from the prompt itself. Means of 128 queries and of 64 keys, the products of all such means, and
// (with top_k between) a list of tiles for each row block.
//
// Means are rounded to the keys' type, products summed in f32 and written: [heads, row blocks, key blocks], causal, the
// blocks that a row block lies in above all else. A launch takes as many heads or row blocks as there is room for products. Row blocks are
// those of the sparse rows, and what is chosen for one depends on its own queries and the keys up to its end.
#include "planner.cuh"
#include "tile.cuh"

constexpr u32 TILE = 64, THREADS = 128, SIDE = 64;

struct BlocksParams {
    View view;   // its tokens end with the sparse rows
    u64 q;       // [rows, q_heads, D], of the keys' type
    u64 plans;   // HeadPlan [q_heads]
    u64 heads;   // u32: query heads with this pattern
    u64 queries; // means, [heads, row_blocks, D]
    u64 keys;    // means, [kv_heads, key_blocks, D]
    u64 scores;  // f32 [gridDim.z, row blocks of the launch, key_blocks]
    u64 lengths; // u32 [heads, row_blocks, 2]: key blocks to choose from, and how many of them; 0: nobody asks
    u64 lists;   // List [q_heads, call_blocks]: see prefill.cuh
    u64 numbers; // from `first_number` on u32 [heads, row_blocks, room]: a free place, then key blocks, rising
    Parts parts;
    u32 q_heads, heads_per_kv;
    u32 row_blocks, key_blocks, call_blocks;
    u32 first_head, first_block, blocks; // of the launch
    u32 first_number, room;
    u32 as_they_are; // products are not put above all else where a row block lies
};

__device__ __forceinline__ u32 query_head(const BlocksParams& params, u32 nth) {
    return __ldg(reinterpret_cast<const u32*>(params.heads) + nth);
}

__device__ __forceinline__ const HeadPlan& plan_of(const BlocksParams& params, u32 head) {
    return reinterpret_cast<const HeadPlan*>(params.plans)[head];
}

// Key blocks that the row block sees any of.
__device__ __forceinline__ u32 seen_by(const BlocksParams& params, u32 block) {
    const u32 end = min(params.parts.offset + (block + 1) * ROWS, params.view.tokens);
    return min((end + TILE - 1) / TILE, params.key_blocks);
}

// Mean of up to `COUNT` rows by a CTA; row(i) is where row i begins.
template <bool IS_BF16, u32 D, u32 COUNT, class Row>
__device__ __forceinline__ void mean(u16* to, u32 there, Row row) {
    constexpr u32 WORDS = D / 8, GROUPS = THREADS / WORDS;
    __shared__ float sums[GROUPS][D];
    const u32 word = threadIdx.x % WORDS, group = threadIdx.x / WORDS;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (u32 i = group; i < COUNT; i += GROUPS) {
        if (i >= there) break;
        float x[8];
        load_scalars(x, row(i), IS_BF16 ? BF16 : F16, word * 8);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) sum[j] += x[j];
    }
#pragma unroll
    for (u32 j = 0; j < 8; ++j) sums[group][word * 8 + j] = sum[j];
    __syncthreads();
    for (u32 d = 2 * threadIdx.x; d < D; d += 2 * THREADS) {
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (u32 i = 0; i < GROUPS; ++i) {
            low += sums[i][d];
            high += sums[i][d + 1];
        }
        const float part = there > 0 ? 1.0f / float(there) : 0.0f;
        reinterpret_cast<u32*>(to)[d / 2] =
            IS_BF16 ? pack_bf16(low * part, high * part) : pack_f16(low * part, high * part);
    }
}

// Grid: (row blocks, heads).
template <bool IS_BF16, u32 D>
__device__ __forceinline__ void mean_queries(const BlocksParams& params) {
    const u32 nth = blockIdx.y, head = query_head(params, nth), block = blockIdx.x;
    const u16* from = reinterpret_cast<const u16*>(params.q) + (u64(block) * ROWS * params.q_heads + head) * D;
    u16* to = reinterpret_cast<u16*>(params.queries) + (u64(nth) * params.row_blocks + block) * D;
    mean<IS_BF16, D, ROWS>(to, min(ROWS, params.parts.rows - block * ROWS),
                           [&](u32 i) { return from + u64(i) * params.q_heads * D; });
    if (threadIdx.x > 0 || params.lengths == 0) return;
    u32* lengths = reinterpret_cast<u32*>(params.lengths) + 2 * (u64(nth) * params.row_blocks + block);
    lengths[0] = params.key_blocks;
    lengths[1] = min(plan_of(params, head).blocks, params.key_blocks);
}

// Grid: (key blocks, KV heads).
template <bool IS_BF16, u32 D>
__device__ __forceinline__ void mean_keys(const BlocksParams& params) {
    const u32 head = blockIdx.y, block = blockIdx.x;
    u16* to = reinterpret_cast<u16*>(params.keys) + (u64(head) * params.key_blocks + block) * D;
    mean<IS_BF16, D, TILE>(to, min(TILE, params.view.tokens - block * TILE), [&](u32 i) {
        const Place at = place(params.view, head, (block * TILE + i) & ~15u);
        return reinterpret_cast<const char*>(params.view.k + at.offset) + (i & 15u) * params.view.token_stride;
    });
}

// Grid: (key blocks / 64, row blocks of the launch / 64, heads of the launch).
template <bool IS_BF16, u32 D>
__device__ __forceinline__ void block_scores(const BlocksParams& params) {
    constexpr u32 STEPS = D / 16, WORDS = D / 8, BYTES = D * 2;
    __shared__ alignas(128) u8 tile[SIDE * BYTES];
    const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
    const u32 nth = params.first_head + blockIdx.z, head = query_head(params, nth), first_key = blockIdx.x * SIDE;
    const u32 row = blockIdx.y * SIDE + threadIdx.x / 32 * 16 + g; // of the launch; and row + 8
    const u32 last = min(params.first_block + (blockIdx.y + 1) * SIDE, params.row_blocks) - 1;
    float s[8][4];
#pragma unroll
    for (u32 n = 0; n < 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = NEGATIVE_INFINITY;
    if (first_key < seen_by(params, last)) {
        const u16* keys = reinterpret_cast<const u16*>(params.keys) + u64(head / params.heads_per_kv) * params.key_blocks * D;
#pragma unroll
        for (u32 i = 0; i < SIDE * WORDS / THREADS; ++i) {
            const u32 at = (threadIdx.x + i * THREADS) / WORDS, word = threadIdx.x % WORDS, key = first_key + at;
            const bool there = key < params.key_blocks;
            copy_async(shared_address(tile) + swizzle<BYTES>(at, word), keys + u64(there ? key : 0) * D + word * 8, there);
        }
        commit_copies();
        u32 q[STEPS][4];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 block = params.first_block + row + 8 * i;
            const bool there = row + 8 * i < params.blocks && block < params.row_blocks;
            const u32* from = reinterpret_cast<const u32*>(params.queries) +
                              (u64(nth) * params.row_blocks + (there ? block : 0)) * (D / 2) + t;
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                q[step][i] = there ? __ldg(from + step * 8) : 0;
                q[step][i + 2] = there ? __ldg(from + step * 8 + 4) : 0;
            }
        }
        wait_copies<0>();
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < STEPS; i += 2) {
                u32 b[4];
                load_matrices(b, shared_address(tile) + swizzle<BYTES>(8 * n + (lane & 7u), 2 * i + (lane >> 3)));
                mma<IS_BF16>(s[n], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
                mma<IS_BF16>(s[n], q[i + 1][0], q[i + 1][1], q[i + 1][2], q[i + 1][3], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u32 here = row + 8 * i, block = params.first_block + here;
        if (here >= params.blocks || block >= params.row_blocks) continue;
        const u32 seen = seen_by(params, block), own = (params.parts.offset + block * ROWS) / TILE;
        float* to = reinterpret_cast<float*>(params.scores) + (u64(blockIdx.z) * params.blocks + here) * params.key_blocks;
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
#pragma unroll
            for (u32 j = 0; j < 2; ++j) {
                const u32 key = first_key + 8 * n + 2 * t + j;
                if (key >= params.key_blocks) continue;
                const bool chosen = key >= own && !params.as_they_are;
                to[key] = key >= seen ? NEGATIVE_INFINITY : chosen ? LARGEST : s[n][2 * i + j];
            }
        }
    }
}

// Chosen blocks become tiles where they stand, behind the first block if it is not among them. Grid: (row blocks, heads).
extern "C" __global__ void __launch_bounds__(128) blocks_build(const __grid_constant__ BlocksParams params) {
    const u32 head = query_head(params, blockIdx.y);
    const u32 first = params.first_number + (blockIdx.y * params.row_blocks + blockIdx.x) * params.room;
    const u32 chosen = min(plan_of(params, head).blocks, params.key_blocks);
    u32* best = reinterpret_cast<u32*>(params.numbers) + first;
    const bool has_first = best[1] == 0;
    __syncthreads();
    for (u32 i = 1 + threadIdx.x; i <= chosen; i += blockDim.x) best[i] *= TILE;
    if (threadIdx.x > 0) return;
    best[0] = 0;
    // Unseen blocks come last, for they are behind all others and their scores below.
    const u32 count = min(chosen, seen_by(params, blockIdx.x));
    const u32 entry[LIST_WORDS] = {first + u32(has_first), count + u32(!has_first), 0, 0, 0, 0, 1};
    u32* list = reinterpret_cast<u32*>(params.lists) +
                (u64(head) * params.call_blocks + params.parts.before / ROWS + blockIdx.x) * LIST_WORDS;
#pragma unroll
    for (u32 i = 0; i < LIST_WORDS; ++i) list[i] = entry[i];
}

#define BLOCKS(NAME, IS_BF16, D)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) mean_queries_##NAME(                                         \
        const __grid_constant__ BlocksParams params) {                                                                 \
        mean_queries<IS_BF16, D>(params);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) mean_keys_##NAME(                                            \
        const __grid_constant__ BlocksParams params) {                                                                 \
        mean_keys<IS_BF16, D>(params);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) block_scores_##NAME(                                         \
        const __grid_constant__ BlocksParams params) {                                                                 \
        block_scores<IS_BF16, D>(params);                                                                              \
    }

BLOCKS(bf16_64, true, 64)
BLOCKS(bf16_128, true, 128)
BLOCKS(f16_64, false, 64)
BLOCKS(f16_128, false, 128)
