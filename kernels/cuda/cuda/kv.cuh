// Where keys and values lie. The host's twin is `RawView` in src/view.rs.
#pragma once
#include "types.cuh"

// Row t of head h begins at base + page * page_stride + head * head_stride + (t % page_tokens) * token_stride, where page
// is pages[t / page_tokens], or 0 without a table. Strides are in bytes.
struct View {
    u64 k, v;             // first key, first value
    u64 k_scale, v_scale; // first f32 scale of each, for e4m3
    u64 pages;            // u32 page numbers, or 0
    u64 lengths;          // u32 tokens that are there, per KV head, or 0: then `tokens` are
    u64 page_stride;
    u64 head_stride, scale_head_stride;
    u32 token_stride, scale_token_stride;
    u32 tokens;      // never more than this, whatever `lengths` says
    u32 page_tokens; // a multiple of 16
};

struct Place {
    u64 offset;       // of the first row of a tile, from k or v
    u64 scale_offset; // from k_scale or v_scale
};

__device__ __forceinline__ u32 tokens_of(const View& view, u32 head) {
    if (view.lengths == 0) return view.tokens;
    u32 length = reinterpret_cast<const u32*>(view.lengths)[head];
    return length < view.tokens ? length : view.tokens;
}

// `first` is a multiple of 16, so that 16 rows from it lie in one page.
__device__ __forceinline__ Place place(const View& view, u32 head, u32 first) {
    u64 page = 0;
    u32 inside = first;
    if (view.pages != 0) {
        u32 index = first / view.page_tokens;
        inside = first - index * view.page_tokens;
        page = reinterpret_cast<const u32*>(view.pages)[index];
    }
    Place out;
    out.offset = page * view.page_stride + head * view.head_stride + u64(inside) * view.token_stride;
    out.scale_offset = page * view.page_stride + head * view.scale_head_stride + u64(inside) * view.scale_token_stride;
    return out;
}
