// The functions of tensormill/native/bits.cuh for a C++ compiler; see device.cuh beside this file.
#pragma once

#include "hopper.cuh"

DEVICE void mma_bits(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Operands<int> in = {d, a, b};
    emulation::collective(in, in, [](const emulation::Operands<int>* const* in, emulation::Operands<int>* const*) {
        uint32_t left[16][8], right[8][8];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++) left[g + 8 * (r & 1)][t + 4 * (r >> 1)] = in[lane]->a[r];
            for (int r = 0; r < 2; r++) right[g][t + 4 * r] = in[lane]->b[r];
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < 8; k++)
                    in[lane]->d[i] += count_bits(left[lane / 4 + 8 * (i >> 1)][k] & right[2 * (lane % 4) + (i & 1)][k]);
    });
}

namespace emulation {
// Word k of a row of 256 bits of an operand in 128-byte swizzle.
inline uint32_t operand_word(uint64_t descriptor, int row, int k) {
    const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t at = start + row / 8 * stride + row % 8 * 128 + 4 * k;
    return emulated_load<uint32_t>(at ^ ((at >> 7 & 7) << 4));
}
}  // namespace emulation

template <int COLUMNS>
DEVICE void wgmma_bits(uint32_t (&d)[COLUMNS / 2], uint64_t a, uint64_t b) {
    if (a >> 62 != 1 || b >> 62 != 1) emulation::fail("a descriptor without the 128-byte swizzle");
    emulation::meet(d, [=](emulation::Warpgroup& group) {
        std::vector<uint32_t*> all;
        for (const void* sums : group.operands) all.push_back(static_cast<uint32_t*>(const_cast<void*>(sums)));
        group.open.push_back([=] {
            static uint32_t left[64][8], right[COLUMNS][8];
            for (int k = 0; k < 8; k++) {
                for (int m = 0; m < 64; m++) left[m][k] = emulation::operand_word(a, m, k);
                for (int n = 0; n < COLUMNS; n++) right[n][k] = emulation::operand_word(b, n, k);
            }
            for (int t = 0; t < 128; t++)
                for (int i = 0; i < COLUMNS / 2; i++) {
                    const uint32_t* x = left[t / 32 * 16 + t % 32 / 4 + 8 * (i >> 1 & 1)];
                    const uint32_t* y = right[i / 4 * 8 + t % 4 * 2 + (i & 1)];
                    for (int k = 0; k < 8; k++) all[t][i] += count_bits(x[k] & y[k]);
                }
        });
    });
}

template <int COUNT>
DEVICE void wgmma_settle(uint32_t (&)[COUNT]) {}

DEVICE void add_shared(uint32_t address, uint32_t value) {
    emulated_store(address, emulated_load<uint32_t>(address) + value);
}
DEVICE void store_global2(void* address, Words2 value) {
    if ((uintptr_t)address % 8) emulation::fail("unaligned store");
    memcpy(address, &value, 8);
}
DEVICE void store_global2_if(bool condition, void* address, Words2 value) {
    if (!condition) return;
    if ((uintptr_t)address % 8) emulation::fail("unaligned store");
    memcpy(address, &value, 8);
}
DEVICE Words4 load_streamed4(const void* address) { return *static_cast<const Words4*>(address); }
