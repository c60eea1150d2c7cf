// Decode attention over quantized caches: the first of two kernels (the other is merge.cu).
//
// The work is split as there: one line of tiles of all (sequence, key-value head) pairs, an equal share of it for each
// block, and partial results in slot block + pair. Within a block every warp takes SUB * 16 tokens of a tile, with a
// softmax of its own, so that warps never wait for each other before a pair ends.
//
// Everything stays in registers. A warp computes S^T = K Q^T, tokens by query rows: the packed codes of a row of K,
// loaded 16 bytes a lane, are the A fragments of mma.m16n8k16 once they are unpacked, since the order of the channels is
// free as long as Q has the same. Then O^T = V^T P^T: a lane loads the same channels of four tokens, and a byte
// permutation of two rows' words gives pairs of tokens, which is what A fragments of V^T hold. P^T is the transposed
// S^T, eight by eight numbers at a time (movmatrix). Row r of S^T is token 2r for r < 8 and 2(r - 8) + 1 for the
// others, so that a lane's two rows are neighbours and so are its four columns of V^T.
//
// Integer formats compute in float16 with exact codes; a token's scales are applied to S^T and to P^T, and the running
// base of the exponentials includes log2 of the value's scale, so that P^T stays in range (see triton.py). The base
// follows the maximum only when that has grown by 8, a factor of 256, which costs a vote and no reductions. Block
// floating point computes in bfloat16, where code * 2^e is exact.
#include "work.cuh"

// Macros: BITS 4 or 8; HEAD_DIM 64 or 128; GROUP query heads of a key-value head, QUERIES new tokens, at most 16
// together; QUERY_TYPE, SCALE_TYPE Half or BFloat16; GROUPS of channels with an exponent, 0 for integer formats;
// KEY_OFFSET, VALUE_OFFSET; KEY_STRIDE, VALUE_STRIDE from token to token in bytes, KEY_SCALE_STRIDE, VALUE_SCALE_STRIDE
// in elements; SCALE_PAIRS, if these are 1 and two neighbouring tokens' scales are an aligned word; PAGE tokens of a page, 0 for contiguous; WINDOW, CAPPED; SUB; BLOCKS of a multiprocessor;
// FETCH_AHEAD tiles; UNROLL steps of the loop.
constexpr int ROWS = GROUP * QUERIES, ROW_TILES = (ROWS + 7) / 8;
constexpr int WARPS = 4, TILE = WARPS * SUB * 16;
constexpr int KEY_WORDS = HEAD_DIM * BITS / 128;   // of a lane: a quarter of a row
constexpr int VALUE_WORDS = HEAD_DIM * BITS / 256;  // an eighth of a row
constexpr int STEPS = HEAD_DIM / 16;
constexpr bool BFP = GROUPS > 0;
constexpr int UNROLLED = UNROLL;
constexpr float LEAST = -3.0e38f;  // less than any logit
constexpr int HALF_DIM = HEAD_DIM / 2;

template <bool>
struct Choose {
    using Type = Half;
};
template <>
struct Choose<true> {
    using Type = BFloat16;
};
using Compute = Choose<BFP>::Type;

struct Arguments {
    const uint16_t* query;
    const uint8_t *key, *value;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    const int32_t *lengths, *block_table;
    float *partial, *statistics;
    int64_t query_stride_b, query_stride_h, query_stride_t;  // in elements, all strides
    int64_t key_stride_p, key_stride_h, value_stride_p, value_stride_h;
    int64_t key_scale_stride_p, key_scale_stride_h, value_scale_stride_p, value_scale_stride_h;
    int32_t table_stride, batch, kv_heads, span, window;
    float factor, cap;
};

// First byte of word i of a lane's quarter of a row of K: 16 bytes of every 64, so that four lanes read 64 in a row.
DEVICE int key_byte(int t, int i) {
    constexpr int LONGEST = KEY_WORDS < 4 ? KEY_WORDS : 4;
    return i / 4 * 64 + t * 4 * LONGEST + i % 4 * 4;
}

template <int COUNT>
DEVICE void load_words(uint32_t (&d)[COUNT], const uint8_t* address) {
    if constexpr (COUNT == 1) {
        d[0] = load_constant(reinterpret_cast<const uint32_t*>(address));
    } else if constexpr (COUNT == 2) {
        const Words2 words = load_constant2(address);
        d[0] = words.x, d[1] = words.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const Words4 words = load_constant4(address + 16 * i);  // 64 bytes apart, see key_byte
            d[i] = words.x, d[i + 1] = words.y, d[i + 2] = words.z, d[i + 3] = words.w;
        }
    }
}

// One warp's next SUB * 16 tokens, as loaded.
struct Step {
    uint32_t key[SUB][2][KEY_WORDS], value[SUB][4][VALUE_WORDS];
    // integer formats: of the lane's two tokens; block floating point: exponents of the lane's channels, the low and
    // the high nibbles', of its tokens of K and of V
    uint32_t key_scale[SUB][2], value_scale[SUB][BFP ? 4 : 2], key_offset[SUB][2], value_offset[SUB][2];
    uint32_t key_high[SUB][2], value_high[SUB][4];
};

struct Pair {
    int sequence, head, length, first;  // first tile
};

// Pairs of codes in 16-bit halves of `word`, at the low 4 bits of each (or all 8), as Compute; unscaled.
DEVICE uint32_t low_codes(uint32_t word) {
    if constexpr (BITS == 8) return sub2<Half>(lop3<((0xf0 & 0xcc) ^ 0xaa)>(word, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    return sub2<Half>(lop3<AND_OR>(word, 0x000f000fu, 0x64006400u), 0x64086408u);  // 1024 + code - 1032
}
DEVICE uint32_t high_codes(uint32_t word) {
    return fma2<Half>(lop3<AND_OR>(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
}
// The same of block floating point: (128 + code) * scale - 136 * scale, exact.
DEVICE uint32_t scaled_codes(uint32_t word, uint32_t scale, uint32_t shift) {
    return fma2<BFloat16>(lop3<AND_OR>(word, 0x000f000fu, 0x43004300u), scale, shift);
}
// 2^(e - 129) as bfloat16; what is too small for that, and a block of zeros, is 0.
DEVICE uint32_t power(uint32_t exponent) { return ((exponent > 2 ? exponent : 2) - 2) << 7; }
DEVICE uint32_t times_136(uint32_t scale) { return mul2<BFloat16>(scale, 0xc308c308u); }

// Where a lane reads a pair's tokens, of page 0 or of the sequence: rows of K from its first token on (2g), rows of V from
// 4t on; scales and exponents from 2g on, and a value's exponents from 4t on.
struct Sources {
    const uint8_t *key, *value;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    const int32_t* pages;
    const uint8_t* line;  // the lane's line of the warp's tokens: of K in the first lanes, of V in others
};
// Lines of 128 bytes of K of a step, and as many of V; a warp's lanes fetch them ahead, if rows are dense.
constexpr int LINES = SUB * 16 * HEAD_DIM * BITS / 8 / 128;
constexpr bool AHEAD = FETCH_AHEAD > 0 && PAGE == 0 && KEY_STRIDE == HEAD_DIM * BITS / 8 && VALUE_STRIDE == KEY_STRIDE &&
                       2 * LINES <= 32;
constexpr int EXPONENT_CHANNELS = HEAD_DIM / (BFP ? GROUPS : 1);

DEVICE Sources sources_of(const Arguments& a, const Pair& pair) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const int64_t page = PAGE ? 0 : pair.sequence;
    const int64_t key_scale = page * a.key_scale_stride_p + pair.head * a.key_scale_stride_h;
    const int64_t value_scale = page * a.value_scale_stride_p + pair.head * a.value_scale_stride_h;
    Sources from;
    from.key = a.key + page * a.key_stride_p + pair.head * a.key_stride_h + key_byte(t, 0) + 2 * g * KEY_STRIDE;
    from.value =
        a.value + page * a.value_stride_p + pair.head * a.value_stride_h + 4 * VALUE_WORDS * g + 4 * t * VALUE_STRIDE;
    if constexpr (BFP) {
        const uint8_t* keys = reinterpret_cast<const uint8_t*>(a.key_scale) + key_scale;
        const uint8_t* values = reinterpret_cast<const uint8_t*>(a.value_scale) + value_scale;
        keys += 2 * g * KEY_SCALE_STRIDE + key_byte(t, 0) / EXPONENT_CHANNELS;
        values += 4 * t * VALUE_SCALE_STRIDE + 4 * VALUE_WORDS * g / EXPONENT_CHANNELS;
        from.key_scale = reinterpret_cast<const uint16_t*>(keys);
        from.value_scale = reinterpret_cast<const uint16_t*>(values);
    } else {
        from.key_scale = a.key_scale + key_scale + 2 * g * KEY_SCALE_STRIDE;
        from.key_offset = a.key_offset + key_scale + 2 * g * KEY_SCALE_STRIDE;
        from.value_scale = a.value_scale + value_scale + 2 * g * VALUE_SCALE_STRIDE;
        from.value_offset = a.value_offset + value_scale + 2 * g * VALUE_SCALE_STRIDE;
    }
    from.pages = a.block_table + pair.sequence * (int64_t)a.table_stride;
    const uint8_t* keys = a.key + page * a.key_stride_p + pair.head * a.key_stride_h;
    const uint8_t* values = a.value + page * a.value_stride_p + pair.head * a.value_stride_h;
    from.line = (lane < LINES ? keys : values - LINES * 128) + lane * 128;
    if (AHEAD) keep(from.line);
    keep(from.key), keep(from.value), keep(from.key_scale), keep(from.value_scale);
    if (KEY_OFFSET) keep(from.key_offset);
    if (VALUE_OFFSET) keep(from.value_offset);
    return from;
}

// Scales of a lane's two tokens, as loaded (whatever is done with them here would wait for them): in one word, or in two.
template <bool FULL>
DEVICE void load_pair(uint32_t (&d)[2], const uint16_t* scales, int after) {
    if constexpr (SCALE_PAIRS) {
        // of the last token alone if it has no neighbour: its weight is then the second's too, and that has none
        if (FULL || after > 0) {
            d[0] = load_constant(reinterpret_cast<const uint32_t*>(scales));
            return;
        }
        d[0] = load_constant_half(scales) * 0x10001u;
    } else {
        d[0] = load_constant_half(scales), d[1] = load_constant_half(scales + after);
    }
}
DEVICE float scale_of(const uint32_t* d, int token) {
    if constexpr (SCALE_PAIRS) return to_float<SCALE_TYPE>(token ? d[0] >> 16 : d[0] & 0xffff);
    return to_float<SCALE_TYPE>(d[token]);
}

// The warp's tokens from `token` on. Unless FULL, some are behind the end: the last token is read in their place, and
// its weight will be 0.
template <bool FULL>
DEVICE void load_tokens(const Arguments& a, const Sources& from, int length, int token, Step& d) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < SUB; s++) {
        int start = token + 16 * s;
        int64_t page = 0;
        if (PAGE) {
            const int index = (FULL ? start : smaller(start, length - 1)) / (PAGE ? PAGE : 1);
            page = (int)load_constant(reinterpret_cast<const uint32_t*>(from.pages + index));
            start -= index * PAGE, length = FULL ? length : length - index * PAGE;
        }
        // from the lane's own first token to the one it reads
        const int first = FULL ? 0 : smaller(0, length - 1 - start - 2 * g);
        const int second = FULL ? 1 : smaller(1, length - 1 - start - 2 * g);
        const uint8_t* key = from.key + (PAGE ? page * a.key_stride_p : 0) + start * KEY_STRIDE;
        load_words(d.key[s][0], key + first * KEY_STRIDE);
        load_words(d.key[s][1], key + second * KEY_STRIDE);
        const int64_t key_scale = (PAGE ? page * a.key_scale_stride_p : 0) + (start + first) * KEY_SCALE_STRIDE;
        const int64_t value_scale = (PAGE ? page * a.value_scale_stride_p : 0) + start * VALUE_SCALE_STRIDE;
        if constexpr (BFP) {
            const uint8_t* exponents = reinterpret_cast<const uint8_t*>(from.key_scale) + key_scale;
            constexpr int HIGH = HALF_DIM / EXPONENT_CHANNELS;
            const int after = (second - first) * KEY_SCALE_STRIDE;
            d.key_scale[s][0] = load_constant_byte(exponents), d.key_high[s][0] = load_constant_byte(exponents + HIGH);
            d.key_scale[s][1] = load_constant_byte(exponents + after);
            d.key_high[s][1] = load_constant_byte(exponents + after + HIGH);
        } else {
            const int after = (second - first) * KEY_SCALE_STRIDE;
            const int value_after = (second - first) * VALUE_SCALE_STRIDE;
            const int64_t value_first = value_scale + first * VALUE_SCALE_STRIDE;
            load_pair<FULL>(d.key_scale[s], from.key_scale + key_scale, after);
            if (KEY_OFFSET) load_pair<FULL>(d.key_offset[s], from.key_offset + key_scale, after);
            load_pair<FULL>(d.value_scale[s], from.value_scale + value_first, value_after);
            if (VALUE_OFFSET) load_pair<FULL>(d.value_offset[s], from.value_offset + value_first, value_after);
        }
        const uint8_t* value = from.value + (PAGE ? page * a.value_stride_p : 0) + start * VALUE_STRIDE;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int at = FULL ? r : smaller(r, length - 1 - start - 4 * t);
            load_words(d.value[s][r], value + at * VALUE_STRIDE);
            if constexpr (BFP) {
                const uint8_t* exponents =
                    reinterpret_cast<const uint8_t*>(from.value_scale) + value_scale + at * VALUE_SCALE_STRIDE;
                d.value_scale[s][r] = load_constant_byte(exponents);
                d.value_high[s][r] = load_constant_byte(exponents + HALF_DIM / EXPONENT_CHANNELS);
            }
        }
    }
}

DEVICE void load_step(const Arguments& a, const Sources& from, int length, int token, Step& d) {
    if (token + SUB * 16 <= length)
        load_tokens<true>(a, from, length, token, d);
    else
        load_tokens<false>(a, from, length, token, d);
}

// S^T of 16 tokens: [row tile][fragment].
DEVICE void multiply_keys(const Step& d, int s, const uint32_t (&q)[ROW_TILES][STEPS][2], float (&x)[ROW_TILES][4]) {
    uint32_t low[2], low_shift[2], high[2], high_shift[2];
    if constexpr (BFP) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            low[r] = power(d.key_scale[s][r]) * 0x10001u, high[r] = power(d.key_high[s][r]) * 0x10001u;
            low_shift[r] = times_136(low[r]), high_shift[r] = times_136(high[r]);
        }
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
#pragma unroll
    for (int i = 0; i < KEY_WORDS; i++) {
        const uint32_t w[2] = {d.key[s][0][i], d.key[s][1][i]};
        uint32_t f[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if constexpr (BFP) {
                f[0][r] = scaled_codes(w[r], low[r], low_shift[r]);
                f[0][2 + r] = scaled_codes(w[r] >> 8, low[r], low_shift[r]);
                f[1][r] = scaled_codes(w[r] >> 4, high[r], high_shift[r]);
                f[1][2 + r] = scaled_codes(w[r] >> 12, high[r], high_shift[r]);
            } else {
                const uint32_t next = w[r] >> 8;
                f[0][r] = low_codes(w[r]), f[0][2 + r] = low_codes(next);
                if (BITS == 4) f[1][r] = high_codes(w[r]), f[1][2 + r] = high_codes(next);
            }
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            if constexpr (BITS == 4) {
                mma<Compute>(x[n], f[0], q[n][2 * i]);
                mma<Compute>(x[n], f[1], q[n][2 * i + 1]);
            } else {
                mma<Compute>(x[n], f[0], q[n][i]);
            }
        }
    }
}

// O^T += V^T P^T of 16 tokens.
DEVICE void multiply_values(const Step& d, int s, const uint32_t (&p)[ROW_TILES][2], float (&o)[ROW_TILES][STEPS][4]) {
    // fragments pair tokens 0 with 2 and 1 with 3 of the lane's four
    uint32_t low[2], low_shift[2], high[2], high_shift[2];
    if constexpr (BFP) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            low[r] = power(d.value_scale[s][r]) | power(d.value_scale[s][BFP ? r + 2 : 0]) << 16;
            high[r] = power(d.value_high[s][r]) | power(d.value_high[s][r + 2]) << 16;
            low_shift[r] = times_136(low[r]), high_shift[r] = times_136(high[r]);
        }
    }
#pragma unroll
    for (int i = 0; i < VALUE_WORDS; i++) {
#pragma unroll
        for (int part = 0; part < 2; part++) {  // two bytes of each word
            const int selector = part ? 0x7632 : 0x5410;
            uint32_t f[2][4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t w = permute_bytes(d.value[s][r][i], d.value[s][r + 2][i], selector);
                if constexpr (BFP) {
                    f[0][2 * r] = scaled_codes(w, low[r], low_shift[r]);
                    f[0][2 * r + 1] = scaled_codes(w >> 4, high[r], high_shift[r]);
                    f[1][2 * r] = scaled_codes(w >> 8, low[r], low_shift[r]);
                    f[1][2 * r + 1] = scaled_codes(w >> 12, high[r], high_shift[r]);
                } else if constexpr (BITS == 4) {
                    f[0][2 * r] = low_codes(w), f[0][2 * r + 1] = high_codes(w);
                    f[1][2 * r] = low_codes(w >> 8), f[1][2 * r + 1] = high_codes(w >> 8);
                } else {
                    f[0][2 * r] = low_codes(w), f[0][2 * r + 1] = low_codes(w >> 8);
                }
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                if constexpr (BITS == 4) {
                    mma<Compute>(o[n][4 * i + 2 * part], f[0], p[n]);
                    mma<Compute>(o[n][4 * i + 2 * part + 1], f[1], p[n]);
                } else {
                    mma<Compute>(o[n][2 * i + part], f[0], p[n]);
                }
            }
        }
    }
}

// Channel of rows g (half 0) and g + 8 (half 1) of tile m of O^T.
DEVICE int channel_of(int m, int g, int half) {
    const int byte = 4 * VALUE_WORDS * g + (BITS == 4 ? m : 2 * m + half);
    return byte + (BITS == 4 ? half * HALF_DIM : 0);
}

KERNEL(attend, WARPS * 32, BLOCKS, Arguments) {
    const Arguments& a = arguments;
    allow_next_kernel();  // which waits for this one's results, but not to be launched
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    int sequence, begin, count;
    const int total = scan<TILE>(a.lengths, a.batch, a.kv_heads, a.span, -1, sequence, begin, count) * a.kv_heads;
    const int each = (total + grid_size() - 1) / grid_size();
    int position = block_index() * each;
    const int finish = smaller(position + each, total);

    while (position < finish) {
        scan<TILE>(a.lengths, a.batch, a.kv_heads, a.span, position, sequence, begin, count);
        Pair pair;
        pair.sequence = sequence;
        pair.length = a.lengths[sequence];
        tiles_of<TILE>(pair.length, a.span, pair.first);
        pair.head = (position - begin) / count;
        const int tile = position - begin - pair.head * count;
        const int stop = smaller(count, tile + finish - position);
        position += stop - tile;

        Step current;
        const int warp_token = warp * SUB * 16;
        const Sources from = sources_of(a, pair);
        load_step(a, from, pair.length, (pair.first + tile) * TILE + warp_token, current);

        // Q as B fragments: rows (head, new token), channels in the order of the unpacked codes
        float values[ROW_TILES][STEPS][4], unit = 1e-30f;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const int row = 8 * n + g;
            const uint16_t* source = a.query + pair.sequence * a.query_stride_b +
                                     (pair.head * GROUP + row / QUERIES) * a.query_stride_h +
                                     row % QUERIES * a.query_stride_t;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                const int at = BITS == 4 ? key_byte(t, k / 2) + k % 2 * HALF_DIM : key_byte(t, k);
Words2 words = {0, 0};
                if (row < ROWS) words = load_constant2(source + at);
                values[n][k][0] = to_float<QUERY_TYPE>(words.x & 0xffff);
                values[n][k][1] = to_float<QUERY_TYPE>(words.x >> 16);
                values[n][k][2] = to_float<QUERY_TYPE>(words.y & 0xffff);
                values[n][k][3] = to_float<QUERY_TYPE>(words.y >> 16);
#pragma unroll
                for (int i = 0; i < 4; i++) unit = fmaxf(unit, fabsf(values[n][k][i]));
            }
        }
#pragma unroll
        for (int d = 1; d < 32; d *= 2) unit = fmaxf(unit, shuffle_xor(unit, d));
        if (BFP) unit = 1;
        const float inverse = 1 / unit, factor = a.factor * unit;
        uint32_t q[ROW_TILES][STEPS][2];
        float query_sum[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                // bytes 0 and 2 of a word are unpacked into one register, 1 and 3 into another
                q[n][k][0] = pack2<Compute>(values[n][k][0] * inverse, values[n][k][2] * inverse);
                q[n][k][1] = pack2<Compute>(values[n][k][1] * inverse, values[n][k][3] * inverse);
                sum += (values[n][k][0] + values[n][k][1]) + (values[n][k][2] + values[n][k][3]);
            }
            sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
#pragma unroll
            for (int c = 0; c < 2; c++) query_sum[n][c] = a.factor * shuffle(sum, 8 * t + 4 * c);  // of S^T's columns
        }

        float o[ROW_TILES][STEPS][4], base[ROW_TILES][2], sums[ROW_TILES][2], shift[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) base[n][c] = LEAST, sums[n][c] = shift[n][c] = 0;
#pragma unroll
            for (int m = 0; m < STEPS; m++) o[n][m][0] = o[n][m][1] = o[n][m][2] = o[n][m][3] = 0;
        }

#pragma unroll UNROLLED
        for (int i = tile; i < stop; i++) {
            const int token = (pair.first + i) * TILE + warp_token;
            Step next;
            if (AHEAD && token + FETCH_AHEAD * TILE + SUB * 16 <= pair.length && lane < 2 * LINES)
                prefetch_line(from.line + (token + FETCH_AHEAD * TILE) * KEY_STRIDE);
            if (i + 1 < stop) load_step(a, from, pair.length, token + TILE, next);
            float x[SUB][ROW_TILES][4], scale[SUB][2], height[SUB][2];
            // some rows see not all of these tokens
            const bool partly = token + SUB * 16 > pair.length - QUERIES + 1 ||
                                (WINDOW && token <= pair.length - 1 - a.window);
            bool grown = false;
#pragma unroll
            for (int s = 0; s < SUB; s++) {
                multiply_keys(current, s, q, x[s]);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = token + 16 * s + 2 * g + r;
                    float key_scale = factor;
                    if constexpr (!BFP) key_scale *= scale_of(current.key_scale[s], r);
                    const float key_offset = KEY_OFFSET ? scale_of(current.key_offset[s], r) : 0.0f;
                    scale[s][r] = 1.0f;
                    if constexpr (!BFP) scale[s][r] = scale_of(current.value_scale[s], r);
                    height[s][r] = BFP ? 0.0f : fast_log2(fmaxf(fabsf(scale[s][r]), 0x1p-100f));
#pragma unroll
                    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            float& y = x[s][n][2 * r + c];
                            y *= key_scale;
                            if (KEY_OFFSET) y += query_sum[n][c] * key_offset;
                            if (CAPPED) y = a.cap * (1 - 2 / (1 + fast_exp2(y * 2.8853900817779268f)));
                            if (partly) {
                                const int last = pair.length - QUERIES + (8 * n + 2 * t + c) % QUERIES;
                                if (at > last || (WINDOW && at <= last - a.window)) y = bits_to_float(0xff800000u);  // -infinity
                            }
                            grown = grown || y + height[s][r] > base[n][c] + 8;
                        }
                }
            }
            if (any_lane(grown)) {
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float most = base[n][c];
#pragma unroll
                        for (int s = 0; s < SUB; s++)
#pragma unroll
                            for (int r = 0; r < 2; r++) most = fmaxf(most, x[s][n][2 * r + c] + height[s][r]);
#pragma unroll
                        for (int d = 4; d < 32; d *= 2) most = fmaxf(most, shuffle_xor(most, d));
                        const float alpha = fast_exp2(base[n][c] - most);
                        base[n][c] = most, sums[n][c] *= alpha, shift[n][c] *= alpha;
#pragma unroll
                        for (int m = 0; m < STEPS; m++) o[n][m][c] *= alpha, o[n][m][2 + c] *= alpha;
                    }
            }
#pragma unroll
            for (int s = 0; s < SUB; s++) {
                uint32_t p[ROW_TILES][2];
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        float e[2];
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            e[c] = fast_exp2(x[s][n][2 * r + c] - base[n][c]);
                            sums[n][c] += e[c];
                            if (VALUE_OFFSET) shift[n][c] += e[c] * scale_of(current.value_offset[s], r);
                            if (!BFP) e[c] *= scale[s][r];
                        }
                        p[n][r] = transpose_matrix(pack2<Compute>(e[0], e[1]));
                    }
                multiply_values(current, s, p, o);
            }
            current = next;
        }

        // the warps' results, in shared memory: base, sum and shift of every row, then O
        constexpr int PADDED = ROW_TILES * 8;
        const uint32_t bases = shared_memory(), outputs = bases + WARPS * PADDED * 12;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
#pragma unroll
                for (int d = 4; d < 32; d *= 2)
                    sums[n][c] += shuffle_xor(sums[n][c], d), shift[n][c] += shuffle_xor(shift[n][c], d);
                const int row = 8 * n + 2 * t + c;
                if (g == 0) {
                    store_shared(bases + 4 * (warp * PADDED + row), float_to_bits(base[n][c]));
                    store_shared(bases + 4 * ((WARPS + warp) * PADDED + row), float_to_bits(sums[n][c]));
                }
#pragma unroll
                for (int m = 0; m < STEPS; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        store_shared(outputs + 4 * ((warp * PADDED + row) * HEAD_DIM + channel_of(m, g, half)),
                                     float_to_bits(o[n][m][2 * half + c] + shift[n][c]));
            }
        synchronize();
        const int64_t slot = (int64_t)(block_index() + pair.sequence * a.kv_heads + pair.head) * ROWS;
        for (int index = thread_index(); index < ROWS * HEAD_DIM; index += WARPS * 32) {
            const int row = index / HEAD_DIM, channel = index % HEAD_DIM;
            float most = LEAST, sum = 0, output = 0, weight[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                most = fmaxf(most, bits_to_float(load_shared(bases + 4 * (w * PADDED + row))));
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                weight[w] = fast_exp2(bits_to_float(load_shared(bases + 4 * (w * PADDED + row))) - most);
                sum += weight[w] * bits_to_float(load_shared(bases + 4 * ((WARPS + w) * PADDED + row)));
                output += weight[w] *
                          bits_to_float(load_shared(outputs + 4 * ((w * PADDED + row) * HEAD_DIM + channel)));
            }
            a.partial[(slot + row) * HEAD_DIM + channel] = output;
            if (channel == 0) a.statistics[2 * (slot + row)] = most, a.statistics[2 * (slot + row) + 1] = sum;
        }
        synchronize();
    }
}
