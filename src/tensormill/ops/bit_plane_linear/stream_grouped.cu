// As stream.cu, with scales for groups of GROUP_PIECES * 128 columns: sums of a group are exact, then scaled and added in
// float32.
//
// A block computes 16 * ROW_TILES rows of weights for TOKENS tokens; its WARPS warps share the groups. A lane reads one
// word of a 128-bit piece of a row, which is its part of the fragments of an m16n8k128 product. Warps' sums are added in
// order, so that results are the same from run to run.
#include "bits.cuh"

constexpr int ROWS = 16 * ROW_TILES;
constexpr int TILES = TOKENS / 8;
constexpr int SETS = W_BITS + X_BITS - 1;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUPS_AHEAD = UNROLL;

struct Arguments {
    const uint32_t* x;
    const uint32_t* weight;
    void* y;
    const int* x_sums;  // (tokens, groups), as the scales
    const int* weight_sums;
    const float* x_scale;
    const float* weight_scale;
    int tokens, rows, words, length, groups;
    int alpha, beta_x, beta_w, gamma;  // gamma is for a column
};

KERNEL(bit_plane_stream_grouped, THREADS, 1, Arguments) {
    const Arguments& p = arguments;
    const uint32_t partial = shared_memory();  // [WARPS][TOKENS][ROWS]
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int first_row = block_index() * ROWS, first_token = block_index_y() * TOKENS;
    wait_for_previous_kernel();
    allow_next_kernel();

    // Rows and tokens beyond the last repeat it; their results are not written.
    const int64_t w_plane = int64_t(p.rows) * p.words, x_plane = int64_t(p.tokens) * p.words;
    const uint32_t* w_row[ROW_TILES][2];
    int row[ROW_TILES][2], token[TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row[r][half] = min(first_row + 16 * r + 8 * half + g, p.rows - 1);
            w_row[r][half] = p.weight + int64_t(row[r][half]) * p.words + t;
        }
    const uint32_t* x_row[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        x_row[tile] = p.x + int64_t(min(first_token + 8 * tile + g, p.tokens - 1)) * p.words + t;
        for (int e = 0; e < 2; e++) token[tile][e] = min(first_token + 8 * tile + 2 * t + e, p.tokens - 1);
    }

    float y[ROW_TILES][TILES][4] = {};
#pragma unroll GROUPS_AHEAD
    for (int group = warp; group < p.groups; group += WARPS) {
        int sum[ROW_TILES][TILES][SETS][4] = {};
#pragma unroll
        for (int piece = 0; piece < GROUP_PIECES; piece++) {
            const int word = 4 * (group * GROUP_PIECES + piece);
            const bool inside = word < p.words;  // the last group may be shorter
            uint32_t a[ROW_TILES][W_BITS][2];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int i = 0; i < W_BITS; i++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        a[r][i][half] = inside ? load_constant(w_row[r][half] + i * w_plane + word) : 0;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int j = 0; j < X_BITS; j++) {
                    const uint32_t b = inside ? load_constant(x_row[tile] + j * x_plane + word) : 0;
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                        for (int i = 0; i < W_BITS; i++) mma_bits128(sum[r][tile][i + j], a[r][i], b);
                }
        }
        const int size = min(128 * GROUP_PIECES, p.length - 128 * GROUP_PIECES * group);
        int token_sum[TILES][2];
        float token_scale[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int64_t at = int64_t(token[tile][e]) * p.groups + group;
                token_sum[tile][e] = p.beta_x != 0 ? p.beta_x * p.x_sums[at] : 0;
                token_scale[tile][e] = p.x_scale[at];
            }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t at = int64_t(row[r][half]) * p.groups + group;
                const int row_sum = p.gamma * size + (p.beta_w != 0 ? p.beta_w * p.weight_sums[at] : 0);
                const float row_scale = p.weight_scale[at];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int value = 0;
#pragma unroll
                        for (int s = SETS - 1; s >= 0; s--) value = 2 * value + sum[r][tile][s][2 * half + e];
                        const int exact = p.alpha * value + token_sum[tile][e] + row_sum;
                        y[r][tile][2 * half + e] += float(exact) * (token_scale[tile][e] * row_scale);
                    }
            }
    }

#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int at = (warp * TOKENS + 8 * tile + 2 * t + e % 2) * ROWS + 16 * r + 8 * (e / 2) + g;
                store_shared(partial + 4 * at, float_to_bits(y[r][tile][e]));
            }
    synchronize();
    for (int k = thread_index(); k < TOKENS * ROWS; k += THREADS) {
        const int m = first_token + k / ROWS, n = first_row + k % ROWS;
        float value = 0;
        for (int w = 0; w < WARPS; w++) value += bits_to_float(load_shared(partial + 4 * (w * TOKENS * ROWS + k)));
        if (m >= p.tokens || n >= p.rows) continue;
        const int64_t at = int64_t(m) * p.rows + n;
#if OUTPUT == 1
        ((float*)p.y)[at] = value;
#elif OUTPUT == 2
        ((uint16_t*)p.y)[at] = pack2<Half>(value, 0.0f);
#else
        ((uint16_t*)p.y)[at] = pack2<BFloat16>(value, 0.0f);
#endif
    }
}
