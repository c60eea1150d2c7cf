// As gemm.cu, arranged so that more happens at once: a single warp keeps the ring filled, which leaves room for two blocks
// (BLOCKS) on a multiprocessor, of which one multiplies while the other writes, and results are written four columns at a
// time without branches, so that their latencies overlap. ALIGNED: the rows of weights are a multiple of four, so that
// four columns of y can be written at once.
#include "bits.cuh"

#if OUTPUT == 3
using Y = BFloat16;
#else
using Y = Half;
#endif

constexpr int ROWS = BLOCK_ROWS;  // of weights, in a tile
constexpr int TOKENS = 64 * WARPGROUPS;
constexpr int CONSUMERS = 128 * WARPGROUPS;  // threads that multiply
constexpr int SETS = W_PLANES + X_PLANES - 1;
constexpr int SUMS = ROWS / 2;     // of a thread, in a set
constexpr int PIECE = 128;         // bytes of a row of a plane in a stage
constexpr int X_BYTES = X_PLANES * TOKENS * PIECE, W_BYTES = W_PLANES * ROWS * PIECE;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int COLUMN_OFFSET = STAGES * STAGE_BYTES;  // [2][ROWS / 2] times two corrections and two scales
constexpr int BARRIER_OFFSET = COLUMN_OFFSET + 4 * ROWS * 4;
constexpr int BAND = 16 / WARPGROUPS;  // token tiles that go through all rows together
static_assert(BARRIER_OFFSET + 16 * STAGES == SHARED_BYTES, "the host's formula differs");

struct Arguments {
    TensorMap x;       // (q tokens, words) int32, boxes of TOKENS x 32
    TensorMap weight;  // (p rows, words) int32, boxes of ROWS x 32
    void* y;
    const int* x_sums;
    const int* weight_sums;
    const float* x_scale;
    const float* weight_scale;
    int tokens, rows, words, x_bits, weight_bits;
    int alpha, beta_x, beta_w, gamma;
};

struct Tile {
    int token, row;
};

// Tiles that run together use few rows of either operand.
DEVICE Tile tile_at(const Arguments& p, int index, int token_tiles, int row_tiles) {
    const int band = index / (BAND * row_tiles), rest = index - band * BAND * row_tiles;
    const int height = min(BAND, token_tiles - band * BAND);
    return {(band * BAND + rest % height) * TOKENS, rest / height * ROWS};
}

// Calls body(level, first weight plane, first activation plane) for every block of planes, most significant first;
// level counts down to 0 and is the power of two of the block's lowest pair.
template <class Body>
DEVICE void for_plane_blocks(const Arguments& p, const Body& body) {
    const int w_blocks = p.weight_bits / W_PLANES, x_blocks = p.x_bits / X_PLANES;
    for (int level = (w_blocks - 1) * W_PLANES + (x_blocks - 1) * X_PLANES; level >= 0; level--) {
        for (int i = w_blocks - 1; i >= 0; i--) {
            const int rest = level - i * W_PLANES;
            if (rest >= 0 && rest % X_PLANES == 0 && rest / X_PLANES < x_blocks) body(level, i * W_PLANES, rest);
        }
    }
}

KERNEL(bit_plane_gemm_overlapped, CONSUMERS + 32, BLOCKS, Arguments) {
    const Arguments& p = arguments;
    const uint32_t base = shared_memory(), full = base + BARRIER_OFFSET, empty = full + 8 * STAGES;
    const int warpgroup = warp_index() / 4, thread = thread_index() % 128;
    const int token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const int row_tiles = (p.rows + ROWS - 1) / ROWS, tiles = token_tiles * row_tiles;
    const int chunks = (p.words + 31) / 32;

    if (thread_index() == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, WARPGROUPS);
        }
        mbarrier_init_fence();
        prefetch_tensor_map(&p.x);
        prefetch_tensor_map(&p.weight);
    }
    synchronize();
    wait_for_previous_kernel();
    allow_next_kernel();

    if (warpgroup == WARPGROUPS) {
        if (lane_index() == 0) {
            int stage = 0;
            uint32_t parity = 1;
            for (int index = block_index(); index < tiles; index += grid_size()) {
                const Tile tile = tile_at(p, index, token_tiles, row_tiles);
                for_plane_blocks(p, [&](int, int w_plane, int x_plane) {
                    for (int chunk = 0; chunk < chunks; chunk++) {
                        const uint32_t barrier = full + 8 * stage, x_to = base + stage * STAGE_BYTES;
                        mbarrier_wait(empty + 8 * stage, parity);
                        mbarrier_arrive_expect(barrier, STAGE_BYTES);
                        // Rows beyond the last are the next plane's, or zeros: they reach only results that are not
                        // written.
                        for (int j = 0; j < X_PLANES; j++)
                            copy_tensor(x_to + j * TOKENS * PIECE, &p.x, 32 * chunk,
                                        (x_plane + j) * p.tokens + tile.token, barrier);
                        for (int i = 0; i < W_PLANES; i++)
                            copy_tensor(x_to + X_BYTES + i * ROWS * PIECE, &p.weight, 32 * chunk,
                                        (w_plane + i) * p.rows + tile.row, barrier);
                        if (++stage == STAGES) stage = 0, parity ^= 1;
                    }
                });
            }
        }
    } else {
        const int lane = lane_index(), pair = 2 * (lane % 4);
        const int row_of_lane = 64 * warpgroup + 16 * (thread / 32) + lane / 4;
        int stage = 0, buffer = 0;
        uint32_t parity = 0;
        uint32_t sum[SETS][SUMS];
        for (int index = block_index(); index < tiles; index += grid_size(), buffer ^= 1) {
            const Tile tile = tile_at(p, index, token_tiles, row_tiles);
            const uint32_t columns = base + COLUMN_OFFSET + buffer * ROWS * 8;
            int own[2];
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int m = tile.token + row_of_lane + 8 * half;
                own[half] = m < p.tokens && p.beta_x != 0 ? p.beta_x * p.x_sums[m] : 0;
                scale[half] = OUTPUT != 0 && m < p.tokens ? p.x_scale[m] : 0.0f;
            }
            for (int c = thread_index(); c < ROWS; c += CONSUMERS) {
                const int n = tile.row + c;
                const bool inside = n < p.rows;
                const uint32_t to = columns + 8 * (c & ~1) + 4 * (c & 1);
                store_shared(to, (inside && p.beta_w != 0 ? p.beta_w * p.weight_sums[n] : 0) + p.gamma);
                store_shared(to + 8, OUTPUT != 0 && inside ? float_to_bits(p.weight_scale[n]) : 0);
            }
#pragma unroll
            for (int s = 0; s < SETS; s++)
#pragma unroll
                for (int r = 0; r < SUMS; r++) sum[s][r] = 0;

            int previous = -1, last_level = -1;  // the stage that unfinished products read; level of the last block
            for_plane_blocks(p, [&](int level, int, int) {
                if (last_level > level) {
                    wgmma_wait<0>();
                    if (thread == 0) mbarrier_arrive(empty + 8 * previous);
                    previous = -1;
                    const int shift = last_level - level;
#pragma unroll
                    for (int s = 0; s < SETS; s++) {
                        wgmma_settle(sum[s]);
#pragma unroll
                        for (int r = 0; r < SUMS; r++) sum[s][r] <<= shift;
                    }
                }
                last_level = level;
                for (int chunk = 0; chunk < chunks; chunk++) {
                    mbarrier_wait(full + 8 * stage, parity);
                    const uint32_t x_at = base + stage * STAGE_BYTES;
                    const uint64_t a = wgmma_descriptor(x_at + warpgroup * 64 * PIECE);
                    const uint64_t b = wgmma_descriptor(x_at + X_BYTES);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; step++)  // of 32 bytes: 2 in the descriptors' unit
#pragma unroll
                        for (int i = 0; i < W_PLANES; i++)
#pragma unroll
                            for (int j = 0; j < X_PLANES; j++)
                                wgmma_bits<ROWS>(sum[i + j], a + 2 * step + j * (TOKENS * PIECE / 16),
                                                 b + 2 * step + i * (ROWS * PIECE / 16));
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (previous >= 0 && thread == 0) mbarrier_arrive(empty + 8 * previous);
                    previous = stage;
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            });
            wgmma_wait<0>();
            if (thread == 0) mbarrier_arrive(empty + 8 * previous);
            wgmma_settle(sum[SETS - 1]);
#pragma unroll
            for (int s = SETS - 2; s >= 0; s--) {
                wgmma_settle(sum[s]);
#pragma unroll
                for (int r = 0; r < SUMS; r++) sum[s][r] += sum[s + 1][r] << 1;
            }

            barrier_sync(1, CONSUMERS);  // the columns' corrections and scales are there
            int remaining[2];  // columns that are written
            int64_t at[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int m = tile.token + row_of_lane + 8 * half;
                remaining[half] = m < p.tokens ? p.rows - tile.row : 0;
                at[half] = int64_t(m) * p.rows + tile.row;
            }
#pragma unroll
            for (int first = 0; first < ROWS / 8; first += 4) {  // four at a time: their latencies overlap
                Words4 column[4];
#pragma unroll
                for (int j = 0; j < 4; j++) column[j] = load_shared4(columns + 8 * (8 * (first + j) + pair));
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint32_t value[4][2];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int r = 4 * (first + j) + 2 * half;
                        value[j][0] = p.alpha * sum[0][r] + own[half] + column[j].x;
                        value[j][1] = p.alpha * sum[0][r + 1] + own[half] + column[j].y;
                        if (OUTPUT != 0) {
                            const float x = float(int(value[j][0])) * (scale[half] * bits_to_float(column[j].z));
                            const float y = float(int(value[j][1])) * (scale[half] * bits_to_float(column[j].w));
                            value[j][0] = OUTPUT == 1 ? float_to_bits(x) : pack2<Y>(x, y);
                            value[j][1] = float_to_bits(y);
                        }
                    }
                    const int c = 8 * first + pair;
#if OUTPUT < 2
                    uint32_t* out = (uint32_t*)p.y + at[half];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if constexpr (ALIGNED) {
                            store_global2_if(c + 8 * j < remaining[half], out + c + 8 * j, {value[j][0], value[j][1]});
                        } else {
                            if (c + 8 * j < remaining[half]) out[c + 8 * j] = value[j][0];
                            if (c + 8 * j + 1 < remaining[half]) out[c + 8 * j + 1] = value[j][1];
                        }
                    }
#else
                    uint16_t* out = (uint16_t*)p.y + at[half];
                    const bool odd = lane & 1;
                    if constexpr (ALIGNED) {
#pragma unroll
                        for (int j = 0; j < 4; j += 2) {
                            // Neighbouring lanes trade words, so that each writes four columns, and a warp whole sectors.
                            const uint32_t low = value[j][0], high = value[j + 1][0];
                            const uint32_t other = shuffle_xor(odd ? low : high, 1);
                            const int to = c + 8 * j + (odd ? 6 : 0);
                            store_global2_if(to < remaining[half], out + to, {odd ? other : low, odd ? high : other});
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            if (c + 8 * j < remaining[half]) out[c + 8 * j] = value[j][0];
                            if (c + 8 * j + 1 < remaining[half]) out[c + 8 * j + 1] = value[j][0] >> 16;
                        }
                    }
#endif
                }
            }
        }
    }
}
