// Codes of a lane in the tiled layout for 8-bit activations (kind "i8" in ../linear_wna16/tiles.py) become bytes.
//
// A code is stored as the two's complement of q - 2^(BITS-1) and is put at the top of its byte, which gives
// (q - 2^(BITS-1)) 2^(8-BITS): at most two logical operations for each plane of 4, 2 and 1 bits (8 bits are whole), on
// four codes at a time. The power of two belongs into the scale.
#pragma once

#include "device.cuh"

// Adds to `a` the FIELD bits of register `index` (0 to 7) of a tile, whose top bit belongs at TOP of the bytes.
template <int FIELD, int TOP>
DEVICE void add_field(const uint32_t* plane, int index, uint32_t& a) {
    constexpr int count = 8 / FIELD, place = TOP + 1 - FIELD;
    constexpr uint32_t mask = ((1u << FIELD) - 1) * (0x01010101u << place);
    const int from = index % count * FIELD;
    const uint32_t word = from > place ? plane[index / count] >> (from - place) : plane[index / count] << (place - from);
    a = TOP == 7 ? word & mask : lop3<AND_OR>(word, mask, a);
}

// The fragment of A (16 rows x 32 columns) of step 0 or 1, which must be known at compile time (an unrolled loop).
template <int BITS>
DEVICE void dequantize_bytes(const uint32_t (&words)[BITS], int step, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int index = 4 * step + r;
        if constexpr (BITS == 8) a[r] = words[index];
        constexpr int fours = BITS & 4, twos = BITS & 2, rest = BITS & 7;
        if constexpr (fours != 0) add_field<4, 7>(words, index, a[r]);
        if constexpr (twos != 0) add_field<2, 7 - fours>(words + fours, index, a[r]);
        if constexpr ((rest & 1) != 0) add_field<1, 7 - fours - twos>(words + fours + twos, index, a[r]);
    }
}
