// Product of two matrices of bit planes for few tokens (mma.sync of single bits): bound by the bytes of the weights.
//
// A block computes 16 * ROW_TILES rows of weights for TOKENS tokens; its WARPS warps share K. A lane reads 16 bytes of
// a row at a time, straight into the fragments of two m16n8k256 products: the order of K within 512 bits does not
// matter as long as both operands have the same. With fewer than eight tokens the eight columns of a product are
// (token, activation plane) pairs, so that one token's planes fill a product; otherwise a product has one plane of
// eight tokens, and pairs of planes with equal i + j share accumulators. Warps add up in shared memory: integers, whose
// order does not matter.
//
// Formats and OUTPUT are as in gemm.cu.
#include "bits.cuh"

constexpr int ROWS = 16 * ROW_TILES;
constexpr bool STACKED = TOKENS < 8;
constexpr int COLUMNS = STACKED ? TOKENS * X_BITS : TOKENS;  // of products
constexpr int TILES = (COLUMNS + 7) / 8;
constexpr int SETS = STACKED ? W_BITS : W_BITS + X_BITS - 1;
constexpr int PLANES = STACKED ? 1 : X_BITS;  // of activations, that a lane reads for a column

constexpr int LOADS_AHEAD = UNROLL;

struct Arguments {
    const uint32_t* x;
    const uint32_t* weight;
    void* y;
    const int* x_sums;
    const int* weight_sums;
    const float* x_scale;
    const float* weight_scale;
    int tokens, rows, words;
    int alpha, beta_x, beta_w, gamma;
};

KERNEL(bit_plane_stream, 32 * WARPS, 1, Arguments) {
    const Arguments& p = arguments;
    const uint32_t total = shared_memory();  // [TOKENS][ROWS]
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int first_row = block_index() * ROWS, first_token = block_index_y() * TOKENS;
    for (int k = thread_index(); k < TOKENS * ROWS; k += 32 * WARPS) store_shared(total + 4 * k, 0);
    wait_for_previous_kernel();
    synchronize();

    // Rows, tokens and columns beyond the last repeat it; their results are not written.
    const int64_t w_plane = int64_t(p.rows) * p.words, x_plane = int64_t(p.tokens) * p.words;
    const uint32_t* w_row[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            w_row[r][half] = p.weight + int64_t(min(first_row + 16 * r + 8 * half + g, p.rows - 1)) * p.words;
    const uint32_t* x_row[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int column = min(8 * tile + g, COLUMNS - 1);
        const int token = min(first_token + (STACKED ? column / X_BITS : column), p.tokens - 1);
        x_row[tile] = p.x + (STACKED ? column % X_BITS : 0) * x_plane + int64_t(token) * p.words;
    }

    int sum[ROW_TILES][TILES][SETS][4] = {};
#pragma unroll LOADS_AHEAD
    for (int start = 16 * warp; start < p.words; start += 16 * WARPS) {
        const int word = start + 4 * t;
        const bool inside = word < p.words;
        Words4 a[ROW_TILES][W_BITS][2];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < W_BITS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    a[r][i][half] = inside ? load_streamed4(w_row[r][half] + i * w_plane + word) : Words4{0, 0, 0, 0};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int j = 0; j < PLANES; j++) {
                const Words4 x = inside ? load_constant4(x_row[tile] + j * x_plane + word) : Words4{0, 0, 0, 0};
                const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int i = 0; i < W_BITS; i++) {
                        const Words4 low = a[r][i][0], high = a[r][i][1];
                        const uint32_t w[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
                        mma_bits(sum[r][tile][STACKED ? i : i + j], w[0], b[0]);
                        mma_bits(sum[r][tile][STACKED ? i : i + j], w[1], b[1]);
                    }
            }
    }
    allow_next_kernel();

#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t value = 0;
#pragma unroll
                for (int s = SETS - 1; s >= 0; s--) value = 2 * value + sum[r][tile][s][e];
                const int column = 8 * tile + 2 * t + e % 2, row = 16 * r + 8 * (e / 2) + g;
                const int token = STACKED ? column / X_BITS : column;
                if (column < COLUMNS)
                    add_shared(total + 4 * (token * ROWS + row), STACKED ? value << column % X_BITS : value);
            }
    synchronize();

    for (int k = thread_index(); k < TOKENS * ROWS; k += 32 * WARPS) {
        const int m = first_token + k / ROWS, n = first_row + k % ROWS;
        if (m >= p.tokens || n >= p.rows) continue;
        int exact = p.alpha * load_shared(total + 4 * k) + p.gamma;
        if (p.beta_x != 0) exact += p.beta_x * p.x_sums[m];
        if (p.beta_w != 0) exact += p.beta_w * p.weight_sums[n];
        const int64_t at = int64_t(m) * p.rows + n;
#if OUTPUT == 0
        ((int*)p.y)[at] = exact;
#else
        const float value = float(exact) * (p.x_scale[m] * p.weight_scale[n]);
#if OUTPUT == 1
        ((float*)p.y)[at] = value;
#elif OUTPUT == 2
        ((uint16_t*)p.y)[at] = pack2<Half>(value, 0.0f);
#else
        ((uint16_t*)p.y)[at] = pack2<BFloat16>(value, 0.0f);
#endif
#endif
    }
}
