// Products of single bits: sums of popcount(a & b). (Hopper emulates the XOR form; AND is native.)
#pragma once

#include "hopper.cuh"

// d (16 x 8, int32) += a (16 x 256 bits) b (256 bits x 8): registers 0 and 1 of a are rows g and g + 8 and bits
// 32 t ... 32 t + 31, registers 2 and 3 the same 128 bits further, for lane 4 g + t; b's two are column g likewise.
DEVICE void mma_bits(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define TM_BITS_LIST_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define TM_BITS_LIST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define TM_OUT_8(c, d, i) TM_OUT_4(c, d, i), TM_OUT_4(c, d, i + 4)
#define TM_WGMMA_BITS(N, OUT, LISTS, A, B)                                                                      \
    if constexpr (COLUMNS == N)                                                                                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" LISTS "}, " A ", " B    \
                     ", 1;"                                                                                     \
                     : OUT("r", d, 0)                                                                             \
                     : "l"(a), "l"(b));

// d (64 x COLUMNS, int32) += A B^T: A, 64 rows of 256 bits, and B, COLUMNS rows of 256 bits, from shared memory.
// Asynchronous: fence before, commit and wait after.
template <int COLUMNS>
DEVICE void wgmma_bits(uint32_t (&d)[COLUMNS / 2], uint64_t a, uint64_t b) {
    TM_WGMMA_BITS(16, TM_OUT_8, TM_BITS_LIST_8, "%8", "%9")
    TM_WGMMA_BITS(32, TM_OUT_16, TM_BITS_LIST_16, "%16", "%17")
    TM_WGMMA_BITS(64, TM_OUT_32, TM_LIST_0, "%32", "%33")
    TM_WGMMA_BITS(128, TM_OUT_64, TM_LIST_0 "," TM_LIST_1, "%64", "%65")
    TM_WGMMA_BITS(256, TM_OUT_128, TM_LIST_0 "," TM_LIST_1 "," TM_LIST_2 "," TM_LIST_3, "%128", "%129")
}

// After a wait: keeps the compiler from using the sums before it.
template <int COUNT>
DEVICE void wgmma_settle(uint32_t (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(d[i])::"memory");
}
DEVICE void add_shared(uint32_t address, uint32_t value) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_global2(void* address, Words2 value) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(value.x), "r"(value.y) : "memory");
}
// Where `condition` holds; no branch, so that work around it can overlap.
DEVICE void store_global2_if(bool condition, void* address, Words2 value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p st.global.v2.u32 [%0], {%1, %2};\n}" ::"l"(address),
                 "r"(value.x), "r"(value.y), "r"(int(condition))
                 : "memory");
}
// Weights that are read once: they need no place in the first-level cache.
DEVICE Words4 load_streamed4(const void* address) {
    Words4 d;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "l"(address));
    return d;
}
