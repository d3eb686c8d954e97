// decode_partial: attention of one token's query heads over keys and values in up to 8 views, split over the grid.
//
// Grid: (splits, groups), a group being the query heads (at most 8) that share a KV head; they are read once for all of
// them. The views' tiles of 16 keys are numbered through; each CTA takes a run of numbers, its warps take every eighth.
// A warp is on its own until the end: it loads keys and values straight into registers, S^T = K Q^T, online softmax,
// O^T += V^T P^T, with the next keys in flight while it works on the present values. Then the warps' states are
// joined in shared memory, and the last CTA of a group joins the splits, so that one launch gives the finished partial.
#include "keys.cuh"
#include "softmax.cuh"

constexpr u32 MAX_VIEWS = 8;
constexpr u32 WARPS = 8;
constexpr u32 TILE = 16;

struct DecodeParams {
    View views[MAX_VIEWS];
    u64 q;          // [q_heads, D]
    u64 out;        // f32 [q_heads, D]
    u64 out_lse;    // f32 [q_heads], base 2
    u64 splits_o;   // f32 [splits, q_heads, D]
    u64 splits_lse; // f32 [splits, q_heads]
    u64 arrived;    // u32 [groups], zero before and after
    float scale;    // of the scores, times log2(e)
    u32 view_count;
    u32 q_dtype;
    u32 q_heads;
    u32 heads_per_kv;  // query heads of a KV head
    u32 groups_per_kv; // groups of at most 8 that they are cut into
    // Rows of a step, each with keys of its own in pages of view 0; the grid's third dimension counts them.
    u64 row_tables;  // u32 [rows]: which page table is the row's
    u64 row_lengths; // u32 [rows]: tokens that it sees, its own included
    u64 out_16;      // [rows, q_heads, D] in the type of the products, or 0: then `out` and `out_lse` are written
    u32 table_stride; // numbers from one page table to the next
    u32 table_tokens; // tokens that a table has room for
};

// Tiles that make a split worth its place in the merge.
constexpr u32 SPLIT_TILES = 11;

template <u32 DTYPE, u32 D>
struct Values {
    static constexpr bool IS_BF16 = DTYPE == BF16;
    static constexpr u32 ROW_BYTES = DTYPE == E4M3 ? D : 2 * D;
    static constexpr u32 BYTES = ROW_BYTES >= 128 ? 16 : 8; // of a row per load; eight threads share a row
    static constexpr u32 LOADS = ROW_BYTES / (8 * BYTES);
    static constexpr u32 WORDS = BYTES / 4;
    static constexpr u32 PER_LOAD = DTYPE == E4M3 ? BYTES : BYTES / 2;
    static constexpr u32 TILES = D / 16;

    u32 raw[4][LOADS][WORDS]; // keys 2t, 2t+1, 2t+8, 2t+9; elements (8 load + g) PER_LOAD ...

    __device__ __forceinline__ void load(const View& view, u64 offset, u32 count) {
        const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 key = 2 * t + (i & 1u) + 8 * (i >> 1);
            const char* row = reinterpret_cast<const char*>(view.v + offset) + key * view.token_stride + g * BYTES;
#pragma unroll
            for (u32 j = 0; j < LOADS; ++j) {
                // Zeros, not what lies there: 0 x NaN would poison the sum.
                if constexpr (BYTES == 16) {
                    Word4 word = key < count ? load_once(row + 128 * j) : Word4{0, 0, 0, 0};
                    raw[i][j][0] = word.x;
                    raw[i][j][1] = word.y;
                    raw[i][j][2] = word.z;
                    raw[i][j][3] = word.w;
                } else {
                    raw[i][j][0] = raw[i][j][1] = 0;
                    if (key < count)
                        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                                     : "=r"(raw[i][j][0]), "=r"(raw[i][j][1])
                                     : "l"(row));
                }
            }
        }
    }

    // Element of the thread's part of a row that is row g (`pair` = 2 tile) or g + 8 (2 tile + 1) of an output tile.
    static __device__ __forceinline__ u32 element(u32 g, u32 pair) {
        return ((pair / PER_LOAD) * 8 + g) * PER_LOAD + pair % PER_LOAD;
    }

    // o[tile] += V^T P^T; p0 and p1 are the b operand: keys 2t, 2t+1 and 2t+8, 2t+9 of head g.
    __device__ __forceinline__ void accumulate(float (&o)[TILES][4], u32 p0, u32 p1) const {
        u32 tile = 0;
#pragma unroll
        for (u32 j = 0; j < LOADS; ++j) {
#pragma unroll
            for (u32 w = 0; w < WORDS; ++w) {
                const u32 k0 = raw[0][j][w], k1 = raw[1][j][w], k2 = raw[2][j][w], k3 = raw[3][j][w];
                if constexpr (DTYPE == E4M3) {
                    const u32 near0 = __byte_perm(k0, k1, 0x5140), near1 = __byte_perm(k0, k1, 0x7362);
                    const u32 far0 = __byte_perm(k2, k3, 0x5140), far1 = __byte_perm(k2, k3, 0x7362);
                    mma<false>(o[tile], e4m3_to_f16(near0 & 0xffffu), e4m3_to_f16(near0 >> 16),
                               e4m3_to_f16(far0 & 0xffffu), e4m3_to_f16(far0 >> 16), p0, p1);
                    mma<false>(o[tile + 1], e4m3_to_f16(near1 & 0xffffu), e4m3_to_f16(near1 >> 16),
                               e4m3_to_f16(far1 & 0xffffu), e4m3_to_f16(far1 >> 16), p0, p1);
                    tile += 2;
                } else {
                    mma<IS_BF16>(o[tile], __byte_perm(k0, k1, 0x5410), __byte_perm(k0, k1, 0x7632),
                                 __byte_perm(k2, k3, 0x5410), __byte_perm(k2, k3, 0x7632), p0, p1);
                    tile += 1;
                }
            }
        }
    }
};

constexpr u32 MAX_SPLITS = 256; // what `merge_splits` has room for

// Splits of one group, joined by a whole CTA. Weights first, in shared memory; then the outputs, four elements a thread
// with many loads in flight, since nothing but latency stands between here and the end.
template <u32 D, bool IS_BF16>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, u32 row, u32 first_head, u32 heads, u32 splits,
                                             float* shared) {
    const u64 before = u64(row) * gridDim.x * params.q_heads; // split results of the rows before
    const float* part_lse = reinterpret_cast<const float*>(params.splits_lse) + before;
    const float4* part_o = reinterpret_cast<const float4*>(params.splits_o) + before * (D / 4);
    const u64 out_head = u64(row) * params.q_heads + first_head;
    float(*weights)[MAX_SPLITS] = reinterpret_cast<float(*)[MAX_SPLITS]>(shared);
    float4* sums = reinterpret_cast<float4*>(shared + 8 * MAX_SPLITS);

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u;
    const u32 items = heads * (D / 4), slices = WARPS * 32 / items; // 1 to 16 threads share an item
    const u32 item = threadIdx.x % items, slice = threadIdx.x / items;
    const u32 head = item / (D / 4), column = item % (D / 4);
    const float4* own_o = part_o + (first_head + head) * (D / 4) + column;
    const u32 stride = params.q_heads * (D / 4);

    constexpr u32 EARLY = 8; // outputs that are on their way while the weights are computed
    float4 early[EARLY];
#pragma unroll
    for (u32 i = 0; i < EARLY; ++i) {
        const u32 split = slice + i * slices;
        early[i] = slice < slices && split < splits ? __ldcg(own_o + u64(split) * stride) : float4{0, 0, 0, 0};
    }
    if (warp < heads) {
        float own[MAX_SPLITS / 32];
        float m = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < MAX_SPLITS / 32; ++i) {
            const u32 split = i * 32 + lane;
            own[i] = split < splits ? __ldcg(part_lse + split * params.q_heads + first_head + warp) : NEGATIVE_INFINITY;
        }
#pragma unroll
        for (u32 i = 0; i < MAX_SPLITS / 32; ++i) m = fmaxf(m, own[i]);
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, step));
#pragma unroll
        for (u32 i = 0; i < MAX_SPLITS / 32; ++i) {
            own[i] = weight(own[i], m);
            sum += own[i];
        }
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (u32 i = 0; i < MAX_SPLITS / 32; ++i) weights[warp][i * 32 + lane] = own[i] * inverse;
        if (lane == 0 && params.out_16 == 0) reinterpret_cast<float*>(params.out_lse)[out_head + warp] = log_sum(m, sum);
    }
    __syncthreads();

    float4 o = {0.0f, 0.0f, 0.0f, 0.0f};
    auto add = [&](float4 x, u32 split) {
        const float w = weights[head][split];
        o.x += w * x.x;
        o.y += w * x.y;
        o.z += w * x.z;
        o.w += w * x.w;
    };
    if (slice < slices) {
#pragma unroll
        for (u32 i = 0; i < EARLY; ++i)
            if (slice + i * slices < splits) add(early[i], slice + i * slices);
#pragma unroll 8
        for (u32 split = slice + EARLY * slices; split < splits; split += slices)
            add(__ldcg(own_o + u64(split) * stride), split);
    }
    sums[threadIdx.x] = o;
    __syncthreads();
    if (slice == 0) {
        for (u32 other = 1; other < slices; ++other) {
            const float4 x = sums[other * items + item];
            o.x += x.x;
            o.y += x.y;
            o.z += x.z;
            o.w += x.w;
        }
        const u64 at = (out_head + head) * (D / 4) + column;
        if (params.out_16 != 0) {
            reinterpret_cast<uint2*>(params.out_16)[at] =
                IS_BF16 ? uint2{pack_bf16(o.x, o.y), pack_bf16(o.z, o.w)} : uint2{pack_f16(o.x, o.y), pack_f16(o.z, o.w)};
        } else {
            reinterpret_cast<float4*>(params.out)[at] = o;
        }
    }
}

// With OF_ROWS every row of a step attends to its own keys; how its keys are split depends on their number alone, so a row
// has the same bits in any step.
template <u32 DTYPE, u32 D, bool OF_ROWS>
__device__ __forceinline__ void decode(const DecodeParams& params) {
    __shared__ View own;
    const u32 row = OF_ROWS ? blockIdx.z : 0;
    const View* views = OF_ROWS ? &own : params.views;
    const u32 view_count = OF_ROWS ? 1 : params.view_count;
    if constexpr (OF_ROWS) {
        if (threadIdx.x == 0) {
            own = params.views[0];
            const u32 table = reinterpret_cast<const u32*>(params.row_tables)[row];
            own.pages = own.pages + u64(table) * params.table_stride * 4;
            own.tokens = min(reinterpret_cast<const u32*>(params.row_lengths)[row], params.table_tokens);
        }
        __syncthreads();
    }
    constexpr u32 TILES = D / 16;
    constexpr bool IS_BF16 = DTYPE == BF16;
    __shared__ alignas(16) float shared_o[WARPS][8][D]; // then the weights and sums of `merge_splits`
    __shared__ float shared_m[WARPS][8], shared_l[WARPS][8];
    __shared__ u32 ends[MAX_VIEWS], lengths[MAX_VIEWS]; // last tile number + 1, and tokens, of each view
    __shared__ Word4 query[Keys<DTYPE, D>::QUERY_WORDS * 32];
    __shared__ bool last;

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
    const u32 kv_head = blockIdx.y / params.groups_per_kv, part = blockIdx.y % params.groups_per_kv;
    const u32 first_head = kv_head * params.heads_per_kv + part * 8;
    const u32 heads = min(8u, params.heads_per_kv - part * 8);

    if (threadIdx.x < view_count) lengths[threadIdx.x] = tokens_of(views[threadIdx.x], kv_head);
    __syncthreads();
    u32 total = 0;
    for (u32 i = 0; i < view_count; ++i) {
        total += (lengths[i] + TILE - 1) / TILE;
        if (threadIdx.x == 0) ends[i] = total;
    }
    __syncthreads();

    const u32 splits = OF_ROWS ? min(max((total + SPLIT_TILES - 1) / SPLIT_TILES, 1u), gridDim.x) : gridDim.x;
    if (blockIdx.x >= splits) return;
    const u32 begin = u32(u64(total) * blockIdx.x / splits);
    const u32 end = u32(u64(total) * (blockIdx.x + 1) / splits);

    Keys<DTYPE, D> keys;
    Values<DTYPE, D> values;

    float o[TILES][4];
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, l[2] = {0.0f, 0.0f};

    u32 index = 0; // view of the tile at hand; tile numbers only grow
    Place at;
    u32 count = 0; // keys of the tile at hand
    auto find = [&](u32 tile, Place& where, u32& there) {
        while (tile >= ends[index]) ++index;
        const u32 first = (tile - (index == 0 ? 0u : ends[index - 1])) * TILE;
        where = place(views[index], kv_head, first);
        there = lengths[index] - first;
    };

    // Scales of keys g and g + 8, of e4m3: on their way with their keys, or every tile would wait for memory twice.
    float k_scale[2] = {1.0f, 1.0f}, v_scale_next[2] = {1.0f, 1.0f};
    auto load_scales = [&]() {
        const View& view = views[index];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 key = g + 8 * i;
            const u64 offset = at.scale_offset + key * view.scale_token_stride;
            k_scale[i] = key < count ? __ldg(reinterpret_cast<const float*>(view.k_scale + offset)) : 1.0f;
            v_scale_next[i] = key < count ? __ldg(reinterpret_cast<const float*>(view.v_scale + offset)) : 1.0f;
        }
    };

    u32 tile = begin + warp;
    if (tile < end) {
        find(tile, at, count);
        if constexpr (DTYPE == E4M3) load_scales();
        keys.load(views[index], at.offset, count);
        values.load(views[index], at.offset, count);
    }
    // The queries come while the first rows are on their way.
    Keys<DTYPE, D>::store_query(query, reinterpret_cast<const void*>(params.q), params.q_dtype,
                                 u64(row) * params.q_heads + first_head + g, g < heads);
    __syncthreads();
    while (tile < end) {
        float s[4];
        const float v_scale[2] = {v_scale_next[0], v_scale_next[1]};
        keys.dot(s, query);
        if constexpr (DTYPE == E4M3) {
            s[0] *= k_scale[0];
            s[1] *= k_scale[0];
            s[2] *= k_scale[1];
            s[3] *= k_scale[1];
        }
        const u32 next = tile + WARPS;
        const u32 here = count;
        if (next < end) {
            find(next, at, count);
            if constexpr (DTYPE == E4M3) load_scales();
            keys.load(views[index], at.offset, count);
        }

        // The value's scale goes into the weight's exponent: weights stay in [0, 1] whatever the scales are, and the sum
        // of the weights is taken before it.
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            s[i] *= params.scale;
            if constexpr (DTYPE == E4M3) s[i] += log2_fast(v_scale[i >> 1]);
            if (g + 8 * (i >> 1) >= here) s[i] = NEGATIVE_INFINITY;
        }
        float rescale[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float top = fmaxf(s[i], s[i + 2]);
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 4));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 8));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 16));
            top = fmaxf(top, m[i]);
            rescale[i] = weight(m[i], top);
            m[i] = top;
            const float p0 = weight(s[i], top), p1 = weight(s[i + 2], top);
            s[i] = p0;
            s[i + 2] = p1;
            float sum;
            if constexpr (DTYPE == E4M3) {
                sum = __fdividef(p0, v_scale[0]) + __fdividef(p1, v_scale[1]);
            } else {
                sum = p0 + p1;
            }
            l[i] = l[i] * rescale[i] + sum;
        }
        if (__any_sync(FULL_WARP, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
            for (u32 i = 0; i < TILES; ++i) {
                o[i][0] *= rescale[0];
                o[i][1] *= rescale[1];
                o[i][2] *= rescale[0];
                o[i][3] *= rescale[1];
            }
        }
        const u32 near = DTYPE == BF16 ? pack_bf16(s[0], s[1]) : pack_f16(s[0], s[1]);
        const u32 far = DTYPE == BF16 ? pack_bf16(s[2], s[3]) : pack_f16(s[2], s[3]);
        values.accumulate(o, transpose_8x8(near), transpose_8x8(far));
        if (next < end) values.load(views[index], at.offset, count);
        tile = next;
    }

    // Join the warps: the states of head 2t + i, whose sums are spread over g.
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        l[i] += __shfl_xor_sync(FULL_WARP, l[i], 4);
        l[i] += __shfl_xor_sync(FULL_WARP, l[i], 8);
        l[i] += __shfl_xor_sync(FULL_WARP, l[i], 16);
        if (g == 0) {
            shared_m[warp][2 * t + i] = m[i];
            shared_l[warp][2 * t + i] = l[i];
        }
    }
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) {
        const u32 low = Values<DTYPE, D>::element(g, 2 * i), high = Values<DTYPE, D>::element(g, 2 * i + 1);
        shared_o[warp][2 * t][low] = o[i][0];
        shared_o[warp][2 * t + 1][low] = o[i][1];
        shared_o[warp][2 * t][high] = o[i][2];
        shared_o[warp][2 * t + 1][high] = o[i][3];
    }
    __syncthreads();

    const bool direct = splits == 1, rounded = direct && params.out_16 != 0;
    float* to_o = reinterpret_cast<float*>(direct ? params.out : params.splits_o);
    float* to_lse = reinterpret_cast<float*>(direct ? params.out_lse : params.splits_lse);
    const u64 first_row = (direct ? u64(row) : u64(row) * gridDim.x + blockIdx.x) * params.q_heads + first_head;
    for (u32 i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const u32 head = i / D, d = i % D;
        float top = NEGATIVE_INFINITY;
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) top = fmaxf(top, shared_m[w][head]);
        float sum = 0.0f, x = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) {
            const float factor = weight(shared_m[w][head], top);
            sum += factor * shared_l[w][head];
            x += factor * shared_o[w][head][d];
        }
        const u64 to = first_row + head;
        const float out = sum > 0.0f ? x / sum : 0.0f;
        if (rounded) {
            reinterpret_cast<u16*>(params.out_16)[to * D + d] = u16(IS_BF16 ? pack_bf16(out, 0.0f) : pack_f16(out, 0.0f));
            continue;
        }
        to_o[to * D + d] = out;
        if (d == 0) to_lse[to] = log_sum(top, sum);
    }
    if (direct) return;

    // The last CTA of the group to arrive sees what all wrote before they arrived: the barrier orders the CTA's writes
    // before its first thread's fence, and that fence before the count.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        u32* arrived = reinterpret_cast<u32*>(params.arrived) + row * gridDim.y + blockIdx.y;
        last = atomicAdd(arrived, 1u) == splits - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    if (last) merge_splits<D, IS_BF16>(params, row, first_head, heads, splits, &shared_o[0][0][0]);
}

#define DECODE(NAME, DTYPE, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) decode_##NAME(                                         \
        const __grid_constant__ DecodeParams params) {                                                                 \
        decode<DTYPE, D, false>(params);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) decode_rows_##NAME(                                    \
        const __grid_constant__ DecodeParams params) {                                                                 \
        decode<DTYPE, D, true>(params);                                                                                \
    }

DECODE(bf16_64, BF16, 64)
DECODE(bf16_128, BF16, 128)
DECODE(f16_64, F16, 64)
DECODE(f16_128, F16, 128)
DECODE(e4m3_64, E4M3, 64)
DECODE(e4m3_128, E4M3, 128)
