// Codes of a lane in the tiled layout of kind "i8" (../tiles.py) become bytes (q - 2^(BITS-1)) 2^(8-BITS):
// the code at the top of its byte, with the top bit inverted. One shift and one logical operation do it for a field
// of four codes. The power of two belongs into the scale.
#pragma once

#include "device.cuh"

constexpr int AND_XOR = (0xf0 & 0xcc) ^ 0xaa;  // (a & b) ^ c

// The fragment of A (16 rows x 32 columns) of step 0 or 1, which must be known at compile time (an unrolled loop).
template <int BITS>
DEVICE void dequantize_bytes(const uint32_t (&words)[BITS], int step, uint32_t (&a)[4]) {
    constexpr int per_word = 8 / BITS, spare = 8 - per_word * BITS, top = 8 - BITS;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int field = 4 * step + r;
        uint32_t code = 0;  // at the top of the bytes, garbage below
        if (field < BITS * per_word) {
            const int from = field % per_word * BITS;
            code = from > top ? words[field / per_word] >> (from - top) : words[field / per_word] << (top - from);
        } else if constexpr (spare > 0) {
            // Made up of the spare bits of several words, in order.
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) {
                const int index = (field - BITS * per_word) * BITS + bit, offset = index % spare;
                if (bit > 0 && offset > 0) continue;  // came with the bit before
                const int from = BITS * per_word + offset, to = top + bit;
                const uint32_t word = words[index / spare];
                const uint32_t here = from >= to ? word >> (from - to) : word << (to - from);
                const int count = spare - offset < BITS - bit ? spare - offset : BITS - bit;
                code = lop3<AND_OR>(here, (((1u << count) - 1) << to) * 0x01010101u, code);
            }
        }
        a[r] = lop3<AND_XOR>(code, (((1u << BITS) - 1) << top) * 0x01010101u, 0x80808080u);
    }
}

// Four bytes of dequantize_bytes, v 2^(8-BITS) with |v| <= 16, as e4m3 numbers v 2^-9: up to there an e4m3's byte below its
// sign is |v| itself.
template <int BITS>
DEVICE uint32_t to_e4m3(uint32_t bytes) {
    constexpr uint32_t each = 0x01010101u;
    const uint32_t negative = bytes >> 7 & each;
    // v below its sign, with all bits inverted where it is negative: |v| or |v| - 1.
    const uint32_t value = lop3<AND_XOR>(bytes >> (8 - BITS), ((1u << (BITS - 1)) - 1) * each, negative * ((1u << (BITS - 1)) - 1));
    return value + negative * 0x81u;
}
