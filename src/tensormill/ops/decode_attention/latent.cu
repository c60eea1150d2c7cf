// Decode attention where all heads share one latent per token, whose first channels are its value (MLA), on sm_90a: the
// first of two kernels (the other, merge.cu, is for sequences that several blocks have a part of).
//
// With 64 rows (heads, new tokens) to a block, products and bytes take about as long, and the tensor cores must never
// wait. A tile is 64 tokens, and two of them are in shared memory beside Q. Two warpgroups take tiles in turn: each
// computes S = Q K^T and the softmax of its own tiles, and of every tile O += P V for its half of the channels: 64 x 256
// numbers, 128 registers of a thread. One's softmax runs while the other multiplies:
//
//     S(t) of what is no value and of the own half of the channels; O += P(t-1) V(t-1); S(t) of the other half; the half of
//     tile t-1 released; P(t) computed, and written for the other warpgroup; O += P(t) V(t); its half released.
//
// Two chains bound a tile's time. From P(t-1) to P(t): a product with V, half of S, the softmax; what precedes P(t-1) runs
// during the other's softmax. From a part's release to its next use: about 1200 cycles of copying, for which every part is
// released as soon as its last product is done. The warps that copy bring the next tile into the second-level cache
// meanwhile: from memory it would take too long. Two blocks with the same tiles and other rows are a cluster: each loads
// half of every tile, for both.
//
// The base of the exponentials is one for both warpgroups, passed on from tile to tile with P. It follows the maximum only
// when that has grown by 8, a factor of 256.
#include "hopper.cuh"
#include "work.cuh"

// Macros: HEAD_DIM channels, VALUE_DIM of them values, 256 or 512; GROUP heads, QUERIES new tokens; QUERY_TYPE Half or
// BFloat16; PAGE tokens of a page, 0 for contiguous; WINDOW, CAPPED.
constexpr int ROWS = GROUP * QUERIES, ROW_BLOCKS = (ROWS + 63) / 64, CLUSTER = ROW_BLOCKS % 2 ? 1 : 2;
constexpr int TILE = 64, PIECE = 32;  // tokens of a tile, and of one copy
constexpr int BOXES = HEAD_DIM / 64, BOX_BYTES = TILE * 128, TILE_BYTES = BOXES * BOX_BYTES;
constexpr int PART = VALUE_DIM / 2, PART_BOXES = PART / 64, SUMS = PART / 2;
constexpr int REST = BOXES - 2 * PART_BOXES;  // boxes that are no values
constexpr int P_OFFSET = 2 * TILE_BYTES, Q_OFFSET = P_OFFSET + BOX_BYTES, BASES_OFFSET = Q_OFFSET + TILE_BYTES;
constexpr int SUMS_OFFSET = BASES_OFFSET + 64 * 4, BARRIER_OFFSET = SUMS_OFFSET + 2 * 64 * 4;
constexpr int CONSUMERS = 256, COPIERS = 2;
constexpr float LEAST = -3.0e38f;  // less than any logit
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM >= VALUE_DIM, "values are the first of whole boxes of channels");

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
    uint16_t* output;  // of sequences that are one block's work; null where there are sinks, which merge.cu adds
    float* lse;
    int64_t query_stride_b, query_stride_h, query_stride_t;  // in elements
    int32_t page_rows;  // rows from page to page, or from sequence to sequence
    int32_t table_stride, batch, span, window;
    float factor, cap;
};

// Barriers: a box of a tile has arrived; a part of it, a half of the values or (2) what is no value, is free.
DEVICE uint32_t full(int buffer, int box) { return shared_memory() + BARRIER_OFFSET + 8 * (buffer * BOXES + box); }
DEVICE uint32_t empty(int buffer, int part) { return full(2, 0) + 8 * (3 * buffer + part); }

// A block's share of one sequence: `count` tiles from the token `start` on; tile j is in buffer j % 2.
struct Segment {
    int sequence, length, start, count;
    bool whole;  // all of it
};

DEVICE Segment next_segment(const Arguments& a, int& position, int finish) {
    Segment s;
    int begin, count, first;
    scan<TILE>(a.lengths, a.batch, 1, a.span, position, s.sequence, begin, count);
    s.length = a.lengths[s.sequence];
    tiles_of<TILE>(s.length, a.span, first);
    const int tile = position - begin;
    s.start = (first + tile) * TILE;
    s.count = smaller(count - tile, finish - position);
    s.whole = s.count == count;
    position += s.count;
    return s;
}

// Boxes in the order in which a tile's owner multiplies: what is no value, its half of the values, the other half.
DEVICE int box_of(int i, int owner) {
    if (i < REST) return 2 * PART_BOXES + i;
    return i - REST < PART_BOXES ? i - REST + owner * PART_BOXES : i - REST - owner * PART_BOXES;
}

// The rows that this block copies of every tile (a half in a cluster) are looked up 32 tiles at a time.
struct Rows {
    int row[2 / CLUSTER];
};

DEVICE Rows rows_of_tiles(const Arguments& a, const Segment& s, int tile) {
    Rows rows;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
#pragma unroll
    for (int i = 0; i < 2 / CLUSTER; i++) {
        // any piece in the place of one behind the end
        const int token = smaller(s.start + tile * TILE + (rank + i) * PIECE, (s.length - 1) / PIECE * PIECE);
        int page = s.sequence, inside = token;
        if (PAGE) {
            const int index = token / (PAGE ? PAGE : 1);
            page = a.block_table[s.sequence * (int64_t)a.table_stride + index], inside = token - index * PAGE;
        }
        rows.row[i] = page * a.page_rows + inside;
    }
    return rows;
}

// What one of COPIERS warps copies.
DEVICE void copy_tiles(const Arguments& a, int copier, int position, int finish) {
    constexpr int AHEAD = 1;  // tiles; those further ahead push out what is needed before
    const int lane = lane_index(), rank = CLUSTER > 1 ? cluster_rank() : 0;
    uint32_t parities = 3;  // a bit of each buffer
    while (position < finish) {
        const Segment s = next_segment(a, position, finish);
        Rows now = rows_of_tiles(a, s, lane), next = rows_of_tiles(a, s, 32 + lane);
        for (int j = 0; j < s.count; j++) {
            if (j > 0 && j % 32 == 0) now = next, next = rows_of_tiles(a, s, j + 32 + lane);
            Rows rows, ahead;
#pragma unroll
            for (int i = 0; i < 2 / CLUSTER; i++) {
                rows.row[i] = (int)shuffle((uint32_t)now.row[i], j % 32);
                const uint32_t inside = shuffle((uint32_t)now.row[i], (j + AHEAD) % 32);
                const uint32_t behind = shuffle((uint32_t)next.row[i], (j + AHEAD) % 32);
                ahead.row[i] = (int)(j % 32 + AHEAD < 32 ? inside : behind);
            }
            if (lane == 0) {
                const int buffer = j % 2;
                if (j + AHEAD < s.count)
                    for (int i = 0; i < 2 / CLUSTER; i++)
                        for (int box = copier; box < BOXES; box += COPIERS) prefetch_tensor(&a.keys, box * 64, ahead.row[i]);
                int awaited = -1;
#pragma unroll 1
                for (int i = copier; i < BOXES; i += COPIERS) {
                    const int box = box_of(i, buffer), part = smaller(box / PART_BOXES, 2);
                    if (part != awaited) mbarrier_wait(empty(buffer, part), parities >> buffer & 1);
                    awaited = part;
                    const uint32_t barrier = full(buffer, box);
                    const uint32_t to = shared_memory() + buffer * TILE_BYTES + box * BOX_BYTES;
                    mbarrier_arrive_expect(barrier, BOX_BYTES);
                    if constexpr (CLUSTER > 1)
                        copy_tensor_multicast(to + rank * PIECE * 128, &a.keys, box * 64, rows.row[0], barrier, 3);
                    else
                        for (int k = 0; k < 2; k++)
                            copy_tensor(to + k * PIECE * 128, &a.keys, box * 64, rows.row[k], barrier);
                }
                parities ^= 1 << buffer;
            }
            synchronize_warp();
        }
    }
}

// This warp no longer needs a part of a tile.
DEVICE void release(int buffer, int part) {
    synchronize_warp();
    if (lane_index() == 0) {
        if constexpr (CLUSTER > 1) {
#pragma unroll
            for (int rank = 0; rank < CLUSTER; rank++) cluster_mbarrier_arrive(map_shared(empty(buffer, part), rank));
        } else {
            mbarrier_arrive(empty(buffer, part));
        }
    }
}

// Rows of a tile's values behind the sequence's end become 0: they may hold anything, and 0 * NaN is NaN.
DEVICE void clear_rows(uint32_t tile, int from) {
    for (int i = thread_index() % 128; i < 2 * PART_BOXES * (TILE - from) * 8; i += 128) {
        const int box = i / ((TILE - from) * 8), rest = i % ((TILE - from) * 8);
        store_shared4(tile + box * BOX_BYTES + from * 128 + rest * 16, Words4{0, 0, 0, 0});
    }
    fence_async_shared();
}

// Address of 8 channels, or tokens, of a row, in a box.
DEVICE uint32_t place(uint32_t box, int row, int chunk) { return box + row * 128 + ((chunk ^ (row & 7)) << 4); }

template <int COUNT>
DEVICE void scale_rows(float (&o)[COUNT], const float (&by)[2]) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) o[j] *= by[j >> 1 & 1];
}

// What a warpgroup of the two computes.
DEVICE void attend(const Arguments& a, int row_block, int program, int position, int finish) {
    const uint32_t tiles = shared_memory(), p = tiles + P_OFFSET, queries = tiles + Q_OFFSET;
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int part = warp / 4, other = 1 - part;
    const int own = warp % 4 * 16;  // the warp's first row
    const uint32_t bases = tiles + BASES_OFFSET + (own + g) * 4, totals = tiles + SUMS_OFFSET + (own + g) * 4;
    const int own_barrier = 4 + part;
    constexpr int P_READY = 2;  // barriers of tiles 0, 2, ..., and of the others
    const uint32_t own_tile = tiles + part * TILE_BYTES, other_tile = tiles + other * TILE_BYTES;
    const uint64_t own_values = wgmma_descriptor_transposed(own_tile + part * PART_BOXES * BOX_BYTES, BOX_BYTES);
    const uint64_t other_values = wgmma_descriptor_transposed(other_tile + part * PART_BOXES * BOX_BYTES, BOX_BYTES);
    uint32_t own_used = 0, other_used = 0;  // tiles that were in the own buffer, and in the other
    while (position < finish) {
        const Segment s = next_segment(a, position, finish);
        for (int i = thread_index(); i < 64 * HEAD_DIM / 8; i += CONSUMERS) {
            const int r = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8), at = row_block * 64 + r;
            const int row = smaller(at, ROWS - 1);
            copy_async16(place(queries + chunk / 8 * BOX_BYTES, r, chunk % 8),
                         a.query + s.sequence * a.query_stride_b + row / QUERIES * a.query_stride_h +
                             row % QUERIES * a.query_stride_t + chunk * 8,
                         at < ROWS ? 16 : 0);
        }
        copy_async_commit();
        copy_async_wait<0>();
        fence_async_shared();
        barrier_sync(1, CONSUMERS);

        float o[SUMS], base[2] = {LEAST, LEAST}, sums[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < SUMS; i++) o[i] = 0;

        // O += P V of the other warpgroup's tile, issued but not awaited.
        const auto multiply_other = [&](int j) {
            const uint32_t parity = (other_used + j / 2) & 1;
#pragma unroll
            for (int box = 0; box < PART_BOXES; box++) mbarrier_wait(full(other, part * PART_BOXES + box), parity);
            barrier_sync(P_READY + other, CONSUMERS);
            float scale[2];
            bool changed = false;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float passed = bits_to_float(load_shared(bases + 32 * r));
                changed = changed || passed != base[r];
                scale[r] = fast_exp2(base[r] - passed), base[r] = passed;
            }
            if (any_lane(changed)) scale_rows(o, scale), scale_rows(sums, scale);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TILE / 16; k++)
                wgmma_shared_transposed<KIND, PART>(o, wgmma_advance(wgmma_descriptor(p), k * 32),
                                                    wgmma_advance(other_values, k * 2048), true);
            wgmma_commit();
        };

        for (int j = part; j < s.count; j += 2) {
            const uint32_t parity = (own_used + j / 2) & 1;
            const int token = s.start + j * TILE;
            float x[TILE / 2];
            const auto multiply_keys = [&](int begin, int end) {  // boxes; a group of products each
#pragma unroll
                for (int i = begin; i < end; i++) {
                    const int first = i < REST ? 0 : REST + (i - REST) / PART_BOXES * PART_BOXES;  // of this part
                    const int from = box_of(first, part), inside = i - first;
                    const uint64_t q = wgmma_descriptor(queries + from * BOX_BYTES);
                    const uint64_t keys = wgmma_descriptor(own_tile + from * BOX_BYTES);
                    mbarrier_wait(full(part, from) + inside * 8, parity);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        wgmma_shared<KIND, TILE>(x, wgmma_advance(q, inside * BOX_BYTES + k * 32),
                                                 wgmma_advance(keys, inside * BOX_BYTES + k * 32), i + k > 0);
                    wgmma_commit();
                }
            };
            multiply_keys(0, REST + PART_BOXES);
            if (j > 0) {
                multiply_other(j - 1);
                multiply_keys(REST + PART_BOXES, BOXES);
                wgmma_wait<PART_BOXES>();
                wgmma_settle(o);
                release(other, part);
                wgmma_wait<0>();
            } else {
                multiply_keys(REST + PART_BOXES, BOXES);
                wgmma_wait<0>();
            }
            wgmma_settle(x);
            if (REST) release(part, 2);
            barrier_sync(own_barrier, 128);  // all of this warpgroup are done with the other's P

            // some rows see not all of these tokens
            const bool partly = token + TILE > s.length - QUERIES + 1 || (WINDOW && token <= s.length - 1 - a.window);
            if (CAPPED)
#pragma unroll
                for (int i = 0; i < TILE / 2; i++)
                    x[i] = a.cap * (1 - 2 / (1 + fast_exp2(x[i] * a.factor * 2.8853900817779268f)));
            if (partly) {
#pragma unroll
                for (int i = 0; i < TILE / 2; i++) {
                    const int at = token + i / 4 * 8 + 2 * t + (i & 1);
                    const int last = s.length - QUERIES + (row_block * 64 + own + g + 8 * (i >> 1 & 1)) % QUERIES;
                    if (at > last || (WINDOW && at <= last - a.window)) x[i] = bits_to_float(0xff800000u);
                }
            }
            const float factor = CAPPED ? 1.0f : a.factor;
            float most[2] = {x[0], x[2]};
#pragma unroll
            for (int i = 1; i < TILE / 2; i++) most[i >> 1 & 1] = fmaxf(most[i >> 1 & 1], x[i]);
            float scale[2];
            bool grown = false;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], shuffle_xor(most[r], 1)), most[r] = fmaxf(most[r], shuffle_xor(most[r], 2));
                most[r] *= factor;
                const bool follows = most[r] > base[r] + 8;
                scale[r] = follows ? fast_exp2(base[r] - most[r]) : 1.0f;
                if (follows) base[r] = most[r];
                grown = grown || follows;
                sums[r] *= scale[r];
            }
            uint32_t f[TILE / 16][4];
#pragma unroll
            for (int i = 0; i < TILE / 2; i += 2) {
                const int r = i >> 1 & 1;
                const float first = fast_exp2(x[i] * factor - base[r]);
                const float next = fast_exp2(x[i + 1] * factor - base[r]);
                sums[r] += first + next;
                f[i / 8][i / 2 % 4] = pack2<QUERY_TYPE>(first, next);
            }

            if (token + TILE > s.length) clear_rows(own_tile, s.length - token);
            const int row = own + lane % 8 + (lane / 8 % 2) * 8;
#pragma unroll
            for (int k = 0; k < TILE / 16; k++) store_matrices4(place(p, row, 2 * k + lane / 16), f[k]);
            if (t == 0) store_shared(bases, float_to_bits(base[0])), store_shared(bases + 32, float_to_bits(base[1]));
            fence_async_shared();
            barrier_arrive(P_READY + part, CONSUMERS);

            if (any_lane(grown)) scale_rows(o, scale);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TILE / 16; k++)
                wgmma_transposed<KIND, PART>(o, f[k], wgmma_advance(own_values, k * 2048), true);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(o);
            release(part, part);
        }
        if ((s.count - 1) % 2 == other) {
            multiply_other(s.count - 1);
            wgmma_wait<0>();
            wgmma_settle(o);
            release(other, part);
        }
        own_used += (s.count + 1 - part) / 2, other_used += (s.count + part) / 2;

#pragma unroll
        for (int r = 0; r < 2; r++) {
            sums[r] += shuffle_xor(sums[r], 1), sums[r] += shuffle_xor(sums[r], 2);
            if (t == 0) store_shared(totals + part * 256 + 32 * r, float_to_bits(sums[r]));
        }
        barrier_sync(1, CONSUMERS);  // also before the next sequence's Q
        const bool final = s.whole && a.output != nullptr;
        const int64_t slot = (int64_t)(final ? s.sequence : program + s.sequence) * ROWS;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = row_block * 64 + own + g + 8 * r;
            if (at >= ROWS) continue;
            const float sum = sums[r] + bits_to_float(load_shared(totals + other * 256 + 32 * r));
            if (part == 0 && t == 0) {
                if (final)
                    a.lse[slot + at] = (base[r] + fast_log2(sum)) * 0.6931471805599453f;
                else
                    a.statistics[2 * (slot + at)] = base[r], a.statistics[2 * (slot + at) + 1] = sum;
            }
            const int64_t to = (slot + at) * VALUE_DIM + part * PART + 2 * t;
            if (final) {
                const float scale = sum > 0 ? 1 / sum : 0.0f;
#pragma unroll
                for (int j = 2 * r; j < SUMS; j += 4)
                    *reinterpret_cast<uint32_t*>(a.output + to + j / 4 * 8) =
                        pack2<QUERY_TYPE>(o[j] * scale, o[j + 1] * scale);
            } else {
#pragma unroll
                for (int j = 2 * r; j < SUMS; j += 4)
                    *reinterpret_cast<Words2*>(a.partial + to + j / 4 * 8) =
                        Words2{float_to_bits(o[j]), float_to_bits(o[j + 1])};
            }
        }
    }
}

DEVICE void synchronize_cluster() {
    if constexpr (CLUSTER > 1)
        cluster_sync();
    else
        synchronize();
}

KERNEL(latent, CONSUMERS + 128, 1, Arguments) {
    const Arguments& a = arguments;
    if (thread_index() == 0) {
        for (int i = 0; i < 2 * BOXES; i++) mbarrier_init(full(0, i), 1);
        for (int i = 0; i < 6; i++) mbarrier_init(empty(0, i), CLUSTER * 4);
        mbarrier_init_fence();
        prefetch_tensor_map(&a.keys);
    }
    synchronize_cluster();
    wait_for_previous_kernel();
    allow_next_kernel();  // which waits for this one's results, but not to be launched
    int sequence, begin, count;
    const int total = scan<TILE>(a.lengths, a.batch, 1, a.span, -1, sequence, begin, count);
    const int programs = grid_size() / ROW_BLOCKS, each = share(total, a.batch, programs);
    const int row_block = block_index() % ROW_BLOCKS, program = block_index() / ROW_BLOCKS;
    const int position = program * each, finish = smaller(position + each, total);
    const int warp = warp_index();
    if (warp >= CONSUMERS / 32) {
        lower_registers<40>();
        const int copier = warp - CONSUMERS / 32;
        if (copier < COPIERS) copy_tiles(a, copier, position, finish);
    } else {
        raise_registers<232>();
        attend(a, row_block, program, position, finish);
    }
    synchronize_cluster();  // no block ends while the other copies to it
}
