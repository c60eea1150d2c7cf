// Product of two matrices of bit planes on Hopper's tensor cores (wgmma of single bits): a few dozen tokens.
//
// Weights are the operand with 64 rows, and the columns of a product are the X_BITS * TOKENS (activation plane, token)
// pairs, plane after plane: one wgmma multiplies a plane of 64 rows of weights with all planes of all tokens, and every
// weight is read once. W_PLANES planes of weights, which divide their number, share a stage and have accumulators of
// their own; between such blocks, from the most significant on, the accumulators are doubled (Horner's rule). A thread
// has the columns of all planes of its tokens, so that adding them up takes no exchange.
//
// A block computes 64 * WARPGROUPS rows of weights; one more warp keeps a ring of STAGES buffers filled.
//
// Formats and OUTPUT are as in gemm.cu.
#include "bits.cuh"

constexpr int ROWS = 64 * WARPGROUPS;
constexpr int PAIRS = X_BITS * TOKENS;
constexpr int COLUMNS = PAIRS <= 16 ? 16 : PAIRS <= 32 ? 32 : PAIRS <= 64 ? 64 : PAIRS <= 128 ? 128 : 256;
constexpr int SUMS = COLUMNS / 2;  // of a thread, for a plane of weights
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int PIECE = 128;  // bytes of a row of a plane in a stage
constexpr int W_BYTES = W_PLANES * ROWS * PIECE;
constexpr int STAGE_BYTES = W_BYTES + COLUMNS * PIECE;
constexpr int BARRIER_OFFSET = STAGES * STAGE_BYTES;
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

KERNEL(bit_plane_skinny, CONSUMERS + 32, 1, Arguments) {
    const Arguments& p = arguments;
    const uint32_t base = shared_memory(), full = base + BARRIER_OFFSET, empty = full + 8 * STAGES;
    const int first_row = block_index() * ROWS, first_token = block_index_y() * TOKENS;
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

    if (warp_index() == CONSUMERS / 32) {
        if (lane_index() != 0) return;
        int stage = 0;
        uint32_t parity = 1;
        for (int plane = p.weight_bits - W_PLANES; plane >= 0; plane -= W_PLANES) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                const uint32_t barrier = full + 8 * stage, w_to = base + stage * STAGE_BYTES;
                mbarrier_wait(empty + 8 * stage, parity);
                mbarrier_arrive_expect(barrier, W_BYTES + PAIRS * PIECE);
                // Rows beyond the last are the next plane's, or zeros: they reach only results that are not written.
                for (int i = 0; i < W_PLANES; i++)
                    copy_tensor(w_to + i * ROWS * PIECE, &p.weight, 32 * chunk, (plane + i) * p.rows + first_row, barrier);
                for (int j = 0; j < X_BITS; j++)
                    copy_tensor(w_to + W_BYTES + j * TOKENS * PIECE, &p.x, 32 * chunk, j * p.tokens + first_token,
                                barrier);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    const int warpgroup = warp_index() / 4, thread = thread_index() % 128, lane = lane_index();
    int stage = 0, previous = -1;  // the stage that unfinished products read
    uint32_t parity = 0;
    uint32_t sum[W_PLANES][SUMS];
#pragma unroll
    for (int i = 0; i < W_PLANES; i++)
#pragma unroll
        for (int r = 0; r < SUMS; r++) sum[i][r] = 0;
    for (int plane = p.weight_bits - W_PLANES; plane >= 0; plane -= W_PLANES) {
        if (previous >= 0) {
            wgmma_wait<0>();
            if (thread == 0) mbarrier_arrive(empty + 8 * previous);
            previous = -1;
#pragma unroll
            for (int i = 0; i < W_PLANES; i++) {
                wgmma_settle(sum[i]);
#pragma unroll
                for (int r = 0; r < SUMS; r++) sum[i][r] <<= W_PLANES;
            }
        }
        for (int chunk = 0; chunk < chunks; chunk++) {
            mbarrier_wait(full + 8 * stage, parity);
            const uint32_t w_at = base + stage * STAGE_BYTES;
            const uint64_t a = wgmma_descriptor(w_at + warpgroup * 64 * PIECE), b = wgmma_descriptor(w_at + W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++)  // of 32 bytes: 2 in the descriptors' unit
#pragma unroll
                for (int i = 0; i < W_PLANES; i++)
                    wgmma_bits<COLUMNS>(sum[i], a + 2 * step + i * (ROWS * PIECE / 16), b + 2 * step);
            wgmma_commit();
            wgmma_wait<1>();
            if (previous >= 0 && thread == 0) mbarrier_arrive(empty + 8 * previous);
            previous = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = W_PLANES - 1; i >= 0; i--) {
        wgmma_settle(sum[i]);
#pragma unroll
        for (int r = 0; r < SUMS; r++)
            if (i < W_PLANES - 1) sum[i][r] += sum[i + 1][r] << 1;
    }

    int row_sum[2];
    float row_scale[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int n = first_row + 64 * warpgroup + thread / 32 * 16 + lane / 4 + 8 * half;
        row_sum[half] = p.gamma + (p.beta_w != 0 && n < p.rows ? p.beta_w * p.weight_sums[n] : 0);
        row_scale[half] = OUTPUT != 0 && n < p.rows ? p.weight_scale[n] : 0.0f;
    }
#pragma unroll
    for (int block = 0; block < TOKENS / 8; block++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int m = first_token + 8 * block + 2 * (lane % 4) + e;
            const bool inside = m < p.tokens;
            const int token_sum = p.beta_x != 0 && inside ? p.beta_x * p.x_sums[m] : 0;
            const float token_scale = OUTPUT != 0 && inside ? p.x_scale[m] : 0.0f;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t value = 0;
#pragma unroll
                for (int j = X_BITS - 1; j >= 0; j--)
                    value = 2 * value + sum[0][4 * (j * (TOKENS / 8) + block) + 2 * half + e];
                const int n = first_row + 64 * warpgroup + thread / 32 * 16 + lane / 4 + 8 * half;
                if (!inside || n >= p.rows) continue;
                const int exact = p.alpha * value + token_sum + row_sum[half];
                const int64_t at = int64_t(m) * p.rows + n;
#if OUTPUT == 0
                ((int*)p.y)[at] = exact;
#elif OUTPUT == 1
                ((float*)p.y)[at] = float(exact) * (token_scale * row_scale[half]);
#elif OUTPUT == 2
                ((uint16_t*)p.y)[at] = pack2<Half>(float(exact) * (token_scale * row_scale[half]), 0.0f);
#else
                ((uint16_t*)p.y)[at] = pack2<BFloat16>(float(exact) * (token_scale * row_scale[half]), 0.0f);
#endif
            }
        }
}
