// y = x W^T for many tokens on sm_90a, with W of 1 to 8 bits in the tiled layout and x of 16 or 8 bits.
//
// The weights are the first operand of the products, from registers, the tokens are the second, from shared memory: a
// block computes TILE_ROWS x TILE_TOKENS of W x^T. Warps of the last warpgroup copy stages of 128 bytes of every token,
// and the weights, scales and zero points that go with them, into a ring in shared memory. Two warpgroups of 64 PARTS
// rows each expand the weights of half a stage in registers while their products of the half before run, and free a
// stage once the products of the next have begun. Where a block has several tiles, the first warpgroup is kept some stages
// ahead, so that it stores its sums while the other one still multiplies, and the other way round.
//
// Where tiles are few, SPLIT blocks share one along K, all of which run at once. Each adds up and stores some of its tokens;
// the others lay their sums for it into the workspace, where a sum that is not there yet reads as EMPTY, and are added in
// the order of the splits. Who has read a sum writes EMPTY again, so that the workspace is ready for the next launch.
//
// Scales of groups multiply the weights, except for 8-bit x, where they multiply the sums of a group, which are then added
// in float32; scales of whole rows multiply the sums at the end. Where 8-bit x has a scale per token and group too, a warp
// brings those of a stage. Every thread then reads a fourth of a stage's, which is what bounds these products: 256 rows
// share what a thread has read, 128 do not.

#include "dequantize.cuh"
#include "dequantize_bytes.cuh"
#include "hopper.cuh"

constexpr int BITS = WEIGHT_BITS;
constexpr int TYPE = X_TYPE;         // 0 float16, 1 bfloat16, 2 int8, 3 e4m3
constexpr int ROWS = TILE_ROWS;      // 128, 256
constexpr int TOKENS = TILE_TOKENS;  // 32, 64, 128, 256
constexpr int STAGES = RING_STAGES;
constexpr int SPLIT = K_SPLITS;
constexpr int GROUPS = STAGE_GROUPS;  // sets of scales in a stage: 0 (whole rows), 1, 2
constexpr bool ZERO = HAS_ZERO;       // zero points; else 2^(BITS - 1)
constexpr bool FLOAT_SCALE = SCALE_TYPE == 2;  // scales are float32, which 8-bit x can have; else Y's type
constexpr bool X_GROUPS = X_GROUPED;           // a scale per token and group of channels, for 8-bit x

#if Y_TYPE == 0
using Y = Half;
#else
using Y = BFloat16;  // y and bias
#endif
#if X_TYPE == 0
using X = Half;
#else
using X = BFloat16;
#endif
#if X_TYPE == 2
using Sum = int;
#else
using Sum = float;
#endif

constexpr int SKEW = RING_SKEW;  // stages by which the first warpgroup is ahead of the second

constexpr bool BYTES = TYPE >= 2, INTEGER = TYPE == 2, FP8 = TYPE == 3;
constexpr float UNIT = INTEGER ? 1.0f / (1 << (8 - BITS)) : FP8 ? 512.0f : 1.0f;  // of the sums
constexpr bool GROUP_SUMS = (BYTES && GROUPS > 0) || FP8 || X_GROUPS;
constexpr Wgmma KIND = INTEGER ? Wgmma::s8 : FP8 ? Wgmma::e4m3 : TYPE == 1 ? Wgmma::bf16 : Wgmma::f16;
constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * CONSUMERS;  // that multiply
constexpr int BLOCKS = ROWS / 64;
constexpr int PARTS = BLOCKS / CONSUMERS;  // of 64 rows, of a warpgroup
constexpr int COPIERS = X_GROUPS ? 2 : BLOCKS;  // warps that copy rows; beside them one brings scales of tokens
constexpr int SUMS = TOKENS / 2;           // of a thread, for 64 rows
constexpr int TILES = BYTES ? 2 : 1;       // of 64 columns, in a stage
constexpr int TILE_BYTES = 128 * BITS;     // of 16 rows x 64 columns
static_assert(!GROUP_SUMS || (GROUPS <= 1 && PARTS * TOKENS <= 128 && !ZERO), "registers");
static_assert(!FP8 || BITS <= 5, "weights that e4m3 does not hold");
static_assert(!X_GROUPS || BYTES, "16-bit x has no scales");

// A stage: tokens (rows of 128 bytes, swizzled), weights, scales, zero points, scales of tokens.
constexpr int X_BYTES = TOKENS * 128;
constexpr int WEIGHT_BYTES = 4 * TILE_BYTES * TILES;  // of 64 rows
constexpr int SCALE_BYTES = FLOAT_SCALE ? 256 : 128;  // of 64 rows and a group
constexpr int ZERO_BYTES = ZERO && !BYTES ? 64 : 0;
constexpr int SCALE_OFFSET = X_BYTES + BLOCKS * WEIGHT_BYTES;
constexpr int ZERO_OFFSET = SCALE_OFFSET + GROUPS * BLOCKS * SCALE_BYTES;
constexpr int X_SCALE_OFFSET = ZERO_OFFSET + GROUPS * BLOCKS * ZERO_BYTES;
constexpr int STAGE_BYTES = (X_SCALE_OFFSET + (X_GROUPS ? 4 * TOKENS : 0) + 1023) / 1024 * 1024;
// After the ring: y, tokens x 64 rows of a part each; barriers.
constexpr int Y_OFFSET = STAGES * STAGE_BYTES;
constexpr int SLICE = TOKENS / SPLIT;  // tokens that a block stores
constexpr int SLICE_SUMS = SUMS / SPLIT;
constexpr int Y_BYTES = SLICE * 128;
constexpr int BARRIER_OFFSET = Y_OFFSET + BLOCKS * Y_BYTES;
static_assert(BARRIER_OFFSET + 16 * STAGES == SHARED_BYTES, "the host's formula differs");
constexpr uint32_t EMPTY = 0xffffffffu;

struct Arguments {
    TensorMap x;                 // boxes of 128 bytes x TOKENS
    TensorMap y;                 // boxes of 64 x SLICE
    const uint8_t* weight;       // [row_blocks][columns / 64, even][4] tiles
    const uint8_t* scale;        // [row_blocks][groups][32] pairs
    const uint16_t* zero;        // the same, pairs of bytes; or null
    const uint16_t* bias;        // [rows]; or null
    const float* token_scale;    // [tokens][x_groups], for 8-bit x
    const int* token_sum;        // [tokens], of x, for 8-bit x and zero points
    uint32_t* workspace;         // [tiles][receiving split][split but that][ROWS * SLICE]
    int tokens, rows;
    int row_blocks, columns;  // of the weights: blocks of 64 rows
    int groups, group_size;
    int width;  // token tiles that blocks go through before the next rows
    int x_groups, x_group_size;
    int segment;  // columns over which no scale changes, of x with groups
};

struct Place {
    int row_tile, token_tile;
};

// Tiles in the order in which blocks take them: of `width` token tiles, all with some rows, then the next rows.
struct Schedule {
    int row_tiles, token_tiles, width;

    DEVICE explicit Schedule(const Arguments& p) {
        row_tiles = (p.row_blocks + BLOCKS - 1) / BLOCKS;
        token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
        width = p.width;
    }

    DEVICE int count() const { return row_tiles * token_tiles; }

    DEVICE Place place(int index) const {
        const int band = index / (row_tiles * width), left = index - band * row_tiles * width;
        const int tokens = min(width, token_tiles - band * width);
        return {left / tokens, band * width + left % tokens};
    }
};

struct Stage {
    int index = 0;
    uint32_t parity = 0;
    DEVICE void next() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }
    DEVICE int previous() const { return index == 0 ? STAGES - 1 : index - 1; }
};

// A thread that multiplies.
struct Worker {
    uint32_t base, full, empty;  // addresses in shared memory: of the ring, of its barriers
    int split;                   // this block's
    int consumer, quarter, lane;
    int begin, end;  // steps along K: stages of a tile
    int pair;        // of this lane's rows, among the 32 of 64 rows
    Stage stage;
};

// The warp is done with a stage.
DEVICE void release(const Worker& w, int index) {
    if (w.lane == 0) mbarrier_arrive(w.empty + 8 * index);
}

DEVICE float row_scale(const void* scale, int index) {
    return FLOAT_SCALE ? static_cast<const float*>(scale)[index]
                       : to_float<Y>(static_cast<const uint16_t*>(scale)[index]);
}

// As they lie in the workspace: arithmetic makes neither a NaN of all ones nor so low a sum of products of bytes.
DEVICE uint32_t to_bits(float value) { return float_to_bits(value); }
DEVICE uint32_t to_bits(int value) { return value ^ 0x7fffffff; }
DEVICE void from_bits(uint32_t bits, float& value) { value = bits_to_float(bits); }
DEVICE void from_bits(uint32_t bits, int& value) { value = bits ^ 0x7fffffff; }

// Copies the stages of every COPIERS'th 64 of a block's rows, from number `local` on; the first copies x too.
DEVICE void copy_tiles(const Arguments& p, const Schedule& schedule, const Worker& w, int local, int first, int blocks) {
    if (local == 0) {  // weights don't depend on earlier kernels, x and the memory of y do
        wait_for_previous_kernel();
        allow_next_kernel();
    }
    Stage stage;
    const int column_tiles = (p.columns + 127) / 128 * 2;
    for (int index = first; index < schedule.count(); index += blocks) {
        const Place at = schedule.place(index);
        const int block = at.row_tile * BLOCKS + local;
        const int present = max(0, min((BLOCKS - local + COPIERS - 1) / COPIERS, (p.row_blocks - block + COPIERS - 1) / COPIERS));
        int group = 0, column = 0;  // of the next set of scales: the group, and where in it
        if constexpr (GROUPS > 0) group = w.begin * 64 * TILES / p.group_size, column = w.begin * 64 * TILES % p.group_size;
        for (int step = w.begin; step < w.end; step++) {
            const uint32_t to = w.base + stage.index * STAGE_BYTES, barrier = w.full + 8 * stage.index;
            mbarrier_wait(w.empty + 8 * stage.index, stage.parity ^ 1);
            mbarrier_arrive_expect(barrier, (local == 0 ? X_BYTES : 0) +
                                                present * (WEIGHT_BYTES + GROUPS * (SCALE_BYTES + ZERO_BYTES)));
            if (local == 0) {
                const int x = step * (BYTES ? 128 : 64), y = at.token_tile * TOKENS;
                copy_tensor(to, &p.x, x, y, barrier);
            }
            int sets[GROUPS > 0 ? GROUPS : 1];
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                sets[g] = min(group, p.groups - 1);
                column += 64 * TILES / (GROUPS > 0 ? GROUPS : 1);
                if (column >= p.group_size) column -= p.group_size, group++;
            }
#pragma unroll
            for (int i = 0; i < BLOCKS / COPIERS; i++) {
                if (i >= present) break;
                const int here = local + i * COPIERS;
                const int64_t row_block = at.row_tile * BLOCKS + here;
                const uint8_t* weight = p.weight + (row_block * column_tiles / TILES + step) * (int64_t)WEIGHT_BYTES;
                copy_bulk(to + X_BYTES + here * WEIGHT_BYTES, weight, WEIGHT_BYTES, barrier);
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const int64_t set = row_block * p.groups + sets[g];
                    copy_bulk(to + SCALE_OFFSET + (here * GROUPS + g) * SCALE_BYTES, p.scale + set * SCALE_BYTES,
                              SCALE_BYTES, barrier);
                    if constexpr (ZERO_BYTES > 0)
                        copy_bulk(to + ZERO_OFFSET + (here * GROUPS + g) * ZERO_BYTES, p.zero + set * 32, ZERO_BYTES,
                                  barrier);
                }
            }
            stage.next();
        }
    }
}

// Copies the scales that a block's tokens have in each stage. Those of tokens 16 i + 2 (lane % 4), the next, and both 8 further
// on lie side by side, for one load. Tokens beyond the last get 0.
DEVICE void copy_token_scales(const Arguments& p, const Schedule& schedule, const Worker& w, int first, int blocks) {
    wait_for_previous_kernel();
    const uint32_t place = X_SCALE_OFFSET + 64 * (w.lane / 16) + 16 * (w.lane / 2 % 4) + 8 * (w.lane / 8 % 2) + 4 * (w.lane % 2);
    Stage stage;
    for (int index = first; index < schedule.count(); index += blocks) {
        const int token = schedule.place(index).token_tile * TOKENS + w.lane;
        int group = w.begin * 128 / p.x_group_size, column = w.begin * 128 % p.x_group_size;
        for (int step = w.begin; step < w.end; step++) {
            mbarrier_wait(w.empty + 8 * stage.index, stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < TOKENS; i += 32) {
                const bool present = token + i < p.tokens;
                const float* scale = p.token_scale + (present ? (int64_t)(token + i) * p.x_groups + group : 0);
                copy_async4(w.base + stage.index * STAGE_BYTES + place + 4 * i, scale, present ? 4 : 0);
            }
            copy_async_arrive(w.full + 8 * stage.index);
            column += 128;
            if (column >= p.x_group_size) column -= p.x_group_size, group++;
            stage.next();
        }
    }
}

// What weights of 64 rows in 16 bits are expanded with: zero points, and scales of rows low and high.
struct Affine {
    ZeroPoint<BITS, X> zero[2];
    uint32_t scale[2];
};

DEVICE void load_affine(const Worker& w, uint32_t from, int set, Affine& to) {
    if constexpr (ZERO) {
        const uint32_t zero = load_shared_half(from + ZERO_OFFSET + set * ZERO_BYTES + w.pair * 2);
        to.zero[0] = ZeroPoint<BITS, X>(zero, 0), to.zero[1] = ZeroPoint<BITS, X>(zero, 1);
    }
    const uint32_t scale = load_shared(from + SCALE_OFFSET + set * SCALE_BYTES + w.pair * 4);
    to.scale[0] = permute_bytes(scale, 0, 0x1010), to.scale[1] = permute_bytes(scale, 0, 0x3232);
}

// Half a stage of the weights of 64 rows, number `local` of the block, as first operands of two products.
DEVICE void expand(const Worker& w, uint32_t from, int local, int half, Affine& affine, uint32_t (&words)[BITS],
                   uint32_t (&a)[2][4]) {
    if (BYTES || half == 0)
        load_tile<BITS>(from + X_BYTES + local * WEIGHT_BYTES + ((BYTES ? 4 * half : 0) + w.quarter) * TILE_BYTES, w.lane,
                        words);
    if constexpr (BYTES) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            dequantize_bytes<BITS>(words, s, a[s]);
#pragma unroll
            for (int r = 0; r < 4 && FP8; r++) a[s][r] = to_e4m3<BITS>(a[s][r]);
        }
    } else {
        if constexpr (GROUPS > 0)
            if (half < GROUPS) load_affine(w, from, local * GROUPS + half, affine);
#pragma unroll
        for (int s = 0; s < 2; s++) {
            dequantize<BITS, X>(words, 2 * half + s, affine.zero[0], affine.zero[1], a[s]);
#pragma unroll
            for (int r = 0; r < 4 && GROUPS > 0; r++) a[s][r] = mul2<X>(a[s][r], affine.scale[r & 1]);
        }
    }
}

// Scales of a part's rows low and high in a stage, or 1.
DEVICE void load_scales(const Worker& w, uint32_t from, int part, float (&to)[2]) {
    const uint32_t scales = from + SCALE_OFFSET + (w.consumer * PARTS + part) * SCALE_BYTES;
    if constexpr (GROUPS == 0) {
        to[0] = to[1] = 1.0f;
    } else if constexpr (FLOAT_SCALE) {
        const Words2 scale = load_shared2(scales + w.pair * 8);
        to[0] = bits_to_float(scale.x), to[1] = bits_to_float(scale.y);
    } else {
        const uint32_t scale = load_shared(scales + w.pair * 4);
        to[0] = to_float<Y>(scale), to[1] = to_float<Y>(scale >> 16);
    }
}

// The sums of a warpgroup's rows, from `block` on; `lead`: lets the other one start after that many stages.
DEVICE void multiply(const Arguments& p, Worker& w, int block, int lead, Sum (&sums)[PARTS][SUMS]) {
    uint32_t a[2][PARTS][2][4];
    uint32_t words[PARTS][BITS];
    Affine affine[PARTS];
    if constexpr (ZERO && !BYTES && GROUPS == 0) {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (block + part < p.row_blocks) {
                const uint32_t zero = p.zero[(block + part) * 32 + w.pair];
                affine[part].zero[0] = ZeroPoint<BITS, X>(zero, 0), affine[part].zero[1] = ZeroPoint<BITS, X>(zero, 1);
            }
    }
    uint32_t more = 0;  // products add to sums
    int step = w.begin;
    do {  // at least once: where paths meet, the compiler would copy sums, before they are there
        keep(more);  // or the first step would be peeled
        const uint32_t from = w.base + w.stage.index * STAGE_BYTES;
        const uint64_t tokens = wgmma_descriptor(from);
        mbarrier_wait(w.full + 8 * w.stage.index, w.stage.parity);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                expand(w, from, w.consumer * PARTS + part, half, affine[part], words[part], a[half][part]);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    wgmma<KIND, TOKENS>(sums[part], a[half][part][s], tokens + 2 * (2 * half + s), more != 0 || half > 0 || s > 0);
            wgmma_commit();
            wgmma_wait<1>();
            // The products of the stage before are done.
            if (half == 0 && step > w.begin) release(w, w.stage.previous());
        }
        more = 1;
        if (SKEW > 0 && step - w.begin == lead - 1) barrier_arrive(3, THREADS);
        w.stage.next();
    } while (++step < w.end);
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < PARTS; part++) wgmma_settle(sums[part]);
    release(w, w.stage.previous());
}

// The totals over groups of a warpgroup's rows. While sums are scaled, none of its products run, so the rest is done while
// they do: loading scales, and expanding the first half of the next stage.
template <int COUNT>
DEVICE void multiply_groups(const Arguments& p, Worker& w, int lead, Sum (&sums)[PARTS][SUMS], float (&totals)[PARTS][COUNT]) {
    uint32_t a[2][PARTS][2][4], words[PARTS][BITS];
    Affine none;
    const auto expand_half = [&](const Stage& stage, int half) {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            expand(w, w.base + stage.index * STAGE_BYTES, w.consumer * PARTS + part, half, none, words[part], a[half][part]);
    };
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (float& total : totals[part]) total = 0.0f;
    mbarrier_wait(w.full + 8 * w.stage.index, w.stage.parity);
    expand_half(w.stage, 0);
    int column = FP8 ? 0 : w.begin * 128 % p.segment;
    uint32_t more = 0;  // products add to sums
    int step = w.begin;
    do {  // at least once, as in `multiply`
        keep(more);
        const uint32_t from = w.base + w.stage.index * STAGE_BYTES;
        const uint64_t tokens = wgmma_descriptor(from);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 1) expand_half(w.stage, 1);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    wgmma<KIND, TOKENS>(sums[part], a[half][part][s], tokens + 2 * (2 * half + s), more != 0 || half > 0 || s > 0);
            wgmma_commit();
        }
        more = 1;
        float scale[PARTS][2], factors[TOKENS / 4];  // of tokens 8 i + 2 (lane % 4) and the next
#pragma unroll
        for (int part = 0; part < PARTS; part++) load_scales(w, from, part, scale[part]);
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            Words4 four = {0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u};
            if constexpr (X_GROUPS) four = load_shared4(from + X_SCALE_OFFSET + 64 * i + 16 * (w.lane % 4));
            factors[4 * i] = bits_to_float(four.x), factors[4 * i + 1] = bits_to_float(four.y);
            factors[4 * i + 2] = bits_to_float(four.z), factors[4 * i + 3] = bits_to_float(four.w);
        }
        wgmma_wait<1>();
        Stage next = w.stage;
        if (step + 1 < w.end) next.next();  // or this stage once more, for nothing
        mbarrier_wait(w.full + 8 * next.index, next.parity);
        expand_half(next, 0);
        wgmma_wait<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) wgmma_settle(sums[part]);
        release(w, w.stage.index);
        column += 128;
        // The units sum products of e4m3 in about 14 bits: every stage is added in float32.
        if (FP8 || column >= p.segment || step == w.end - 1) {
            column = 0, more = 0;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < COUNT; i++)
                    totals[part][i] += float(sums[part][i]) * (factors[i / 4 * 2 + i % 2] * scale[part][i / 2 % 2]);
        }
        if (SKEW > 0 && step - w.begin == lead - 1) barrier_arrive(3, THREADS);
        w.stage.next();
    } while (++step < w.end);
}

// This thread's place in the workspace for what one split lays there for another.
DEVICE uint32_t* place(const Arguments& p, int tile, int from, int to) {
    return p.workspace + ((int64_t)(tile * SPLIT + to) * (SPLIT - 1) + from - (from > to)) * (ROWS * SLICE) +
           thread_index() * 4;
}

template <class S>
DEVICE void give(const Arguments& p, const Worker& w, int tile, const S (&sums)[PARTS][SUMS]) {
#pragma unroll
    for (int to = 0; to < SPLIT; to++)
        if (to != w.split) {
            uint32_t* const given = place(p, tile, w.split, to);
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < SLICE_SUMS; i += 4) {
                    const S* s = &sums[part][to * SLICE_SUMS + i];
                    store_relaxed4(given + (part * SLICE_SUMS + i) * THREADS,
                                   {to_bits(s[0]), to_bits(s[1]), to_bits(s[2]), to_bits(s[3])});
                }
        }
}

// This split's slice, number OWN, with what the others lay for it, in the order of the splits.
template <int OWN, class S>
DEVICE void take(const Arguments& p, int tile, S (&sums)[PARTS][SUMS]) {
    // Times 4 sums, of every split: loads under way together, as far as registers allow.
    constexpr int PLACES = PARTS * SLICE_SUMS / 4, AT_ONCE = PLACES < 8 / SPLIT ? PLACES : 8 / SPLIT;
#pragma unroll
    for (int begin = 0; begin < PLACES; begin += AT_ONCE) {
        Words4 found[AT_ONCE][SPLIT];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int from = 0; from < SPLIT; from++)
                if (from != OWN) found[i][from] = load_relaxed4(place(p, tile, from, OWN) + 4 * (begin + i) * THREADS);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int at = 4 * (begin + i);
            S(&own)[SUMS] = sums[at / SLICE_SUMS];
            const int first = OWN * SLICE_SUMS + at % SLICE_SUMS;
            S total[4] = {0, 0, 0, 0};
#pragma unroll
            for (int from = 0; from < SPLIT; from++) {
                S more[4] = {own[first], own[first + 1], own[first + 2], own[first + 3]};
                if (from != OWN) {
                    uint32_t* const taken = place(p, tile, from, OWN) + at * THREADS;
                    Words4 words = found[i][from];
                    while (words.x == EMPTY || words.y == EMPTY || words.z == EMPTY || words.w == EMPTY) {
                        spin();
                        words = load_relaxed4(taken);
                    }
                    store_relaxed4(taken, {EMPTY, EMPTY, EMPTY, EMPTY});
                    from_bits(words.x, more[0]), from_bits(words.y, more[1]);
                    from_bits(words.z, more[2]), from_bits(words.w, more[3]);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) total[j] += more[j];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) own[first + j] = total[j];
        }
    }
}

// The sums of a warpgroup's rows, from `block` on, of slice OWN, become y.
template <int OWN, class S>
DEVICE void store(const Arguments& p, const Worker& w, int block, int token_tile, const S (&sums)[PARTS][SUMS]) {
    const uint32_t output = w.base + Y_OFFSET + w.consumer * PARTS * Y_BYTES;
    const int token = token_tile * TOKENS + OWN * SLICE;
    if (thread_index() % 128 == 0) store_tensor_wait();
    barrier_sync(1 + w.consumer, 128);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float scale[2] = {UNIT, UNIT}, shift[2] = {0.0f, 0.0f};
        int zero[2] = {0, 0};
        if (block + part < p.row_blocks) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = (block + part) * 64 + 16 * w.quarter + w.lane / 4 + 8 * r;
                if constexpr (GROUPS == 0) scale[r] *= row_scale(p.scale, (block + part) * 64 + 2 * w.pair + r);
                if constexpr (ZERO && INTEGER)
                    zero[r] = (int(p.zero[(block + part) * 32 + w.pair] >> 8 * r & 255) - (1 << (BITS - 1))) << (8 - BITS);
                if (p.bias != nullptr && row < p.rows) shift[r] = to_float<Y>(p.bias[row]);
            }
        }
#pragma unroll
        for (int i = 0; i < SLICE_SUMS; i += 8) {  // 16 tokens
            uint32_t packed[4];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int first = i + 4 * c;
                S s[4];
#pragma unroll
                for (int j = 0; j < 4; j++) s[j] = sums[part][OWN * SLICE_SUMS + first + j];
                float factor[2] = {1.0f, 1.0f};
                if constexpr (BYTES && !X_GROUPS) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int t = token + 2 * first + 2 * (w.lane % 4) + j;
                        factor[j] = t < p.tokens ? p.token_scale[t] : 0.0f;
                        if constexpr (ZERO) {
                            const int sum = t < p.tokens ? p.token_sum[t] : 0;
                            s[j] -= zero[0] * sum, s[2 + j] -= zero[1] * sum;
                        }
                    }
                }
                float value[4];
#pragma unroll
                for (int j = 0; j < 4; j++) value[j] = float(s[j]) * (scale[j / 2] * factor[j % 2]) + shift[j / 2];
                packed[2 * c] = pack2<Y>(value[0], value[1]);
                packed[2 * c + 1] = pack2<Y>(value[2], value[3]);
            }
            // This lane's row, a token, of the matrices (rows, tokens) (0, 0), (8, 0), (0, 8), (8, 8).
            const int t = 2 * i + 8 * (w.lane / 16) + w.lane % 8, chunk = 2 * w.quarter + w.lane / 8 % 2;
            store_matrices4_transposed(output + part * Y_BYTES + t * 128 + ((chunk ^ (t & 7)) << 4), packed[0], packed[1],
                                       packed[2], packed[3]);
        }
    }
    fence_async_shared();
    barrier_sync(1 + w.consumer, 128);
    if (thread_index() % 128 == 0) {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if ((block + part) * 64 < p.rows) store_tensor(&p.y, (block + part) * 64, token, output + part * Y_BYTES);
        store_tensor_commit();
    }
}

// Its slice of the sums of all splits becomes y.
template <int OWN, class S>
DEVICE void finish(const Arguments& p, const Worker& w, int tile, int block, int token_tile, S (&sums)[PARTS][SUMS]) {
    if (SPLIT == 1 || w.split == OWN) {
        if constexpr (SPLIT > 1) take<OWN>(p, tile, sums);
        store<OWN>(p, w, block, token_tile, sums);
    } else if constexpr (OWN < SPLIT - 1) {
        finish<OWN + 1>(p, w, tile, block, token_tile, sums);
    }
}

template <bool FIRST, class A, class B>
DEVICE auto& choose(A& a, B& b) {
    if constexpr (FIRST)
        return a;
    else
        return b;
}

KERNEL(linear_wgmma, THREADS + 128, 1, Arguments) {
    const Arguments& p = arguments;
    const int warp = warp_index();
    // A split's block has one tile only.
    const int first = block_index() / SPLIT, blocks = SPLIT > 1 ? 1 << 30 : grid_size();
    const int steps = (p.columns + 64 * TILES - 1) / (64 * TILES);
    Worker w;
    w.base = shared_memory(), w.full = w.base + BARRIER_OFFSET, w.empty = w.full + 8 * STAGES;
    w.consumer = warp / 4, w.quarter = warp % 4, w.lane = lane_index();
    w.split = block_index() % SPLIT, w.begin = steps * w.split / SPLIT, w.end = steps * (w.split + 1) / SPLIT;
    w.pair = w.lane / 4 * 4 + w.quarter;

    if (thread_index() == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(w.full + 8 * i, COPIERS + (X_GROUPS ? 32 : 0));
            mbarrier_init(w.empty + 8 * i, 4 * CONSUMERS);
        }
        mbarrier_init_fence();
        prefetch_tensor_map(&p.x);
        prefetch_tensor_map(&p.y);
    }
    synchronize();

    const Schedule schedule(p);
    if (warp >= 4 * CONSUMERS) {
        lower_registers<56>();
        const int local = warp - 4 * CONSUMERS;
        if (local < COPIERS && w.lane == 0) copy_tiles(p, schedule, w, local, first, blocks);
        if (X_GROUPS && local == COPIERS) copy_token_scales(p, schedule, w, first, blocks);
    } else {
        raise_registers<224>();
        const bool skewed = SKEW > 0 && SPLIT == 1 && first + blocks < schedule.count();
        int lead = skewed && w.consumer == 0 ? min(SKEW, w.end - w.begin) : 0;
        if (skewed && w.consumer == 1) barrier_sync(3, THREADS);
        for (int index = first; index < schedule.count(); index += blocks) {
            const Place at = schedule.place(index);
            const int block = at.row_tile * BLOCKS + w.consumer * PARTS;
            Sum sums[PARTS][SUMS];
            float totals[PARTS][GROUP_SUMS ? SUMS : 1];
            if constexpr (GROUP_SUMS)
                multiply_groups(p, w, lead, sums, totals);
            else
                multiply(p, w, block, lead, sums);
            auto& results = choose<GROUP_SUMS>(totals, sums);
            if constexpr (SPLIT > 1) give(p, w, index, results);
            finish<0>(p, w, index, block, at.token_tile, results);
            lead = 0;
        }
        if (thread_index() % 128 == 0) store_tensor_wait();
    }
}
