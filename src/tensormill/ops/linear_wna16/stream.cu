// y = x W^T + bias for few tokens, W of 1 to 8 bits in the tiled layout (ops/tiles.py): bound by the bytes of W.
//
// One block per multiprocessor. W is cut in units of 64 ROW_BLOCKS rows x 128 columns, ordered by rows, then columns, and
// every block takes an equal run of them. Producer warps, one for every 64 rows, stream units (codes, scales, zero points,
// and the columns of x that belong to them) into a ring of stages in shared memory, as far ahead as there is room.
//
// Consumer warps work in pairs. Both of a pair multiply the same SUMMED_TILES x 16 rows of a unit, each by 64 of its columns:
// weights are the first operand of the tensor cores' products, in registers, as exact integers q - z; tokens are the
// second, eight at a time. Sums over the columns that share a scale are exact up to float32's rounding, and the scale is
// applied to them, not to the weights. After the last column each of the pair gets the whole sums of half of the rows.
//
// Where a block's run begins or ends within a row of units, the sums are shared among blocks, and the last of them (in the
// order of columns) adds those of the others in order, so that results don't depend on timing. They travel through the
// workspace. A sum that is not there yet reads as EMPTY, a NaN that arithmetic doesn't produce; whoever has read it writes
// EMPTY again, so that the workspace is ready for the next launch. Blocks take their rows from the last to the first: what
// others wait for is computed first, and a block only waits for blocks before it. Units of fewer rows are shared by fewer
// blocks, but take more of x's bytes.
//
// Macros: WEIGHT_BITS; ACTIVATION (Half or BFloat16); TOKENS (8, 16, 32: padded); ROW_BLOCKS (2, 4); SPAN (32, 64, 128:
// columns of a unit that share a scale); ZEROS (whether there are zero points); SCALE and BIAS (0 none, 1 float16,
// 2 bfloat16, 3 float32).
#include "dequantize.cuh"

struct Arguments {
    const uint8_t* weight;
    const uint8_t* scale;
    const uint8_t* zero_point;
    const void* bias;
    const uint8_t* x;
    uint16_t* y;
    float* workspace;  // KEPT * 128 * CONSUMERS, of a block
    int tokens, rows, columns;
    int x_stride;    // bytes from token to token, a multiple of 16
    int groups;      // per row
    int group_size;  // columns; where it exceeds SPAN, a multiple of 128
    int stages;
    int across;                // units of a row of units
    int units, larger_blocks;  // of a block; so many blocks, the first, have one more
};

constexpr int COLUMNS = 128;  // of a block of columns
constexpr int ROWS = 64 * ROW_BLOCKS;
constexpr int CONSUMERS = 8;
constexpr int THREADS = 32 * (CONSUMERS + ROW_BLOCKS);
constexpr int SUMMED_TILES = ROW_BLOCKS;
// Where sums need more registers than an equal share, the producers leave some of theirs.
constexpr bool SHIFTED_REGISTERS = ROW_BLOCKS == 4 && TOKENS == 32;
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int QUADRUPLES = SUMMED_TILES * TOKEN_TILES;  // of sums, of a thread: 16 rows x 8 tokens of its warp
constexpr int KEPT = QUADRUPLES / 2;
constexpr int SPANS = COLUMNS / SPAN;
constexpr int SCALE_BYTES = SCALE == 3 ? 4 : 2;
constexpr uint32_t EMPTY = 0xffffffffu;

// A stage: codes, then x, then scales, then zero points.
constexpr int TILE_BYTES = 128 * WEIGHT_BITS;
constexpr int BLOCK_BYTES = 8 * TILE_BYTES;                    // 64 rows x 128 columns
constexpr int X_STRIDE = 2 * COLUMNS + 16;                     // rows of x start in different banks
constexpr int BLOCK_SCALES = 64 * SPANS;                       // of 64 rows x 128 columns
constexpr int X_OFFSET = ROW_BLOCKS * BLOCK_BYTES;
constexpr int SCALE_OFFSET = X_OFFSET + TOKENS * X_STRIDE;
constexpr int ZERO_OFFSET = SCALE_OFFSET + ROW_BLOCKS * BLOCK_SCALES * SCALE_BYTES;
constexpr int STAGE_BYTES = ZERO_OFFSET + (ZEROS ? ROW_BLOCKS * BLOCK_SCALES : 0);
// Before the stages: the barriers of up to 16, and what consumers give to each other, two places of 16
// bytes a thread.
constexpr int BARRIER_BYTES = 256;
constexpr int STAGES_OFFSET = BARRIER_BYTES + 2 * CONSUMERS * 512;

// A block's units.
struct Run {
    const int across, begin, end;

    DEVICE Run(const Arguments& a, int block)
        : across(a.across),
          begin(block * a.units + (block < a.larger_blocks ? block : a.larger_blocks)),
          end(begin + a.units + (block < a.larger_blocks ? 1 : 0)) {}
};

DEVICE int block_of(const Arguments& a, int unit) {
    const int in_larger = a.larger_blocks * (a.units + 1);
    return unit < in_larger ? unit / (a.units + 1) : a.larger_blocks + (unit - in_larger) / a.units;
}

// The part of a block's run that lies in one row of units, the last row first.
struct Part {
    int row, first, last;  // columns of units, one past the last

    DEVICE Part(const Run& run, int end) : row((end - 1) / run.across) {
        const int start = row * run.across;
        first = run.begin > start ? run.begin - start : 0;
        last = end - start;
    }
    DEVICE int begin(const Run& run) const { return row * run.across + first; }  // where the next one ends
};

// A place in the ring of stages, and how often it went round.
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    DEVICE void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

DEVICE uint32_t full_barrier(int stage) { return shared_memory() + 16 * stage; }
DEVICE uint32_t empty_barrier(int stage) { return shared_memory() + 16 * stage + 8; }
DEVICE uint32_t stage_address(int stage) {
    return shared_memory() + STAGES_OFFSET + stage * STAGE_BYTES;
}

#if TENSORMILL_ARCH >= 900
constexpr int PRODUCER_ARRIVALS = 33;  // its lanes, and the announcement of a bulk copy
#else
constexpr int PRODUCER_ARRIVALS = 32;
#endif

// A walk through the weights of a run, 64 rows of them: codes come by bulk copies, all else 16 bytes a lane. A unit's
// share of time is short, so addresses are computed once per row and then move on.
struct WeightWalk {
    const Arguments& arguments;
    const Run& run;
    const int block, lane;
    int end, left;             // where the current row's part ends, and how many of its units are left
    bool present;              // whether there are rows
    const uint8_t* codes;      // of the next unit
    const uint8_t* groups[2];  // what this lane copies of scales and zero points
    int same;                  // units until the next group
#if TENSORMILL_ARCH >= 900
    const uint64_t policy = policy_evict_first();
#endif

    static constexpr int SCALES = BLOCK_SCALES * SCALE_BYTES, BYTES = SCALES + (ZEROS ? BLOCK_SCALES : 0);
    static constexpr int COPIES = (BYTES + 511) / 512;  // a lane

    DEVICE WeightWalk(const Arguments& arguments, const Run& run, int block)
        : arguments(arguments), run(run), block(block), lane(lane_index()), end(run.end) {
        begin_row();
    }

    DEVICE int units_per_group() const { return arguments.group_size > SPAN ? arguments.group_size / COLUMNS : 1; }

    DEVICE void begin_row() {
        const Part part(run, end);
        const int64_t index = part.row * ROW_BLOCKS + block;
        left = part.last - part.first, end = part.begin(run);
        const int first = part.first;
        present = index * 64 < arguments.rows;
        codes = arguments.weight + (index * arguments.across + first) * BLOCK_BYTES;
        const int per_group = units_per_group(), group = per_group > 1 ? first / per_group : first;
        same = per_group > 1 ? per_group - first % per_group : 1;
        const int64_t scales = index * arguments.groups + group * SPANS;
        groups[0] = arguments.scale + scales * (64 * SCALE_BYTES);
        groups[1] = arguments.zero_point + scales * 64;
    }

    DEVICE void load(int stage) {
        const uint32_t to = stage_address(stage);
        const int bytes = present ? BLOCK_BYTES : 0;
#if TENSORMILL_ARCH >= 900
        if (lane == 0) {
            mbarrier_arrive_expect(full_barrier(stage), bytes);
            if (present) copy_bulk(to + block * BLOCK_BYTES, codes, bytes, full_barrier(stage), policy);
        }
#else
        for (int i = 16 * lane; i < bytes; i += 512) copy_async16(to + block * BLOCK_BYTES + i, codes + i);
#endif
#pragma unroll
        for (int copy = 0; copy < COPIES; copy++) {
            const int i = 16 * lane + 512 * copy;
            const bool zero = i >= SCALES;
            const uint32_t place = zero ? ZERO_OFFSET + block * BLOCK_SCALES + i - SCALES : SCALE_OFFSET + block * SCALES + i;
            if (i < BYTES && present) copy_async16(to + place, zero ? groups[1] + i - SCALES : groups[0] + i);
        }
        if (--same == 0) {
            same = units_per_group();
            groups[0] += SCALES, groups[1] += BLOCK_SCALES;
        }
        codes += BLOCK_BYTES;
        if (--left == 0 && end > run.begin) begin_row();
    }
};

// A walk through x along a run, for one producer of ROW_BLOCKS: 16 bytes of every 2 ROW_BLOCKS-th token a lane.
struct XWalk {
    const Arguments& arguments;
    const Run& run;
    const int chunk, token;
    int end, left;
    int bytes;            // to the end of the row, may be negative: columns beyond the last become 0
    const uint8_t* from;

    DEVICE XWalk(const Arguments& arguments, const Run& run, int block)
        : arguments(arguments), run(run), chunk(lane_index() % 16), token(2 * block + lane_index() / 16), end(run.end) {
        begin_row();
    }

    DEVICE void begin_row() {
        const Part part(run, end);
        left = part.last - part.first, end = part.begin(run);
        const int column = part.first * COLUMNS + 8 * chunk;
        bytes = 2 * (arguments.columns - column);
        from = arguments.x + int64_t(token) * arguments.x_stride + 2 * column;
    }

    // Tokens beyond the last are not written: their products go nowhere.
    DEVICE void load(int stage) {
        const uint32_t to = stage_address(stage) + X_OFFSET + token * X_STRIDE + 16 * chunk;
        const int count = bytes < 0 ? 0 : bytes < 16 ? bytes : 16;
#pragma unroll
        for (int i = 0; i < TOKENS; i += 2 * ROW_BLOCKS)
            if (token + i < arguments.tokens)
                copy_async16(to + i * X_STRIDE, from + int64_t(i) * arguments.x_stride, count);
        bytes -= 2 * COLUMNS;
        copy_async_arrive(full_barrier(stage));
        from += 2 * COLUMNS;
        if (--left == 0 && end > run.begin) begin_row();
    }
};

DEVICE void produce(const Arguments& arguments, const Run& run, int block) {
    WeightWalk weights(arguments, run, block);
    // Weights don't depend on the kernel before: as many as there are stages for are under way while it ends.
    const int units = run.end - run.begin, ahead = units < arguments.stages ? units : arguments.stages;
    for (int stage = 0; stage < ahead; stage++) weights.load(stage);
    wait_for_previous_kernel();
    allow_next_kernel();
    XWalk x(arguments, run, block);
    Place place;
    for (int unit = 0; unit < units; unit++) {
        if (unit >= ahead) {
            mbarrier_wait(empty_barrier(place.stage), place.parity ^ 1);
            weights.load(place.stage);
        }
        x.load(place.stage);
        place.advance(arguments.stages);
    }
}

template <int KIND>
DEVICE float number(uint32_t bits) {
    if constexpr (KIND == 1) return to_float<Half>(bits);
    if constexpr (KIND == 2) return to_float<BFloat16>(bits);
    return bits_to_float(bits);
}

struct Consumer {
    const Arguments& arguments;
    const int warp, lane;
    const int pair = warp / 2, way = warp % 2;  // `way`: which 64 of a unit's columns
    // Of the pair's rows, in units of 16: the first in a unit, its block of 64 rows, and its place there.
    const int first_tile = pair * SUMMED_TILES, block = first_tile / 4, tile_in_block = first_tile % 4;
    float sum[QUADRUPLES][4];  // of tile i and tokens 8 n: number i * TOKEN_TILES + n; after `exchange`, the first KEPT
    uint32_t codes_at, x_at, group_index;  // of this warp or lane: bytes in a stage, and number among scales
    int turn = 0;              // place for an exchange

    DEVICE void begin() {
        const int span = SPAN == 128 ? 0 : way * (64 / SPAN);
        group_index = (block * SPANS + span) * 64 + lane / 4 * 8 + 2 * tile_in_block;
        codes_at = block * BLOCK_BYTES + (4 * way + tile_in_block) * TILE_BYTES;
        x_at = X_OFFSET + lane % 8 * X_STRIDE + 128 * way + lane / 8 * 16;
        if constexpr (TOKENS < 32) keep(codes_at), keep(x_at), keep(group_index);
    }

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < QUADRUPLES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = 0;
    }

    // Scales of rows 16 i + lane / 4 and 8 rows on, of the pair's rows.
    DEVICE void load_scales(uint32_t address, int i, float (&scale)[2]) const {
        if constexpr (SCALE == 3) {
            const Words2 pair = load_shared2(address + 8 * i);
            scale[0] = bits_to_float(pair.x), scale[1] = bits_to_float(pair.y);
        } else {
            const uint32_t pair = load_shared(address + 4 * i);
            scale[0] = number<SCALE>(pair & 0xffff), scale[1] = number<SCALE>(pair >> 16);
        }
    }

    DEVICE void multiply(uint32_t stage) {
        constexpr int steps = SPAN == 32 ? 2 : 4;  // of 16 columns, whose sums are scaled together
        uint32_t zeros[4 / steps][2];
        if constexpr (ZEROS) {
#pragma unroll
            for (int span = 0; span < 4 / steps; span++) {
                const uint32_t address = stage + ZERO_OFFSET + group_index + 64 * span;
                if constexpr (SUMMED_TILES == 4) {
                    const Words2 found = load_shared2(address);
                    zeros[span][0] = found.x, zeros[span][1] = found.y;
                } else {
                    zeros[span][0] = load_shared(address);
                }
            }
        }
        uint32_t x[TOKEN_TILES][2][4];  // B fragments of four steps
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++)
                load_matrices4(stage + x_at + 8 * n * X_STRIDE + 64 * pair, x[n][pair]);
#pragma unroll
        for (int i = 0; i < SUMMED_TILES; i++) {
            uint32_t words[WEIGHT_BITS];
            load_tile<WEIGHT_BITS>(stage + codes_at + i * TILE_BYTES, lane, words);
            float partial[TOKEN_TILES][4];
            ZeroPoint<WEIGHT_BITS, ACTIVATION> zero[2];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                if (step % steps == 0) {
#pragma unroll
                    for (int h = 0; h < 2 && ZEROS; h++)
                        zero[h] = ZeroPoint<WEIGHT_BITS, ACTIVATION>(zeros[step / steps][i / 2], i % 2 * 2 + h);
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) partial[n][j] = 0;
                }
                uint32_t a[4];
                dequantize<WEIGHT_BITS, ACTIVATION>(words, step, zero[0], zero[1], a);
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; n++) {
                    const uint32_t b[2] = {x[n][step / 2][step % 2 * 2], x[n][step / 2][step % 2 * 2 + 1]};
                    mma<ACTIVATION>(partial[n], a, b);
                }
                if (step % steps == steps - 1) {
                    float scale[2];
                    load_scales(stage + SCALE_OFFSET + (group_index + 64 * (step / steps)) * SCALE_BYTES, i, scale);
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[i * TOKEN_TILES + n][j] += partial[n][j] * scale[j / 2];
                }
            }
        }
    }

    // Of the pair, each keeps one half of the sums and gets the other's.
    DEVICE void exchange() {
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            float(&low)[4] = sum[i];
            const float(&up)[4] = sum[KEPT + i];
            const uint32_t place = shared_memory() + BARRIER_BYTES + (turn * CONSUMERS * 32 + lane) * 16;
            store_shared4(place + 512 * warp, {float_to_bits(way ? low[0] : up[0]), float_to_bits(way ? low[1] : up[1]),
                                               float_to_bits(way ? low[2] : up[2]), float_to_bits(way ? low[3] : up[3])});
            barrier_sync(1 + pair, 64);
#pragma unroll
            for (int j = 0; j < 4; j++) low[j] = way ? up[j] : low[j];
            add_to(low, load_shared4(place + 512 * (warp ^ 1)));
            turn ^= 1;  // what was read stays until both have met again
        }
    }

    // Where this thread's sum number i lies among what a block gives, in units of 16 bytes.
    DEVICE int place(int i) const { return i * (32 * CONSUMERS) + 32 * warp + lane; }
    DEVICE float* slot(int block, int i) const {
        float* workspace = arguments.workspace;
        keep(workspace);  // or addresses take registers, all the time
        return workspace + (int64_t(block) * (KEPT * 32 * CONSUMERS) + place(i)) * 4;
    }

    DEVICE void give_away() const {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            store_relaxed4(slot(block_index(), i), {float_to_bits(sum[i][0]), float_to_bits(sum[i][1]),
                                                    float_to_bits(sum[i][2]), float_to_bits(sum[i][3])});
    }

    DEVICE void add_to(float (&to)[4], const Words4& words) const {
        to[0] += bits_to_float(words.x), to[1] += bits_to_float(words.y);
        to[2] += bits_to_float(words.z), to[3] += bits_to_float(words.w);
    }

    // Adds the sums of blocks `first` to `last` - 1.
    DEVICE void add(int first, int last) {
        // Loads of several blocks are under way together, as far as registers allow.
        constexpr int at_once = 8 / KEPT;
        for (int begin = first; begin < last; begin += at_once) {
            Words4 found[at_once][KEPT];
#pragma unroll
            for (int j = 0; j < at_once; j++)
#pragma unroll
                for (int i = 0; i < KEPT; i++)
                    if (begin + j < last) found[j][i] = load_relaxed4(slot(begin + j, i));
#pragma unroll
            for (int j = 0; j < at_once; j++)
#pragma unroll
                for (int i = 0; i < KEPT; i++) {
                    if (begin + j >= last) continue;
                    float* const place = slot(begin + j, i);
                    Words4 words = found[j][i];
                    while (words.x == EMPTY || words.y == EMPTY || words.z == EMPTY || words.w == EMPTY) {
                        spin();
                        words = load_relaxed4(place);
                    }
                    store_relaxed4(place, {EMPTY, EMPTY, EMPTY, EMPTY});
                    add_to(sum[i], words);
                }
        }
    }

    DEVICE void store(int row) const {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int n = row * ROWS + (first_tile + (way * KEPT + i) / TOKEN_TILES) * 16 + 8 * h + lane / 4;
                if (n >= arguments.rows) continue;
                float bias = 0;
                if constexpr (BIAS == 3) bias = static_cast<const float*>(arguments.bias)[n];
                if constexpr (BIAS == 1 || BIAS == 2) bias = number<BIAS>(static_cast<const uint16_t*>(arguments.bias)[n]);
                const int token = (way * KEPT + i) % TOKEN_TILES * 8 + lane % 4 * 2;
                const uint32_t pair = pack2<ACTIVATION>(sum[i][2 * h] + bias, sum[i][2 * h + 1] + bias);
                uint16_t* to = arguments.y + int64_t(token) * arguments.rows + n;
                if (token < arguments.tokens) to[0] = uint16_t(pair);
                if (token + 1 < arguments.tokens) to[arguments.rows] = uint16_t(pair >> 16);
            }
    }

    DEVICE void consume(const Run& run) {
        begin();
        wait_for_previous_kernel();
        allow_next_kernel();
        Place place;
        for (int end = run.end; end > run.begin;) {
            const Part part(run, end);
            end = part.begin(run);
            // Past the last row or column there is nothing in shared memory but what was there.
            const bool present = (part.row * ROW_BLOCKS + block) * 64 < arguments.rows;
            clear();
            for (int column = part.first; column < part.last; column++) {
                mbarrier_wait(full_barrier(place.stage), place.parity);
                if (present) multiply(stage_address(place.stage));
                synchronize_warp();
                if (lane == 0) mbarrier_arrive(empty_barrier(place.stage));
                place.advance(arguments.stages);
            }
            if (!present) continue;
            exchange();
            if (part.last < run.across) {
                give_away();
                continue;
            }
            if (part.first > 0) add(block_of(arguments, part.row * run.across), block_index());
            store(part.row);
        }
    }
};

KERNEL(linear_stream, THREADS, 1, Arguments) {
    if (thread_index() < arguments.stages) {
        mbarrier_init(full_barrier(thread_index()), ROW_BLOCKS * PRODUCER_ARRIVALS);
        mbarrier_init(empty_barrier(thread_index()), CONSUMERS);
        mbarrier_init_fence();
    }
    synchronize();
    const Run run(arguments, block_index());
    const int warp = warp_index();
    if (warp >= CONSUMERS) {
        if constexpr (SHIFTED_REGISTERS) lower_registers<88>();
        produce(arguments, run, warp - CONSUMERS);
    } else {
        if constexpr (SHIFTED_REGISTERS) raise_registers<208>();
        Consumer{arguments, warp, lane_index()}.consume(run);
    }
}
