// Thin wrappers around the instructions of NVIDIA GPUs, for kernels that are compiled at run time without CUDA's
// headers. tests/emulation/device.cuh has the same functions for a C++ compiler, so that kernels run on a CPU too.
//
// Conventions: two 16-bit numbers are a uint32_t (the first in the low half); an address in shared memory is a
// uint32_t, counted in bytes, and shared memory is reached through the functions here only; `Half` and `BFloat16`
// are tags that choose the type of an instruction. A kernel takes one struct of arguments:
//
//     struct Arguments { ... };
//     KERNEL(name, threads, blocks_per_multiprocessor, Arguments) { ... arguments.x ... }
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#if defined(__CUDA_ARCH__)
#define TENSORMILL_ARCH __CUDA_ARCH__
#else
#define TENSORMILL_ARCH 900
#endif

#define DEVICE __device__ __forceinline__
#define KERNEL(NAME, THREADS, BLOCKS, ARGUMENTS)           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) \
        NAME(const __grid_constant__ ARGUMENTS arguments)

struct Half {};
struct BFloat16 {};

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

// --- where a thread is

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane_index() { return threadIdx.x & 31; }
// The same for all lanes, which the compiler is told by the shuffle.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_index_y() { return blockIdx.y; }
DEVICE int grid_size() { return gridDim.x; }

// --- barriers and shuffles

DEVICE void synchronize() { __syncthreads(); }
DEVICE void synchronize_warp() { __syncwarp(); }
// `threads` threads of the block meet at barrier `id`, 1 to 15.
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// --- bits

// IMMEDIATE: the truth table of (a, b, c) where a = 0xf0, b = 0xcc, c = 0xaa.
template <int IMMEDIATE>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(IMMEDIATE));
    return d;
}
constexpr int AND_OR = (0xf0 & 0xcc) | 0xaa;              // (a & b) | c
constexpr int SELECT = (0xf0 & 0xcc) | (~0xf0 & 0xaa & 0xff);  // a ? b : c, bit by bit
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// The larger of each of two unsigned 16-bit integers.
DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
#if TENSORMILL_ARCH >= 900
    uint32_t d;
    asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
    return (a >> 16 > b >> 16 ? a >> 16 : b >> 16) << 16 | low;
#endif
}
DEVICE int count_bits(uint32_t a) { return __popc(a); }
DEVICE float bits_to_float(uint32_t a) { return __uint_as_float(a); }
DEVICE uint32_t float_to_bits(float a) { return __float_as_uint(a); }

// --- pairs of 16-bit numbers

template <class T>
DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);  // a * b + c, rounded once
template <>
DEVICE uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
DEVICE uint32_t fma2<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t add2<Half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
DEVICE uint32_t add2<BFloat16>(uint32_t a, uint32_t b) {
    return fma2<BFloat16>(a, 0x3f803f80u, b);
}

template <class T>
DEVICE uint32_t sub2(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t sub2<Half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
DEVICE uint32_t sub2<BFloat16>(uint32_t a, uint32_t b) {
#if TENSORMILL_ARCH >= 900
    uint32_t d;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2<BFloat16>(b, 0xbf80bf80u, a);  // a - 1 * b
#endif
}

template <class T>
DEVICE uint32_t mul2(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t mul2<Half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
DEVICE uint32_t mul2<BFloat16>(uint32_t a, uint32_t b) {
    return fma2<BFloat16>(a, b, 0x80008000u);
}

// Two float32 rounded to nearest, the first in the low half.
template <class T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<Half>(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
template <>
DEVICE uint32_t pack2<BFloat16>(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// The number in the low 16 bits, as float32.
template <class T>
DEVICE float to_float(uint32_t a);
template <>
DEVICE float to_float<Half>(uint32_t a) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((uint16_t)a));
    return d;
}
template <>
DEVICE float to_float<BFloat16>(uint32_t a) {
    return __uint_as_float(a << 16);
}

// --- shared memory

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
// Address of the block's dynamic shared memory, a multiple of 1024.
DEVICE uint32_t shared_memory() { return (uint32_t)__cvta_generic_to_shared(dynamic_shared_memory); }

DEVICE uint32_t load_shared_half(uint32_t address) {
    uint16_t d;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(d) : "r"(address));
    return d;
}
DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t d;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address));
    return d;
}
DEVICE Words2 load_shared2(uint32_t address) {
    Words2 d;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(address));
    return d;
}
DEVICE Words4 load_shared4(uint32_t address) {
    Words4 d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "r"(address));
    return d;
}
DEVICE void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared4(uint32_t address, Words4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}
// Four 8x8 matrices of 16-bit numbers; lane 8 i + j gives the address of row j of matrix i.
DEVICE void load_matrices4(uint32_t address, uint32_t (&d)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address));
}

// --- global memory

// Through the read-only cache: memory that nobody writes during the kernel, nor the kernel before it while both run.
DEVICE uint32_t load_constant(const uint32_t* address) {
    uint32_t d;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(address));
    return d;
}
DEVICE Words4 load_constant4(const void* address) {
    Words4 d;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "l"(address));
    return d;
}
// Past the first-level cache, so that what other blocks wrote is seen once it has arrived.
DEVICE Words4 load_relaxed4(const void* address) {
    Words4 d;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "l"(address)
                 : "memory");
    return d;
}
DEVICE void store_relaxed4(void* address, Words4 value) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}
DEVICE Words2 load_relaxed2(const void* address) {
    Words2 d;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(address) : "memory");
    return d;
}
// Adds, and returns what was there before. What this thread saw written before is seen by whoever adds later, too.
DEVICE uint32_t add_ordered(uint32_t* address, uint32_t value) {
    uint32_t before;
    asm volatile("fence.acq_rel.gpu;\natom.relaxed.gpu.global.add.u32 %0, [%1], %2;\nfence.acq_rel.gpu;"
                 : "=r"(before)
                 : "l"(address), "r"(value)
                 : "memory");
    return before;
}
// Waiting for another block: lets the emulation run it.
DEVICE void spin() {}

// --- asynchronous copies (sm_80)

// The first `bytes` of 16 are copied, the others become 0.
DEVICE void copy_async16(uint32_t shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// Four bytes, or, where `bytes` is 0, a zero.
DEVICE void copy_async4(uint32_t shared, const void* global, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// Or in groups: this thread's copies since the group before, and waiting until at most PENDING groups are unfinished.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// This thread's copies so far arrive at the barrier once they are complete (counted as one of its arrivals).
DEVICE void copy_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// --- barriers in shared memory, of 8 bytes

DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initializations, before the block's synchronization.
DEVICE void mbarrier_init_fence() {
#if TENSORMILL_ARCH >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Waits until the phase of that parity is complete.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if TENSORMILL_ARCH >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
}

// --- Hopper: bulk copies, and kernels that overlap (nothing, or their plain form, before sm_90)

#if TENSORMILL_ARCH >= 900
// Arrives, and asks that `bytes` arrive by copies too before the phase completes.
DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Cache policies for copies: what is read once should be the first to leave the second-level cache.
DEVICE uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// `bytes` and both addresses are multiples of 16.
DEVICE void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
DEVICE void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}
// The box at (x, y), x counted along the contiguous dimension; `map` is a CUtensorMap among the kernel's arguments.
DEVICE void copy_tensor(uint32_t shared, const void* map, int x, int y, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(shared),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
DEVICE void prefetch_tensor_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// What this thread wrote to shared memory becomes visible to bulk copies and wgmma.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Waits for the kernel before (and all it wrote), where this kernel was launched to overlap with it.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may start its blocks. To be called after wait_for_previous_kernel: what the next kernel reads
// before its own wait is then complete, whoever wrote it.
DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void wait_for_previous_kernel() {}
DEVICE void allow_next_kernel() {}
#endif

// A warpgroup's limit of registers, a multiple of 8; nothing on chips that can't move it.
template <int REGISTERS>
DEVICE void raise_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
DEVICE void lower_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// --- matrix products of a warp; fragments as in PTX

// d (16 x 8, float32) += a (16 x 16) b (16 x 8)
template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d (16 x 8, int32) += a (16 x 32, int8) b (32 x 8, int8)
DEVICE void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- small loads, votes, transposition, special functions, and a hint

// As load_constant, of other sizes.
DEVICE uint32_t load_constant_byte(const uint8_t* address) {
    uint32_t d;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(d) : "l"(address));
    return d;
}
DEVICE uint32_t load_constant_half(const uint16_t* address) {
    uint16_t d;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(d) : "l"(address));
    return d;
}
DEVICE Words2 load_constant2(const void* address) {
    Words2 d;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(address));
    return d;
}
// Brings the 128 bytes around the address into the second-level cache.
DEVICE void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
// Keeps the compiler from computing the value anew wherever it is used, which it does to save registers.
template <class T>
DEVICE void keep(T*& pointer) {
    asm volatile("" : "+l"(pointer));
}
DEVICE void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
// Whether any lane says so.
DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }
// An 8x8 matrix of 16-bit numbers, two neighbours of row lane / 4 in each lane, transposed.
DEVICE uint32_t transpose_matrix(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
// To about 22 bits; subnormal numbers are 0.
DEVICE float fast_exp2(float a) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
DEVICE float fast_log2(float a) {
    float d;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}
