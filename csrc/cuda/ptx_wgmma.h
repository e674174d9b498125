// The wgmma instructions of sm_90a; part of ptx.h. They have so many operands that macros write them.
#pragma once

#include <cstdint>

#include "../nm_format.h"

namespace msp {
namespace ptx {

// 9.7.15 Orders registers written before against the products after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `Pending` committed groups are unfinished.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Called after the wait for the products that add to `d`: it keeps the compiler, which sees no connection,
// from reading `d` before.
template <int Count>
__device__ __forceinline__ void wgmma_done(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operand names %<t>0 ... %<t>9, and accumulators d[i] ...
#define MSP_D10(t) \
    "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define MSP_D60 MSP_D10() MSP_D10(1) MSP_D10(2) MSP_D10(3) MSP_D10(4) MSP_D10(5)
#define MSP_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MSP_F16(i) MSP_F4(i), MSP_F4(i + 4), MSP_F4(i + 8), MSP_F4(i + 12)
#define MSP_F64(i) MSP_F16(i), MSP_F16(i + 16), MSP_F16(i + 32), MSP_F16(i + 48)

#define MSP_WGMMA_SP(shape, type, accumulators, operands, ...)                                          \
    asm volatile(                                                                                       \
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                  \
        "wgmma.mma_async.sp.sync.aligned." shape ".f32." type "." type " {" accumulators "}, " operands \
        ", add, 1, 1, 0;\n}"                                                                            \
        : __VA_ARGS__                                                                                   \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(metadata), "n"(Selector))

#define MSP_WGMMA_SP_TYPE(type)                                                                            \
    if constexpr (N == 64) {                                                                               \
        MSP_WGMMA_SP("m64n64k32", type, MSP_D10() MSP_D10(1) MSP_D10(2) "%30,%31",                         \
                     "{%32, %33, %34, %35}, %36, %37, %38", MSP_F16(0), MSP_F16(16));                      \
    } else if constexpr (N == 128) {                                                                       \
        MSP_WGMMA_SP("m64n128k32", type, MSP_D60 "%60,%61,%62,%63", "{%64, %65, %66, %67}, %68, %69, %70", \
                     MSP_F64(0));                                                                          \
    } else {                                                                                               \
        MSP_WGMMA_SP("m64n256k32", type,                                                                   \
                     MSP_D60 MSP_D10(6) MSP_D10(7) MSP_D10(8) MSP_D10(9) MSP_D10(10)                       \
                         MSP_D10(11) "%120,%121,%122,%123,%124,%125,%126,%127",                            \
                     "{%128, %129, %130, %131}, %132, %133, %134", MSP_F64(0), MSP_F64(64));               \
    }

// 9.7.15.5 wgmma.mma_async.sp: d += a b, with a [64, 32] 2:4 sparse in registers and b [32, N] in shared
// memory, where `b` is its matrix descriptor, k contiguous. Lanes 2 Selector and 2 Selector + 1 of each four
// hold the metadata.
template <Dtype D, int N, int Selector>
__device__ __forceinline__ void wgmma_sp(float (&d)[N / 2], uint4 a, uint64_t b, uint32_t metadata) {
    static_assert(N == 64 || N == 128 || N == 256, "no such shape is spelled out");
    if constexpr (D == Dtype::kBFloat16) {
        MSP_WGMMA_SP_TYPE("bf16")
    } else {
        MSP_WGMMA_SP_TYPE("f16")
    }
}

#undef MSP_WGMMA_SP_TYPE
#undef MSP_WGMMA_SP
#undef MSP_F64
#undef MSP_F16
#undef MSP_F4
#undef MSP_D60
#undef MSP_D10

}  // namespace ptx
}  // namespace msp
