// prefill: attention of a prompt's queries over a list of tiles; dense, A-shape, Vertical-Slash and Block-Sparse alike.
//
// A CTA takes 128 query rows of one head; each of its four warps holds the sums of 32 of them in registers and meets every
// tile of 64 keys. Rows of keys and values come by cp.async, from whatever page or gathered column they lie in, into
// swizzled tiles, one ahead of their use; the products are mma.sync. Every operand from shared memory serves both halves of
// a warp's rows, for the reads of shared memory are what bounds this kernel. prefill_wide.cuh has Hopper's own way.
#include "prefill_wide.cuh"

constexpr u32 THREADS = 128, TILE_PANEL = TILE * 128, ROW_PANEL = ROWS * 128;

// The lane, asked for anew: what is computed from it is not kept in registers from one tile to the next.
__device__ __forceinline__ u32 lane_anew() {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

template <bool IS_BF16, u32 D>
struct Prefill {
    static constexpr u32 WORDS = D / 8, STEPS = D / 16, PLANE = TILE * D * 2, STAGES = 2;
    const PrefillParams& params;
    const Sequence& sequence;
    const List& list;
    const u32 &tile_count, &column_count, &end;
    u32 queries; // [panels][ROWS] of 128 bytes, swizzled; then the stages: keys, values; 1024-aligned
    int* keys;   // [STAGES][TILE], positions of gathered keys

    __device__ __forceinline__ static u32 head() { return blockIdx.y; }
    __device__ __forceinline__ const u32* numbers() const { return reinterpret_cast<const u32*>(params.numbers); }
    __device__ __forceinline__ u32 stage_at(u32 stage) const { return queries + ROWS * D * 2 + stage * 2 * PLANE; }

    __device__ __forceinline__ u32 count() const { return tile_count + (column_count + TILE - 1) / TILE; }

    __device__ __forceinline__ void load_queries(u32 block) const {
        const u32 word = threadIdx.x % WORDS;
#pragma unroll 2
        for (u32 row = threadIdx.x / WORDS; row < ROWS; row += THREADS / WORDS) {
            const u32 own = block * ROWS + row;
            const bool there = own < sequence.rows;
            const u64 from = params.q + (there ? (u64(sequence.first_row + own) * params.q_heads + head()) * D * 2 + word * 16 : 0);
            copy_async(queries + (word >> 3) * ROW_PANEL + swizzle<128>(row, word & 7u),
                       reinterpret_cast<const void*>(from), there);
        }
    }

    // Whether the rows of a tile are all there and lie one after another, as nearly all do.
    __device__ __forceinline__ bool is_run(int first) const {
        const bool one_page = sequence.pages == 0 || (u32(first) % TILE == 0 && params.view.page_tokens % TILE == 0);
        return first >= 0 && u32(first) + TILE <= sequence.tokens && one_page;
    }

    __device__ __forceinline__ void load(u32 index, u32 stage) const {
        constexpr u32 AT_ONCE = THREADS / WORDS; // rows; a multiple of eight, so that a thread's have one swizzle
        const u32 word = threadIdx.x % WORDS, own = threadIdx.x / WORDS, kv_head = head() / params.heads_per_kv;
        const u32 to_k = stage_at(stage) + (word >> 3) * TILE_PANEL + swizzle<128>(own, word & 7u), to_v = to_k + PLANE;
        const bool gathered = index >= tile_count;
        const int first = gathered ? 0 : tile_first(numbers(), list, end, index);
        if (!gathered && is_run(first)) {
            u64 from = row_offset(params.view, sequence.pages, kv_head, u32(first)) + own * params.view.token_stride + word * 16;
#pragma unroll 4
            for (u32 i = 0; i < TILE / AT_ONCE; ++i) {
                copy_async(to_k + i * AT_ONCE * 128, reinterpret_cast<const void*>(params.view.k + from));
                copy_async(to_v + i * AT_ONCE * 128, reinterpret_cast<const void*>(params.view.v + from));
                from += AT_ONCE * params.view.token_stride;
            }
            return;
        }
        const u32 first_column = gathered ? (index - tile_count) * TILE : 0;
#pragma unroll 1
        for (u32 i = 0; i < TILE / AT_ONCE; ++i) {
            const u32 row = own + i * AT_ONCE;
            int key = first + int(row);
            if (gathered) {
                const u32 column = first_column + row;
                key = column < column_count ? int(__ldg(numbers() + list.columns + column)) : -1;
            }
            const bool there = key >= 0 && u32(key) < sequence.tokens;
            const u64 from = there ? row_offset(params.view, sequence.pages, kv_head, u32(key)) + word * 16 : 0;
            copy_async(to_k + i * AT_ONCE * 128, reinterpret_cast<const void*>(params.view.k + from), there);
            copy_async(to_v + i * AT_ONCE * 128, reinterpret_cast<const void*>(params.view.v + from), there);
        }
        if (gathered && threadIdx.x < TILE)
            keys[stage * TILE + threadIdx.x] = column_once(numbers(), list, end, column_count, first_column + threadIdx.x);
    }

    // Where this lane's row of four matrices begins, in rows of 128 bytes of which `row` and every eighth one after it lie alike: word
    // `half` of it, and word 2 i + half is at `^ (i << 5)`. Written out, for the compiler does not see that the swizzle is the same for all.
    __device__ __forceinline__ static u32 lane_at(u32 base, u32 row, u32 half) {
        return base + row * 128 + ((half ^ (row & 7u)) << 4);
    }

    // s = q k^T, for the two halves of the warp's rows.
    __device__ __forceinline__ void scores(float (&s)[2][8][4], u32 stage) const {
        const u32 lane = lane_anew();
        const u32 from_q = lane_at(queries, (threadIdx.x & ~31u) + (lane & 15u), lane >> 4);
        const u32 from_k = lane_at(stage_at(stage), (lane >> 4) * 8 + (lane & 7u), lane >> 3 & 1u);
#pragma unroll
        for (u32 n = 0; n < 8; ++n) {
#pragma unroll
            for (u32 h = 0; h < 2; ++h) s[h][n][0] = s[h][n][1] = s[h][n][2] = s[h][n][3] = 0.0f;
        }
#pragma unroll 4
        for (u32 i = 0; i < STEPS; ++i) {
            u32 q[2][4];
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                load_matrices(q[h], (from_q ^ (i % 4 << 5)) + (i / 4) * ROW_PANEL + 16 * h * 128);
#pragma unroll
            for (u32 n = 0; n < 8; n += 2) {
                u32 b[4];
                load_matrices(b, (from_k ^ (i % 4 << 5)) + (i / 4) * TILE_PANEL + n * 1024);
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    mma<IS_BF16>(s[h][n], q[h][0], q[h][1], q[h][2], q[h][3], b[0], b[1]);
                    mma<IS_BF16>(s[h][n + 1], q[h][0], q[h][1], q[h][2], q[h][3], b[2], b[3]);
                }
            }
        }
    }

    // o += p v, the weights p being s rounded to the keys' type.
    __device__ __forceinline__ void weigh(float (&o)[2][D / 8][4], const float (&s)[2][8][4], u32 stage) const {
        const u32 lane = lane_anew(), from_v = lane_at(stage_at(stage) + PLANE, lane & 15u, lane >> 4);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 p[2][4];
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                p[h][0] = pack<IS_BF16>(s[h][2 * i][0], s[h][2 * i][1]);
                p[h][1] = pack<IS_BF16>(s[h][2 * i][2], s[h][2 * i][3]);
                p[h][2] = pack<IS_BF16>(s[h][2 * i + 1][0], s[h][2 * i + 1][1]);
                p[h][3] = pack<IS_BF16>(s[h][2 * i + 1][2], s[h][2 * i + 1][3]);
            }
#pragma unroll
            for (u32 n = 0; n < D / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, (from_v ^ (n % 8 << 4)) + (n / 8) * TILE_PANEL + 16 * i * 128);
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    mma<IS_BF16>(o[h][n], p[h][0], p[h][1], p[h][2], p[h][3], b[0], b[1]);
                    mma<IS_BF16>(o[h][n + 1], p[h][0], p[h][1], p[h][2], p[h][3], b[2], b[3]);
                }
            }
        }
    }

    // Takes what each row does not see out of the scores of one half of the warp's rows.
    __device__ __forceinline__ void mask(float (&s)[8][4], u32 index, u32 stage, u32 half) const {
        const u32 lane = lane_anew(), t = lane & 3u;
        const int row = int(end - ROWS + (threadIdx.x & ~31u) + 16 * half + (lane >> 2));
        const bool gathered = index >= tile_count;
        const int first = gathered ? 0 : tile_first(numbers(), list, end, index);
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
};

template <bool IS_BF16, u32 D>
__device__ __forceinline__ void prefill(const PrefillParams& params) {
    using Body = Prefill<IS_BF16, D>;
    extern __shared__ u8 dynamic[];
    __shared__ int keys[Body::STAGES * TILE];
    const u32 head = blockIdx.y, place = gridDim.x - 1 - blockIdx.x; // the longest first
    const HeadLists lists = reinterpret_cast<const HeadLists*>(params.heads)[head];
    // What is asked for once per tile stays in shared memory: registers are for the sums.
    __shared__ List list;
    __shared__ u32 counts[3]; // tiles, columns, position after the block
    const u32* numbers = reinterpret_cast<const u32*>(params.numbers);
    const Sequence& sequence = sequence_of(params, place);
    const u32 block = place - sequence.first_block;
    const u32 end = sequence.offset + (block + 1) * ROWS, queries = (shared_address(dynamic) + 1023u) & ~1023u;
    if (threadIdx.x == 0) {
        counts[2] = end;
        list = reinterpret_cast<const List*>(params.lists)[lists.first + (sequence.first_list + block) * lists.step];
        counts[0] = tiles_below(numbers, list, end);
        counts[1] = columns_below(numbers, list, end);
    }
    __syncthreads();
    const Body body{params, sequence, list, counts[0], counts[1], counts[2], queries, keys};
    const u32 count = body.count();

    float o[2][D / 8][4], m[2][2], l[2][2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        m[h][0] = m[h][1] = NEGATIVE_INFINITY;
        l[h][0] = l[h][1] = 0.0f;
#pragma unroll
        for (u32 n = 0; n < D / 8; ++n) o[h][n][0] = o[h][n][1] = o[h][n][2] = o[h][n][3] = 0.0f;
    }

    if (count > 0) {
        body.load_queries(block);
        body.load(0, 0);
        commit_copies();
    }
    for (u32 i = 0; i < count; ++i) {
        const u32 stage = i % Body::STAGES;
        wait_copies<0>();
        __syncthreads();
        if (i + 1 < count) body.load(i + 1, stage ^ 1u);
        commit_copies();
        float s[2][8][4];
        body.scores(s, stage);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            float shrink[2];
            body.mask(s[h], i, stage, h);
            body.soften(s[h], m[h], l[h], shrink);
            // Maxima settle after a few tiles, and then there is nothing to do here.
            if (!__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) continue;
#pragma unroll
            for (u32 n = 0; n < D / 8; ++n) {
                o[h][n][0] *= shrink[0];
                o[h][n][1] *= shrink[0];
                o[h][n][2] *= shrink[1];
                o[h][n][3] *= shrink[1];
            }
        }
        body.weigh(o, s, stage);
    }
    wait_copies<0>();

    // Rows g, g + 8, g + 16 and g + 24 of the warp's 32.
    const u32 lane = lane_anew(), t = lane & 3u, row = block * ROWS + (threadIdx.x & ~31u) + (lane >> 2);
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 at = row + 16 * h + 8 * i;
            float sum = l[h][i];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            if (at >= sequence.rows) continue;
            const float part = sum > 0.0f ? 1.0f / sum : 0.0f;
            u32* to = reinterpret_cast<u32*>(params.out) + (u64(sequence.first_row + at) * params.q_heads + head) * (D / 2) + t;
#pragma unroll
            for (u32 n = 0; n < D / 8; ++n)
                to[n * 4] = pack<IS_BF16>(o[h][n][2 * i] * part, o[h][n][2 * i + 1] * part);
            if (t == 0)
                reinterpret_cast<float*>(params.out_lse)[u64(head) * params.rows + sequence.first_row + at] =
                    log_sum(m[h][i] * params.scale, sum);
        }
    }
}

#define PREFILL(NAME, IS_BF16, D)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const __grid_constant__ PrefillParams params) {      \
        prefill<IS_BF16, D>(params);                                                                                   \
    }

PREFILL(prefill_bf16_64, true, 64)
PREFILL(prefill_bf16_128, true, 128)
PREFILL(prefill_f16_64, false, 64)
PREFILL(prefill_f16_128, false, 128)

#ifdef HAS_WGMMA
#define PREFILL_WIDE(NAME, IS_BF16, D, STAGES)                                                                         \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) NAME(const __grid_constant__ WideParams params) {    \
        prefill_wide<IS_BF16, D, STAGES>(params);                                                                      \
    }

PREFILL_WIDE(prefill_wide_bf16_64, true, 64, 3)
PREFILL_WIDE(prefill_wide_bf16_128, true, 128, 2)
PREFILL_WIDE(prefill_wide_f16_64, false, 64, 3)
PREFILL_WIDE(prefill_wide_f16_128, false, 128, 2)
#endif
