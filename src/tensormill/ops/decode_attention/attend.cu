// Decode attention over caches of 16 bits and less, in one kernel.
//
// The work is split as in triton.py: one line of tiles of all (sequence, key-value head) pairs, an equal share of it for
// each block. A block that has a whole pair writes its output; otherwise the blocks of a pair write partial results in slot
// block + pair, and the last to arrive adds them up, in order.
//
// Within a block every warp takes SUB * 16 tokens of a tile, with a softmax of its own, so that warps never wait for each
// other before a pair ends. Each copies its own tokens into its own ring of STAGES steps in shared memory, swizzled so
// that fragments are read without bank conflicts; scales, which are small, are loaded one step ahead into registers.
//
// A warp computes S^T = K Q^T, tokens by query rows: the packed codes of a row of K, 16 bytes a lane, are the A fragments
// of the product once they are unpacked, since the order of the channels is free as long as Q has the same. Then
// O^T = V^T P^T: a lane reads the same channels of four tokens, and a byte permutation of two rows' words gives pairs of
// tokens, which is what A fragments of V^T hold. P^T is the transposed S^T, eight by eight numbers at a time (movmatrix).
// Row r of S^T is token 2r for r < 8 and 2(r - 8) + 1 for the others, so that a lane's two rows are neighbours and so
// are its four columns of V^T.
//
// Integer formats multiply K by Q in integers: codes need next to no unpacking for it, and Q has 16 bits of its row's
// largest magnitude, as a high and a low byte. O^T is computed in float16 with exact codes. A token's scales are applied
// to S^T and to P^T, and the running base of the exponentials includes log2 of the value's scale, so that P^T stays in
// range (see triton.py). Caches of 16 bits compute in the query's type. The base follows the maximum only when that has grown by 8, a factor of 256, which costs a vote
// and no reductions. Block floating point computes in bfloat16, where code * 2^e is exact.
#include "work.cuh"

// Macros: BITS 4, 8 or 16; HEAD_DIM 64 or 128; GROUP query heads of a key-value head, QUERIES new tokens, at most 16
// together; QUERY_TYPE, SCALE_TYPE Half or BFloat16; GROUPS of channels with an exponent, 0 for other formats;
// KEY_OFFSET, VALUE_OFFSET; KEY_STRIDE, VALUE_STRIDE from token to token in bytes, KEY_SCALE_STRIDE, VALUE_SCALE_STRIDE
// in elements; SCALE_PAIRS, if these are 1 and two neighbouring tokens' scales are an aligned word; PAGE tokens of a page,
// 0 for contiguous; WINDOW, CAPPED; SINKS 0 none, 1 float32, 2 SINK_TYPE; SUB; BLOCKS of a multiprocessor; STAGES.
constexpr int ROWS = GROUP * QUERIES, ROW_TILES = (ROWS + 7) / 8, PADDED = ROW_TILES * 8;
constexpr int WARPS = 4, STEP_TOKENS = SUB * 16, TILE = WARPS * STEP_TOKENS;
constexpr int KEY_WORDS = HEAD_DIM * BITS / 128;   // of a lane: a quarter of a row
constexpr int VALUE_WORDS = HEAD_DIM * BITS / 256;  // an eighth of a row
constexpr int STEPS = HEAD_DIM / 16;
constexpr bool BFP = GROUPS > 0, FLOATS = BITS == 16, INTEGERS = !BFP && !FLOATS;
constexpr float LEAST = -3.0e38f;  // less than any logit
constexpr int HALF_DIM = HEAD_DIM / 2;

// A step in shared memory: rows of K, and rows of V. 32 lanes copy PASS_ROWS of each at a time.
constexpr int ROW_BYTES = HEAD_DIM * BITS / 8, ROW_CHUNKS = ROW_BYTES / 16, PASS_ROWS = 32 / ROW_CHUNKS;
constexpr int VALUES_OFFSET = STEP_TOKENS * ROW_BYTES, STEP_BYTES = 2 * VALUES_OFFSET;
// A warp's ring holds its results, too. Before the rings: base and sum of every warp's rows.
constexpr int RESULT_BYTES = PADDED * HEAD_DIM * 4;
constexpr int RING_BYTES = STAGES * STEP_BYTES > RESULT_BYTES ? STAGES * STEP_BYTES : RESULT_BYTES;
constexpr int SUMS_OFFSET = WARPS * PADDED * 4, RINGS_OFFSET = 1024;
static_assert(2 * SUMS_OFFSET <= RINGS_OFFSET - 16, "a warp's bases and sums lie before the rings");
constexpr int LAST_OFFSET = RINGS_OFFSET - 16;  // whether this block merges
constexpr int EACH = HEAD_DIM / 32;             // channels of a lane, of results

template <bool, class T, class U>
struct Choose {
    using Type = T;
};
template <class T, class U>
struct Choose<false, T, U> {
    using Type = U;
};
using Compute = Choose<INTEGERS, Half, QUERY_TYPE>::Type;  // block floating point has queries in bfloat16

struct Arguments {
    const uint16_t* query;
    const uint8_t *key, *value;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    const int32_t *lengths, *block_table;
    const void* sinks;
    uint16_t* output;
    float *lse, *partial, *statistics;
    uint32_t* arrived;  // of each pair, blocks that wrote their part: 0 before and after
    int64_t query_stride_b, query_stride_h, query_stride_t;  // in elements, all strides
    int64_t key_stride_p, key_stride_h, value_stride_p, value_stride_h;
    int64_t key_scale_stride_p, key_scale_stride_h, value_scale_stride_p, value_scale_stride_h;
    int32_t table_stride, batch, kv_heads, span, window;
    float factor, cap;
};

struct Pair {
    int sequence, head, length, first;  // first tile
};

// First byte of word i of a lane's quarter of a row of K: 16 bytes of every 64, so that four lanes read 64 in a row.
DEVICE int key_byte(int t, int i) {
    constexpr int LONGEST = KEY_WORDS < 4 ? KEY_WORDS : 4;
    return i / 4 * 64 + t * 4 * LONGEST + i % 4 * 4;
}

// Where a byte of a row lies in a step: what lanes read at once lies in different banks.
DEVICE int key_place(int row, int byte) {
    const int at = row * ROW_BYTES + byte;
    return at ^ (ROW_BYTES >= 64 ? (row >> 1 & 1) << 6 : (row >> 2 & 1) << 5);
}
// Likewise of a lane's eighth of a row of V.
DEVICE int value_byte(int g, int i) { return FLOATS ? i / 4 * 128 + g * 16 + i % 4 * 4 : 4 * VALUE_WORDS * g + 4 * i; }
DEVICE int value_place(int row, int byte) { return (row * ROW_BYTES + byte) ^ ((row >> 2 & 3) << 5); }

// Where a lane finds a pair's tokens, of page 0 or of the sequence: what it copies of K and V from token 0 on (its row of
// the first pass); scales from token 2g on; exponents of K likewise, and of V from 4t on.
struct Sources {
    const uint8_t *key, *value;
    const uint16_t *key_scale, *key_offset, *value_scale, *value_offset;
    const int32_t* pages;
};

DEVICE Sources sources_of(const Arguments& a, const Pair& pair) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4, row = lane / ROW_CHUNKS, byte = lane % ROW_CHUNKS * 16;
    const int64_t page = PAGE ? 0 : pair.sequence;
    const int64_t key_scale = page * a.key_scale_stride_p + pair.head * a.key_scale_stride_h;
    const int64_t value_scale = page * a.value_scale_stride_p + pair.head * a.value_scale_stride_h;
    Sources from;
    from.key = a.key + page * a.key_stride_p + pair.head * a.key_stride_h + row * KEY_STRIDE + byte;
    from.value = a.value + page * a.value_stride_p + pair.head * a.value_stride_h + row * VALUE_STRIDE + byte;
    if constexpr (BFP) {
        const uint8_t* keys = reinterpret_cast<const uint8_t*>(a.key_scale) + key_scale;
        const uint8_t* values = reinterpret_cast<const uint8_t*>(a.value_scale) + value_scale;
        from.key_scale = reinterpret_cast<const uint16_t*>(keys + 2 * g * KEY_SCALE_STRIDE);
        from.value_scale = reinterpret_cast<const uint16_t*>(values + 4 * t * VALUE_SCALE_STRIDE);
    } else {
        from.key_scale = a.key_scale + key_scale + 2 * g * KEY_SCALE_STRIDE;
        from.key_offset = a.key_offset + key_scale + 2 * g * KEY_SCALE_STRIDE;
        from.value_scale = a.value_scale + value_scale + 2 * g * VALUE_SCALE_STRIDE;
        from.value_offset = a.value_offset + value_scale + 2 * g * VALUE_SCALE_STRIDE;
    }
    from.pages = a.block_table + pair.sequence * (int64_t)a.table_stride;
    keep(from.key), keep(from.value);
    if (!FLOATS) keep(from.key_scale), keep(from.value_scale);
    if (KEY_OFFSET) keep(from.key_offset);
    if (VALUE_OFFSET) keep(from.value_offset);
    return from;
}

// Pages of a step, 16 tokens each; looked up before they are needed.
struct Pages {
    int page[SUB];
};
constexpr uint32_t PAGE_TOKENS = PAGE ? PAGE : 1;
DEVICE Pages pages_of(const Sources& from, int length, int token) {
    Pages pages;
#pragma unroll
    for (int s = 0; s < SUB; s++) {
        if (PAGE) {
            const uint32_t index = (uint32_t)smaller(token + 16 * s, length - 1) / PAGE_TOKENS;
            pages.page[s] = (int)load_constant(reinterpret_cast<const uint32_t*>(from.pages + index));
        }
    }
    return pages;
}
// 16 tokens in their page: the first, and the sequence's last, which is read in the place of those behind it.
struct Inside {
    int page, start, last;
};
template <bool FULL>
DEVICE Inside inside_page(const Pages& pages, int s, int length, int token) {
    Inside at = {0, token + 16 * s, length - 1};
    if (PAGE) {
        at.page = pages.page[s];
        const int begin = (uint32_t)(FULL ? at.start : smaller(at.start, at.last)) / PAGE_TOKENS * PAGE_TOKENS;
        at.start -= begin, at.last -= begin;
    }
    return at;
}
// What a page or a token adds to a pointer; pages are less than 2^31 elements apart.
template <class T>
DEVICE const T* at_page(const T* pointer, int page, int64_t stride) {
    return PAGE ? pointer + (int64_t)page * (int32_t)stride : pointer;
}

template <bool FULL>
DEVICE void copy_tokens(const Arguments& a, const Sources& from, const Pages& pages, int length, int token, uint32_t to) {
    const int lane = lane_index(), row = lane / ROW_CHUNKS, byte = lane % ROW_CHUNKS * 16;
    const uint32_t key_to = to + key_place(row, byte), value_to = to + VALUES_OFFSET + value_place(row, byte);
#pragma unroll
    for (int s = 0; s < SUB; s++) {
        const Inside in = inside_page<FULL>(pages, s, length, token);
        const uint8_t* key = at_page(from.key, in.page, a.key_stride_p) + (int64_t)in.start * KEY_STRIDE;
        const uint8_t* value = at_page(from.value, in.page, a.value_stride_p) + (int64_t)in.start * VALUE_STRIDE;
#pragma unroll
        for (int j = 0; j < 16 / PASS_ROWS; j++) {
            const int i = s * (16 / PASS_ROWS) + j;  // the swizzle of later passes follows from the first one's
            const int at = j * PASS_ROWS, back = FULL ? 0 : smaller(0, in.last - in.start - at - row);
            copy_async16((key_to ^ ((i * PASS_ROWS >> 1 & 1) << 6)) + i * 512, key + (at + back) * (int64_t)KEY_STRIDE);
            copy_async16((value_to ^ ((i * PASS_ROWS >> 2 & 3) << 5)) + i * 512, value + (at + back) * (int64_t)VALUE_STRIDE);
        }
    }
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

// Scales of a step's keys, or values, as loaded: of the lane's two tokens in each 16. In block floating point all of a
// token's exponents, of two tokens of K or four of V; of 8, the second four are in `offset`.
template <int TOKENS>
struct Scales {
    uint32_t scale[SUB][TOKENS], offset[SUB][TOKENS];
};
using KeyScales = Scales<2>;
using ValueScales = Scales<BFP ? 4 : 2>;

DEVICE void load_exponents(const uint8_t* from, uint32_t& first, uint32_t& second) {
    if constexpr (GROUPS == 8) {
        const Words2 words = load_constant2(from);
        first = words.x, second = words.y;
    } else if constexpr (GROUPS == 4) {
        first = load_constant(reinterpret_cast<const uint32_t*>(from));
    } else {
        first = load_constant_half(reinterpret_cast<const uint16_t*>(from));
    }
}

template <bool FULL, int STRIDE, bool OFFSET, int TOKENS>
DEVICE void load_scales(const uint16_t* scales, const uint16_t* offsets, int64_t page_stride, const Pages& pages, int length,
                        int token, Scales<TOKENS>& d) {
    const int before = lane_index() / 4 * 2, before_exponents = TOKENS == 4 ? lane_index() % 4 * 4 : before;
#pragma unroll
    for (int s = 0; s < SUB; s++) {
        const Inside in = inside_page<FULL>(pages, s, length, token);
        if constexpr (BFP) {
            const uint8_t* bytes = at_page(reinterpret_cast<const uint8_t*>(scales), in.page, page_stride);
            bytes += (int64_t)in.start * STRIDE;
#pragma unroll
            for (int r = 0; r < TOKENS; r++) {
                const int at = FULL ? r : smaller(r, in.last - in.start - before_exponents);
                load_exponents(bytes + at * STRIDE, d.scale[s][r], d.offset[s][r]);
            }
        } else {
            // from the lane's own first token to the one it reads
            const int first = FULL ? 0 : smaller(0, in.last - in.start - before);
            const int second = FULL ? 1 : smaller(1, in.last - in.start - before);
            const int64_t at = (int64_t)(in.start + first) * STRIDE;
            const int after = (second - first) * STRIDE;
            load_pair<FULL>(d.scale[s], at_page(scales, in.page, page_stride) + at, after);
            if (OFFSET) load_pair<FULL>(d.offset[s], at_page(offsets, in.page, page_stride) + at, after);
        }
    }
}

// Unless all of a step's tokens are there, the last is read in the place of those behind it, whose weight will be 0.
DEVICE void copy_step(const Arguments& a, const Sources& from, const Pages& pages, int length, int token, uint32_t to) {
    if (token + STEP_TOKENS <= length)
        copy_tokens<true>(a, from, pages, length, token, to);
    else
        copy_tokens<false>(a, from, pages, length, token, to);
}
DEVICE void load_key_scales(const Arguments& a, const Sources& from, const Pages& pages, int length, int token, KeyScales& d) {
    const int64_t stride = a.key_scale_stride_p;
    if (token + STEP_TOKENS <= length)
        load_scales<true, KEY_SCALE_STRIDE, KEY_OFFSET>(from.key_scale, from.key_offset, stride, pages, length, token, d);
    else
        load_scales<false, KEY_SCALE_STRIDE, KEY_OFFSET>(from.key_scale, from.key_offset, stride, pages, length, token, d);
}
DEVICE void load_value_scales(const Arguments& a, const Sources& from, const Pages& pages, int length, int token,
                              ValueScales& d) {
    const int64_t stride = a.value_scale_stride_p;
    if (token + STEP_TOKENS <= length)
        load_scales<true, VALUE_SCALE_STRIDE, VALUE_OFFSET>(from.value_scale, from.value_offset, stride, pages, length, token, d);
    else
        load_scales<false, VALUE_SCALE_STRIDE, VALUE_OFFSET>(from.value_scale, from.value_offset, stride, pages, length, token, d);
}

// Words of a lane's share of a row, 16 bytes of every APART.
template <int APART = 64, int COUNT>
DEVICE void read_words(uint32_t (&d)[COUNT], uint32_t address) {
    if constexpr (COUNT == 1) {
        d[0] = load_shared(address);
    } else if constexpr (COUNT == 2) {
        const Words2 words = load_shared2(address);
        d[0] = words.x, d[1] = words.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const Words4 words = load_shared4(address ^ i / 4 * APART);
            d[i] = words.x, d[i + 1] = words.y, d[i + 2] = words.z, d[i + 3] = words.w;
        }
    }
}

// Pairs of codes in 16-bit halves of `word`, at the low 4 bits of each (or all 8), as float16; unscaled.
DEVICE uint32_t low_codes(uint32_t word) {
    if constexpr (BITS == 8) return sub2<Half>(lop3<((0xf0 & 0xcc) ^ 0xaa)>(word, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    return sub2<Half>(lop3<AND_OR>(word, 0x000f000fu, 0x64006400u), 0x64086408u);  // 1024 + code - 1032
}
DEVICE uint32_t high_codes(uint32_t word) {
    return fma2<Half>(lop3<AND_OR>(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
}
// The same of block floating point, in bfloat16: (128 + code) * scale - 136 * scale, exact.
DEVICE uint32_t scaled_codes(uint32_t word, uint32_t scale, uint32_t shift) {
    return fma2<BFloat16>(lop3<AND_OR>(word, 0x000f000fu, 0x43004300u), scale, shift);
}
// 2^(e - 129) as bfloat16, of two exponents; what is too small for that, and a block of zeros, is 0.
DEVICE uint32_t powers(uint32_t exponents) { return (max_pair(exponents, 0x00020002u) - 0x00020002u) << 7; }
DEVICE uint32_t times_136(uint32_t scale) { return mul2<BFloat16>(scale, 0xc308c308u); }
// The exponent of the group of `byte`, of low nibbles or of high ones, of tokens a and b, as two 16-bit integers.
DEVICE uint32_t exponents_of(int byte, bool high, uint32_t a, uint32_t a_second, uint32_t b, uint32_t b_second) {
    constexpr int CHANNELS = HEAD_DIM / (BFP ? GROUPS : 1), HIGH = HALF_DIM / CHANNELS;
    const int at = byte / CHANNELS + (high && GROUPS < 8 ? HIGH : 0);
    const bool second = high && GROUPS == 8;
    return permute_bytes(second ? a_second : a, second ? b_second : b, at * 0x11 + (at + 4) * 0x1100) & 0x00ff00ffu;
}

// Q as B fragments: rows (head, new token), channels in the order of the unpacked codes. In integer formats also what is
// subtracted from a product for codes that are stored as code + 8, all of a lane's columns of S^T.
struct Query {
    uint32_t fragment[ROW_TILES][STEPS][2];  // of integers: high bytes in even steps, low bytes in odd ones
    int zero[ROW_TILES][2];
    float factor[ROW_TILES][2], sum[ROW_TILES][2];
};

DEVICE Query load_query(const Arguments& a, const Pair& pair) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    Query q;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const int row = 8 * n + g;
        const uint16_t* source = a.query + pair.sequence * a.query_stride_b +
                                 (pair.head * GROUP + row / QUERIES) * a.query_stride_h + row % QUERIES * a.query_stride_t;
        float values[STEPS][4], unit = 1e-30f, sum = 0;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const int at = BITS == 4   ? key_byte(t, k / 2) + k % 2 * HALF_DIM
                           : BITS == 8 ? key_byte(t, k)
                                       : key_byte(t, 2 * k) / 2;
            Words2 words = {0, 0};
            if (row < ROWS) words = load_constant2(source + at);
            values[k][0] = to_float<QUERY_TYPE>(words.x & 0xffff), values[k][1] = to_float<QUERY_TYPE>(words.x >> 16);
            values[k][2] = to_float<QUERY_TYPE>(words.y & 0xffff), values[k][3] = to_float<QUERY_TYPE>(words.y >> 16);
#pragma unroll
            for (int i = 0; i < 4; i++) unit = fmaxf(unit, fabsf(values[k][i])), sum += values[k][i];
        }
        sum += shuffle_xor(sum, 1), sum += shuffle_xor(sum, 2);
        if constexpr (!INTEGERS) {
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                if constexpr (FLOATS) {
                    q.fragment[n][k][0] = pack2<Compute>(values[k][0], values[k][1]);
                    q.fragment[n][k][1] = pack2<Compute>(values[k][2], values[k][3]);
                    continue;
                }
                // bytes 0 and 2 of a word are unpacked into one register, 1 and 3 into another
                q.fragment[n][k][0] = pack2<BFloat16>(values[k][0], values[k][2]);
                q.fragment[n][k][1] = pack2<BFloat16>(values[k][1], values[k][3]);
            }
            q.factor[n][0] = q.factor[n][1] = a.factor;
        } else {
            constexpr float MOST = 32512.0f;  // so that high bytes are less than 128
            unit = fmaxf(unit, shuffle_xor(unit, 1)), unit = fmaxf(unit, shuffle_xor(unit, 2));
            const float inverse = MOST / unit;
            int total = 0;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t high = 0, low = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float scaled = values[k][i] * inverse;
                    const int integer = (int)(scaled + (scaled < 0 ? -0.5f : 0.5f));
                    total += integer;
                    high |= ((uint32_t)((integer + 128) >> 8) & 0xff) << (8 * i);
                    low |= ((uint32_t)integer & 0xff) << (8 * i);  // as a signed byte, with the high one's rounding
                }
                q.fragment[n][k / 2 * 2][k % 2] = high, q.fragment[n][k / 2 * 2 + 1][k % 2] = low;
            }
            total += (int)shuffle_xor((uint32_t)total, 1), total += (int)shuffle_xor((uint32_t)total, 2);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int from = 8 * t + 4 * c;  // a lane that has this column's row
                q.zero[n][c] = BITS == 4 ? -8 * (int)shuffle((uint32_t)total, from) : 0;
                q.factor[n][c] = a.factor * shuffle(unit, from) / MOST;
                q.sum[n][c] = a.factor * shuffle(sum, from);
            }
        }
    }
    return q;
}

// S^T of 16 tokens, less their scales: [row tile][fragment].
DEVICE void multiply_keys(const KeyScales& d, int s, uint32_t keys, const Query& q, float (&x)[ROW_TILES][4]) {
    const uint32_t second_row = (keys ^ ROW_BYTES % 128) + ROW_BYTES / 128 * 128;
    uint32_t key[2][FLOATS ? 4 : KEY_WORDS];
    if constexpr (FLOATS) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
#pragma unroll
        for (int i = 0; i < STEPS; i += 2) {
            read_words(key[0], keys ^ i / 2 * 64), read_words(key[1], second_row ^ i / 2 * 64);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const uint32_t f[4] = {key[0][2 * k], key[1][2 * k], key[0][2 * k + 1], key[1][2 * k + 1]};
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) mma<Compute>(x[n], f, q.fragment[n][i + k]);
            }
        }
        return;
    }
    read_words(key[0], keys), read_words(key[1], second_row);
    if constexpr (BFP) {
        uint32_t low[2], low_shift[2], high[2], high_shift[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int byte = key_byte(lane_index() % 4, 0);
            const uint32_t first = d.scale[s][r], second = d.offset[s][r];
            low[r] = powers(exponents_of(byte, false, first, second, first, second));
            high[r] = powers(exponents_of(byte, true, first, second, first, second));
            low_shift[r] = times_136(low[r]), high_shift[r] = times_136(high[r]);
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
#pragma unroll
        for (int i = 0; i < KEY_WORDS; i++) {
            uint32_t f[2][4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t w = key[r][i];
                f[0][r] = scaled_codes(w, low[r], low_shift[r]);
                f[0][2 + r] = scaled_codes(w >> 8, low[r], low_shift[r]);
                f[1][r] = scaled_codes(w >> 4, high[r], high_shift[r]);
                f[1][2 + r] = scaled_codes(w >> 12, high[r], high_shift[r]);
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                mma<Compute>(x[n], f[0], q.fragment[n][2 * i]);
                mma<Compute>(x[n], f[1], q.fragment[n][2 * i + 1]);
            }
        }
    } else {
        int high[ROW_TILES][4], low[ROW_TILES][4];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) high[n][i] = 0, low[n][i] = q.zero[n][i % 2];
#pragma unroll
        for (int k = 0; k < STEPS / 2; k++) {  // 32 channels
            uint32_t f[4];
            if constexpr (BITS == 4) {
                f[0] = key[0][k] & 0x0f0f0f0fu, f[1] = key[1][k] & 0x0f0f0f0fu;
                f[2] = key[0][k] >> 4 & 0x0f0f0f0fu, f[3] = key[1][k] >> 4 & 0x0f0f0f0fu;
            } else {
                f[0] = key[0][2 * k], f[1] = key[1][2 * k], f[2] = key[0][2 * k + 1], f[3] = key[1][2 * k + 1];
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                mma_int8(high[n], f, q.fragment[n][2 * k]);
                mma_int8(low[n], f, q.fragment[n][2 * k + 1]);
            }
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[n][i] = (float)(high[n][i] * 256 + low[n][i]);
    }
}

// O^T += V^T P^T of 16 tokens.
DEVICE void multiply_values(const ValueScales& d, int s, uint32_t values, const uint32_t (&p)[ROW_TILES][2],
                            float (&o)[ROW_TILES][STEPS][4]) {
    uint32_t value[4][VALUE_WORDS];
#pragma unroll
    for (int r = 0; r < 4; r++) read_words<128>(value[r], (values ^ (r * ROW_BYTES & 127)) + (r * ROW_BYTES & ~127));
    // fragments pair tokens 0 with 2 and 1 with 3 of the lane's four
    uint32_t low[2], low_shift[2], high[2], high_shift[2];
    if constexpr (BFP) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            constexpr int NEXT = BFP ? 2 : 0;
            const int byte = 4 * VALUE_WORDS * (lane_index() / 4);
            const uint32_t first = d.scale[s][r], second = d.offset[s][r];
            const uint32_t next_first = d.scale[s][r + NEXT], next_second = d.offset[s][r + NEXT];
            low[r] = powers(exponents_of(byte, false, first, second, next_first, next_second));
            high[r] = powers(exponents_of(byte, true, first, second, next_first, next_second));
            low_shift[r] = times_136(low[r]), high_shift[r] = times_136(high[r]);
        }
    }
#pragma unroll
    for (int i = 0; i < VALUE_WORDS; i++) {
#pragma unroll
        for (int part = 0; part < (FLOATS ? 1 : 2); part++) {  // two bytes of each word, or all
            const int selector = part ? 0x7632 : 0x5410;
            uint32_t f[2][4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t w = permute_bytes(value[r][i], value[r + 2][i], selector);
                if constexpr (FLOATS) {
                    f[0][2 * r] = w, f[0][2 * r + 1] = permute_bytes(value[r][i], value[r + 2][i], 0x7632);
                } else if constexpr (BFP) {
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
                    mma<Compute>(o[n][FLOATS ? i : 2 * i + part], f[0], p[n]);
                }
            }
        }
    }
}

// Channel of rows g (half 0) and g + 8 (half 1) of tile m of O^T.
DEVICE int channel_of(int m, int g, int half) {
    if (FLOATS) return value_byte(g, m) / 2 + half;
    const int byte = 4 * VALUE_WORDS * g + (BITS == 4 ? m : 2 * m + half);
    return byte + (BITS == 4 ? half * HALF_DIM : 0);
}

// --- results: a warp has a row, a lane EACH channels of it

struct Result {
    float most, sum, output[EACH];
};

// In shared memory, and in memory that other blocks wrote.
template <int COUNT>
DEVICE void read_floats(float (&d)[COUNT], uint32_t address) {
    uint32_t words[COUNT];
    read_words(words, address);
#pragma unroll
    for (int i = 0; i < COUNT; i++) d[i] = bits_to_float(words[i]);
}
template <int COUNT>
DEVICE void read_floats(float (&d)[COUNT], const float* address) {
    if constexpr (COUNT == 2) {
        const Words2 words = load_relaxed2(address);
        d[0] = bits_to_float(words.x), d[1] = bits_to_float(words.y);
    } else {
        const Words4 words = load_relaxed4(address);
        d[0] = bits_to_float(words.x), d[1] = bits_to_float(words.y);
        d[2] = bits_to_float(words.z), d[3] = bits_to_float(words.w);
    }
}

// Of the block's warps.
DEVICE Result add_warps(int row) {
    const uint32_t bases = shared_memory(), rings = bases + RINGS_OFFSET;
    Result d;
    d.most = LEAST, d.sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) d.most = fmaxf(d.most, bits_to_float(load_shared(bases + 4 * (w * PADDED + row))));
#pragma unroll
    for (int i = 0; i < EACH; i++) d.output[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const uint32_t at = bases + 4 * (w * PADDED + row);
        const float weight = fast_exp2(bits_to_float(load_shared(at)) - d.most);
        d.sum += weight * bits_to_float(load_shared(at + SUMS_OFFSET));
        float output[EACH];
        read_floats(output, rings + w * RING_BYTES + 4 * (row * HEAD_DIM + lane_index() * EACH));
#pragma unroll
        for (int i = 0; i < EACH; i++) d.output[i] += weight * output[i];
    }
    return d;
}

// Of the blocks `first` to `last`, whose results are at `slot` and every ROWS further on.
DEVICE Result add_blocks(const Arguments& a, int64_t slot, int count) {
    const int lane = lane_index();
    Result d;
    d.most = LEAST, d.sum = 0;
    for (int p = lane; p < count; p += 32)
        d.most = fmaxf(d.most, bits_to_float(load_relaxed2(a.statistics + 2 * (slot + (int64_t)p * ROWS)).x));
#pragma unroll
    for (int k = 1; k < 32; k *= 2) d.most = fmaxf(d.most, shuffle_xor(d.most, k));
#pragma unroll
    for (int i = 0; i < EACH; i++) d.output[i] = 0;
#pragma unroll 8
    for (int p = 0; p < count; p++) {
        const int64_t at = slot + (int64_t)p * ROWS;
        float statistics[2], output[EACH];
        read_floats(statistics, static_cast<const float*>(a.statistics + 2 * at));
        read_floats(output, static_cast<const float*>(a.partial + at * HEAD_DIM + lane * EACH));
        const float weight = fast_exp2(statistics[0] - d.most);
        d.sum += weight * statistics[1];
#pragma unroll
        for (int i = 0; i < EACH; i++) d.output[i] += weight * output[i];
    }
    return d;
}

DEVICE void write_part(const Arguments& a, int64_t at, const Result& d) {
    const int lane = lane_index();
    float* to = a.partial + at * HEAD_DIM + lane * EACH;
#pragma unroll
    for (int i = 0; i < EACH; i += 2)
        *reinterpret_cast<Words2*>(to + i) = Words2{float_to_bits(d.output[i]), float_to_bits(d.output[i + 1])};
    if (lane == 0)
        *reinterpret_cast<Words2*>(a.statistics + 2 * at) = Words2{float_to_bits(d.most), float_to_bits(d.sum)};
}

// Normalizes a pair's result, its sink included.
DEVICE void write_output(const Arguments& a, int pair, int row, Result d) {
    const int lane = lane_index();
    if (SINKS) {
        const int head = pair % a.kv_heads * GROUP + row / QUERIES;
        float sink;
        if (SINKS == 1)
            sink = static_cast<const float*>(a.sinks)[head];
        else
            sink = to_float<SINK_TYPE>(static_cast<const uint16_t*>(a.sinks)[head]);
        sink *= 1.4426950408889634f;
        const float most = fmaxf(d.most, sink), scale = fast_exp2(d.most - most);
        d.most = most, d.sum = d.sum * scale + fast_exp2(sink - most);
#pragma unroll
        for (int i = 0; i < EACH; i++) d.output[i] *= scale;
    }
    const float scale = d.sum > 0 ? 1 / d.sum : 0.0f;
    const int64_t at = (int64_t)pair * ROWS + row;
    uint32_t* to = reinterpret_cast<uint32_t*>(a.output + at * HEAD_DIM + lane * EACH);
#pragma unroll
    for (int i = 0; i < EACH; i += 2) to[i / 2] = pack2<QUERY_TYPE>(d.output[i] * scale, d.output[i + 1] * scale);
    if (lane == 0) a.lse[at] = (d.most + fast_log2(d.sum)) * 0.6931471805599453f;
}

KERNEL(attend, WARPS * 32, BLOCKS, Arguments) {
    const Arguments& a = arguments;
    wait_for_previous_kernel();
    allow_next_kernel();
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    const uint32_t bases = shared_memory(), ring = bases + RINGS_OFFSET + warp * RING_BYTES;
    int sequence, begin, count;
    const int total = scan<TILE>(a.lengths, a.batch, a.kv_heads, a.span, -1, sequence, begin, count) * a.kv_heads;
    const int each = (total + grid_size() - 1) / grid_size();
    int position = block_index() * each;
    const int finish = smaller(position + each, total);
    const uint32_t keys = ring + key_place(2 * g, key_byte(t, 0));
    const uint32_t values = ring + VALUES_OFFSET + value_place(4 * t, value_byte(g, 0));

    // sequences that have nothing
    for (int pair = block_index(); pair < a.batch * a.kv_heads; pair += grid_size()) {
        if (a.lengths[pair / a.kv_heads] > 0) continue;
        Result nothing;
        nothing.most = LEAST, nothing.sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) nothing.output[i] = 0;
        for (int row = warp; row < ROWS; row += WARPS) write_output(a, pair, row, nothing);
    }

    while (position < finish) {
        scan<TILE>(a.lengths, a.batch, a.kv_heads, a.span, position, sequence, begin, count);
        Pair pair;
        pair.sequence = sequence;
        pair.length = a.lengths[sequence];
        tiles_of<TILE>(pair.length, a.span, pair.first);
        pair.head = (position - begin) / count;
        begin += pair.head * count;  // the pair's first position
        const int tile = position - begin;
        const int steps = smaller(count, tile + finish - position) - tile;
        position += steps;

        const Sources from = sources_of(a, pair);
        int token = (pair.first + tile) * TILE + warp * STEP_TOKENS;  // of the step that is computed
        Pages following = pages_of(from, pair.length, token), ahead = following;
        KeyScales key_scales;
        ValueScales value_scales;
        if (!FLOATS) {
            load_key_scales(a, from, following, pair.length, token, key_scales);
            load_value_scales(a, from, following, pair.length, token, value_scales);
        }
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            const int at = token + i * TILE;
            if (i > 0) ahead = pages_of(from, pair.length, at);
            if (i == 1) following = ahead;
            if (i < steps) copy_step(a, from, ahead, pair.length, at, ring + i * STEP_BYTES);
            copy_async_commit();
        }
        if (STAGES == 2) following = pages_of(from, pair.length, token + TILE);
        ahead = pages_of(from, pair.length, token + (STAGES - 1) * TILE);

        const Query q = load_query(a, pair);
        float o[ROW_TILES][STEPS][4], base[ROW_TILES][2], sums[ROW_TILES][2], shift[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) base[n][c] = LEAST, sums[n][c] = shift[n][c] = 0;
#pragma unroll
            for (int m = 0; m < STEPS; m++) o[n][m][0] = o[n][m][1] = o[n][m][2] = o[n][m][3] = 0;
        }

        uint32_t stage = 0, free_stage = (STAGES - 1) * STEP_BYTES;
        for (int i = 0; i < steps; i++, token += TILE) {
            copy_async_wait<STAGES - 2>();
            synchronize_warp();  // all lanes' copies have arrived, and all are done with the step before
            if (i + STAGES - 1 < steps)
                copy_step(a, from, ahead, pair.length, token + (STAGES - 1) * TILE, ring + free_stage);
            copy_async_commit();
            float x[SUB][ROW_TILES][4], scale[SUB][2], offset[SUB][2], height[SUB][2];
            // some rows see not all of these tokens
            const bool partly = token + STEP_TOKENS > pair.length - QUERIES + 1 ||
                                (WINDOW && token <= pair.length - 1 - a.window);
            bool grown = false;
#pragma unroll
            for (int s = 0; s < SUB; s++) {
                multiply_keys(key_scales, s, keys + stage + s * 16 * ROW_BYTES, q, x[s]);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = token + 16 * s + 2 * g + r;
                    const float key_scale = !INTEGERS ? 1.0f : scale_of(key_scales.scale[s], r);
                    const float key_offset = KEY_OFFSET ? scale_of(key_scales.offset[s], r) : 0.0f;
                    scale[s][r] = !INTEGERS ? 1.0f : scale_of(value_scales.scale[s], r);
                    offset[s][r] = VALUE_OFFSET ? scale_of(value_scales.offset[s], r) : 0.0f;
                    height[s][r] = !INTEGERS ? 0.0f : fast_log2(fmaxf(fabsf(scale[s][r]), 0x1p-100f));
#pragma unroll
                    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            float& y = x[s][n][2 * r + c];
                            y *= q.factor[n][c];
                            if (INTEGERS) y *= key_scale;
                            if (KEY_OFFSET) y += q.sum[n][c] * key_offset;
                            if (CAPPED) y = a.cap * (1 - 2 / (1 + fast_exp2(y * 2.8853900817779268f)));
                            if (partly) {
                                const int last = pair.length - QUERIES + (8 * n + 2 * t + c) % QUERIES;
                                if (at > last || (WINDOW && at <= last - a.window)) y = bits_to_float(0xff800000u);  // -infinity
                            }
                            grown = grown || y + height[s][r] > base[n][c] + 8;
                        }
                }
            }
            // scales of the next step, as soon as these were used
            if (!FLOATS && i + 1 < steps) {
                load_key_scales(a, from, following, pair.length, token + TILE, key_scales);
                if (!BFP) load_value_scales(a, from, following, pair.length, token + TILE, value_scales);
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
                            if (VALUE_OFFSET) shift[n][c] += e[c] * offset[s][r];
                            if (INTEGERS) e[c] *= scale[s][r];
                        }
                        p[n][r] = transpose_matrix(pack2<Compute>(e[0], e[1]));
                    }
                multiply_values(value_scales, s, values + stage + s * 16 * ROW_BYTES, p, o);
            }
            if (BFP && i + 1 < steps)
                load_value_scales(a, from, following, pair.length, token + TILE, value_scales);
            if (PAGE) {
                following = STAGES == 3 ? ahead : pages_of(from, pair.length, token + 2 * TILE);
                ahead = pages_of(from, pair.length, token + STAGES * TILE);
            }
            free_stage = stage;
            stage = stage + STEP_BYTES < STAGES * STEP_BYTES ? stage + STEP_BYTES : 0;
        }
        copy_async_wait<0>();
        synchronize_warp();

        // the warps' results, in shared memory: base and sum of every row, and O
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
#pragma unroll
                for (int d = 4; d < 32; d *= 2) {
                    sums[n][c] += shuffle_xor(sums[n][c], d);
                    if (VALUE_OFFSET) shift[n][c] += shuffle_xor(shift[n][c], d);
                }
                const int row = 8 * n + 2 * t + c;
                if (g == 0) {
                    store_shared(bases + 4 * (warp * PADDED + row), float_to_bits(base[n][c]));
                    store_shared(bases + SUMS_OFFSET + 4 * (warp * PADDED + row), float_to_bits(sums[n][c]));
                }
#pragma unroll
                for (int m = 0; m < STEPS; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        store_shared(ring + 4 * (row * HEAD_DIM + channel_of(m, g, half)),
                                     float_to_bits(o[n][m][2 * half + c] + shift[n][c]));
            }
        synchronize();
        const int index = pair.sequence * a.kv_heads + pair.head;
        if (steps == count) {
            for (int row = warp; row < ROWS; row += WARPS) write_output(a, index, row, add_warps(row));
        } else {
            for (int row = warp; row < ROWS; row += WARPS)
                write_part(a, (int64_t)(block_index() + index) * ROWS + row, add_warps(row));
            synchronize();
            const int first = begin / each, parts = (begin + count - 1) / each - first + 1;
            if (thread_index() == 0) {
                const bool last = (int)add_ordered(a.arrived + index, 1) == parts - 1;
                if (last) a.arrived[index] = 0;
                store_shared(bases + LAST_OFFSET, last);
            }
            synchronize();
            if (load_shared(bases + LAST_OFFSET))
                for (int row = warp; row < ROWS; row += WARPS)
                    write_output(a, index, row, add_blocks(a, (int64_t)(first + index) * ROWS + row, parts));
        }
        synchronize();  // before the rings are used again
    }
}
