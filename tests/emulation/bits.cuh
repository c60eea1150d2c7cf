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
struct BitOperands {
    uint32_t* d;
    uint64_t a, b;
};
// Word k of a row of 256 bits of a K-major operand in 128-byte swizzle.
inline uint32_t operand_word(uint64_t descriptor, int row, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1) fail("the descriptor is not one of a 128-byte swizzle");
    return emulated_load<uint32_t>(swizzled(start + row / 8 * stride + row % 8 * 128 + 4 * k));
}
}  // namespace emulation

template <int COLUMNS>
DEVICE void wgmma_bits(uint32_t (&d)[COLUMNS / 2], uint64_t a, uint64_t b) {
    emulation::BitOperands in = {d, a, b};
    emulation::collective(in, in, [](const emulation::BitOperands* const* in, emulation::BitOperands* const*) {
        const int first = emulation::state.current / 32 % 4 * 16;
        uint32_t left[16][8], right[COLUMNS][8];
        for (int k = 0; k < 8; k++) {
            for (int r = 0; r < 16; r++) left[r][k] = emulation::operand_word(in[0]->a, first + r, k);
            for (int c = 0; c < COLUMNS; c++) right[c][k] = emulation::operand_word(in[0]->b, c, k);
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < COLUMNS / 2; i++) {
                const int row = lane / 4 + 8 * (i >> 1 & 1), column = 8 * (i / 4) + 2 * (lane % 4) + (i & 1);
                for (int k = 0; k < 8; k++) in[lane]->d[i] += count_bits(left[row][k] & right[column][k]);
            }
    });
}

DEVICE void add_shared(uint32_t address, uint32_t value) {
    emulated_store(address, emulated_load<uint32_t>(address) + value);
}
template <int COUNT>
DEVICE void wgmma_settle(uint32_t (&)[COUNT]) {}
DEVICE void store_global2_if(bool condition, void* address, Words2 value) {
    if (!condition) return;
    if ((uintptr_t)address % 8) emulation::fail("unaligned store");
    memcpy(address, &value, 8);
}
DEVICE Words4 load_streamed4(const void* address) { return *static_cast<const Words4*>(address); }
DEVICE int min(int a, int b) { return a < b ? a : b; }
