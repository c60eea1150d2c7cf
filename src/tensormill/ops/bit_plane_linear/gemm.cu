// Product of two matrices of bit planes on Hopper's tensor cores (wgmma b1, and.popc): many tokens.
//
// U[m, n] = sum_{i, j} 2^(i + j) popcount(w_i[n] & x_j[m]) over p planes of weights and q of activations, where one
// wgmma adds 64 x BLOCK_N x 256 single bits. Its accumulators can't be scaled, but U is a polynomial in 2: planes are
// taken in blocks of W_PLANES x X_PLANES from the most significant on, and the accumulators are doubled from one power
// to the next (Horner's rule). Block sizes divide the numbers of planes. Within a block, pairs (i, j) of equal i + j share accumulators, of which there are
// W_PLANES + X_PLANES - 1 sets. Blocks of one plane each need the fewest registers and allow the largest tile; larger
// blocks load each plane less often.
//
// One thread of the last warpgroup keeps a ring of STAGES buffers filled (TMA, 1024 bits of K of every plane in the
// block, 128-byte swizzle); WARPGROUPS consumers of 64 tokens each multiply. Blocks are persistent: while consumers
// write one tile's results, the ring already fills for the next.
//
// All formats are affine in the unsigned codes: y = alpha U + beta_x sum_k u_x + beta_w sum_k u_w + gamma, in arithmetic
// modulo 2^32, which is exact because y itself fits.
//
// OUTPUT: 0 int32, 1 float32, 2 float16, 3 bfloat16; the last three are scaled by x_scale[m] weight_scale[n].
#include "device.cuh"

namespace {

constexpr int BLOCK_M = 64 * WARPGROUPS;
constexpr int ROW_BYTES = 128;  // of one plane in one stage
constexpr int SETS = W_PLANES + X_PLANES - 1;
constexpr int X_BYTES = X_PLANES * BLOCK_M * ROW_BYTES, W_BYTES = W_PLANES * BLOCK_N * ROW_BYTES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int REGISTERS = BLOCK_N / 2;  // of one set of accumulators
constexpr int GROUP = 16;               // row blocks that share weights in L2

struct Tile {
  int m, n;
};

// Tiles in groups of GROUP row blocks, so that those that run together use few rows of either operand.
__device__ Tile tile_at(int index, int row_blocks, int column_blocks) {
  const int per_group = GROUP * column_blocks, first = index / per_group * GROUP;
  const int height = min(GROUP, row_blocks - first), within = index % per_group;
  return {(first + within % height) * BLOCK_M, within / height * BLOCK_N};
}

// Calls body(level, first weight plane, first activation plane) for every block of planes, most significant first;
// level counts down to 0 and is the power of two of the block's lowest pair.
template <class Body>
__device__ void for_plane_blocks(int w_bits, int x_bits, Body &&body) {
  const int w_blocks = w_bits / W_PLANES, x_blocks = x_bits / X_PLANES;
  for (int level = (w_blocks - 1) * W_PLANES + (x_blocks - 1) * X_PLANES; level >= 0; --level) {
    for (int i = w_blocks - 1; i >= 0; --i) {
      const int rest = level - i * W_PLANES;
      if (rest >= 0 && rest % X_PLANES == 0 && rest / X_PLANES < x_blocks) body(level, i * W_PLANES, rest);
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
    bit_plane_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, void *y,
                   const int *x_sums, const int *w_sums, const float *x_scale, const float *w_scale, int tokens, int rows,
                   int words, int x_bits, int w_bits, int alpha, int beta_x, int beta_w, int gamma) {
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char *stages = shared;
  int *correction = reinterpret_cast<int *>(shared + STAGES * STAGE_BYTES);   // [2][BLOCK_N]
  float *column_scale = reinterpret_cast<float *>(correction + 2 * BLOCK_N);  // [2][BLOCK_N]
  uint64_t *full = reinterpret_cast<uint64_t *>(column_scale + 2 * BLOCK_N), *empty = full + STAGES;

  const int warpgroup = threadIdx.x / 128;
  const int row_blocks = (tokens + BLOCK_M - 1) / BLOCK_M, column_blocks = (rows + BLOCK_N - 1) / BLOCK_N;
  const int tiles = row_blocks * column_blocks, chunks = (words + 31) / 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], WARPGROUPS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == WARPGROUPS) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x % 128 == 0) {
      int stage = 0, phase = 1;
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_at(index, row_blocks, column_blocks);
        for_plane_blocks(w_bits, x_bits, [&](int, int w_plane, int x_plane) {
          for (int chunk = 0; chunk < chunks; ++chunk) {
            mbarrier_wait(&empty[stage], phase);
            mbarrier_expect_tx(&full[stage], STAGE_BYTES);
            unsigned char *x_stage = stages + stage * STAGE_BYTES, *w_stage = x_stage + X_BYTES;
            // Rows beyond the last are the next plane's, or zeros: they only reach results that are not written.
            for (int j = 0; j < X_PLANES; ++j)
              tma_load_2d(x_stage + j * BLOCK_M * ROW_BYTES, &x_map, &full[stage], chunk * 32,
                          (x_plane + j) * tokens + tile.m);
            for (int i = 0; i < W_PLANES; ++i)
              tma_load_2d(w_stage + i * BLOCK_N * ROW_BYTES, &w_map, &full[stage], chunk * 32,
                          (w_plane + i) * rows + tile.n);
            if (++stage == STAGES) stage = 0, phase ^= 1;
          }
        });
      }
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int row = 64 * warpgroup + 16 * (thread / 32) + lane / 4, pair = 2 * (lane % 4);
    int stage = 0, phase = 0, parity = 0;
    uint32_t sum[SETS][REGISTERS];
    for (int index = blockIdx.x; index < tiles; index += gridDim.x, parity ^= 1) {
      const Tile tile = tile_at(index, row_blocks, column_blocks);
      for (int c = threadIdx.x; c < BLOCK_N; c += 128 * WARPGROUPS) {
        const bool inside = tile.n + c < rows;
        correction[parity * BLOCK_N + c] = (inside && beta_w != 0 ? beta_w * w_sums[tile.n + c] : 0) + gamma;
        if (OUTPUT != 0) column_scale[parity * BLOCK_N + c] = inside ? w_scale[tile.n + c] : 0.0f;
      }
#pragma unroll
      for (int s = 0; s < SETS; ++s)
#pragma unroll
        for (int r = 0; r < REGISTERS; ++r) sum[s][r] = 0;

      int previous = -1, last_level = -1;  // stage that the unfinished products read; level of the last block
      for_plane_blocks(w_bits, x_bits, [&](int level, int, int) {
        if (last_level > level) {
          wgmma_wait<0>();
          if (thread == 0) mbarrier_arrive(&empty[previous]);
          previous = -1;
          const int shift = last_level - level;
#pragma unroll
          for (int s = 0; s < SETS; ++s)
#pragma unroll
            for (int r = 0; r < REGISTERS; ++r) sum[s][r] <<= shift;
        }
        last_level = level;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          mbarrier_wait(&full[stage], phase);
          const unsigned char *x_stage = stages + stage * STAGE_BYTES, *w_stage = x_stage + X_BYTES;
          const uint64_t a = wgmma_descriptor_128b(x_stage + 64 * warpgroup * ROW_BYTES);
          const uint64_t b = wgmma_descriptor_128b(w_stage);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; ++step)  // 32 bytes of K each: 2 in the descriptor's units of 16
#pragma unroll
            for (int i = 0; i < W_PLANES; ++i)
#pragma unroll
              for (int j = 0; j < X_PLANES; ++j)
                wgmma_b1<BLOCK_N>(sum[i + j], a + 2 * step + j * (BLOCK_M * ROW_BYTES / 16),
                                  b + 2 * step + i * (BLOCK_N * ROW_BYTES / 16));
          wgmma_commit();
          wgmma_wait<1>();
          if (previous >= 0 && thread == 0) mbarrier_arrive(&empty[previous]);
          previous = stage;
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      });
      wgmma_wait<0>();
      if (thread == 0) mbarrier_arrive(&empty[previous]);
#pragma unroll
      for (int s = SETS - 2; s >= 0; --s)
#pragma unroll
        for (int r = 0; r < REGISTERS; ++r) sum[s][r] += sum[s + 1][r] << 1;

      named_barrier_sync(1, 128 * WARPGROUPS);
      const int *columns = correction + parity * BLOCK_N;
      const float *scales = column_scale + parity * BLOCK_N;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = tile.m + row + 8 * half;
        const bool inside = m < tokens;
        const int own = inside && beta_x != 0 ? beta_x * x_sums[m] : 0;
        const float scale = OUTPUT != 0 && inside ? x_scale[m] : 0.0f;
#if OUTPUT < 2
        uint32_t *out = static_cast<uint32_t *>(y) + static_cast<int64_t>(m) * rows + tile.n + pair;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
          uint32_t value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = 8 * j + pair + e;
            const int exact = alpha * static_cast<int>(sum[0][4 * j + 2 * half + e]) + own + columns[c];
            value[e] = OUTPUT == 0 ? exact : float_as_uint(static_cast<float>(exact) * (scale * scales[c]));
          }
          const int n = tile.n + 8 * j + pair;
          if (inside && rows % 2 == 0 && n < rows) {
            store_global_v2(out + 8 * j, value[0], value[1]);
          } else if (inside) {
            if (n < rows) out[8 * j] = value[0];
            if (n + 1 < rows) out[8 * j + 1] = value[1];
          }
        }
#else
        uint16_t *out = static_cast<uint16_t *>(y) + static_cast<int64_t>(m) * rows + tile.n;
        const bool odd = lane & 1;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j += 2) {
          uint32_t word[2];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            float value[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int c = 8 * (j + b) + pair + e;
              const int exact = alpha * static_cast<int>(sum[0][4 * (j + b) + 2 * half + e]) + own + columns[c];
              value[e] = static_cast<float>(exact) * (scale * scales[c]);
            }
            word[b] = OUTPUT == 2 ? pack_half2(value[0], value[1]) : pack_bfloat162(value[0], value[1]);
          }
          // Neighbouring lanes trade words, so that each writes four columns and eight bytes.
          const uint32_t other = shuffle_xor(odd ? word[0] : word[1], 1);
          const uint32_t first = odd ? other : word[0], second = odd ? word[1] : other;
          const int c = odd ? 8 * (j + 1) + pair - 2 : 8 * j + pair, n = tile.n + c;
          if (inside && rows % 4 == 0 && n < rows) {
            store_global_v2(out + c, first, second);
          } else if (inside) {
            const uint32_t both[2] = {first, second};
            for (int e = 0; e < 4; ++e)
              if (n + e < rows) out[c + e] = static_cast<uint16_t>(both[e / 2] >> 16 * (e % 2));
          }
        }
#endif
      }
    }
  }
}
