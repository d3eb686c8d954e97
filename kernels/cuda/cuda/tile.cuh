// Tensor-core tiles on Ampere and later: mma.sync, ldmatrix, movmatrix, cp.async, and the swizzle of shared-memory rows.
#pragma once
#include "types.cuh"

// c[16 x 8] += a[16 x 16] b[16 x 8]. With g = lane / 4 and t = lane % 4, a thread holds
//   a: rows g, g+8, g, g+8 at k = 2t, 2t, 2t+8, 2t+8 (pairs);  b: k = 2t, 2t+8 (pairs) at column g;
//   c: rows g, g, g+8, g+8 at columns 2t, 2t+1, 2t, 2t+1.
template <bool IS_BF16>
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (IS_BF16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// An 8 x 8 matrix of 16-bit numbers, one row in four lanes, transposed across the warp.
__device__ __forceinline__ u32 transpose_8x8(u32 rows) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(rows));
    return out;
}

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Four 8 x 8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&out)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
}

// 16 bytes from global to shared memory without passing through registers; zeros when `there` is false.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool there = true) {
    u32 bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Byte offset of 16-byte word `word` of row `row` in a tile of `ROW_BYTES` rows: the words of eight rows in a column lie
// in eight different bank groups, so ldmatrix meets no conflict.
template <u32 ROW_BYTES>
__device__ __forceinline__ u32 swizzle(u32 row, u32 word) {
    return row * ROW_BYTES + ((word ^ (row & 7u)) << 4);
}
