// What the prefill kernels share: parameters, lists, where a row of keys lies.
#pragma once
#include "kv.cuh"
#include "softmax.cuh"
#include "tile.cuh"

// A sequence of a launch: the last `rows` of its positions are queries.
struct Sequence {
    u64 pages; // of its own, in the view's pool; or 0
    u32 tokens;
    u32 rows;
    u32 offset;      // position of its first query
    u32 first_row;   // of the queries
    u32 first_block; // of the launch's row blocks; rises from sequence to sequence
    u32 first_list;  // its first row block, as lists by row block count them
};

constexpr u32 SEQUENCES = 64;

struct PrefillParams {
    View view;   // of all sequences; but pages and tokens are theirs
    u64 q;       // [rows, q_heads, D], of the keys' type
    u64 out;     // as q
    u64 out_lse; // f32 [q_heads, rows], base 2
    u64 heads;   // HeadLists [q_heads]
    u64 lists;   // List
    u64 numbers; // u32: the tiles, columns and cover that the lists name
    float scale; // of the scores, times log2(e); positive
    u32 rows;    // of all sequences, and between them
    u32 blocks;  // row blocks
    u32 q_heads;
    u32 heads_per_kv;
    u32 count; // of sequences, by rising length
    Sequence sequences[SEQUENCES];
};

struct HeadLists {
    u32 first, step; // the list of row block b is first + b * step
};

constexpr u32 RELATIVE = 0, ABSOLUTE = 1, DENSE = 2;

struct List {
    u32 tiles, tile_count; // rising; of a dense list nothing is written down
    u32 columns, column_count;
    u32 cover, cover_bits; // bit u - 1: a tile holds distance u
    u32 kind;
};

constexpr u32 ROWS = 128, TILE = 64, HALF_ROWS = ROWS / 2;

// The sequence of a row block of the launch.
__device__ __forceinline__ const Sequence& sequence_of(const PrefillParams& params, u32 block) {
    u32 low = 0, high = params.count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (params.sequences[middle].first_block <= block)
            low = middle;
        else
            high = middle;
    }
    return params.sequences[low];
}

// How many of the rising `numbers` are below `limit`.
__device__ __forceinline__ u32 count_below(const u32* numbers, u32 count, u32 limit) {
    if (count > 0 && __ldg(numbers + count - 1) < limit) return count;
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

// Tiles of a list that begin before `end`: they lie apart, so there are few, and the last of a dense list is met at once.
__device__ __forceinline__ u32 tiles_below(const u32* numbers, const List& list, u32 end) {
    if (list.kind == DENSE) return (end + TILE - 1) / TILE;
    return count_below(numbers + list.tiles, min(list.tile_count, (end + TILE - 1) / TILE), end);
}

__device__ __forceinline__ u32 columns_below(const u32* numbers, const List& list, u32 end) {
    return count_below(numbers + list.columns, min(list.column_count, end), end);
}

template <bool IS_BF16>
__device__ __forceinline__ u32 pack(float low, float high) {
    if constexpr (IS_BF16) return pack_bf16(low, high);
    return pack_f16(low, high);
}

// Byte offset of a row of KV head `kv_head`, from k or v.
__device__ __forceinline__ u64 row_offset(const View& view, u64 pages, u32 kv_head, u32 key) {
    u64 at = kv_head * view.head_stride;
    if (pages == 0) return at + u64(key) * view.token_stride;
    const u32 index = key / view.page_tokens;
    const u64 page = __ldg(reinterpret_cast<const u32*>(pages) + index);
    return at + page * view.page_stride + u64(key - index * view.page_tokens) * view.token_stride;
}

// Position of the first key of tile `index` of a list, for the row block that ends at `end`; may be negative.
// The nearest tile comes first, but of an absolute list.
__device__ __forceinline__ int tile_first(const u32* numbers, const List& list, u32 end, u32 index) {
    if (list.kind == DENSE) return (int((end + TILE - 1) / TILE) - 1 - int(index)) * int(TILE);
    const u32 tile = __ldg(numbers + list.tiles + index);
    return list.kind == ABSOLUTE ? int(tile) : int(end) - int(tile) - int(TILE);
}

// Position of column `index`, or -1 if there is none or a tile holds it as well: it counts there.
__device__ __forceinline__ int column_once(const u32* numbers, const List& list, u32 end, u32 count, u32 index) {
    if (index >= count) return -1;
    const u32 key = __ldg(numbers + list.columns + index);
    const u32 bit = end - key - 1;
    const bool twice = bit < list.cover_bits && (__ldg(numbers + list.cover + bit / 32) >> (bit & 31u) & 1u);
    return twice ? -1 : int(key);
}
