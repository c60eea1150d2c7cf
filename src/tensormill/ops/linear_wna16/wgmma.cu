// y = x W^T for many tokens on sm_90a, with W of 1 to 8 bits in the tiled layout and x of 16 or 8 bits.
//
// The weights are the first operand of the products, from registers, the tokens are the second, from shared memory: a
// block computes TILE_ROWS x TILE_TOKENS of W x^T. Warps of the last warpgroup copy stages of 128 bytes of every token,
// and the weights, scales and zero points that go with them, into a ring in shared memory. Two warpgroups of 64 PARTS
// rows each expand the weights of half a stage in registers while their products of the half before run, and free a
// stage once the products of the next have begun. The ring lets one begin its next tile while the other still stores.
//
// CLUSTER blocks with neighbouring rows share their tokens: each copies a part of them into all. SPLIT blocks, which
// have a tile of their own only, share it along K: each adds up and stores some of its tokens; the others send theirs
// through shared memory, and they are added in the order of the splits.
//
// Scales of groups multiply the weights, except for 8-bit x, where they multiply the integer sums of a group, which are
// then added in float32; scales of whole rows multiply the sums at the end.

#include "dequantize.cuh"
#include "dequantize_bytes.cuh"
#include "hopper.cuh"

constexpr int BITS = WEIGHT_BITS;
constexpr int TYPE = X_TYPE;         // 0 float16, 1 bfloat16, 2 int8
constexpr int ROWS = TILE_ROWS;      // 128, 256
constexpr int TOKENS = TILE_TOKENS;  // 64, 128, 256
constexpr int STAGES = RING_STAGES;
constexpr int CLUSTER = CLUSTER_BLOCKS;
constexpr int SPLIT = K_SPLITS;
constexpr int GROUPS = STAGE_GROUPS;  // sets of scales in a stage: 0 (whole rows), 1, 2
constexpr bool ZERO = HAS_ZERO;       // zero points; else 2^(BITS - 1)

#if Y_TYPE == 0
using Y = Half;
#else
using Y = BFloat16;  // y, scales and bias
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

#ifndef RING_SKEW
#define RING_SKEW 0
#endif
constexpr int SKEW = RING_SKEW;  // stages by which the first warpgroup is ahead

constexpr bool INTEGER = TYPE == 2;
constexpr float UNIT = INTEGER ? 1.0f / (1 << (8 - BITS)) : 1.0f;  // of the sums
constexpr bool GROUP_SUMS = INTEGER && GROUPS > 0;
constexpr Wgmma KIND = INTEGER ? Wgmma::s8 : TYPE == 1 ? Wgmma::bf16 : Wgmma::f16;
constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * CONSUMERS;  // that multiply
constexpr int BLOCKS = ROWS / 64;
constexpr int PARTS = BLOCKS / CONSUMERS;  // of 64 rows, of a warpgroup
constexpr int SUMS = TOKENS / 2;           // of a thread, for 64 rows
constexpr int TILES = INTEGER ? 2 : 1;     // of 64 columns, in a stage
constexpr int TILE_BYTES = 128 * BITS;     // of 16 rows x 64 columns
static_assert(!GROUP_SUMS || (GROUPS == 1 && PARTS == 1 && TOKENS <= 128 && !ZERO && SPLIT == 1), "registers");

// A stage: tokens (rows of 128 bytes, swizzled), weights, scales, zero points.
constexpr int X_BYTES = TOKENS * 128;
constexpr int WEIGHT_BYTES = 4 * TILE_BYTES * TILES;  // of 64 rows
constexpr int SCALE_BYTES = 128;                      // of 64 rows and a group
constexpr int ZERO_BYTES = ZERO && !INTEGER ? 64 : 0;
constexpr int SCALE_OFFSET = X_BYTES + BLOCKS * WEIGHT_BYTES;
constexpr int ZERO_OFFSET = SCALE_OFFSET + GROUPS * BLOCKS * SCALE_BYTES;
constexpr int STAGE_BYTES = (ZERO_OFFSET + GROUPS * BLOCKS * ZERO_BYTES + 1023) / 1024 * 1024;
// After the ring: y, tokens x 64 rows of a part each; sums from the other splits; barriers.
constexpr int SLICE = TOKENS / SPLIT;  // tokens that a block stores
constexpr int SLICE_SUMS = SUMS / SPLIT;
constexpr int Y_OFFSET = STAGES * STAGE_BYTES;
constexpr int Y_BYTES = SLICE * 128;
constexpr int SENT_OFFSET = Y_OFFSET + BLOCKS * Y_BYTES;
constexpr int SENT_BYTES = PARTS * SLICE_SUMS * THREADS * 4;  // by one split
constexpr int BARRIER_OFFSET = SENT_OFFSET + (SPLIT - 1) * SENT_BYTES;
static_assert(BARRIER_OFFSET + 16 * STAGES + 8 == SHARED_BYTES, "the host's formula differs");

struct Arguments {
    TensorMap x;                 // boxes of 128 bytes x TOKENS / CLUSTER
    TensorMap y;                 // boxes of 64 x SLICE
    const uint8_t* weight;       // [row_blocks][columns / 64, even][4] tiles
    const uint32_t* scale;       // [row_blocks][groups][32] pairs
    const uint16_t* zero;        // the same, pairs of bytes; or null
    const uint16_t* bias;        // [rows]; or null
    const float* token_scale;    // [tokens], for 8-bit x
    const int* token_sum;        // [tokens], of x, for 8-bit x and zero points
    int tokens, rows;
    int row_blocks, columns;  // of the weights: blocks of 64 rows
    int groups, group_size;
    int width;  // token tiles that blocks go through before the next rows
};

struct Place {
    int row_tile, token_tile;
};

DEVICE Place place(const Arguments& p, int index, int row_tiles, int token_tiles) {
    const int band = index / (row_tiles * p.width);
    const int rest = index - band * row_tiles * p.width;
    const int width = min(p.width, token_tiles - band * p.width);
    return {rest / width, band * p.width + rest % width};
}

struct Stage {
    int index = 0;
    uint32_t parity = 0;
    DEVICE void next() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }
    DEVICE int previous() const { return index == 0 ? STAGES - 1 : index - 1; }
};

// A warp is done with a stage, in every block that copies into it.
DEVICE void release(uint32_t empty, int split, int lane) {
    if constexpr (CLUSTER == 1) {
        if (lane == 0) mbarrier_arrive(empty);
    } else {
        if (lane < CLUSTER) cluster_mbarrier_arrive(map_shared(empty, split * CLUSTER + lane));
    }
}

DEVICE uint32_t to_bits(float value) { return float_to_bits(value); }
DEVICE uint32_t to_bits(int value) { return value; }
DEVICE void from_bits(uint32_t bits, float& value) { value = bits_to_float(bits); }
DEVICE void from_bits(uint32_t bits, int& value) { value = bits; }

KERNEL(linear_wgmma, THREADS + 128, 1, Arguments) {
    const Arguments& p = arguments;
    const uint32_t base = shared_memory();
    const uint32_t full = base + BARRIER_OFFSET, empty = full + 8 * STAGES, received = empty + 8 * STAGES;
    const int warp = warp_index(), lane = lane_index();
    const int rank = CLUSTER * SPLIT > 1 ? cluster_rank() : 0;
    const int member = rank % CLUSTER, split = rank / CLUSTER;

    if (thread_index() == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(full + 8 * i, BLOCKS);
            mbarrier_init(empty + 8 * i, CLUSTER * 4 * CONSUMERS);
        }
        mbarrier_init(received, (SPLIT - 1) * THREADS + 1);
        mbarrier_init_fence();
        prefetch_tensor_map(&p.x);
        prefetch_tensor_map(&p.y);
    }
    if constexpr (CLUSTER * SPLIT > 1)
        cluster_sync();
    else
        synchronize();

    const int row_tiles = (p.row_blocks + BLOCKS * CLUSTER - 1) / (BLOCKS * CLUSTER);
    const int token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const int clusters = grid_size() / (CLUSTER * SPLIT);
    const int steps = (p.columns + 64 * TILES - 1) / (64 * TILES);
    const int begin = steps * split / SPLIT, end = steps * (split + 1) / SPLIT;
    Stage stage;

    if (warp >= 4 * CONSUMERS) {
        lower_registers<56>();
        const int local = warp - 4 * CONSUMERS;  // the 64 rows that this warp copies; the first, x too
        if (local < BLOCKS && lane == 0) {
            const int column_tiles = (p.columns + 127) / 128 * 2;
            for (int index = block_index() / (CLUSTER * SPLIT); index < row_tiles * token_tiles; index += clusters) {
                const Place at = place(p, index, row_tiles, token_tiles);
                const int block = (at.row_tile * CLUSTER + member) * BLOCKS + local;
                const bool present = block < p.row_blocks;
                const uint8_t* weight = p.weight + (int64_t)block * column_tiles * (4 * TILE_BYTES);
                const int first_group = block * p.groups;
                int group = 0, column = 0;  // of the next set of scales: group, and where it stands in it
                if constexpr (GROUPS > 0) group = begin * 64 * TILES / p.group_size, column = begin * 64 * TILES % p.group_size;
                for (int step = begin; step < end; step++) {
                    const uint32_t to = base + stage.index * STAGE_BYTES, barrier = full + 8 * stage.index;
                    mbarrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
                    mbarrier_arrive_expect(barrier, (local == 0 ? X_BYTES : 0) +
                                                        (present ? WEIGHT_BYTES + GROUPS * (SCALE_BYTES + ZERO_BYTES) : 0));
                    if (local == 0) {
                        const int x = step * (INTEGER ? 128 : 64), y = at.token_tile * TOKENS;
                        if constexpr (CLUSTER == 1)
                            copy_tensor(to, &p.x, x, y, barrier);
                        else
                            copy_tensor_multicast(to + member * (X_BYTES / CLUSTER), &p.x, x,
                                                  y + member * (TOKENS / CLUSTER), barrier,
                                                  ((1 << CLUSTER) - 1) << (split * CLUSTER));
                    }
                    if (present) {
                        copy_bulk(to + X_BYTES + local * WEIGHT_BYTES, weight + (int64_t)step * WEIGHT_BYTES,
                                  WEIGHT_BYTES, barrier);
#pragma unroll
                        for (int g = 0; g < GROUPS; g++) {
                            const int64_t set = first_group + min(group, p.groups - 1);
                            copy_bulk(to + SCALE_OFFSET + (local * GROUPS + g) * SCALE_BYTES, p.scale + set * 32,
                                      SCALE_BYTES, barrier);
                            if constexpr (ZERO_BYTES > 0)
                                copy_bulk(to + ZERO_OFFSET + (local * GROUPS + g) * ZERO_BYTES, p.zero + set * 32,
                                          ZERO_BYTES, barrier);
                            column += 64 * TILES / (GROUPS > 0 ? GROUPS : 1);
                            if (column >= p.group_size) column -= p.group_size, group++;
                        }
                    }
                    stage.next();
                }
            }
        }
    } else {
        raise_registers<224>();
        const int consumer = warp / 4, quarter = warp % 4;
        const int pair = lane / 4 * 4 + quarter;  // of this lane's rows, among the 32 of 64 rows
        Sum sums[PARTS][SUMS];
        float totals[GROUP_SUMS ? SUMS : 1];
        uint32_t a[2][PARTS][2][4];
        uint32_t words[PARTS][BITS];
        const int first = block_index() / (CLUSTER * SPLIT);
        if (SKEW > 0 && consumer == 1) barrier_sync(3, THREADS);
        for (int index = first; index < row_tiles * token_tiles; index += clusters) {
            const Place at = place(p, index, row_tiles, token_tiles);
            const int block = (at.row_tile * CLUSTER + member) * BLOCKS + consumer * PARTS;
            ZeroPoint<BITS, X> row_zero[PARTS][2];
            if constexpr (ZERO && !INTEGER && GROUPS == 0) {
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    if (block + part < p.row_blocks) {
                        const uint32_t zero = p.zero[(block + part) * 32 + pair];
                        row_zero[part][0] = ZeroPoint<BITS, X>(zero & 255);
                        row_zero[part][1] = ZeroPoint<BITS, X>(zero >> 8);
                    }
            }
            bool fresh = true;  // of GROUP_SUMS: no products of this group yet
            if constexpr (GROUP_SUMS) {
#pragma unroll
                for (int i = 0; i < SUMS; i++) totals[i] = 0.0f;
            }
            int column = 0;  // of GROUP_SUMS: of the group, that are done
            for (int step = begin; step < end; step++) {
                const uint32_t from = base + stage.index * STAGE_BYTES;
                const uint64_t tokens = wgmma_descriptor(from);
                mbarrier_wait(full + 8 * stage.index, stage.parity);
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int part = 0; part < PARTS; part++) {
                        const int local = consumer * PARTS + part;
                        if (INTEGER || half == 0)
                            load_tile<BITS>(from + X_BYTES + local * WEIGHT_BYTES +
                                                ((INTEGER ? 4 * half : 0) + quarter) * TILE_BYTES,
                                            lane, words[part]);
                        if constexpr (INTEGER) {
#pragma unroll
                            for (int s = 0; s < 2; s++) dequantize_bytes<BITS>(words[part], s, a[half][part][s]);
#ifdef NO_DEQUANT
                            for (int s = 0; s < 2; s++) for (int r = 0; r < 4; r++) a[half][part][s][r] = words[part][s];
#endif
                        } else {
                            const int set = local * GROUPS + (GROUPS == 2 ? half : 0);
                            ZeroPoint<BITS, X> low = row_zero[part][0], high = row_zero[part][1];
                            if constexpr (ZERO && GROUPS > 0) {
                                const uint32_t zero = load_shared_half(from + ZERO_OFFSET + set * ZERO_BYTES + pair * 2);
                                low = ZeroPoint<BITS, X>(zero & 255), high = ZeroPoint<BITS, X>(zero >> 8);
                            }
#pragma unroll
                            for (int s = 0; s < 2; s++)
                                dequantize<BITS, X>(words[part], 2 * half + s, low, high, a[half][part][s]);
#ifdef NO_DEQUANT
                            for (int s = 0; s < 2; s++) for (int r = 0; r < 4; r++) a[half][part][s][r] = words[part][s];
                            if constexpr (0) {
#else
                            if constexpr (GROUPS > 0) {
#endif
                                const uint32_t scale = load_shared(from + SCALE_OFFSET + set * SCALE_BYTES + pair * 4);
#pragma unroll
                                for (int s = 0; s < 2; s++)
#pragma unroll
                                    for (int r = 0; r < 4; r++)
                                        a[half][part][s][r] = mul2<X>(
                                            a[half][part][s][r], permute_bytes(scale, 0, r & 1 ? 0x3232 : 0x1010));
                            }
                        }
                    }
                    wgmma_fence();
#pragma unroll
                    for (int s = 0; s < 2; s++)
#pragma unroll
                        for (int part = 0; part < PARTS; part++)
                            wgmma<KIND, TOKENS>(sums[part], a[half][part][s], tokens + 2 * (2 * half + s),
                                                (GROUP_SUMS ? !fresh : step > begin) || half > 0 || s > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (half == 0 && step > begin && !GROUP_SUMS) release(empty + 8 * stage.previous(), split, lane);
                }
                if constexpr (GROUP_SUMS) {
                    wgmma_wait<0>();
                    column += 128;
                    fresh = column >= p.group_size || step == end - 1;
                    if (fresh) {
                        column = 0;
                        const uint32_t scale =
                            load_shared(from + SCALE_OFFSET + consumer * SCALE_BYTES + pair * 4);
                        const float low = to_float<Y>(scale), high = to_float<Y>(scale >> 16);
#pragma unroll
                        for (int i = 0; i < SUMS; i++) totals[i] += float(sums[0][i]) * (i & 2 ? high : low);
                    }
                    release(empty + 8 * stage.index, split, lane);
                }
                if (SKEW > 0 && consumer == 0 && index == first && step == begin + min(SKEW, end - begin) - 1)
                    barrier_arrive(3, THREADS);
                stage.next();
            }
            if constexpr (!GROUP_SUMS) {
                wgmma_wait<0>();
                release(empty + 8 * stage.previous(), split, lane);
            }

            if constexpr (SPLIT > 1) {
                // Splits before the receiver lay theirs at their own index, those after it one lower.
#pragma unroll
                for (int to = 0; to < SPLIT; to++)
                    if (to != split) {
                        const uint32_t sent = map_shared(base + SENT_OFFSET, to * CLUSTER + member) +
                                              (split - (split > to)) * SENT_BYTES + thread_index() * 16;
#pragma unroll
                        for (int part = 0; part < PARTS; part++)
#pragma unroll
                            for (int i = 0; i < SLICE_SUMS; i += 4) {
                                const Sum* s = &sums[part][to * SLICE_SUMS + i];
                                cluster_store(sent + (part * SLICE_SUMS + i) / 4 * (16 * THREADS),
                                              {to_bits(s[0]), to_bits(s[1]), to_bits(s[2]), to_bits(s[3])});
                            }
                        cluster_mbarrier_arrive(map_shared(received, to * CLUSTER + member));
                    }
                if (thread_index() == 0) mbarrier_arrive(received);
                cluster_mbarrier_wait(received, 0);
            }

            const uint32_t output = base + Y_OFFSET + consumer * PARTS * Y_BYTES;
            const int token = at.token_tile * TOKENS + split * SLICE;
            if (thread_index() % 128 == 0) store_tensor_wait();
            barrier_sync(1 + consumer, 128);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                float scale[2] = {UNIT, UNIT}, shift[2] = {0.0f, 0.0f};
                int zero[2] = {0, 0};
                if (block + part < p.row_blocks) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const int row = (block + part) * 64 + 16 * quarter + lane / 4 + 8 * r;
                        if constexpr (GROUPS == 0) scale[r] *= to_float<Y>(p.scale[(block + part) * 32 + pair] >> 16 * r);
                        if constexpr (ZERO && INTEGER)
                            zero[r] = (int(p.zero[(block + part) * 32 + pair] >> 8 * r & 255) - (1 << (BITS - 1)))
                                      << (8 - BITS);
                        if (p.bias != nullptr && row < p.rows) shift[r] = to_float<Y>(p.bias[row]);
                    }
                }
#pragma unroll
                for (int to = 0; to < SPLIT; to++) {
                    if (to != split) continue;
#pragma unroll
                    for (int i = 0; i < SLICE_SUMS; i += 8) {  // 16 tokens
                        uint32_t packed[4];
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            Sum s[4];
#pragma unroll
                            for (int j = 0; j < 4; j++) s[j] = sums[part][to * SLICE_SUMS + i + 4 * c + j];
                            if constexpr (SPLIT > 1) {
                                Sum total[4] = {0, 0, 0, 0};
#pragma unroll
                                for (int o = 0; o < SPLIT; o++) {
                                    Sum other[4] = {s[0], s[1], s[2], s[3]};
                                    if (o != to) {
                                        const Words4 words =
                                            load_shared4(base + SENT_OFFSET + (o - (o > to)) * SENT_BYTES +
                                                         (part * SLICE_SUMS + i + 4 * c) / 4 * (16 * THREADS) +
                                                         thread_index() * 16);
                                        from_bits(words.x, other[0]), from_bits(words.y, other[1]);
                                        from_bits(words.z, other[2]), from_bits(words.w, other[3]);
                                    }
#pragma unroll
                                    for (int j = 0; j < 4; j++) total[j] += other[j];
                                }
#pragma unroll
                                for (int j = 0; j < 4; j++) s[j] = total[j];
                            }
                            float factor[2] = {1.0f, 1.0f};
                            float value[4];
                            if constexpr (INTEGER) {
#pragma unroll
                                for (int j = 0; j < 2; j++) {
                                    const int t = token + 2 * (i + 4 * c) + 2 * (lane % 4) + j;
                                    factor[j] = t < p.tokens ? p.token_scale[t] : 0.0f;
                                    if constexpr (ZERO) {
                                        const int sum = t < p.tokens ? p.token_sum[t] : 0;
                                        s[j] -= zero[0] * sum, s[2 + j] -= zero[1] * sum;
                                    }
                                }
                            }
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                value[j] = GROUP_SUMS ? totals[i + 4 * c + j] : float(s[j]);
                                value[j] = value[j] * (scale[j / 2] * factor[j % 2]) + shift[j / 2];
                            }
                            packed[2 * c] = pack2<Y>(value[0], value[1]);
                            packed[2 * c + 1] = pack2<Y>(value[2], value[3]);
                        }
                        // This lane's row, a token, of the matrices (rows, tokens) (0, 0), (8, 0), (0, 8), (8, 8).
                        const int t = 2 * i + 8 * (lane / 16) + lane % 8, chunk = 2 * quarter + lane / 8 % 2;
                        store_matrices4_transposed(output + part * Y_BYTES + t * 128 + ((chunk ^ (t & 7)) << 4),
                                                   packed[0], packed[1], packed[2], packed[3]);
                    }
                }
            }
            fence_async_shared();
            barrier_sync(1 + consumer, 128);
            if (thread_index() % 128 == 0) {
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    if ((block + part) * 64 < p.rows)
                        store_tensor(&p.y, (block + part) * 64, token, output + part * Y_BYTES);
                store_tensor_commit();
            }
        }
        if (thread_index() % 128 == 0) store_tensor_wait();
    }
    if constexpr (CLUSTER * SPLIT > 1) cluster_sync();  // none leaves while another may still write into it
}
