// y = x W^T + bias for few tokens, W of 1 to 8 bits in the tiled layout (ops/tiles.py): bound by the bytes of W.
//
// One or two blocks per multiprocessor. W is cut in units of 64 ROW_BLOCKS rows x 128 columns, ordered by rows, then
// columns, and every block takes an equal run of them. Producer warps stream units (codes, scales, zero points, and the
// columns of x that belong to them) into a ring of stages in shared memory, as far ahead as there is room. The consumer
// warps each own ROW_TILES x 16 rows of a unit. Weights are the first operand of the tensor cores' products, in
// registers, as exact integers q - z; tokens are the second, eight at a time. Sums over the columns that share a scale
// are exact up to float32's rounding, and the scale is applied to them, not to the weights.
//
// Where a block's run begins or ends within a row of units, the sums are shared among blocks: all but the last of them
// (in the order of columns) write theirs to the workspace, and the last adds them in order, so that results don't depend
// on timing. A sum that is not there yet reads as EMPTY, a NaN that arithmetic doesn't produce; whoever has read it
// writes EMPTY again, so that the workspace is ready for the next launch. Blocks take their rows from the last to the
// first: what others wait for is computed first, and a block only waits for blocks before it.
//
// Macros: WEIGHT_BITS; ACTIVATION (Half or BFloat16); TOKENS (8, 16, 32, 64: padded); ROW_BLOCKS, ROW_TILES; SPAN (32,
// 64, 128: columns of a unit that share a scale); ZEROS (whether there are zero points); SCALE and BIAS (0 none, 1
// float16, 2 bfloat16, 3 float32).
#include "dequantize.cuh"

struct Arguments {
    const uint8_t* weight;
    const uint8_t* scale;
    const uint8_t* zero_point;
    const void* bias;
    const uint8_t* x;
    uint16_t* y;
    float* workspace;  // TOKENS * rows of a unit, per block
    int tokens, rows, columns;
    int x_stride;    // bytes from token to token, a multiple of 16
    int groups;      // per row
    int group_size;  // columns; where it exceeds SPAN, a multiple of 128
    int stages;
};

constexpr int COLUMNS = 128;
constexpr int ROWS = 64 * ROW_BLOCKS;
constexpr int WARPS = 4 * ROW_BLOCKS / ROW_TILES;  // without the producers
constexpr int THREADS = 32 * (WARPS + ROW_BLOCKS);
// Many sums need more registers than an equal share: the producers leave theirs to the others.
constexpr bool SHIFTED_REGISTERS = TOKENS >= 32 && ROW_BLOCKS == 4 && WARPS == 8;
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int QUADRUPLES = ROW_TILES * TOKEN_TILES;  // of sums in a thread
constexpr int SPANS = COLUMNS / SPAN;
constexpr int SCALE_BYTES = SCALE == 3 ? 4 : 2;
constexpr uint32_t EMPTY = 0xffffffffu;

// A stage: codes, then x, then scales, then zero points.
constexpr int TILE_BYTES = 128 * WEIGHT_BITS;
constexpr int BLOCK_BYTES = 8 * TILE_BYTES;         // 64 rows x 128 columns
constexpr int X_STRIDE = 2 * COLUMNS + 16;          // rows of x start in different banks
constexpr int BLOCK_SCALES = 64 * SPANS;            // of 64 rows
constexpr int X_OFFSET = ROW_BLOCKS * BLOCK_BYTES;
constexpr int SCALE_OFFSET = X_OFFSET + TOKENS * X_STRIDE;
constexpr int ZERO_OFFSET = SCALE_OFFSET + ROW_BLOCKS * BLOCK_SCALES * SCALE_BYTES;
constexpr int STAGE_BYTES = ZERO_OFFSET + (ZEROS ? ROW_BLOCKS * BLOCK_SCALES : 0);
constexpr int BARRIER_BYTES = 256;  // of up to 16 stages, before the stages

// A unit is worked on in halves of 64 columns. Sums of products are scaled once for both while they fit the registers.
constexpr bool WHOLE_UNIT = SPAN == 128 && TOKENS <= 16;
constexpr int SUMMED_STEPS = SPAN == 32 ? 2 : 4;  // of 16 columns, otherwise
constexpr int HALF_SPANS = SPAN == 32 ? 2 : 1;

// A block's units. Their number times that of blocks has less than 32 bits.
struct Run {
    int across, units;  // units of a row of units, and in all
    int begin, end;

    DEVICE Run(const Arguments& arguments, int block)
        : across((arguments.columns + COLUMNS - 1) / COLUMNS), units((arguments.rows + ROWS - 1) / ROWS * across) {
        begin = units * block / grid_size();
        end = units * (block + 1) / grid_size();
    }
    // The block that has a unit.
    DEVICE int owner(int unit) const { return ((unit + 1) * grid_size() - 1) / units; }
};

// Calls `visit(row of units, first column of units, one past the last)` for the run's rows, the last first.
template <class Visit>
DEVICE void for_each_row(const Run& run, Visit visit) {
    for (int end = run.end; end > run.begin;) {
        const int row = (end - 1) / run.across, start = row * run.across;
        const int first = run.begin > start ? run.begin - start : 0;
        visit(row, first, end - start);
        end = start + first;
    }
}

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
DEVICE uint32_t stage_address(int stage) { return shared_memory() + BARRIER_BYTES + stage * STAGE_BYTES; }

// One warp for every 64 rows of a unit: copies of few bytes cost as much as large ones, and the unit's share of time is
// short. Codes come by bulk copies, all else 16 bytes a lane.
struct Producer {
    const Arguments& arguments;
    const int block;  // of 64 rows
    const int lane = lane_index();
    const int across = (arguments.columns + COLUMNS - 1) / COLUMNS;
#if TENSORMILL_ARCH >= 900
    static constexpr int ARRIVALS = 33;  // the lanes, and the announcement of a bulk copy
    const uint64_t policy = policy_evict_first();
#else
    static constexpr int ARRIVALS = 32;
#endif

    DEVICE void load_weights(int stage, int row, int column) const {
        constexpr int scale_bytes = BLOCK_SCALES * SCALE_BYTES, zero_bytes = ZEROS ? BLOCK_SCALES : 0;
        const int index = row * ROW_BLOCKS + block;
        const bool present = index * 64 < arguments.rows;
        const uint8_t* codes = arguments.weight + (int64_t(index) * across + column) * BLOCK_BYTES;
        const uint32_t to = stage_address(stage);
#if TENSORMILL_ARCH >= 900
        if (lane == 0) {
            mbarrier_arrive_expect(full_barrier(stage), present ? BLOCK_BYTES : 0);
            if (present) copy_bulk(to + block * BLOCK_BYTES, codes, BLOCK_BYTES, full_barrier(stage), policy);
        }
        synchronize_warp();
#else
        if (present)
            for (int i = 16 * lane; i < BLOCK_BYTES; i += 512) copy_async16(to + block * BLOCK_BYTES + i, codes + i);
#endif
        if (!present) return;
        const int group = arguments.group_size > SPAN ? column * COLUMNS / arguments.group_size : column * SPANS;
        const int64_t first = (int64_t(index) * arguments.groups + group) * 64;
#pragma unroll
        for (int i = 16 * lane; i < scale_bytes + zero_bytes; i += 512) {
            const bool zero = i >= scale_bytes;
            copy_async16(to + (zero ? ZERO_OFFSET + block * zero_bytes - scale_bytes : SCALE_OFFSET + block * scale_bytes) + i,
                         zero ? arguments.zero_point + first + i - scale_bytes : arguments.scale + first * SCALE_BYTES + i);
        }
    }

    // Columns beyond the last become 0. Tokens beyond the last are not written: their products go nowhere.
    DEVICE void load_x(int stage, int column) const {
        const int chunk = lane % 16, first = column * COLUMNS + 8 * chunk, left = 2 * (arguments.columns - first);
        const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
        const uint32_t to = stage_address(stage) + X_OFFSET + 16 * chunk;
        const uint8_t* from = arguments.x + (bytes > 0 ? 2 * first : 0);
        for (int token = 2 * block + lane / 16; token < arguments.tokens; token += 2 * ROW_BLOCKS)
            copy_async16(to + token * X_STRIDE, from + int64_t(token) * arguments.x_stride, bytes);
        copy_async_arrive(full_barrier(stage));
    }

    DEVICE void produce(const Run& run) const {
        // Weights don't depend on the kernel before: as many as there are stages for are under way while it ends.
        int ahead = 0;
        for_each_row(run, [&](int row, int first, int last) {
            for (int column = first; column < last && ahead < arguments.stages; column++)
                load_weights(ahead++, row, column);
        });
        wait_for_previous_kernel();
        allow_next_kernel();
        Place place;
        int unit = 0;
        for_each_row(run, [&](int row, int first, int last) {
            for (int column = first; column < last; column++, unit++) {
                if (unit >= ahead) {
                    mbarrier_wait(empty_barrier(place.stage), place.parity ^ 1);
                    load_weights(place.stage, row, column);
                }
                load_x(place.stage, column);
                place.advance(arguments.stages);
            }
        });
    }
};

template <int KIND>
DEVICE float number(uint32_t bits) {
    if constexpr (KIND == 1) return to_float<Half>(bits);
    if constexpr (KIND == 2) return to_float<BFloat16>(bits);
    return bits_to_float(bits);
}

struct Consumer {
    const Arguments& arguments;
    const int warp, lane;
    // Of this warp's rows, in units of 16: the block of 64 rows and the place within it.
    const int first_tile = warp * ROW_TILES, block = first_tile / 4, tile_in_block = first_tile % 4;
    float sum[ROW_TILES][TOKEN_TILES][4];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < 4 * QUADRUPLES; i++) sum[i / 4 / TOKEN_TILES][i / 4 % TOKEN_TILES][i % 4] = 0;
    }

    // Scales and zero points of rows 16 i + lane / 4 and 8 rows on, of this warp's rows.
    DEVICE void load_groups(uint32_t stage, int span, int i, float (&scale)[2],
                            ZeroPoint<WEIGHT_BITS, ACTIVATION> (&zero)[2]) const {
        const int index = block * BLOCK_SCALES + span * 64 + lane / 4 * 8 + 2 * (tile_in_block + i);
        const uint32_t address = stage + SCALE_OFFSET + index * SCALE_BYTES;
        if constexpr (SCALE == 3) {
            const Words2 pair = load_shared2(address);
            scale[0] = bits_to_float(pair.x), scale[1] = bits_to_float(pair.y);
        } else {
            const uint32_t pair = load_shared(address);
            scale[0] = number<SCALE>(pair & 0xffff), scale[1] = number<SCALE>(pair >> 16);
        }
        if constexpr (ZEROS) {
            const uint32_t pair = load_shared_half(stage + ZERO_OFFSET + index);
            zero[0] = ZeroPoint<WEIGHT_BITS, ACTIVATION>(pair & 0xff);
            zero[1] = ZeroPoint<WEIGHT_BITS, ACTIVATION>(pair >> 8);
        }
    }

    DEVICE void multiply(uint32_t stage) {
        float scale[ROW_TILES][HALF_SPANS][2];
        ZeroPoint<WEIGHT_BITS, ACTIVATION> zero[ROW_TILES][2];
        float partial[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[ROW_TILES][4][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                uint32_t words[WEIGHT_BITS];
                load_tile<WEIGHT_BITS>(stage + block * BLOCK_BYTES + (4 * half + tile_in_block + i) * TILE_BYTES, lane,
                                       words);
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    if ((64 * half + 16 * step) % SPAN == 0)
                        load_groups(stage, (64 * half + 16 * step) / SPAN, i, scale[i][16 * step / SPAN], zero[i]);
                    dequantize<WEIGHT_BITS, ACTIVATION>(words, step, zero[i][0], zero[i][1], a[i][step]);
                }
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                uint32_t x[2][4];  // B fragments of two steps each
#pragma unroll
                for (int pair = 0; pair < 2; pair++)
                    load_matrices4(stage + X_OFFSET + (8 * n + lane % 8) * X_STRIDE +
                                       2 * (64 * half + 32 * pair + lane / 8 * 8),
                                   x[pair]);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int step = 0; step < 4; step++) {
                        const bool starts = WHOLE_UNIT ? half == 0 && step == 0 : step % SUMMED_STEPS == 0;
                        const bool ends = WHOLE_UNIT ? half == 1 && step == 3 : step % SUMMED_STEPS == SUMMED_STEPS - 1;
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            if (starts) partial[i][n][j] = 0;
                        const uint32_t b[2] = {x[step / 2][step % 2 * 2], x[step / 2][step % 2 * 2 + 1]};
                        mma<ACTIVATION>(partial[i][n], a[i][step], b);
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            if (ends) sum[i][n][j] += partial[i][n][j] * scale[i][16 * step / SPAN][j / 2];
                    }
            }
        }
    }

    // This thread's quadruple i in the workspace of a block.
    DEVICE float* slot(int block, int i) const {
        return arguments.workspace + ((int64_t(block) * QUADRUPLES + i) * (32 * WARPS) + 32 * warp + lane) * 4;
    }

    DEVICE void give_away() const {
#pragma unroll
        for (int i = 0; i < QUADRUPLES; i++) {
            const float(&from)[4] = sum[i / TOKEN_TILES][i % TOKEN_TILES];
            store_relaxed4(slot(block_index(), i), {float_to_bits(from[0]), float_to_bits(from[1]),
                                                    float_to_bits(from[2]), float_to_bits(from[3])});
        }
    }

    // Adds the sums of blocks `first` to `last` - 1.
    DEVICE void add(int first, int last) {
        // Loads of several blocks are under way together, as far as registers allow.
        constexpr int at_once = QUADRUPLES < 8 ? 8 / QUADRUPLES : 1, some = QUADRUPLES < 8 ? QUADRUPLES : 8;
        for (int begin = first; begin < last; begin += at_once) {
#pragma unroll
            for (int from = 0; from < QUADRUPLES; from += some) {
                Words4 found[at_once][some];
#pragma unroll
                for (int j = 0; j < at_once; j++)
#pragma unroll
                    for (int i = 0; i < some; i++)
                        if (begin + j < last) found[j][i] = load_relaxed4(slot(begin + j, from + i));
#pragma unroll
                for (int j = 0; j < at_once; j++)
#pragma unroll
                    for (int i = 0; i < some; i++) {
                        if (begin + j >= last) continue;
                        float* const place = slot(begin + j, from + i);
                        Words4 words = found[j][i];
                        while (words.x == EMPTY || words.y == EMPTY || words.z == EMPTY || words.w == EMPTY) {
                            spin();
                            words = load_relaxed4(place);
                        }
                        store_relaxed4(place, {EMPTY, EMPTY, EMPTY, EMPTY});
                        float(&to)[4] = sum[(from + i) / TOKEN_TILES][(from + i) % TOKEN_TILES];
                        to[0] += bits_to_float(words.x), to[1] += bits_to_float(words.y);
                        to[2] += bits_to_float(words.z), to[3] += bits_to_float(words.w);
                    }
            }
        }
    }

    DEVICE void store(int row) const {
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int n = row * ROWS + (first_tile + i) * 16 + 8 * h + lane / 4;
                if (n >= arguments.rows) continue;
                float bias = 0;
                if constexpr (BIAS == 3) bias = static_cast<const float*>(arguments.bias)[n];
                if constexpr (BIAS == 1 || BIAS == 2) bias = number<BIAS>(static_cast<const uint16_t*>(arguments.bias)[n]);
#pragma unroll
                for (int m = 0; m < TOKEN_TILES; m++) {
                    const int token = 8 * m + lane % 4 * 2;
                    const uint32_t pair = pack2<ACTIVATION>(sum[i][m][2 * h] + bias, sum[i][m][2 * h + 1] + bias);
                    uint16_t* to = arguments.y + int64_t(token) * arguments.rows + n;
                    if (token < arguments.tokens) to[0] = uint16_t(pair);
                    if (token + 1 < arguments.tokens) to[arguments.rows] = uint16_t(pair >> 16);
                }
            }
    }

    DEVICE void consume(const Run& run) {
        wait_for_previous_kernel();
        allow_next_kernel();
        Place place;
        for_each_row(run, [&](int row, int first, int last) {
            // Past the last row there is nothing in shared memory but what was there.
            const bool present = (row * ROW_BLOCKS + block) * 64 < arguments.rows;
            clear();
            for (int column = first; column < last; column++) {
                mbarrier_wait(full_barrier(place.stage), place.parity);
                if (present) multiply(stage_address(place.stage));
                synchronize_warp();
                if (lane == 0) mbarrier_arrive(empty_barrier(place.stage));
                place.advance(arguments.stages);
            }
            if (!present) return;
            if (last < run.across) return give_away();
            if (first > 0) add(run.owner(row * run.across), block_index());
            store(row);
        });
    }
};

KERNEL(linear_stream, THREADS, 1, Arguments) {
    if (thread_index() < arguments.stages) {
        mbarrier_init(full_barrier(thread_index()), ROW_BLOCKS * Producer::ARRIVALS);
        mbarrier_init(empty_barrier(thread_index()), WARPS);
        mbarrier_init_fence();
    }
    synchronize();
    const Run run(arguments, block_index());
    const int warp = warp_index();
    if (warp >= WARPS) {
        if constexpr (SHIFTED_REGISTERS) lower_registers<72>();
        Producer{arguments, warp - WARPS}.produce(run);
    } else {
        if constexpr (SHIFTED_REGISTERS) raise_registers<216>();
        Consumer{arguments, warp, lane_index()}.consume(run);
    }
}
