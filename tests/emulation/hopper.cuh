// The functions of tensormill/native/hopper.cuh for a C++ compiler. Products read their operands as late as they may,
// when they are waited for, while copies arrive at once: what overwrites an operand too early gives a wrong result.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>

#include "device.cuh"

using std::max;
using std::min;

// What tensor_map in kernels.py writes: address, columns, rows, bytes of a row, of an element; columns and rows of a box.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) { return address | (rank + 1) << emulation::RANK_SHIFT; }
DEVICE uint32_t cluster_rank() { return emulation::block_rank(); }
DEVICE void cluster_sync() {
    emulation::wait(emulation::state.cluster_barrier, emulation::state.cluster * emulation::state.threads);
}
DEVICE void cluster_mbarrier_arrive(uint32_t barrier) { mbarrier_arrive(barrier); }
DEVICE Words2 cluster_load2(uint32_t address) { return emulated_load<Words2>(address); }

namespace emulation {
// Calls f(element in shared memory, element of the tensor or null) for a box of rows of 128 bytes, swizzled.
template <class F>
void each_element(const TensorMap* map, int x, int y, uint32_t shared, F f) {
    const auto [address, columns, rows, pitch, size, box_columns, box_rows] =
        *reinterpret_cast<const uint64_t(*)[7]>(map->words);
    if (box_columns * size != 128 || shared % 1024) fail("a box that is not of rows of 128 bytes at a multiple of 1024");
    for (uint64_t r = 0; r < box_rows; r++)
        for (uint64_t c = 0; c < box_columns; c++) {
            const uint32_t at = shared + r * 128 + c * size;
            const bool inside = y + r < rows && x + c < columns;
            f(shared_bytes(at ^ ((at >> 7 & 7) << 4), size),
              inside ? reinterpret_cast<uint8_t*>(address + (y + r) * pitch + (x + c) * size) : nullptr, size);
        }
}
}  // namespace emulation

DEVICE void prefetch_tensor_map(const TensorMap*) {}
DEVICE void copy_tensor(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier) {
    emulation::each_element(map, x, y, shared, [](uint8_t* to, const uint8_t* from, int size) {
        from ? memcpy(to, from, size) : memset(to, 0, size);
    });
    emulation::Mbarrier& b = emulation::mbarrier(barrier);
    b.bytes -= 128 * map->words[6];
    emulation::check_phase(b);
}
DEVICE void copy_tensor_multicast(uint32_t shared, const TensorMap* map, int x, int y, uint32_t barrier, int blocks) {
    for (int rank = 0; rank < emulation::state.cluster; rank++)
        if (blocks >> rank & 1) copy_tensor(map_shared(shared, rank), map, x, y, map_shared(barrier, rank));
}
DEVICE void prefetch_tensor(const TensorMap*, int, int) {}
DEVICE void store_tensor(const TensorMap* map, int x, int y, uint32_t shared) {
    emulation::each_element(map, x, y, shared, [](const uint8_t* from, uint8_t* to, int size) {
        if (to) memcpy(to, from, size);
    });
}
DEVICE void store_tensor_commit() {}
DEVICE void store_tensor_wait() {}

DEVICE void store_matrices4(uint32_t address, const uint32_t (&a)[4]) {
    struct In {
        uint32_t address;
        const uint32_t* values;
    } in = {address, a};
    emulation::collective(in, in, [](const In* const* in, In* const*) {
        for (int i = 0; i < 4; i++)
            for (int lane = 0; lane < 32; lane++)
                memcpy(emulation::shared_bytes(in[8 * i + lane / 4]->address, 16) + 4 * (lane % 4), &in[lane]->values[i], 4);
    });
}
DEVICE void store_matrices4_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    struct In {
        uint32_t address, values[4];
    } in = {address, {a, b, c, d}};
    emulation::collective(in, in, [](const In* const* in, In* const*) {
        for (int i = 0; i < 4; i++)
            for (int row = 0; row < 8; row++)
                for (int column = 0; column < 8; column++) {
                    const uint16_t value = in[4 * column + row / 2]->values[i] >> (16 * (row % 2));
                    memcpy(emulation::shared_bytes(in[8 * i + row]->address, 16) + 2 * column, &value, 2);
                }
    });
}

DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | (uint32_t(descriptor) + bytes / 16);
}

enum class Wgmma { f16, bf16, s8, e4m3 };

namespace emulation {
// A warpgroup's products: of the open group, and of the groups that were committed.
struct Warpgroup {
    uint64_t cluster;
    int arrived;
    uint64_t generation;
    const void* operands[128];
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> committed;
};
inline std::vector<Warpgroup> warpgroups;

// Waits for all threads of the warpgroup; the last computes.
template <class Compute>
void meet(const void* operands, Compute compute) {
    if (warpgroups.size() < state.fibers.size() / 128) warpgroups.resize(state.fibers.size() / 128);
    Warpgroup& group = warpgroups[state.current / 128];
    if (group.cluster != state.clusters) group = Warpgroup{state.clusters};
    group.operands[state.current % 128] = operands;
    if (++group.arrived == 128) {
        compute(group);
        group.arrived = 0, group.generation++, state.progress++;
    } else {
        const uint64_t generation = group.generation;
        while (group.generation == generation) yield();
    }
}

template <Wgmma KIND>
float wgmma_element(const uint8_t* bytes) {
    if (KIND == Wgmma::s8) return *reinterpret_cast<const int8_t*>(bytes);
    if (KIND == Wgmma::e4m3) {
        const int exponent = *bytes >> 3 & 15, fraction = *bytes & 7;
        const float value = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
        return (*bytes & 127) == 127 ? NAN : *bytes & 128 ? -value : value;
    }
    const uint32_t bits = bytes[0] | bytes[1] << 8;
    return KIND == Wgmma::bf16 ? FormatOf<BFloat16>::widen(bits) : FormatOf<Half>::widen(bits);
}
}  // namespace emulation

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {
    emulation::meet(nullptr, [](emulation::Warpgroup& group) {
        group.committed.push_back(std::move(group.open));
        group.open.clear();
    });
}
template <int PENDING>
DEVICE void wgmma_wait() {
    emulation::meet(nullptr, [](emulation::Warpgroup& group) {
        for (; group.committed.size() > PENDING; group.committed.pop_front())
            for (auto& product : group.committed.front()) product();
    });
}

template <int COUNT>
DEVICE void wgmma_settle(float (&)[COUNT]) {}
template <int COUNT>
DEVICE void wgmma_settle(int (&)[COUNT]) {}

namespace emulation {
inline uint32_t descriptor_field(uint64_t b, int bit) { return (b >> bit & 0x3fff) << 4; }
// Element k of row n of an operand whose rows are contiguous along K, before the swizzle.
inline uint32_t place_in_rows(uint64_t b, int n, int k, int size) {
    return descriptor_field(b, 0) + n / 8 * descriptor_field(b, 32) + n % 8 * 128 + k * size;
}
// The same where it is contiguous along n.
inline uint32_t place_in_columns(uint64_t b, int n, int k, int size) {
    return descriptor_field(b, 0) + n / 64 * descriptor_field(b, 16) + k / 8 * descriptor_field(b, 32) + k % 8 * 128 +
           n % 64 * size;
}
// A is in registers, or in shared memory where `registers` is null. PLACE(descriptor, n, k, size) is where element k of
// B's column n lies, before the swizzle.
template <Wgmma KIND, int COLUMNS, class D, class Place>
void multiply(D (&d)[COLUMNS / 2], const uint32_t* registers, uint64_t a, uint64_t b, bool accumulate, Place place) {
    struct Operands {
        D* d;
        const uint32_t* a;
    } operands = {d, registers};
    constexpr int SIZE = KIND == Wgmma::s8 || KIND == Wgmma::e4m3 ? 1 : 2, K = 32 / SIZE, EACH = 4 / SIZE;
    if (b >> 62 != 1 || (!registers && a >> 62 != 1)) fail("a descriptor without the 128-byte swizzle");
    emulation::meet(&operands, [=](emulation::Warpgroup& group) {
        std::vector<Operands> all;
        for (const void* operands : group.operands) all.push_back(*static_cast<const Operands*>(operands));
        group.open.push_back([=] {
            static float left[64][K], right[COLUMNS][K];
            const auto element = [=](uint32_t at) {
                return wgmma_element<KIND>(shared_bytes(at ^ ((at >> 7 & 7) << 4), SIZE));
            };
            for (int t = 0; registers && t < 128; t++)
                for (int r = 0; r < 4; r++)
                    for (int e = 0; e < EACH; e++)
                        left[t / 32 * 16 + t % 32 / 4 + 8 * (r & 1)][(r >> 1) * (K / 2) + t % 4 * EACH + e] =
                            wgmma_element<KIND>(reinterpret_cast<const uint8_t*>(&all[t].a[r]) + SIZE * e);
            for (int m = 0; !registers && m < 64; m++)
                for (int k = 0; k < K; k++) left[m][k] = element(place_in_rows(a, m, k, SIZE));
            for (int n = 0; n < COLUMNS; n++)
                for (int k = 0; k < K; k++) right[n][k] = element(place(b, n, k, SIZE));
            for (int t = 0; t < 128; t++)
                for (int i = 0; i < COLUMNS / 2; i++) {
                    const float* x = left[t / 32 * 16 + t % 32 / 4 + 8 * (i >> 1 & 1)];
                    const float* y = right[i / 4 * 8 + t % 4 * 2 + (i & 1)];
                    float sum = 0;  // of int8, exact
                    for (int k = 0; k < K; k++) sum += x[k] * y[k];
                    all[t].d[i] = (accumulate ? all[t].d[i] : D(0)) + D(sum);
                }
        });
    });
}
}  // namespace emulation

template <Wgmma KIND, int COLUMNS, class D>
DEVICE void wgmma(D (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulation::multiply<KIND, COLUMNS>(d, a, 0, b, accumulate, emulation::place_in_rows);
}
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_shared(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::multiply<KIND, COLUMNS>(d, nullptr, a, b, accumulate, emulation::place_in_rows);
}

DEVICE uint64_t wgmma_descriptor_transposed(uint32_t address, uint32_t stride) {
    return wgmma_descriptor(address) & ~(uint64_t(0x3FFF) << 16) | uint64_t(stride >> 4) << 16;
}
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_transposed(float (&d)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulation::multiply<KIND, COLUMNS>(d, a, 0, b, accumulate, emulation::place_in_columns);
}
template <Wgmma KIND, int COLUMNS>
DEVICE void wgmma_shared_transposed(float (&d)[COLUMNS / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::multiply<KIND, COLUMNS>(d, nullptr, a, b, accumulate, emulation::place_in_columns);
}
