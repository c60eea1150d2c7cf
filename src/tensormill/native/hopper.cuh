// What sm_90a adds to device.cuh: products of warpgroups (wgmma), tensor copies, clusters of blocks.
#pragma once

#include "device.cuh"

// Made on the host by cuTensorMapEncodeTiled; to be passed in a kernel's arguments.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// --- clusters

// Address of `address` in block `rank` of the cluster.
DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Barrier of all threads of all blocks of the cluster.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at a barrier in any block of the cluster, without releasing what was written: that would cost a fence of all
// memory each time, far too much in a loop.
DEVICE void cluster_mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// What another block of the cluster has in shared memory.
DEVICE Words2 cluster_load2(uint32_t address) {
    Words2 d;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(address) : "memory");
    return d;
}

// --- tensor copies

// As copy_tensor, to this address of every block of the cluster whose bit is set in `blocks`; arrives at that barrier there.
DEVICE void copy_tensor_multicast(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
        "[%4], %5;" ::"r"(shared),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((uint16_t)blocks)
        : "memory");
}

// Brings a box into the second-level cache.
DEVICE void prefetch_tensor(const TensorMap* map, int x, int y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}

// Shared memory to the box at (x, y), less what lies outside of the tensor.
DEVICE void store_tensor(const TensorMap* map, int x, int y, uint32_t shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x),
                 "r"(y), "r"(shared)
                 : "memory");
}

DEVICE void store_tensor_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have read what they store.
DEVICE void store_tensor_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i.
DEVICE void store_matrices4(uint32_t address, const uint32_t (&a)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a[0]), "r"(a[1]),
                 "r"(a[2]), "r"(a[3])
                 : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed; lane 8 i + j gives the address of row j of matrix i.
DEVICE void store_matrices4_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// --- wgmma

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups of products are unfinished.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After a wait, at the end of the loop of these products or where others are unfinished: keeps the compiler from copying
// these sums before it.
template <int COUNT>
DEVICE void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT>
DEVICE void wgmma_settle(int (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// Operand of rows of 128 bytes, K contiguous, with the 128-byte swizzle of a tensor map, at a multiple of 1024
// bytes: groups of eight rows are 1024 bytes apart. 32 bytes further along K the address is 32 bytes higher.
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The descriptor of an address that is `bytes` further on.
DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | (uint32_t(descriptor) + bytes / 16);
}

enum class Wgmma { f16, bf16, s8, e4m3 };  // operands

#define TM_LIST_HALF "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define TM_LIST_0                                                                                           \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
    "%28,%29,%30,%31"
#define TM_LIST_1                                                                                          \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
    "%57,%58,%59,%60,%61,%62,%63"
#define TM_LIST_2                                                                                          \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
    "%89,%90,%91,%92,%93,%94,%95"
#define TM_LIST_3                                                                                                    \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118," \
    "%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define TM_OUT_4(c, d, i) "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3])
#define TM_OUT_16(c, d, i) TM_OUT_4(c, d, i), TM_OUT_4(c, d, i + 4), TM_OUT_4(c, d, i + 8), TM_OUT_4(c, d, i + 12)
#define TM_OUT_32(c, d, i) TM_OUT_16(c, d, i), TM_OUT_16(c, d, i + 16)
#define TM_OUT_64(c, d, i) TM_OUT_32(c, d, i), TM_OUT_32(c, d, i + 32)
#define TM_OUT_128(c, d, i) TM_OUT_64(c, d, i), TM_OUT_64(c, d, i + 64)

#define TM_WGMMA_CASE(N, TYPE, SHAPE, C, OUT, LISTS, A, B, SCALE, TAIL)                                          \
    if constexpr (KIND == Wgmma::TYPE)                                                                           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SCALE ", 0;\nwgmma.mma_async.sync.aligned.m64n" N SHAPE \
                     " {" LISTS "}, {" A "}, " B ", p" TAIL ";\n}"                                               \
                     : OUT(C, d, 0)                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));

#define TM_WGMMA_SIZE(N, OUT, LISTS, A, B, SCALE)                                                                 \
    if constexpr (COLUMNS == N) {                                                                                  \
        TM_WGMMA_CASE(#N, f16, "k16.f32.f16.f16", "f", OUT, LISTS, A, B, SCALE, ", 1, 1, 0")                      \
        TM_WGMMA_CASE(#N, bf16, "k16.f32.bf16.bf16", "f", OUT, LISTS, A, B, SCALE, ", 1, 1, 0")                   \
        TM_WGMMA_CASE(#N, s8, "k32.s32.s8.s8", "r", OUT, LISTS, A, B, SCALE, "")                                  \
        TM_WGMMA_CASE(#N, e4m3, "k32.f32.e4m3.e4m3", "f", OUT, LISTS, A, B, SCALE, ", 1, 1")                      \
    }

// d (64 x COLUMNS) += A B^T, or = where `accumulate` is false: A, 64 rows of 32 bytes, from registers (a warp's 16 rows
// as the A fragment of mma.sync), B, COLUMNS rows of 32 bytes, from shared memory. Asynchronous: fence before, commit
// and wait after.
template <Wgmma KIND, int COLUMNS, class D>
DEVICE void wgmma(D (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    TM_WGMMA_SIZE(32, TM_OUT_16, TM_LIST_HALF, "%16,%17,%18,%19", "%20", "%21")
    TM_WGMMA_SIZE(64, TM_OUT_32, TM_LIST_0, "%32,%33,%34,%35", "%36", "%37")
    TM_WGMMA_SIZE(128, TM_OUT_64, TM_LIST_0 "," TM_LIST_1, "%64,%65,%66,%67", "%68", "%69")
    TM_WGMMA_SIZE(256, TM_OUT_128, TM_LIST_0 "," TM_LIST_1 "," TM_LIST_2 "," TM_LIST_3, "%128,%129,%130,%131", "%132",
                  "%133")
}

// --- wgmma of a B that is contiguous along its columns

// Operand of K rows of COLUMNS 16-bit elements, as boxes of rows of 128 bytes, swizzled, `stride` bytes from one box of
// 64 columns to the next; groups of eight rows are 1024 bytes apart.
DEVICE uint64_t wgmma_descriptor_transposed(uint32_t address, uint32_t stride) {
    return wgmma_descriptor(address) & ~(uint64_t(0x3FFF) << 16) | uint64_t(stride >> 4) << 16;
}

#define TM_WGMMA_TRANSPOSED(N, OUT, LISTS, A, B, SCALE)                                         \
    if constexpr (COLUMNS == N) {                                                                \
        TM_WGMMA_CASE(#N, f16, "k16.f32.f16.f16", "f", OUT, LISTS, A, B, SCALE, ", 1, 1, 1")    \
        TM_WGMMA_CASE(#N, bf16, "k16.f32.bf16.bf16", "f", OUT, LISTS, A, B, SCALE, ", 1, 1, 1") \
    }

// d (64 x COLUMNS) += A B, as `wgmma`, with B of 16 rows of COLUMNS 16-bit elements.
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_transposed(float (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    TM_WGMMA_TRANSPOSED(128, TM_OUT_64, TM_LIST_0 "," TM_LIST_1, "%64,%65,%66,%67", "%68", "%69")
    TM_WGMMA_TRANSPOSED(256, TM_OUT_128, TM_LIST_0 "," TM_LIST_1 "," TM_LIST_2 "," TM_LIST_3, "%128,%129,%130,%131",
                        "%132", "%133")
}

// --- wgmma of two operands in shared memory

#define TM_WGMMA_SHARED_CASE(N, TYPE, OUT, LISTS, A, B, SCALE, TRANSPOSED)                                              \
    if constexpr (KIND == Wgmma::TYPE)                                                                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SCALE ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." #TYPE \
                     "." #TYPE " {" LISTS "}, " A ", " B ", p, 1, 1, 0, " TRANSPOSED ";\n}"                              \
                     : OUT("f", d, 0)                                                                                   \
                     : "l"(a), "l"(b), "r"(int(accumulate)));

#define TM_WGMMA_SHARED(N, OUT, LISTS, A, B, SCALE, TRANSPOSED)                      \
    if constexpr (COLUMNS == N) {                                                    \
        TM_WGMMA_SHARED_CASE(#N, f16, OUT, LISTS, A, B, SCALE, TRANSPOSED)           \
        TM_WGMMA_SHARED_CASE(#N, bf16, OUT, LISTS, A, B, SCALE, TRANSPOSED)          \
    }

// As `wgmma`, with A as B is: rows of 128 bytes, swizzled.
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_shared(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, bool accumulate) {
    TM_WGMMA_SHARED(64, TM_OUT_32, TM_LIST_0, "%32", "%33", "%34", "0")
}

// As `wgmma_transposed`, with A as in `wgmma_shared`.
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_shared_transposed(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, bool accumulate) {
    TM_WGMMA_SHARED(128, TM_OUT_64, TM_LIST_0 "," TM_LIST_1, "%64", "%65", "%66", "1")
    TM_WGMMA_SHARED(256, TM_OUT_128, TM_LIST_0 "," TM_LIST_1 "," TM_LIST_2 "," TM_LIST_3, "%128", "%129", "%130", "1")
}
