// Product of two matrices of bit planes on Hopper's tensor cores (wgmma of single bits): many tokens.
//
// U[m, n] = sum_{i, j} 2^(i + j) popcount(w_i[n] & x_j[m]) over p planes of weights and q of activations, where one
// wgmma adds 64 x BLOCK_ROWS x 256 single bits. Its accumulators can't be scaled, but U is a polynomial in 2: planes
// are taken in blocks of W_PLANES x X_PLANES from the most significant on, and the accumulators are doubled from one
// power to the next (Horner's rule). W_PLANES divides p, X_PLANES divides q. Within a block, pairs (i, j) of equal
// i + j share accumulators, of which there are W_PLANES + X_PLANES - 1 sets. Blocks of one plane each need the fewest
// registers and allow the largest tile; larger blocks load each plane less often.
//
// One thread of the last warpgroup keeps a ring of STAGES buffers filled (1024 bits of K of every plane in the block,
// 128-byte swizzle); WARPGROUPS consumers of 64 tokens each multiply. The kernel is persistent: while consumers write
// one tile's results, the ring already fills for the next.
//
// All formats are affine in the unsigned codes: y = alpha U + beta_x sum_k u_x + beta_w sum_k u_w + gamma, in
// arithmetic modulo 2^32, which is exact because y itself fits.
//
// OUTPUT: 0 int32, 1 float32, 2 float16, 3 bfloat16; the last three are scaled by x_scale[m] weight_scale[n].
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
constexpr int COLUMN_OFFSET = STAGES * STAGE_BYTES;              // [2][ROWS] corrections, then as many scales
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

KERNEL(bit_plane_gemm, CONSUMERS + 128, 1, Arguments) {
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

    if (warpgroup == WARPGROUPS) {
        lower_registers<40>();
        if (thread == 0) {
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
        raise_registers<232>();
        const int lane = lane_index(), pair = 2 * (lane % 4);
        const int row_of_lane = 64 * warpgroup + 16 * (thread / 32) + lane / 4;
        int stage = 0, buffer = 0;
        uint32_t parity = 0;
        uint32_t sum[SETS][SUMS];
        for (int index = block_index(); index < tiles; index += grid_size(), buffer ^= 1) {
            const Tile tile = tile_at(p, index, token_tiles, row_tiles);
            const uint32_t columns = base + COLUMN_OFFSET + buffer * ROWS * 4, scales = columns + 2 * ROWS * 4;
            for (int c = thread_index(); c < ROWS; c += CONSUMERS) {
                const int n = tile.row + c;
                const bool inside = n < p.rows;
                store_shared(columns + 4 * c, (inside && p.beta_w != 0 ? p.beta_w * p.weight_sums[n] : 0) + p.gamma);
                if (OUTPUT != 0) store_shared(scales + 4 * c, inside ? float_to_bits(p.weight_scale[n]) : 0);
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
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int m = tile.token + row_of_lane + 8 * half;
                if (m >= p.tokens && OUTPUT < 2) continue;
                const bool inside = m < p.tokens;
                const int own = inside && p.beta_x != 0 ? p.beta_x * p.x_sums[m] : 0;
                const float scale = OUTPUT != 0 && inside ? p.x_scale[m] : 0.0f;
                const int64_t at = int64_t(m) * p.rows + tile.row;
#if OUTPUT < 2
                uint32_t* out = (uint32_t*)p.y + at;
#pragma unroll
                for (int j = 0; j < ROWS / 8; j++) {
                    const int c = 8 * j + pair, n = tile.row + c;
                    const Words2 add = load_shared2(columns + 4 * c);
                    Words2 value = {p.alpha * sum[0][4 * j + 2 * half] + own + add.x,
                                    p.alpha * sum[0][4 * j + 2 * half + 1] + own + add.y};
                    if (OUTPUT == 1) {
                        const Words2 by = load_shared2(scales + 4 * c);
                        value.x = float_to_bits(float(int(value.x)) * (scale * bits_to_float(by.x)));
                        value.y = float_to_bits(float(int(value.y)) * (scale * bits_to_float(by.y)));
                    }
                    if (p.rows % 2 == 0 && n < p.rows) {
                        store_global2(out + c, value);
                    } else {
                        if (n < p.rows) out[c] = value.x;
                        if (n + 1 < p.rows) out[c + 1] = value.y;
                    }
                }
#else
                uint16_t* out = (uint16_t*)p.y + at;
                const bool odd = lane & 1;
#pragma unroll
                for (int j = 0; j < ROWS / 8; j += 2) {
                    uint32_t word[2];
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const int c = 8 * (j + k) + pair, r = 4 * (j + k) + 2 * half;
                        const Words2 add = load_shared2(columns + 4 * c), by = load_shared2(scales + 4 * c);
                        word[k] = pack2<Y>(
                            float(int(p.alpha * sum[0][r] + own + add.x)) * (scale * bits_to_float(by.x)),
                            float(int(p.alpha * sum[0][r + 1] + own + add.y)) * (scale * bits_to_float(by.y)));
                    }
                    // Neighbouring lanes trade words, so that each writes four columns, and a warp whole sectors.
                    const uint32_t other = shuffle_xor(odd ? word[0] : word[1], 1);
                    const Words2 value = {odd ? other : word[0], odd ? word[1] : other};
                    const int c = odd ? 8 * (j + 1) + pair - 2 : 8 * j + pair, n = tile.row + c;
                    if (!inside) continue;
                    if (p.rows % 4 == 0 && n < p.rows) {
                        store_global2(out + c, value);
                    } else {
                        const uint32_t both[2] = {value.x, value.y};
                        for (int e = 0; e < 4; e++)
                            if (n + e < p.rows) out[c + e] = both[e / 2] >> 16 * (e % 2);
                    }
                }
#endif
            }
        }
    }
}
