// Product of two matrices of bit planes for few tokens (mma.sync b1, and.popc): bound by the bytes of the weights.
//
// A block computes 16 * ROW_TILES features for TOKENS tokens; its WARPS warps share K. A lane reads 16 bytes of a row
// at a time, straight into the fragments of two m16n8k256 products: the order of K within 512 bits does not matter as
// long as both operands have the same. Weights are the first operand, so that 16 rows of them meet columns that are
// tokens. With fewer than eight tokens the columns are (token, activation plane) pairs (STACKED), so that one token's
// planes fill a product; otherwise a product has one plane of eight tokens, and pairs of planes with equal i + j share
// accumulators. Warps add up in shared memory: integers, so that the order does not matter.
//
// Formats and OUTPUT are as in gemm.cu.
#include "device.cuh"

namespace {

constexpr int ROWS = 16 * ROW_TILES;
constexpr bool STACKED = TOKENS < 8;
constexpr int TILES = STACKED ? (TOKENS * X_BITS + 7) / 8 : TOKENS / 8;  // of eight columns
constexpr int SETS = STACKED ? W_BITS : W_BITS + X_BITS - 1;
constexpr int B_PLANES = STACKED ? 1 : X_BITS;

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    bit_plane_stream(const uint32_t *x, const uint32_t *w, void *y, const int *x_sums, const int *w_sums,
                     const float *x_scale, const float *w_scale, int tokens, int rows, int words, int alpha, int beta_x,
                     int beta_w, int gamma) {
  __shared__ int total[TOKENS][ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
  for (int k = threadIdx.x; k < TOKENS * ROWS; k += 32 * WARPS) total[k / ROWS][k % ROWS] = 0;
  __syncthreads();

  // Rows, tokens and columns beyond the end repeat the last one; their results are not written.
  const uint32_t *w_row[ROW_TILES][2];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      w_row[r][half] = w + static_cast<int64_t>(min(first_row + 16 * r + 8 * half + g, rows - 1)) * words;
  const int64_t w_plane = static_cast<int64_t>(rows) * words, x_plane = static_cast<int64_t>(tokens) * words;
  const uint32_t *x_row[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int column = min(8 * tile + g, STACKED ? TOKENS * X_BITS - 1 : TOKENS - 1);
    const int token = min(first_token + (STACKED ? column / X_BITS : column), tokens - 1);
    x_row[tile] = x + (STACKED ? column % X_BITS : 0) * x_plane + static_cast<int64_t>(token) * words;
  }

  int sum[ROW_TILES][TILES][SETS][4] = {};
#pragma unroll UNROLL
  for (int word = 16 * warp + 4 * t; word - 4 * t < words; word += 16 * WARPS) {
    const bool inside = word < words;
    uint4 a[ROW_TILES][W_BITS][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int i = 0; i < W_BITS; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[r][i][half] = inside ? load_global_streamed(w_row[r][half] + i * w_plane + word) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int j = 0; j < B_PLANES; ++j) {
        const uint4 b = inside ? load_global(x_row[tile] + j * x_plane + word) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
          for (int i = 0; i < W_BITS; ++i) {
            int(&c)[4] = sum[r][tile][STACKED ? i : i + j];
            mma_b1(c, a[r][i][0].x, a[r][i][1].x, a[r][i][0].y, a[r][i][1].y, b.x, b.y);
            mma_b1(c, a[r][i][0].z, a[r][i][1].z, a[r][i][0].w, a[r][i][1].w, b.z, b.w);
          }
      }
  }

#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int value = 0;
#pragma unroll
        for (int s = SETS - 1; s >= 0; --s) value = 2 * value + sum[r][tile][s][e];
        const int column = 8 * tile + 2 * t + e % 2, row = 16 * r + 8 * (e / 2) + g;
        if (STACKED) value <<= column % X_BITS;
        if (!STACKED || column < TOKENS * X_BITS) atomic_add_shared(&total[STACKED ? column / X_BITS : column][row], value);
      }
  __syncthreads();

  for (int k = threadIdx.x; k < TOKENS * ROWS; k += 32 * WARPS) {
    const int m = first_token + k / ROWS, n = first_row + k % ROWS;
    if (m >= tokens || n >= rows) continue;
    int exact = alpha * total[k / ROWS][k % ROWS] + gamma;
    if (beta_x != 0) exact += beta_x * x_sums[m];
    if (beta_w != 0) exact += beta_w * w_sums[n];
    const int64_t at = static_cast<int64_t>(m) * rows + n;
#if OUTPUT == 0
    static_cast<int *>(y)[at] = exact;
#else
    const float value = static_cast<float>(exact) * (x_scale[m] * w_scale[n]);
#if OUTPUT == 1
    static_cast<float *>(y)[at] = value;
#elif OUTPUT == 2
    static_cast<uint16_t *>(y)[at] = static_cast<uint16_t>(pack_half2(value, 0.0f));
#else
    static_cast<uint16_t *>(y)[at] = static_cast<uint16_t>(pack_bfloat162(value, 0.0f));
#endif
#endif
  }
}
