// x_attention: XAttention's lists from the prompt itself (arXiv 2503.16428). As many keys as the stride has, end to end, are one long
// key, as many queries in reversed order one long query: their product is the sum of scores along an antidiagonal.
//
// Products of long rows are tiles of a matrix product whose rows are gathered from where queries and keys lie; only the logarithm of the sum of
// weights of each long query over a block of 64 keys is written. From these a CTA makes a row block's list: the fewest key blocks with a
// share of the mass.
//
// What is chosen for a row block depends on its own queries and the keys up to its end: sums run by position.
#include "products.cuh"
#include "share.cuh"
#include "softmax.cuh"

struct XAttentionParams {
    View view;   // its tokens end with the sparse rows
    u64 q;       // [rows, q_heads, D], of the keys' type
    u64 plans;   // HeadPlan [q_heads]
    u64 heads;   // u32: query heads with this pattern and stride
    u64 gathered; // keys of a view in pages without them, [kv_heads, tokens, D]; 0 if nobody needs them
    u64 scores;  // f32 [heads of the launch, long queries of the launch, key_blocks], base 2
    u64 lists;   // List [q_heads, call_blocks]: see prefill.cuh
    u64 numbers; // from `first_number` on, by `Triangle`
    Parts parts;
    float scale; // of the products, times log2(e) / stride; positive
    u32 q_heads, heads_per_kv;
    u32 key_blocks, call_blocks;
    u32 first_head, heads_count, first_block, blocks; // of the launch
    u32 first_number;
};

template <u32 STRIDE>
struct Long {
    static constexpr u32 QUERIES = ROWS / STRIDE;   // long queries of a row block
    static constexpr u32 KEYS = KEY_BLOCK / STRIDE; // long keys of a key block
};

__device__ __forceinline__ u32 query_head(const XAttentionParams& params, u32 nth) {
    return __ldg(reinterpret_cast<const u32*>(params.heads) + nth);
}

// Long keys that long query `index` (from the first sparse row on) sees: those that end before its last query, or with it.
template <u32 STRIDE>
__device__ __forceinline__ u32 long_keys(const Parts& parts, u32 index) {
    return (parts.offset + (index + 1) * STRIDE) / STRIDE;
}

// A tile of the products: long queries of the launch, long keys.
template <u32 STRIDE>
struct LongTile {
    u32 nth, first_query, first_key; // head of the launch; of the launch; of all
    bool there;                      // any of its queries sees any of its keys

    // Row blocks of tiles after another share their keys while these are in the cache.
    __device__ __forceinline__ LongTile(const XAttentionParams& params, u32 index, u32 high, u32 wide) {
        constexpr u32 BAND = 8;
        const u32 queries = params.blocks * Long<STRIDE>::QUERIES, keys = params.key_blocks * Long<STRIDE>::KEYS;
        const u32 across = (queries + high - 1) / high, along = (keys + wide - 1) / wide;
        nth = index / (across * along);
        index -= nth * across * along;
        const u32 band = index / (BAND * along), inside = index % (BAND * along), rows = min(BAND, across - BAND * band);
        first_query = (BAND * band + inside % rows) * high;
        first_key = inside / rows * wide;
        const u32 last = min(first_query + high, queries) - 1;
        there = first_key < long_keys<STRIDE>(params.parts, params.first_block * Long<STRIDE>::QUERIES + last);
    }
};

// Takes the products of one long query's row with 8 N long keys, two of each eight here and the rest in the other lanes of four,
// and writes the logarithms of their sums of weights by key block.
template <u32 STRIDE, u32 N, class Product>
__device__ __forceinline__ void put_sums(const XAttentionParams& params, u32 nth, u32 query, u32 first_key, Product product) {
    constexpr u32 KEYS = Long<STRIDE>::KEYS;
    const u32 t = threadIdx.x & 3u, queries = params.blocks * Long<STRIDE>::QUERIES;
    const u32 seen = long_keys<STRIDE>(params.parts, params.first_block * Long<STRIDE>::QUERIES + query);
    float s[N][2], most = NEGATIVE_INFINITY;
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            s[j][i] = first_key + 8 * j + 2 * t + i < seen ? product(j, i) * params.scale : NEGATIVE_INFINITY;
            most = fmaxf(most, s[j][i]);
        }
    }
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
    // A row that sees nothing here: whatever is taken from -inf is -inf.
    const float shift = most == NEGATIVE_INFINITY ? 0.0f : most;
    float* to = reinterpret_cast<float*>(params.scores) + (u64(nth) * queries + query) * params.key_blocks;
    const auto put = [&](u32 block, float sum) {
        if (query < queries && block < params.key_blocks) to[block] = shift + log2_fast(sum);
    };
    const bool odd = t & 1u, high = t & 2u;
#pragma unroll
    for (u32 j = 0; j < N; j += 2 * KEYS / 4) {
        // Of each two eights the even lanes of four keep one and the odd ones the other; then, where these are key blocks, of each two
        // pairs likewise: so a lane has one key block in the end, and four lanes write four that follow each other.
        float kept[KEYS / 4];
#pragma unroll
        for (u32 i = 0; i < KEYS / 4; ++i) {
            const float first = exp2_fast(s[j + 2 * i][0] - shift) + exp2_fast(s[j + 2 * i][1] - shift);
            const float second = exp2_fast(s[j + 2 * i + 1][0] - shift) + exp2_fast(s[j + 2 * i + 1][1] - shift);
            kept[i] = (odd ? second : first) + __shfl_xor_sync(FULL_WARP, odd ? first : second, 1);
        }
        if constexpr (KEYS == 8) {
            const float sum = (high ? kept[1] : kept[0]) + __shfl_xor_sync(FULL_WARP, high ? kept[0] : kept[1], 2);
            put(first_key / KEYS + j + t, sum);
        } else {
            put(first_key / KEYS + 2 * (j + u32(odd)) + u32(high), kept[0]);
        }
    }
}

// Grid: tiles of 128 long queries by 128 long keys, of all heads of the launch.
template <bool IS_BF16, u32 D, u32 STRIDE>
__device__ __forceinline__ void long_scores(const XAttentionParams& params) {
    constexpr u32 BM = 128, BN = 128, PANELS = D / 64;
    extern __shared__ u8 dynamic[];
    const LongTile<STRIDE> tile(params, blockIdx.x, BM, BN);
    if (!tile.there) return;
    const u32 head = query_head(params, params.first_head + tile.nth), word = threadIdx.x % 8, own = threadIdx.x / 8;
    const u32 first_row = params.first_block * ROWS + tile.first_query * STRIDE;
    float c[BM / 32][BN / 32][4];
    multiply_tile<IS_BF16, BM, BN>(c, (shared_address(dynamic) + 127u) & ~127u, STRIDE * PANELS, [&](u32 step, u32 to) {
        const u32 place_in = step / PANELS, byte = step % PANELS * 128 + word * 16;
#pragma unroll
        for (u32 i = 0; i < BM / 32; ++i) {
            const u32 at = own + 32 * i, row = first_row + at * STRIDE + STRIDE - 1 - place_in;
            const bool there = row < params.parts.rows;
            const u64 from = params.q + (u64(there ? row : 0) * params.q_heads + head) * D * 2 + byte;
            copy_async(to + swizzle<128>(at, word), reinterpret_cast<const void*>(from), there);
        }
#pragma unroll
        for (u32 i = 0; i < BN / 32; ++i) {
            const u32 at = own + 32 * i, token = (tile.first_key + at) * STRIDE + place_in;
            const bool there = token < params.view.tokens;
            u64 from = params.view.k;
            if (there)
                from += place(params.view, head / params.heads_per_kv, token & ~15u).offset +
                        (token & 15u) * params.view.token_stride + byte;
            copy_async(to + BM * 128 + swizzle<128>(at, word), reinterpret_cast<const void*>(from), there);
        }
    });
    const u32 warp = threadIdx.x / 32, g = (threadIdx.x & 31u) >> 2;
#pragma unroll
    for (u32 i = 0; i < BM / 32; ++i) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            put_sums<STRIDE, BN / 32>(params, tile.nth, tile.first_query + warp / 4 * (BM / 2) + 16 * i + g + 8 * half,
                                      tile.first_key + warp % 4 * (BN / 4),
                                      [&](u32 j, u32 k) { return c[i][j][2 * half + k]; });
    }
}

#ifdef HAS_WGMMA

struct WideParams {
    TensorMap q, k; // [heads][place in a long row][long rows][D]
    XAttentionParams base;
};

// Grid: (tokens / 16, KV heads).
template <u32 D>
__device__ __forceinline__ void gather_keys(const XAttentionParams& params) {
    constexpr u32 WORDS = D / 8;
    const View& view = params.view;
    const Place from = place(view, blockIdx.y, blockIdx.x * 16);
    for (u32 i = threadIdx.x; i < 16 * WORDS; i += blockDim.x) {
        const u32 row = i / WORDS, token = blockIdx.x * 16 + row;
        if (token >= view.tokens) continue;
        const u64 word = view.k + from.offset + row * view.token_stride + i % WORDS * 16;
        reinterpret_cast<Word4*>(params.gathered)[(u64(blockIdx.y) * view.tokens + token) * WORDS + i % WORDS] =
            *reinterpret_cast<const Word4*>(word);
    }
}

// The same on Hopper; tiles of 128 by 256. Grid: any number of CTAs.
template <bool IS_BF16, u32 D, u32 STRIDE>
__device__ __forceinline__ void long_scores_wide(const WideParams& params) {
    constexpr u32 BN = 256, PANELS = D / 64;
    const XAttentionParams& base = params.base;
    const u32 queries = base.blocks * Long<STRIDE>::QUERIES, keys = base.key_blocks * Long<STRIDE>::KEYS;
    const u32 tiles = base.heads_count * ((queries + WIDE_M - 1) / WIDE_M) * ((keys + BN - 1) / BN);
    multiply_wide<IS_BF16, BN, 4>(
        tiles, STRIDE * PANELS, [&](u32 index) { return LongTile<STRIDE>(base, index, WIDE_M, BN).there; },
        [&](u32 index, u32 step, u32 to, u32 barrier) {
            const LongTile<STRIDE> tile(base, index, WIDE_M, BN);
            const u32 head = query_head(base, base.first_head + tile.nth), place_in = step / PANELS, x = step % PANELS * 64;
            const u32 query = base.first_block * Long<STRIDE>::QUERIES + tile.first_query;
#pragma unroll
            for (u32 i = 0; i < WIDE_M / BOX_ROWS; ++i)
                copy_tensor(to + i * BOX_BYTES, params.q, barrier, x, int(query + i * BOX_ROWS), STRIDE - 1 - place_in, head);
#pragma unroll
            for (u32 i = 0; i < BN / BOX_ROWS; ++i)
                copy_tensor(to + WIDE_M * 128 + i * BOX_BYTES, params.k, barrier, x, int(tile.first_key + i * BOX_ROWS), place_in,
                            head / base.heads_per_kv);
        },
        [&](u32 index, u32 part, const float (&c)[BN / 8][4]) {
            const LongTile<STRIDE> tile(base, index, WIDE_M, BN);
            const u32 query = tile.first_query + part * 64 + threadIdx.x / 32 % 4 * 16 + ((threadIdx.x & 31u) >> 2);
            // A quarter at a time: the scaled products of all of them would not fit beside the products.
#pragma unroll
            for (u32 from = 0; from < BN / 8; from += 8) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
                    put_sums<STRIDE, 8>(base, tile.nth, query + 8 * half, tile.first_key + 8 * from,
                                        [&](u32 j, u32 k) { return c[from + j][2 * half + k]; });
            }
        });
}

#endif

// A row block's list. Grid: (row blocks of the launch, heads of the launch).
template <u32 STRIDE>
__device__ __forceinline__ void x_attention_build(const XAttentionParams& params) {
    constexpr u32 THREADS = 256, QUERIES = Long<STRIDE>::QUERIES;
    extern __shared__ Word4 room[]; // masses, then bits
    __shared__ ShareShared<THREADS> shared;
    __shared__ float lse[QUERIES];
    u32* masses = reinterpret_cast<u32*>(room);
    u32* bits = masses + params.key_blocks;
    const u32 nth = params.first_head + blockIdx.y, head = query_head(params, nth), block = params.first_block + blockIdx.x;
    const Parts& parts = params.parts;
    const Seen seen = Seen::by(parts, params.view.tokens, block);
    const u32 rows = min(ROWS, parts.rows - block * ROWS), count = rows / STRIDE; // of long queries
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
    const float* scores = reinterpret_cast<const float*>(params.scores) +
                          (u64(blockIdx.y) * params.blocks + blockIdx.x) * QUERIES * params.key_blocks;
    // Key blocks that long query `i` sees any long key of: nothing is written of others.
    const auto reach = [&](u32 i) {
        return (long_keys<STRIDE>(parts, block * QUERIES + i) + Long<STRIDE>::KEYS - 1) / Long<STRIDE>::KEYS;
    };
    for (u32 i = warp; i < count; i += THREADS / 32) {
        const float* from = scores + u64(i) * params.key_blocks;
        float m = NEGATIVE_INFINITY, l = 0.0f;
        const u32 end = reach(i);
#pragma unroll 4
        for (u32 j = lane; j < end; j += 32) {
            const float x = from[j], top = fmaxf(m, x);
            l = l * weight(m, top) + weight(x, top);
            m = top;
        }
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const float other_m = __shfl_xor_sync(FULL_WARP, m, step), other_l = __shfl_xor_sync(FULL_WARP, l, step);
            const float top = fmaxf(m, other_m);
            l = l * weight(m, top) + other_l * weight(other_m, top);
            m = top;
        }
        if (lane == 0) lse[i] = log_sum(m, l);
    }
    __syncthreads();
    u32 sums[2] = {0, 0}; // of all, and of those that are kept whatever they have
    for (u32 j = threadIdx.x; j < seen.all; j += THREADS) {
        float mass = 0.0f;
        for (u32 i = 0; i < count; ++i)
            if (j < reach(i)) mass += weight(scores[u64(i) * params.key_blocks + j], lse[i]);
        const u32 x = whole_number(mass * (WHOLE / QUERIES));
        masses[j] = x;
        sums[0] += x;
        sums[1] += j == 0 || j >= seen.before ? x : 0;
    }
    sum_all<THREADS>(sums, shared, 1);
    const HeadPlan& plan = reinterpret_cast<const HeadPlan*>(params.plans)[head];
    // The first block and the diagonal are kept whatever they have; the others make up what is missing.
    const u32 wanted = sums[0] > 0 ? target_of(plan.share, sums[0]) : 0;
    const u32 target = wanted > sums[1] ? wanted - sums[1] : 0;
    u32 least = count == 0 ? 0 : ~0u; // too few queries for an antidiagonal, at the end of a prompt: see everything
    if (count > 0 && target > 0)
        least = least_of_share<THREADS>(seen.before, target, shared, [&](u32 i) { return i == 0 ? 0u : masses[i]; });
    for (u32 j = threadIdx.x; j < (seen.all + 31) / 32 * 32; j += THREADS) {
        const u32 word = __ballot_sync(FULL_WARP, j < seen.all && (count == 0 || masses[j] >= least));
        if (lane == 0) bits[j / 32] = word;
    }
    __syncthreads();
    if (warp == 0)
        put_list(params.lists, params.numbers, parts, head, params.call_blocks, block,
                 params.first_number + Triangle::of(parts).at(nth, block), bits, seen);
}

#define X_ATTENTION_BUILD(STRIDE)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        x_attention_build_##STRIDE(const __grid_constant__ XAttentionParams params) {                                  \
        x_attention_build<STRIDE>(params);                                                                             \
    }

X_ATTENTION_BUILD(8)
X_ATTENTION_BUILD(16)

#define LONG_SCORES(NAME, IS_BF16, D, STRIDE)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2) long_scores_##NAME##_##STRIDE(                                \
        const __grid_constant__ XAttentionParams params) {                                                             \
        long_scores<IS_BF16, D, STRIDE>(params);                                                                       \
    }

#ifdef HAS_WGMMA
#define LONG_SCORES_WIDE(NAME, IS_BF16, D, STRIDE)                                                                     \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) long_scores_wide_##NAME##_##STRIDE(                  \
        const __grid_constant__ WideParams params) {                                                                   \
        long_scores_wide<IS_BF16, D, STRIDE>(params);                                                                  \
    }
#else
#define LONG_SCORES_WIDE(NAME, IS_BF16, D, STRIDE)
#endif

#define BOTH(NAME, IS_BF16, D)                                                                                         \
    LONG_SCORES(NAME, IS_BF16, D, 8)                                                                                   \
    LONG_SCORES(NAME, IS_BF16, D, 16)                                                                                  \
    LONG_SCORES_WIDE(NAME, IS_BF16, D, 8)                                                                              \
    LONG_SCORES_WIDE(NAME, IS_BF16, D, 16)

#ifdef HAS_WGMMA
extern "C" __global__ void __launch_bounds__(128) gather_keys_64(const __grid_constant__ XAttentionParams params) {
    gather_keys<64>(params);
}

extern "C" __global__ void __launch_bounds__(128) gather_keys_128(const __grid_constant__ XAttentionParams params) {
    gather_keys<128>(params);
}
#endif

BOTH(bf16_64, true, 64)
BOTH(bf16_128, true, 128)
BOTH(f16_64, false, 64)
BOTH(f16_128, false, 128)
