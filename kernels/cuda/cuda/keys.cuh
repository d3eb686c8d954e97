// One warp's 16 keys against up to 8 queries, straight from global memory to the tensor cores.
//
// S^T = K Q^T puts keys in the tile's 16 rows and the query heads that share them in its 8 columns, so a group of 4 or 8
// wastes little or nothing. The sum over d may run in any order, so a thread takes whole 16-byte words of the rows as
// they lie, and the query is laid out to match: no shared memory, no shuffles.
#pragma once
#include "kv.cuh"
#include "tile.cuh"

template <u32 DTYPE, u32 D>
struct Keys {
    static constexpr bool IS_BF16 = DTYPE == BF16;
    static constexpr u32 ROW_BYTES = DTYPE == E4M3 ? D : 2 * D;
    static constexpr u32 WORDS = ROW_BYTES / 64; // 16-byte words of a row per thread
    static constexpr u32 PER_WORD = DTYPE == E4M3 ? 16 : 8;

    static constexpr u32 QUERY_WORDS = D / 32; // 16-byte words per thread: the b operands of two steps each

    // The b operands stay in shared memory, which all warps read and registers are too few for: `[QUERY_WORDS][32]`.
    // The CTA's warps share the work; the caller synchronises. Queries are [heads, D]; the lane's head g is `row`, or there
    // is none.
    static __device__ __forceinline__ void store_query(Word4* shared, const void* base, u32 dtype, u64 row, bool there) {
        const u32 lane = threadIdx.x & 31u, t = lane & 3u;
        for (u32 index = threadIdx.x / 32; index < QUERY_WORDS; index += blockDim.x / 32) {
            constexpr u32 PARTS = PER_WORD / 8;
            const u64 at = row * D + index / PARTS * PER_WORD * 4 + t * PER_WORD + index % PARTS * 8;
            float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            if (there) load_scalars(x, base, dtype, at);
            Word4 out;
            out.x = IS_BF16 ? pack_bf16(x[0], x[1]) : pack_f16(x[0], x[1]);
            out.y = IS_BF16 ? pack_bf16(x[2], x[3]) : pack_f16(x[2], x[3]);
            out.z = IS_BF16 ? pack_bf16(x[4], x[5]) : pack_f16(x[4], x[5]);
            out.w = IS_BF16 ? pack_bf16(x[6], x[7]) : pack_f16(x[6], x[7]);
            shared[index * 32 + lane] = out;
        }
    }

    Word4 low[WORDS], high[WORDS]; // rows g and g + 8

    // Rows at or past `count` are zeros: what lies there is never read.
    __device__ __forceinline__ void load(const View& view, u64 offset, u32 count) {
        const u32 lane = threadIdx.x & 31u, g = lane >> 2, t = lane & 3u;
        const char* row = reinterpret_cast<const char*>(view.k + offset) + g * view.token_stride + t * 16;
        const char* far = row + 8 * view.token_stride;
#pragma unroll
        for (u32 word = 0; word < WORDS; ++word) {
            low[word] = g < count ? load_once(row + 64 * word) : Word4{0, 0, 0, 0};
            high[word] = g + 8 < count ? load_once(far + 64 * word) : Word4{0, 0, 0, 0};
        }
    }

    // out: keys g, g, g+8, g+8 against heads 2t, 2t+1, 2t, 2t+1.
    __device__ __forceinline__ void dot(float (&out)[4], const Word4* query) const {
        const u32 base = shared_address(query) + (threadIdx.x & 31u) * 16;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) out[i] = 0.0f;
#pragma unroll
        for (u32 word = 0; word < WORDS; ++word) {
            const u32 a[4] = {low[word].x, low[word].y, low[word].z, low[word].w};
            const u32 b[4] = {high[word].x, high[word].y, high[word].z, high[word].w};
            if constexpr (DTYPE == E4M3) {
#pragma unroll
                for (u32 i = 0; i < 4; i += 2) {
                    const Word4 q = load_shared(base + (word * 2 + i / 2) * 512);
                    mma<false>(out, e4m3_to_f16(a[i] & 0xffffu), e4m3_to_f16(b[i] & 0xffffu), e4m3_to_f16(a[i] >> 16),
                               e4m3_to_f16(b[i] >> 16), q.x, q.y);
                    mma<false>(out, e4m3_to_f16(a[i + 1] & 0xffffu), e4m3_to_f16(b[i + 1] & 0xffffu),
                               e4m3_to_f16(a[i + 1] >> 16), e4m3_to_f16(b[i + 1] >> 16), q.z, q.w);
                }
            } else {
                const Word4 q = load_shared(base + word * 512);
                mma<IS_BF16>(out, a[0], b[0], a[1], b[1], q.x, q.y);
                mma<IS_BF16>(out, a[2], b[2], a[3], b[3], q.z, q.w);
            }
        }
    }
};
