// What the planners of sparse lists share: rows in parts, and what each head keeps. The host's twins are in src/planner.rs.
#pragma once
#include "kv.cuh"

constexpr u32 ROWS = 128;     // of a row block: see prefill.cuh
constexpr u32 LIST_WORDS = 7; // of a List there
constexpr float LARGEST = 3.0e38f; // score of what is always chosen

// A run of rows that is planned for together.
struct Part {
    u32 first_row, rows; // from the first sparse row on
    u32 end;             // position behind its last row
};

// The sparse rows of a call.
struct Parts {
    u32 rows;      // all of them
    u32 offset;    // position of the first
    u32 part_rows; // of each part but the last, which may have fewer; whole row blocks if there are several
    u32 first;     // part of a launch
    u32 before;    // rows of the call before the first sparse one; whole row blocks

    __device__ __forceinline__ Part part(u32 nth) const {
        Part out;
        out.first_row = nth * part_rows;
        out.rows = min(part_rows, rows - out.first_row);
        out.end = offset + out.first_row + out.rows;
        return out;
    }
};

enum PlanKind : u32 { FIXED = 0, VERTICAL_SLASH = 1, BLOCK_SPARSE = 2, FLEX_PREFILL = 3, X_ATTENTION = 4 };

struct HeadPlan {
    u32 kind;
    u32 verticals, slashes, sink, near; // Vertical-Slash: counts, and the first ones, which are always among them
    u32 blocks;                         // Block-Sparse: key blocks of a row block
    u32 list[LIST_WORDS];               // fixed: the same for every row block
    float share;                        // FlexPrefill, XAttention: of the mass
    float tau;                          // FlexPrefill: below this distance the best blocks of the pooled map are taken
    u32 least;                          // FlexPrefill: key blocks of a row block at least
};
