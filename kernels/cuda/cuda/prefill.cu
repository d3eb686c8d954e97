// prefill: attention of a prompt's queries over a list of tiles; dense, A-shape, Vertical-Slash and Block-Sparse alike.
//
// A CTA takes 128 query rows of one head; each of its eight warps holds 16 of them in registers and meets every tile of
// 64 keys. Rows of keys and values come by cp.async, from whatever page or gathered column they lie in, into swizzled
// tiles, a few ahead of their use. The products are mma.sync, or wgmma on Hopper, whose registers hold the same elements
// where the warps are: one body serves both. The scores of the next tile and the weighted values of this one are given
// to the tensor cores together, and the softmax of the next runs while the latter are summed.
#include "hopper.cuh"
#include "kv.cuh"
#include "softmax.cuh"
#include "tile.cuh"

struct PrefillParams {
    View view;
    u64 q;       // [rows, q_heads, D], of the keys' type
    u64 out;     // as q
    u64 out_lse; // f32 [q_heads, rows], base 2
    u64 heads;   // HeadLists [q_heads]
    u64 lists;   // List
    u64 numbers; // u32: the tiles, columns and cover that the lists name
    float scale; // of the scores, times log2(e); positive
    u32 rows;
    u32 offset; // position of the first query
    u32 q_heads;
    u32 heads_per_kv;
};

struct HeadLists {
    u32 first, step; // the list of row block b is first + b * step
};

struct List {
    u32 tiles, tile_count; // rising
    u32 columns, column_count;
    u32 cover, cover_bits; // bit u - 1: a tile holds distance u
    u32 absolute;
};

constexpr u32 ROWS = 128, TILE = 64, THREADS = 256, PANEL = TILE * 128;

// How many of the rising `numbers` are below `limit`.
__device__ __forceinline__ u32 count_below(const u32* numbers, u32 count, u32 limit) {
    u32 low = 0;
    while (count > 0) {
        const u32 half = count / 2;
        if (__ldg(numbers + low + half) < limit) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

template <bool IS_BF16>
__device__ __forceinline__ u32 pack(float low, float high) {
    if constexpr (IS_BF16) return pack_bf16(low, high);
    return pack_f16(low, high);
}

template <bool IS_BF16, u32 D, u32 STAGES, bool WIDE>
struct Prefill {
    static constexpr u32 WORDS = D / 8, STEPS = D / 16, PLANE = TILE * D * 2;
    const PrefillParams& params;
    const List& list;
    const u32* numbers;
    u32 shared;  // of the stages: keys, values; 1024-aligned
    int* keys;   // [STAGES][TILE], positions of gathered keys
    u32 end, kv_head, tile_count, column_count;

    __device__ __forceinline__ u32 count() const { return tile_count + (column_count + TILE - 1) / TILE; }

    __device__ __forceinline__ int tile_first(u32 index) const {
        const u32 tile = __ldg(numbers + list.tiles + index);
        return list.absolute ? int(tile) : int(end) - int(tile) - int(TILE);
    }

    __device__ __forceinline__ u64 row_offset(u32 key) const {
        const View& view = params.view;
        u64 at = kv_head * view.head_stride;
        if (view.pages == 0) return at + key * view.token_stride;
        const u32 index = key / view.page_tokens;
        const u64 page = __ldg(reinterpret_cast<const u32*>(view.pages) + index);
        return at + page * view.page_stride + (key - index * view.page_tokens) * view.token_stride;
    }

    __device__ __forceinline__ void load(u32 index, u32 stage) const {
        const u32 word = threadIdx.x % WORDS;
        const u32 to_k = shared + stage * 2 * PLANE + (word >> 3) * PANEL, to_v = to_k + PLANE;
        const bool gathered = index >= tile_count;
        const u32 first_column = gathered ? (index - tile_count) * TILE : 0;
        const int first = gathered ? 0 : tile_first(index);
#pragma unroll (WIDE ? 4 : 2)
        for (u32 row = threadIdx.x / WORDS; row < TILE; row += THREADS / WORDS) {
            int key = first + int(row);
            if (gathered) {
                const u32 column = first_column + row;
                key = column < column_count ? int(__ldg(numbers + list.columns + column)) : -1;
            }
            const bool there = key >= 0 && u32(key) < params.view.tokens;
            const u64 from = (there ? row_offset(u32(key)) : 0) + word * 16;
            const u32 at = swizzle<128>(row, word & 7u);
            copy_async(to_k + at, reinterpret_cast<const void*>(params.view.k + from), there);
            copy_async(to_v + at, reinterpret_cast<const void*>(params.view.v + from), there);
        }
        if (gathered && threadIdx.x < TILE) {
            // A column that a tile holds as well counts there.
            const u32 column = first_column + threadIdx.x;
            int key = -1;
            if (column < column_count) {
                key = int(__ldg(numbers + list.columns + column));
                const u32 bit = end - u32(key) - 1;
                if (bit < list.cover_bits && (__ldg(numbers + list.cover + bit / 32) >> (bit & 31u) & 1u)) key = -1;
            }
            keys[stage * TILE + threadIdx.x] = key;
        }
    }

    // s = q k^T; on Hopper in flight when this returns.
    __device__ __forceinline__ void scores(float (&s)[8][4], const u32 (&q)[STEPS][4], u32 stage) const {
        const u32 base = shared + stage * 2 * PLANE;
#ifdef HAS_WGMMA
        if constexpr (WIDE) {
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i)
                wgmma<IS_BF16, false>(s, q[i], wgmma_tile(base + (i / 4) * PANEL + (i % 4) * 32, 16), i > 0);
            return;
        }
#endif
        const u32 lane = threadIdx.x & 31u;
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < STEPS; i += 2) {
                const u32 word = 2 * i + (lane >> 3);
                u32 b[4];
                load_matrices(b, base + (i / 4) * PANEL + swizzle<128>(8 * n + (lane & 7u), word & 7u));
                mma<IS_BF16>(s[n], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
                mma<IS_BF16>(s[n], q[i + 1][0], q[i + 1][1], q[i + 1][2], q[i + 1][3], b[2], b[3]);
            }
        }
    }

    // o += p v; on Hopper in flight when this returns.
    __device__ __forceinline__ void weigh(float (&o)[D / 8][4], const u32 (&p)[4][4], u32 stage) const {
        const u32 base = shared + stage * 2 * PLANE + PLANE;
#ifdef HAS_WGMMA
        if constexpr (WIDE) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) wgmma<IS_BF16, true>(o, p[i], wgmma_tile(base + i * 16 * 128, PANEL), true);
            return;
        }
#endif
        const u32 lane = threadIdx.x & 31u;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 row = 16 * i + (lane & 15u);
#pragma unroll
            for (u32 n = 0; n < D / 8; n += 2) {
                const u32 word = n + (lane >> 4);
                u32 b[4];
                load_matrices_transposed(b, base + (n / 8) * PANEL + swizzle<128>(row, word & 7u));
                mma<IS_BF16>(o[n], p[i][0], p[i][1], p[i][2], p[i][3], b[0], b[1]);
                mma<IS_BF16>(o[n + 1], p[i][0], p[i][1], p[i][2], p[i][3], b[2], b[3]);
            }
        }
    }

    // Takes what each row does not see out of the scores; `row` is the position of the thread's first row.
    __device__ __forceinline__ void mask(float (&s)[8][4], u32 index, u32 stage, int row) const {
        const u32 t = threadIdx.x & 3u;
        const bool gathered = index >= tile_count;
        const int first = gathered ? 0 : tile_first(index);
        if (!gathered && first >= 0 && first + int(TILE) <= int(end - ROWS) + 1) return;
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 column = 8 * n + 2 * t + i;
                const int key = gathered ? keys[stage * TILE + column] : first + int(column);
                if (key < 0 || key > row) s[n][i] = NEGATIVE_INFINITY;
                if (key < 0 || key > row + 8) s[n][i + 2] = NEGATIVE_INFINITY;
            }
        }
    }

    // Scores become weights relative to the new maxima; `shrink` is what earlier sums are worth then.
    __device__ __forceinline__ void soften(float (&s)[8][4], float (&m)[2], float (&l)[2], float (&shrink)[2]) const {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float top = m[i];
#pragma unroll
            for (u32 n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float shift = top == NEGATIVE_INFINITY ? 0.0f : top * params.scale;
            shrink[i] = exp2_fast(m[i] * params.scale - shift);
            m[i] = top;
            float sum = 0.0f;
#pragma unroll
            for (u32 n = 0; n < 8; ++n) {
                s[n][2 * i] = exp2_fast(s[n][2 * i] * params.scale - shift);
                s[n][2 * i + 1] = exp2_fast(s[n][2 * i + 1] * params.scale - shift);
                sum += s[n][2 * i] + s[n][2 * i + 1];
            }
            l[i] = l[i] * shrink[i] + sum;
        }
    }

    __device__ __forceinline__ static void round(u32 (&p)[4][4], const float (&s)[8][4]) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            p[i][0] = pack<IS_BF16>(s[2 * i][0], s[2 * i][1]);
            p[i][1] = pack<IS_BF16>(s[2 * i][2], s[2 * i][3]);
            p[i][2] = pack<IS_BF16>(s[2 * i + 1][0], s[2 * i + 1][1]);
            p[i][3] = pack<IS_BF16>(s[2 * i + 1][2], s[2 * i + 1][3]);
        }
    }

    // All but the last `PENDING` copies of every thread are there.
    template <int PENDING>
    __device__ __forceinline__ static void arrive() {
        wait_copies<PENDING>();
#ifdef HAS_WGMMA
        if constexpr (WIDE) publish_shared();
#endif
        __syncthreads();
    }
};

template <bool IS_BF16, u32 D, u32 STAGES, bool WIDE>
__device__ __forceinline__ void prefill(const PrefillParams& params) {
    using Body = Prefill<IS_BF16, D, STAGES, WIDE>;
    extern __shared__ u8 dynamic[];
    __shared__ int keys[STAGES * TILE];
    const u32 warp = threadIdx.x / 32, g = (threadIdx.x & 31u) >> 2, t = threadIdx.x & 3u;
    const u32 head = blockIdx.y, block = gridDim.x - 1 - blockIdx.x; // the longest first
    const HeadLists lists = reinterpret_cast<const HeadLists*>(params.heads)[head];
    const List list = reinterpret_cast<const List*>(params.lists)[lists.first + block * lists.step];
    const u32* numbers = reinterpret_cast<const u32*>(params.numbers);
    const u32 end = params.offset + (block + 1) * ROWS;
    const Body body{params,
                    list,
                    numbers,
                    (shared_address(dynamic) + 1023u) & ~1023u,
                    keys,
                    end,
                    head / params.heads_per_kv,
                    count_below(numbers + list.tiles, list.tile_count, end),
                    count_below(numbers + list.columns, list.column_count, end)};
    const u32 count = body.count();

#pragma unroll
    for (u32 i = 0; i < STAGES - 1; ++i) {
        if (i < count) body.load(i, i);
        commit_copies();
    }

    // Rows g and g + 8 of the warp's 16.
    const u32 row = block * ROWS + warp * 16 + g;
    u32 q[Body::STEPS][4];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const bool there = row + 8 * i < params.rows;
        const u32* from = reinterpret_cast<const u32*>(params.q) + (u64(row + 8 * i) * params.q_heads + head) * (D / 2) + t;
#pragma unroll
        for (u32 step = 0; step < Body::STEPS; ++step) {
            q[step][i] = there ? __ldg(from + step * 8) : 0;
            q[step][i + 2] = there ? __ldg(from + step * 8 + 4) : 0;
        }
    }
    float o[D / 8][4];
#pragma unroll
    for (u32 i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, l[2] = {0.0f, 0.0f}, shrink[2];
    float s[8][4];
    u32 p[4][4];
    const int position = int(params.offset + row);

    if (count > 0) {
        Body::template arrive<STAGES - 2>();
#ifdef HAS_WGMMA
        if constexpr (WIDE) wgmma_begin();
#endif
        body.scores(s, q, 0);
#ifdef HAS_WGMMA
        if constexpr (WIDE) {
            wgmma_commit();
            wgmma_wait<0>();
            settle(s);
        }
#endif
        body.mask(s, 0, 0, position);
        body.soften(s, m, l, shrink);
        Body::round(p, s);

        u32 stage = 0;
        for (u32 i = 0; i + 1 < count; ++i) {
            const u32 next = stage + 1 == STAGES ? 0 : stage + 1;
            const u32 free = stage == 0 ? STAGES - 1 : stage - 1;
            Body::template arrive<STAGES - 3>();
            if (i + STAGES - 1 < count) body.load(i + STAGES - 1, free);
            commit_copies();
#ifdef HAS_WGMMA
            if constexpr (WIDE) {
                settle(s);
                settle(o);
                settle(p);
                wgmma_begin();
                body.scores(s, q, next);
                wgmma_commit();
                body.weigh(o, p, stage);
                wgmma_commit();
                wgmma_wait<1>();
                settle(s);
                body.mask(s, i + 1, next, position);
                body.soften(s, m, l, shrink);
                wgmma_wait<0>();
                settle(o);
                settle(p);
            }
#endif
            if constexpr (!WIDE) {
                body.weigh(o, p, stage);
                body.scores(s, q, next);
                body.mask(s, i + 1, next, position);
                body.soften(s, m, l, shrink);
            }
            // Maxima settle after a few tiles, and then there is nothing to do here.
            if (!WIDE || __any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (u32 n = 0; n < D / 8; ++n) {
                    o[n][0] *= shrink[0];
                    o[n][1] *= shrink[0];
                    o[n][2] *= shrink[1];
                    o[n][3] *= shrink[1];
                }
            }
            Body::round(p, s);
            stage = next;
        }
#ifdef HAS_WGMMA
        if constexpr (WIDE) {
            settle(o);
            settle(p);
            wgmma_begin();
        }
#endif
        body.weigh(o, p, stage);
#ifdef HAS_WGMMA
        if constexpr (WIDE) {
            wgmma_commit();
            wgmma_wait<0>();
            settle(o);
        }
#endif
    }
    wait_copies<0>();

#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        l[i] += __shfl_xor_sync(FULL_WARP, l[i], 1);
        l[i] += __shfl_xor_sync(FULL_WARP, l[i], 2);
        if (row + 8 * i >= params.rows) continue;
        const float part = l[i] > 0.0f ? 1.0f / l[i] : 0.0f;
        u32* to = reinterpret_cast<u32*>(params.out) + (u64(row + 8 * i) * params.q_heads + head) * (D / 2) + t;
#pragma unroll
        for (u32 n = 0; n < D / 8; ++n) to[n * 4] = pack<IS_BF16>(o[n][2 * i] * part, o[n][2 * i + 1] * part);
        if (t == 0)
            reinterpret_cast<float*>(params.out_lse)[u64(head) * params.rows + row + 8 * i] =
                log_sum(m[i] * params.scale, l[i]);
    }
}

#define PREFILL(NAME, IS_BF16, D, STAGES, WIDE)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ PrefillParams params) {      \
        prefill<IS_BF16, D, STAGES, WIDE>(params);                                                                     \
    }

PREFILL(prefill_bf16_64, true, 64, 3, false)
PREFILL(prefill_bf16_128, true, 128, 3, false)
PREFILL(prefill_f16_64, false, 64, 3, false)
PREFILL(prefill_f16_128, false, 128, 3, false)
#ifdef HAS_WGMMA
PREFILL(prefill_wide_bf16_64, true, 64, 4, true)
PREFILL(prefill_wide_bf16_128, true, 128, 4, true)
PREFILL(prefill_wide_f16_64, false, 64, 4, true)
PREFILL(prefill_wide_f16_128, false, 128, 4, true)
#endif
