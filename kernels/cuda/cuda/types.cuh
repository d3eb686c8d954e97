// Scalar types and conversions. No toolkit header is included anywhere: NVRTC then needs nothing but itself.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define NEGATIVE_INFINITY (__int_as_float(0xff800000))
constexpr u32 FULL_WARP = 0xffffffffu;

// Names of the element types, as the host numbers them (`Dtype::code`).
constexpr u32 BF16 = 0, F16 = 1, E4M3 = 2, F32 = 3;

struct alignas(16) Word4 {
    u32 x, y, z, w;
};

// Read-once data: not kept in L1, so that it does not push out what is read again.
__device__ __forceinline__ Word4 load_once(const void* address) {
    Word4 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(address));
    return out;
}

// Volatile, so that the compiler loads where this stands instead of keeping the value in registers.
__device__ __forceinline__ Word4 load_shared(u32 address) {
    Word4 out;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "r"(address));
    return out;
}

__device__ __forceinline__ float bf16_to_f32(u16 bits) { return __int_as_float(int(u32(bits) << 16)); }

__device__ __forceinline__ float f16_to_f32(u16 bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

// Two numbers in one register, `low` in the low half; round to nearest, ties to even.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

// Two e4m3 numbers (the low 16 bits) as two f16, exactly.
__device__ __forceinline__ u32 e4m3_to_f16(u32 pair) {
#if __CUDA_ARCH__ >= 890
    u32 out;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(u16(pair)));
    return out;
#else
    // Exponent and mantissa move under f16's wider exponent; the product makes up for the other bias, subnormals included.
    u32 spread = (pair & 0xffu) | ((pair & 0xff00u) << 8);
    u32 magnitude = (spread & 0x007f007fu) << 7;
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(magnitude), "r"(0x5c005c00u));
    if ((spread & 0x7fu) == 0x7fu) out |= 0x7fffu;
    if ((spread & 0x7f0000u) == 0x7f0000u) out |= 0x7fff0000u;
    return out | ((spread & 0x00800080u) << 8);
#endif
}

// Two f32 as e4m3 (low 16 bits, `low` in the low byte): nearest, ties to even, saturating at 448.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
#else
    auto one = [](float x) -> u32 {
        u32 sign = (u32(__float_as_int(x)) >> 24) & 0x80u;
        float magnitude = fabsf(x);
        if (!(magnitude == magnitude)) return 0x7fu;
        if (magnitude >= 448.0f) return sign | 0x7eu;
        if (magnitude < 0.015625f) return sign | u32(__float2int_rn(magnitude * 512.0f)); // subnormal: steps of 2^-9
        u32 bits = u32(__float_as_int(magnitude));
        bits += 0x7ffffu + ((bits >> 20) & 1u);
        return sign | ((bits >> 20) - (120u << 3));
    };
    return one(low) | (one(high) << 8);
#endif
}

// Eight numbers from element `index`, a multiple of 8, of f32, bf16 or f16.
__device__ __forceinline__ void load_scalars(float (&x)[8], const void* base, u32 dtype, u64 index) {
    if (dtype == F32) {
        const Word4* from = reinterpret_cast<const Word4*>(static_cast<const float*>(base) + index);
        const Word4 a = from[0], b = from[1];
        const u32 bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 i = 0; i < 8; ++i) x[i] = __int_as_float(int(bits[i]));
    } else {
        const Word4 a = *reinterpret_cast<const Word4*>(static_cast<const u16*>(base) + index);
        const u32 bits[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u16 half = u16(bits[i / 2] >> (16 * (i & 1)));
            x[i] = dtype == BF16 ? bf16_to_f32(half) : f16_to_f32(half);
        }
    }
}
