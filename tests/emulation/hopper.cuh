// The functions of tensormill/native/hopper.cuh for a C++ compiler; see device.cuh beside this file.
#pragma once

#include "device.cuh"

// What the host's test describes instead of a CUtensorMap: a matrix and the box of one copy, 128-byte swizzle.
struct alignas(64) TensorMap {
    const uint8_t* base;
    int64_t rows, row_bytes;
    int box_rows, box_bytes, element_bytes;
    uint8_t padding[92];
};

namespace emulation {
// Where the 128-byte swizzle puts a byte.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }
}  // namespace emulation

DEVICE void prefetch_tensor_map(const void*) {}
DEVICE void copy_tensor(uint32_t shared, const void* map, int x, int y, uint32_t barrier) {
    const TensorMap& m = *static_cast<const TensorMap*>(map);
    if (shared % 1024) emulation::fail("a swizzled box starts at a multiple of 1024 bytes");
    for (int row = 0; row < m.box_rows; row++)
        for (int at = 0; at < m.box_bytes; at += 4) {
            const int64_t from = int64_t(x) * m.element_bytes + at;
            uint32_t value = 0;
            if (y + row >= 0 && y + row < m.rows && from < m.row_bytes) memcpy(&value, m.base + (y + row) * m.row_bytes + from, 4);
            emulated_store(emulation::swizzled(shared + 128 * row + at), value);
        }
    emulation::Mbarrier& b = emulation::mbarrier(barrier);
    b.bytes -= m.box_rows * m.box_bytes;
    emulation::check_phase(b);
}

// Blocks run one after another: kernels are emulated without clusters.
DEVICE uint32_t map_shared(uint32_t address, uint32_t) { return address; }
DEVICE uint32_t cluster_rank() { return 0; }
DEVICE void cluster_sync() { emulation::fail("clusters are not emulated"); }
DEVICE void copy_tensor_multicast(uint32_t, const TensorMap*, int, int, uint32_t, uint16_t) { cluster_sync(); }

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() {}
template <int PENDING>
DEVICE void wgmma_wait() {}
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

template <bool CONDITION, class A, class B>
struct ChooseType {
    using type = A;
};
template <class A, class B>
struct ChooseType<false, A, B> {
    using type = B;
};
template <bool CONDITION, class A, class B>
using Choose = typename ChooseType<CONDITION, A, B>::type;
