// Decode attention where all heads share one latent per token, whose first channels are its value (MLA), on sm_90a: the
// first of two kernels (the other is merge.cu). The work is split as there.
//
// With 64 rows (heads, new tokens) to a block, products and bytes take about as long, so that both must run at once. A
// warp copies tiles of 32 tokens into a ring of four in shared memory (tensor copies, boxes of 64 channels, swizzled).
// Two warpgroups take two tiles at a time. For S = Q K^T each multiplies its own tile: Q, resident in shared memory, is
// loaded into registers fragment by fragment, the tile is the second operand. They exchange the rows' maxima, and each
// writes its P where its tile's last channels were, which are no values and no longer needed. For O = P V each takes
// both tiles and half of the value's channels: its part of O is 64 x 256 numbers, 128 registers of a thread.
//
// The base of the exponentials follows the maximum only when that has grown by 8, a factor of 256.
#include "hopper.cuh"
#include "work.cuh"

// Macros: HEAD_DIM channels, VALUE_DIM of them values, 256 or 512; GROUP heads, QUERIES new tokens; QUERY_TYPE Half or
// BFloat16; PAGE tokens of a page, 0 for contiguous; WINDOW, CAPPED.
constexpr int ROWS = GROUP * QUERIES, ROW_BLOCKS = (ROWS + 63) / 64;
constexpr int PAIR = 64, SUB = 32;  // tokens of two tiles, and of one
constexpr int BOXES = HEAD_DIM / 64, BOX_BYTES = SUB * 128, TILE_BYTES = BOXES * BOX_BYTES;
constexpr int STAGES = 4;
constexpr int PITCH = HEAD_DIM * 2 + 16;  // of a row of Q, so that eight rows lie in different banks
constexpr int PART = VALUE_DIM / 2, SUMS = PART / 2;
constexpr int Q_OFFSET = STAGES * TILE_BYTES, MAXIMA_OFFSET = Q_OFFSET + 64 * PITCH;
constexpr int BARRIER_OFFSET = MAXIMA_OFFSET + 2 * 64 * 4;
constexpr int CONSUMERS = 256;
constexpr float LEAST = -3.0e38f;  // less than any logit
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM >= VALUE_DIM + 64, "the last channels of a tile make room for P");

template <class T>
struct KindOf {
    static constexpr Wgmma KIND = Wgmma::f16;
};
template <>
struct KindOf<BFloat16> {
    static constexpr Wgmma KIND = Wgmma::bf16;
};
constexpr Wgmma KIND = KindOf<QUERY_TYPE>::KIND;

struct Arguments {
    TensorMap keys;  // rows of HEAD_DIM channels, boxes of 64 channels x 32 rows
    const uint16_t* query;
    const int32_t *lengths, *block_table;
    float *partial, *statistics;
    int64_t query_stride_b, query_stride_h, query_stride_t;  // in elements
    int32_t page_rows;  // rows from page to page, or from sequence to sequence
    int32_t table_stride, batch, span, window;
    float factor, cap;
};

// The next of the ring's stages.
struct Stage {
    int index = 0;
    uint32_t parity = 0;
    DEVICE void next() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }
};

// A block's share of one sequence: pairs of tiles from `tile` to `stop`.
struct Segment {
    int sequence, length, first, tile, stop;
};

DEVICE Segment next_segment(const Arguments& a, int& position, int finish) {
    Segment s;
    int begin, count;
    scan<PAIR>(a.lengths, a.batch, 1, a.span, position, s.sequence, begin, count);
    s.length = a.lengths[s.sequence];
    tiles_of<PAIR>(s.length, a.span, s.first);
    s.tile = position - begin;
    s.stop = smaller(count, s.tile + finish - position);
    position += s.stop - s.tile;
    return s;
}

DEVICE void copy_tiles(const Arguments& a, int position, int finish) {
    const uint32_t base = shared_memory(), full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    Stage stage;
    while (position < finish) {
        const Segment s = next_segment(a, position, finish);
        for (int start = (s.first + s.tile) * PAIR; start < (s.first + s.stop) * PAIR; start += SUB) {
            const int token = smaller(start, (s.length - 1) / SUB * SUB);  // any tile in the place of one behind the end
            int page = s.sequence, inside = token;
            if (PAGE) {
                const int index = token / (PAGE ? PAGE : 1);
                page = a.block_table[s.sequence * (int64_t)a.table_stride + index], inside = token - index * PAGE;
            }
            if (lane_index() == 0) {
                const uint32_t barrier = full + 8 * stage.index;
                mbarrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
                mbarrier_arrive_expect(barrier, TILE_BYTES);
                for (int box = 0; box < BOXES; box++)
                    copy_tensor(base + stage.index * TILE_BYTES + box * BOX_BYTES, &a.keys, box * 64,
                                page * a.page_rows + inside, barrier);
            }
            stage.next();
        }
    }
}

// Rows of a tile behind the sequence's end become 0: they may hold anything, and 0 * NaN is NaN.
DEVICE void clear_rows(uint32_t tile, int from) {
    const int thread = thread_index() % 128;
    for (int i = thread; i < BOXES * (SUB - from) * 8; i += 128) {
        const int box = i / ((SUB - from) * 8), rest = i % ((SUB - from) * 8);
        store_shared4(tile + box * BOX_BYTES + from * 128 + rest * 16, Words4{0, 0, 0, 0});
    }
    fence_async_shared();
}

// Address of a lane's row of a 16 x 16 fragment of P, which has rows of 64 bytes; `step` counts 16 tokens.
DEVICE uint32_t place_of_p(uint32_t p, int row, int chunk) { return p + row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// What a warpgroup of the two computes.
DEVICE void attend(const Arguments& a, int row_block, int program, int position, int finish) {
    const uint32_t base = shared_memory(), full = base + BARRIER_OFFSET, empty = full + STAGES * 8;
    const uint32_t queries = base + Q_OFFSET, maxima = base + MAXIMA_OFFSET;
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int part = warp / 4;            // the warpgroup: its tile of a pair, and its half of the channels
    const int own = warp % 4 * 16;        // the warp's first row
    const int row = own + lane % 8 + (lane / 8 % 2) * 8, half = lane / 16;  // that the lane addresses, of fragments
    Stage stage;
    while (position < finish) {
        const Segment s = next_segment(a, position, finish);
        for (int i = thread_index(); i < 64 * (HEAD_DIM / 8); i += CONSUMERS) {
            const int r = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8), at = row_block * 64 + r;
            Words4 words = {0, 0, 0, 0};
            if (at < ROWS)
                words = load_constant4(a.query + s.sequence * a.query_stride_b + at / QUERIES * a.query_stride_h +
                                       at % QUERIES * a.query_stride_t + chunk * 8);
            store_shared4(queries + r * PITCH + chunk * 16, words);
        }
        barrier_sync(1, CONSUMERS);

        float o[SUMS], bases[2] = {LEAST, LEAST}, sums[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < SUMS; i++) o[i] = 0;

        for (int i = s.tile; i < s.stop; i++) {
            const int token = (s.first + i) * PAIR + part * SUB;  // of the own tile
            Stage second = stage;
            second.next();
            const uint32_t tiles[2] = {base + stage.index * TILE_BYTES, base + second.index * TILE_BYTES};
            const uint32_t tile = tiles[part];
            mbarrier_wait(full + 8 * (part ? second : stage).index, (part ? second : stage).parity);
            if (token + SUB > s.length) {
                clear_rows(tile, s.length > token ? s.length - token : 0);
                barrier_sync(2 + part, 128);
            }
            float x[SUB / 2], most[2] = {LEAST, LEAST};
            {
                uint32_t q[2][4][4];
#pragma unroll
                for (int box = 0; box < BOXES; box++) {
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        load_matrices4(queries + row * PITCH + box * 128 + k * 32 + half * 16, q[box % 2][k]);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        wgmma<KIND, SUB>(x, q[box % 2][k], wgmma_descriptor(tile + box * BOX_BYTES + k * 32),
                                         box + k > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                }
                wgmma_wait<0>();
                // some rows see not all of these tokens
                const bool partly =
                    token + SUB > s.length - QUERIES + 1 || (WINDOW && token <= s.length - 1 - a.window);
#pragma unroll
                for (int j = 0; j < SUB / 2; j++) {
                    const int r = j >> 1 & 1;
                    x[j] *= a.factor;
                    if (CAPPED) x[j] = a.cap * (1 - 2 / (1 + fast_exp2(x[j] * 2.8853900817779268f)));
                    if (partly) {
                        const int at = token + j / 4 * 8 + 2 * t + (j & 1);
                        const int last = s.length - QUERIES + (row_block * 64 + own + g + 8 * r) % QUERIES;
                        if (at > last || (WINDOW && at <= last - a.window)) x[j] = bits_to_float(0xff800000u);
                    }
                    most[r] = fmaxf(most[r], x[j]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], shuffle_xor(most[r], 1)), most[r] = fmaxf(most[r], shuffle_xor(most[r], 2));
                if (t == 0) store_shared(maxima + (part * 64 + own + g + 8 * r) * 4, float_to_bits(most[r]));
            }
            barrier_sync(1, CONSUMERS);
            float alpha[2];
            bool grown = false;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], bits_to_float(load_shared(maxima + ((1 - part) * 64 + own + g + 8 * r) * 4)));
                const bool follows = most[r] > bases[r] + 8;
                alpha[r] = follows ? fast_exp2(bases[r] - most[r]) : 1.0f;
                if (follows) bases[r] = most[r];
                grown = grown || follows;
            }
            if (any_lane(grown)) {
#pragma unroll
                for (int j = 0; j < SUMS; j++) o[j] *= alpha[j >> 1 & 1];
                sums[0] *= alpha[0], sums[1] *= alpha[1];
            }
            {
                const uint32_t p = tile + (BOXES - 1) * BOX_BYTES;
#pragma unroll
                for (int j = 0; j < SUB / 2; j += 2) {
                    const int r = j >> 1 & 1;
                    const float first = fast_exp2(x[j] - bases[r]), next = fast_exp2(x[j + 1] - bases[r]);
                    sums[r] += first + next;
                    store_shared(place_of_p(p, own + g + 8 * r, j / 4) + 4 * t, pack2<QUERY_TYPE>(first, next));
                }
                fence_async_shared();  // before a copy overwrites what was written here
            }
            barrier_sync(1, CONSUMERS);

            // the other warpgroup waited for its tile; so must this one
            mbarrier_wait(full + 8 * (part ? stage : second).index, (part ? stage : second).parity);
            uint32_t f[2][2][4];
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    load_matrices4(place_of_p(tiles[u] + (BOXES - 1) * BOX_BYTES, row, 2 * k + half), f[u][k]);
            wgmma_fence();
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    wgmma_transposed<KIND, PART>(
                        o, f[u][k],
                        wgmma_descriptor_transposed(tiles[u] + part * (PART / 64) * BOX_BYTES + k * 2048, BOX_BYTES), true);
            wgmma_commit();
            wgmma_wait<0>();
            synchronize_warp();
            if (lane == 0) {
                mbarrier_arrive(empty + 8 * stage.index);
                mbarrier_arrive(empty + 8 * second.index);
            }
            stage.next(), stage.next();
        }

#pragma unroll
        for (int r = 0; r < 2; r++) {
            sums[r] += shuffle_xor(sums[r], 1), sums[r] += shuffle_xor(sums[r], 2);
            if (t == 0) store_shared(maxima + (part * 64 + own + g + 8 * r) * 4, float_to_bits(sums[r]));
        }
        barrier_sync(1, CONSUMERS);
        const int64_t slot = (int64_t)(program + s.sequence) * ROWS;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = row_block * 64 + own + g + 8 * r;
            if (at >= ROWS) continue;
            if (part == 0 && t == 0) {
                a.statistics[2 * (slot + at)] = bases[r];
                a.statistics[2 * (slot + at) + 1] =
                    sums[r] + bits_to_float(load_shared(maxima + (64 + own + g + 8 * r) * 4));
            }
            float* to = a.partial + (slot + at) * VALUE_DIM + part * PART + 2 * t;
#pragma unroll
            for (int j = 0; j < SUMS; j += 4) {
                *reinterpret_cast<Words2*>(to + j / 4 * 8) =
                    Words2{float_to_bits(o[j + 2 * r]), float_to_bits(o[j + 2 * r + 1])};
            }
        }
        barrier_sync(1, CONSUMERS);  // before the next sequence's Q and maxima
    }
}

KERNEL(latent, CONSUMERS + 128, 1, Arguments) {
    const Arguments& a = arguments;
    allow_next_kernel();  // which waits for this one's results, but not to be launched
    if (thread_index() == 0) {
        const uint32_t full = shared_memory() + BARRIER_OFFSET, empty = full + STAGES * 8;
        for (int i = 0; i < STAGES; i++) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, CONSUMERS / 32);
        mbarrier_init_fence();
        prefetch_tensor_map(&a.keys);
    }
    synchronize();
    int sequence, begin, count;
    const int total = scan<PAIR>(a.lengths, a.batch, 1, a.span, -1, sequence, begin, count);
    const int programs = grid_size() / ROW_BLOCKS, each = (total + programs - 1) / programs;
    const int row_block = block_index() % ROW_BLOCKS, program = block_index() / ROW_BLOCKS;
    const int position = program * each, finish = smaller(position + each, total);
    const int warp = warp_index();
    if (warp >= CONSUMERS / 32) {
        lower_registers<40>();
        if (warp == CONSUMERS / 32) copy_tiles(a, position, finish);
    } else {
        raise_registers<232>();
        attend(a, row_block, program, position, finish);
    }
}
