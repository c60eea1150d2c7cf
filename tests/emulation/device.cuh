// The functions of tensormill/native/device.cuh for a C++ compiler: kernels run on the CPU, so that their logic is tested
// without a GPU. Every CUDA thread is a fiber of one host thread; a fiber runs until it waits for others. Barriers,
// shuffles, matrix loads and products are collective: the last lane to arrive computes for all. Asynchronous copies
// happen at once. Blocks run one after another, in order, so that a block may wait for those before it; those of a
// cluster run together. Shared memory is poisoned with NaN before each block. What would hang, leave a warp's lanes at different places or reach beyond shared
// memory is reported.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#define TENSORMILL_EMULATION 1
#define TENSORMILL_ARCH 900
#define DEVICE inline
// NAME_run returns what went wrong, or null.
#define KERNEL(NAME, THREADS, BLOCKS, ARGUMENTS)                                                                  \
    void NAME(const ARGUMENTS& arguments);                                                                        \
    extern "C" const char* NAME##_run(int grid_x, int grid_y, int threads, int shared, int cluster,               \
                                      const void* arguments) {                                                    \
        return emulation::run(grid_x, grid_y, threads, shared, cluster,                                           \
                              [](const void* p) { NAME(*static_cast<const ARGUMENTS*>(p)); }, arguments);         \
    }                                                                                                             \
    void NAME(const ARGUMENTS& arguments)

struct Half {};
struct BFloat16 {};
struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

namespace emulation {

constexpr uint32_t SHARED_BASE = 1024;  // so that address 0 is an error
constexpr int STACK_BYTES = 64 << 10;

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started, done;
};
struct Warp {
    int arrived;
    uint64_t generation;
    const void* tag;
    const void* in[32];
    void* out[32];
};
struct Barrier {
    int arrived;
    uint64_t generation;
};
struct State {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Barrier> barriers;  // 16 of a block
    std::vector<uint8_t> shared;    // of the cluster's blocks
    Barrier cluster_barrier;
    int grid_x, block_x, block_y, threads, cluster, current;  // the cluster's first block; its current thread
    int shared_size;                                          // of a block
    uint64_t progress;
    uint64_t clusters;  // that were started
    void (*kernel)(const void*);
    const void* arguments;
    jmp_buf scheduler;
    char error[256];
};
inline State state;

inline int block_rank() { return state.current / state.threads; }

inline void yield() {
    if (_setjmp(state.fibers[state.current].resume) == 0) _longjmp(state.scheduler, 1);
}

[[noreturn]] inline void fail(const char* what) {
    if (!state.error[0])
        snprintf(state.error, sizeof state.error, "block (%d, %d), thread %d: %s", state.block_x + block_rank(),
                 state.block_y, state.current % state.threads, what);
    for (;;) yield();
}

inline void enter() {
    state.kernel(state.arguments);
    state.fibers[state.current].done = true;
    state.progress++;
    for (;;) yield();
}

inline void run_cluster() {
    State& s = state;
    memset(s.shared.data(), 0xff, s.shared.size());
    s.barriers.assign(16 * s.cluster, Barrier{});
    s.cluster_barrier = Barrier{};
    s.warps.assign(s.cluster * s.threads / 32, Warp{});
    s.clusters++;
    for (Fiber& fiber : s.fibers) fiber.started = fiber.done = false;
    for (;;) {
        static uint64_t before;
        static bool alive;
        before = s.progress, alive = false;
        for (s.current = 0; s.current < s.cluster * s.threads; s.current++) {
            if (s.fibers[s.current].done) continue;
            alive = true;
            if (_setjmp(s.scheduler) == 0) {
                Fiber& fiber = s.fibers[s.current];
                if (fiber.started) _longjmp(fiber.resume, 1);
                fiber.started = true;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = STACK_BYTES;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, enter, 0);
                setcontext(&fiber.context);
            }
            if (s.error[0]) return;
        }
        if (!alive) return;
        if (before == s.progress) {
            snprintf(s.error, sizeof s.error, "block (%d, %d) hangs", s.block_x, s.block_y);
            return;
        }
    }
}

inline const char* run(int grid_x, int grid_y, int threads, int shared, int cluster, void (*kernel)(const void*),
                       const void* arguments) {
    State& s = state;
    s.error[0] = 0;
    s.grid_x = grid_x, s.threads = threads, s.cluster = cluster, s.shared_size = shared;
    s.kernel = kernel, s.arguments = arguments;
    if (threads % 32) return "the block is no whole number of warps";
    if (grid_x % cluster) return "the grid is no whole number of clusters";
    s.shared.resize((size_t)shared * cluster);
    while ((int)s.fibers.size() < threads * cluster) {
        s.fibers.emplace_back();
        s.fibers.back().stack.reset(new char[STACK_BYTES]);
    }
    for (s.block_y = 0; s.block_y < grid_y; s.block_y++)
        for (s.block_x = 0; s.block_x < grid_x; s.block_x += cluster) {
            run_cluster();
            if (s.error[0]) return s.error;
        }
    return nullptr;
}

// An address's upper byte is 0 for the block's own shared memory, 1 + rank for that of another block of the cluster.
constexpr int RANK_SHIFT = 24;

inline uint8_t* shared_bytes(uint32_t address, int bytes) {
    const int rank = address >> RANK_SHIFT ? (int)(address >> RANK_SHIFT) - 1 : block_rank();
    address &= (1u << RANK_SHIFT) - 1;
    if (address % (bytes < 16 ? bytes : 16)) fail("unaligned access to shared memory");  // wider ones are bulk copies
    if (address < SHARED_BASE || (int)(address + bytes) > (int)SHARED_BASE + state.shared_size || rank >= state.cluster)
        fail("outside shared memory");
    return state.shared.data() + (size_t)rank * state.shared_size + (address - SHARED_BASE);
}

// Waits for all lanes of the warp; the last computes from everybody's `in` everybody's `out`.
template <class In, class Out, class Compute>
void collective(const In& in, Out& out, Compute compute) {
    static const char tag = 0;  // one per place in the source
    Warp& warp = state.warps[state.current / 32];
    const int lane = state.current % 32;
    if (warp.arrived > 0 && warp.tag != &tag) fail("lanes of a warp meet in different instructions");
    warp.tag = &tag, warp.in[lane] = &in, warp.out[lane] = &out;
    if (++warp.arrived == 32) {
        compute(reinterpret_cast<const In* const*>(warp.in), reinterpret_cast<Out* const*>(warp.out));
        warp.arrived = 0, warp.generation++, state.progress++;
    } else {
        const uint64_t generation = warp.generation;
        while (warp.generation == generation) yield();
    }
}

inline void arrive(Barrier& barrier, int threads) {
    state.progress++;
    if (++barrier.arrived == threads) barrier.arrived = 0, barrier.generation++;
}
inline void wait(Barrier& barrier, int threads) {
    const uint64_t generation = barrier.generation;
    arrive(barrier, threads);
    while (barrier.generation == generation) yield();
}

// A barrier in shared memory.
struct Mbarrier {
    uint16_t arrivals, pending;
    int32_t bytes : 31;
    uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier has eight bytes");
inline Mbarrier& mbarrier(uint32_t address) { return *reinterpret_cast<Mbarrier*>(shared_bytes(address, 8)); }
inline void check_phase(Mbarrier& barrier) {
    state.progress++;
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.arrivals, barrier.phase ^= 1;
}

// float16 and bfloat16 from their number of mantissa bits and exponent bias.
template <int MANTISSA_BITS, int EXPONENT_BIAS>
struct Format {
    static float widen(uint32_t bits) {
        const uint32_t exponent = (bits & 0x7fff) >> MANTISSA_BITS, fraction = bits & ((1u << MANTISSA_BITS) - 1);
        float value;
        if (exponent == 2 * EXPONENT_BIAS + 1)
            value = fraction ? NAN : INFINITY;
        else if (exponent == 0)
            value = ldexpf((float)fraction, 1 - EXPONENT_BIAS - MANTISSA_BITS);
        else
            value = ldexpf((float)(fraction + (1u << MANTISSA_BITS)), (int)exponent - EXPONENT_BIAS - MANTISSA_BITS);
        return bits & 0x8000 ? -value : value;
    }
    static uint32_t round(double value) {
        const uint32_t sign = signbit(value) ? 0x8000 : 0, infinity = (2 * EXPONENT_BIAS + 1) << MANTISSA_BITS;
        const double magnitude = fabs(value);
        if (isnan(value)) return 0x7fff;
        if (magnitude < ldexp(1, 1 - EXPONENT_BIAS)) return sign | (uint32_t)nearbyint(ldexp(magnitude, EXPONENT_BIAS + MANTISSA_BITS - 1));
        if (magnitude >= ldexp(1, EXPONENT_BIAS + 1)) return sign | infinity;
        const int exponent = ilogb(magnitude);
        const uint32_t rounded = (uint32_t)nearbyint(ldexp(magnitude, MANTISSA_BITS - exponent));
        return sign | (((uint32_t)(exponent + EXPONENT_BIAS) << MANTISSA_BITS) + rounded - (1u << MANTISSA_BITS));
    }
};
template <class T>
struct FormatOf;
template <>
struct FormatOf<Half> : Format<10, 15> {};
template <>
struct FormatOf<BFloat16> : Format<7, 127> {};

template <class T>
uint32_t pair(double low, double high) {
    return FormatOf<T>::round(low) | FormatOf<T>::round(high) << 16;
}
template <class T>
float half_of(uint32_t a, int h) {
    return FormatOf<T>::widen(a >> (16 * h) & 0xffff);
}

}  // namespace emulation

DEVICE int thread_index() { return emulation::state.current % emulation::state.threads; }
DEVICE int lane_index() { return emulation::state.current % 32; }
DEVICE int warp_index() { return thread_index() / 32; }
DEVICE int block_index() { return emulation::state.block_x + emulation::block_rank(); }
DEVICE int block_index_y() { return emulation::state.block_y; }
DEVICE int grid_size() { return emulation::state.grid_x; }

namespace emulation {
inline Barrier& barrier(int id) { return state.barriers[16 * block_rank() + id]; }
}  // namespace emulation
DEVICE void synchronize() { emulation::wait(emulation::barrier(0), emulation::state.threads); }
DEVICE void barrier_sync(int id, int threads) { emulation::wait(emulation::barrier(id), threads); }
DEVICE void barrier_arrive(int id, int threads) { emulation::arrive(emulation::barrier(id), threads); }
DEVICE void synchronize_warp() {
    int none = 0;
    emulation::collective(none, none, [](const int* const*, int* const*) {});
}
template <class V>
DEVICE V shuffle_xor(V value, int mask) {
    struct In {
        V value;
        int mask;
    } in = {value, mask};
    V out;
    emulation::collective(in, out, [](const In* const* in, V* const* out) {
        for (int i = 0; i < 32; i++) *out[i] = in[i ^ in[i]->mask]->value;
    });
    return out;
}
template <class V>
DEVICE V shuffle(V value, int lane) {
    struct In {
        V value;
        int lane;
    } in = {value, lane};
    V out;
    emulation::collective(in, out, [](const In* const* in, V* const* out) {
        for (int i = 0; i < 32; i++) *out[i] = in[in[i]->lane & 31]->value;
    });
    return out;
}

template <int IMMEDIATE>
DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    if (IMMEDIATE & 0x01) d |= ~a & ~b & ~c;
    if (IMMEDIATE & 0x02) d |= ~a & ~b & c;
    if (IMMEDIATE & 0x04) d |= ~a & b & ~c;
    if (IMMEDIATE & 0x08) d |= ~a & b & c;
    if (IMMEDIATE & 0x10) d |= a & ~b & ~c;
    if (IMMEDIATE & 0x20) d |= a & ~b & c;
    if (IMMEDIATE & 0x40) d |= a & b & ~c;
    if (IMMEDIATE & 0x80) d |= a & b & c;
    return d;
}
constexpr int AND_OR = (0xf0 & 0xcc) | 0xaa;
constexpr int SELECT = (0xf0 & 0xcc) | (~0xf0 & 0xaa & 0xff);
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) d |= (uint32_t)(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return d;
}
DEVICE uint32_t max_pair(uint32_t a, uint32_t b) {
    const uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
    return (a >> 16 > b >> 16 ? a >> 16 : b >> 16) << 16 | low;
}
DEVICE int count_bits(uint32_t a) { return __builtin_popcount(a); }
DEVICE float bits_to_float(uint32_t a) {
    float d;
    memcpy(&d, &a, 4);
    return d;
}
DEVICE uint32_t float_to_bits(float a) {
    uint32_t d;
    memcpy(&d, &a, 4);
    return d;
}

template <class T>
DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    using emulation::half_of;
    return emulation::pair<T>((double)half_of<T>(a, 0) * half_of<T>(b, 0) + half_of<T>(c, 0),
                              (double)half_of<T>(a, 1) * half_of<T>(b, 1) + half_of<T>(c, 1));
}
template <class T>
DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
    return fma2<T>(a, b, 0x80008000u);
}
template <class T>
DEVICE uint32_t pack2(float low, float high) {
    return emulation::pair<T>(low, high);
}
template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b) {
    using emulation::half_of;
    return emulation::pair<T>((double)half_of<T>(a, 0) + half_of<T>(b, 0), (double)half_of<T>(a, 1) + half_of<T>(b, 1));
}
template <class T>
DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
    return add2<T>(a, b ^ 0x80008000u);
}
template <class T>
DEVICE float to_float(uint32_t a) {
    return emulation::half_of<T>(a, 0);
}

DEVICE uint32_t shared_memory() { return emulation::SHARED_BASE; }
template <class V>
DEVICE V emulated_load(uint32_t address) {
    V value;
    memcpy(&value, emulation::shared_bytes(address, sizeof(V)), sizeof(V));
    return value;
}
template <class V>
DEVICE void emulated_store(uint32_t address, V value) {
    memcpy(emulation::shared_bytes(address, sizeof(V)), &value, sizeof(V));
}
DEVICE uint32_t load_shared_half(uint32_t address) { return emulated_load<uint16_t>(address); }
DEVICE uint32_t load_shared(uint32_t address) { return emulated_load<uint32_t>(address); }
DEVICE Words2 load_shared2(uint32_t address) { return emulated_load<Words2>(address); }
DEVICE Words4 load_shared4(uint32_t address) { return emulated_load<Words4>(address); }
DEVICE void store_shared(uint32_t address, uint32_t value) { emulated_store(address, value); }
DEVICE void store_shared4(uint32_t address, Words4 value) { emulated_store(address, value); }

namespace emulation {
template <int COUNT, bool TRANSPOSED>
void load_matrices(uint32_t address, uint32_t (&d)[COUNT]) {
    collective(address, d, [](const uint32_t* const* in, uint32_t(*const* out)[COUNT]) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < COUNT; i++) {
                uint16_t pair[2];
                for (int h = 0; h < 2; h++) {
                    const int row = TRANSPOSED ? 2 * (lane % 4) + h : lane / 4;
                    const int column = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + h;
                    memcpy(&pair[h], shared_bytes(*in[8 * i + row], 16) + 2 * column, 2);
                }
                (*out[lane])[i] = pair[0] | (uint32_t)pair[1] << 16;
            }
    });
}
}  // namespace emulation
DEVICE void load_matrices4(uint32_t address, uint32_t (&d)[4]) { emulation::load_matrices<4, false>(address, d); }

DEVICE uint32_t load_constant(const uint32_t* address) { return *address; }
DEVICE Words4 load_constant4(const void* address) { return *static_cast<const Words4*>(address); }
DEVICE Words4 load_relaxed4(const void* address) { return *static_cast<const Words4*>(address); }
DEVICE void store_relaxed4(void* address, Words4 value) { *static_cast<Words4*>(address) = value; }
DEVICE Words2 load_relaxed2(const void* address) { return *static_cast<const Words2*>(address); }
DEVICE uint32_t add_ordered(uint32_t* address, uint32_t value) {
    const uint32_t before = *address;
    *address += value;
    return before;
}
DEVICE void spin() { emulation::yield(); }

DEVICE void copy_async16(uint32_t shared, const void* global, int bytes = 16) {
    uint8_t* to = emulation::shared_bytes(shared, 16);
    if ((uintptr_t)global % 16 && bytes) emulation::fail("unaligned copy");
    memset(to, 0, 16);
    memcpy(to, global, bytes);
}
DEVICE void copy_async4(uint32_t shared, const void* global, int bytes = 4) {
    emulated_store<uint32_t>(shared, bytes ? *static_cast<const uint32_t*>(global) : 0);
}
DEVICE void copy_async_commit() {}
template <int PENDING>
DEVICE void copy_async_wait() {}
DEVICE void mbarrier_arrive(uint32_t barrier) {
    emulation::Mbarrier& b = emulation::mbarrier(barrier);
    if (b.pending == 0) emulation::fail("more arrivals at a barrier than it was made for");
    b.pending--;
    emulation::check_phase(b);
}
DEVICE void copy_async_arrive(uint32_t barrier) { mbarrier_arrive(barrier); }

DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
    emulation::Mbarrier& b = emulation::mbarrier(barrier);
    b.arrivals = b.pending = arrivals, b.bytes = 0, b.phase = 0;
}
DEVICE void mbarrier_init_fence() {}
DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    emulation::mbarrier(barrier).bytes += bytes;
    mbarrier_arrive(barrier);
}
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (emulation::mbarrier(barrier).phase == parity) emulation::yield();
}

DEVICE uint64_t policy_evict_first() { return 0; }
DEVICE void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier, uint64_t = 0) {
    if (bytes % 16 || (uintptr_t)global % 16 || shared % 16) emulation::fail("bulk copy that is no multiple of 16");
    if (bytes == 0) return;
    memcpy(emulation::shared_bytes(shared, bytes), global, bytes);
    emulation::Mbarrier& b = emulation::mbarrier(barrier);
    b.bytes -= bytes;
    emulation::check_phase(b);
}
DEVICE void fence_async_shared() {}
DEVICE void wait_for_previous_kernel() {}
DEVICE void allow_next_kernel() {}
template <int REGISTERS>
DEVICE void raise_registers() {}
template <int REGISTERS>
DEVICE void lower_registers() {}

namespace emulation {
template <class D>
struct Operands {
    D* d;
    const uint32_t *a, *b;
};
}  // namespace emulation
template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using emulation::half_of;
    emulation::Operands<float> in = {d, a, b};
    emulation::collective(in, in, [](const emulation::Operands<float>* const* in, emulation::Operands<float>* const*) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int h = 0; h < 2; h++) {
                const int g = lane / 4, t = lane % 4;
                for (int r = 0; r < 4; r++)
                    left[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + h] = half_of<T>(in[lane]->a[r], h);
                for (int r = 0; r < 2; r++) right[2 * t + 8 * r + h][g] = half_of<T>(in[lane]->b[r], h);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
                for (int k = 0; k < 16; k++) in[lane]->d[i] += left[row][k] * right[k][column];
            }
    });
}
DEVICE void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Operands<int> in = {d, a, b};
    emulation::collective(in, in, [](const emulation::Operands<int>* const* in, emulation::Operands<int>* const*) {
        int left[16][32], right[32][8];
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 4; e++) {
                const int g = lane / 4, t = lane % 4;
                for (int r = 0; r < 4; r++)
                    left[g + 8 * (r & 1)][4 * t + 16 * (r >> 1) + e] = (int8_t)(in[lane]->a[r] >> (8 * e));
                for (int r = 0; r < 2; r++) right[4 * t + 16 * r + e][g] = (int8_t)(in[lane]->b[r] >> (8 * e));
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
                for (int k = 0; k < 32; k++) in[lane]->d[i] += left[row][k] * right[k][column];
            }
    });
}

DEVICE uint32_t load_constant_byte(const uint8_t* address) { return *address; }
DEVICE uint32_t load_constant_half(const uint16_t* address) { return *address; }
DEVICE Words2 load_constant2(const void* address) { return *static_cast<const Words2*>(address); }
DEVICE void prefetch_line(const void*) {}
template <class T>
DEVICE void keep(T*&) {}
DEVICE void keep(uint32_t&) {}
DEVICE bool any_lane(bool condition) {
    bool out;
    emulation::collective(condition, out, [](const bool* const* in, bool* const* out) {
        bool any = false;
        for (int i = 0; i < 32; i++) any |= *in[i];
        for (int i = 0; i < 32; i++) *out[i] = any;
    });
    return out;
}
DEVICE uint32_t transpose_matrix(uint32_t a) {
    uint32_t d;
    emulation::collective(a, d, [](const uint32_t* const* in, uint32_t* const* out) {
        for (int lane = 0; lane < 32; lane++) {
            *out[lane] = 0;
            for (int h = 0; h < 2; h++) {
                const int row = 2 * (lane % 4) + h, column = lane / 4;
                *out[lane] |= (*in[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff) << (16 * h);
            }
        }
    });
    return d;
}
DEVICE float fast_exp2(float a) { return exp2f(a); }
DEVICE float fast_log2(float a) { return log2f(a); }
