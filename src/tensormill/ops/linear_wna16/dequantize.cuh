// Codes of a lane in the tiled layout (ops/tiles.py describes it) become exact 16-bit integers q - z.
//
// One logical operation puts a code into the mantissa of a number of known exponent: 1024 + 2^p q in float16 for a code
// at bit p of a half word, 128 + 2^p q in bfloat16. One subtraction (p = 0) or one multiply-add by 2^-p then gives
// q - z without rounding. Fields that don't fit a mantissa where they stand share a shift of their word.
#pragma once

#include "device.cuh"

template <class T>
struct Format;
template <>
struct Format<Half> {
    static constexpr int mantissa = 10, bias = 15;
};
template <>
struct Format<BFloat16> {
    static constexpr int mantissa = 7, bias = 127;
};

// An integer with at most mantissa + 1 significant bits, twice.
template <class T>
constexpr uint32_t pair_of(int value) {
    const uint32_t magnitude = value < 0 ? -value : value;
    int exponent = 0;
    while ((magnitude >> (exponent + 1)) != 0) exponent++;
    const uint32_t fraction = ((magnitude << Format<T>::mantissa) >> exponent) & ((1u << Format<T>::mantissa) - 1);
    const uint32_t biased = uint32_t(exponent + Format<T>::bias) << Format<T>::mantissa;
    return ((value < 0 ? 0x8000u : 0u) | (magnitude != 0 ? biased | fraction : 0u)) * 0x00010001u;
}
// 2^-p, twice.
template <class T>
constexpr uint32_t pair_of_power(int p) {
    return (uint32_t(Format<T>::bias - p) << Format<T>::mantissa) * 0x00010001u;
}

// How codes of BITS bits lie in a lane's words, seen as 16 pairs of half words.
template <int BITS, class T>
struct Fields {
    static constexpr int per_word = 16 / BITS;              // whole fields of a half word
    static constexpr int spare = 16 - per_word * BITS;      // bits left over, which make up `spare` more fields
    static constexpr int one = 1 << Format<T>::mantissa;    // the number whose mantissa's unit is 1
    static constexpr int fitting = Format<T>::mantissa / BITS < 1 ? 1 : Format<T>::mantissa / BITS;
    static constexpr int in_place = fitting > 4 ? 4 : fitting < per_word ? fitting : per_word;  // fields a shift
    static constexpr uint32_t mask = ((1u << BITS) - 1) * 0x00010001u;
    static constexpr bool wide = BITS > Format<T>::mantissa;  // 8 bits in bfloat16: as 7 bits and one
};

// What is subtracted, per position of a field: one + z where p = 0, and -(one * 2^-p + z) for the others.
template <int BITS, class T>
struct ZeroPoint {
    using F = Fields<BITS, T>;
    uint32_t offset[F::wide ? 2 : F::in_place];

    // z = 2^(BITS - 1), of weights without zero points.
    DEVICE ZeroPoint() {
        if constexpr (F::wide) {
            offset[0] = pair_of<T>(255);
            offset[1] = pair_of<T>(129);
        } else {
            offset[0] = pair_of<T>(F::one + (1 << (BITS - 1)));
#pragma unroll
            for (int i = 1; i < F::in_place; i++) offset[i] = pair_of<T>(-((F::one >> (i * BITS)) + (1 << (BITS - 1))));
        }
    }

    // z is that byte of `word`.
    DEVICE ZeroPoint(uint32_t word, int byte) {
        if constexpr (F::wide) {
            const uint32_t z = word >> (8 * byte) & 255, low = z < 127 ? z : 127;
            offset[0] = low * 0x00010001u + pair_of<T>(F::one);
            offset[1] = (z - low) * 0x00010001u + pair_of<T>(F::one);
        } else {
            offset[0] = permute_bytes(word, pair_of<T>(F::one), 0x5050 + 0x0101 * byte);
#pragma unroll
            for (int i = 1; i < F::in_place; i++)
                offset[i] = sub2<T>(pair_of<T>(F::one - (F::one >> (i * BITS))), offset[0]);
        }
    }
};

// q - z for a pair of codes at bits 0 and 16 + 0 of `word`, garbage above, moved up by the position's index.
template <int BITS, class T>
DEVICE uint32_t dequantize_pair(uint32_t word, int position, const ZeroPoint<BITS, T>& zero) {
    using F = Fields<BITS, T>;
    constexpr uint32_t one = pair_of<T>(F::one);
    if constexpr (F::wide) {
        const uint32_t low = sub2<T>(lop3<AND_OR>(word, 0x007f007fu, one), zero.offset[0]);
        return add2<T>(low, sub2<T>(lop3<AND_OR>(word, 0x00800080u, one), zero.offset[1]));
    } else {
        const uint32_t number = lop3<AND_OR>(word, F::mask << (position * BITS), one);
        if (position == 0) return sub2<T>(number, zero.offset[0]);
        return fma2<T>(number, pair_of_power<T>(position * BITS), zero.offset[position]);
    }
}

// The fragment of A (16 rows x 16 columns) of step 0 to 3: registers 0 and 2 are row lane / 4, 1 and 3 row lane / 4 + 8.
// `step` must be known at compile time (an unrolled loop).
template <int BITS, class T>
DEVICE void dequantize(const uint32_t (&words)[BITS], int step, const ZeroPoint<BITS, T>& low_row,
                       const ZeroPoint<BITS, T>& high_row, uint32_t (&a)[4]) {
    using F = Fields<BITS, T>;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const ZeroPoint<BITS, T>& zero = r & 1 ? high_row : low_row;
        const int pair = 4 * step + r;
        if (pair < BITS * F::per_word) {
            const int field = pair % F::per_word, shift = field / F::in_place * F::in_place * BITS;
            a[r] = dequantize_pair<BITS, T>(words[pair / F::per_word] >> shift, field % F::in_place, zero);
        } else if constexpr (F::spare > 0) {
            // A code made up of the spare bits of several words, in order.
            uint32_t code = 0;
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) {
                const int index = (pair - BITS * F::per_word) * BITS + bit, offset = index % F::spare;
                if (bit > 0 && offset > 0) continue;  // came with the bit before
                const int from = BITS * F::per_word + offset;
                const uint32_t word = words[index / F::spare];
                const uint32_t here = from >= bit ? word >> (from - bit) : word << (bit - from);
                const int count = F::spare - offset < BITS - bit ? F::spare - offset : BITS - bit;
                code = lop3<AND_OR>(here, (((1u << count) - 1) << bit) * 0x00010001u, code);
            }
            a[r] = dequantize_pair<BITS, T>(code, 0, zero);
        }
    }
}

// A lane's words of the tile at `address` in shared memory: as many loads of four words as there are, then two, then one.
template <int BITS>
DEVICE void load_tile(uint32_t address, int lane, uint32_t (&words)[BITS]) {
    constexpr int fours = BITS / 4 * 4, twos = BITS / 2 * 2;
#pragma unroll
    for (int i = 0; i < fours; i += 4) {
        const Words4 four = load_shared4(address + 4 * (32 * i + 4 * lane));
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
    if constexpr (twos > fours) {
        const Words2 two = load_shared2(address + 4 * (32 * fours + 2 * lane));
        words[fours] = two.x, words[fours + 1] = two.y;
    }
    if constexpr (BITS > twos) words[twos] = load_shared(address + 4 * (32 * twos + lane));
}
