// Product of matrices of bit planes: AND, count bits, add; powers of two by Horner's rule (tiles.h).
//
// Formats are affine in the unsigned codes, so that y = alpha U + beta_x sum(u_x) + beta_w sum(u_w) + gamma K for each
// group, in arithmetic modulo 2^32, which is exact because y fits.
#include <nanobind/nanobind.h>

#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "prefetch.h"

namespace tensormill::bit_planes {

using Row = uint32_t (*)(const uint32_t *x, const uint32_t *w, int64_t x_plane, int64_t w_plane, int w_bits,
                         int64_t words);
using Tile = void (*)(const uint32_t *const *x, const uint32_t *const *w, int64_t x_plane, int64_t w_plane, int x_bits,
                      int w_bits, int64_t words, uint32_t *u);

struct Kernel {
  Row row[8];  // for one token, by its bits
  Tile tile;   // for `tokens` and `rows`
  int tokens, rows;
};

}  // namespace tensormill::bit_planes

#define ISA portable
#define ISA_TARGET
#define ISA_LEVEL 0
#define ISA_TOKENS 2
#define ISA_ROWS 2
#include "tiles.h"

#if TENSORMILL_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2")))
#define ISA_LEVEL 1
#define ISA_TOKENS 2
#define ISA_ROWS 4
#include "tiles.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq")))
#define ISA_LEVEL 2
#define ISA_TOKENS 4
#define ISA_ROWS 4
#include "tiles.h"
#endif

namespace tensormill::bit_planes {

#if TENSORMILL_X86
// Whether there is an instruction that counts the bits of a vector's words.
bool counts_bits() { return instruction_set() >= kAvx512 && __builtin_cpu_supports("avx512vpopcntdq"); }
#endif

Kernel kernel() {
#if TENSORMILL_X86
  if (counts_bits()) return avx512::kernel();
  if (instruction_set() >= kAvx2) return avx2::kernel();
#endif
  return portable::kernel();
}

// y: (tokens, rows) int32, or float32 if there are scales (addresses other than 0). group_words: words of a group.
void product(uintptr_t x_address, uintptr_t w_address, uintptr_t x_sums_address, uintptr_t w_sums_address,
             uintptr_t x_scale_address, uintptr_t w_scale_address, uintptr_t y_address, int64_t tokens, int64_t rows,
             int64_t length, int64_t words, int64_t group_words, int x_bits, int w_bits, int32_t alpha, int32_t beta_x,
             int32_t beta_w, int32_t gamma, int threads) {
  constexpr int64_t TOKENS_AT_ONCE = 64;  // whose planes stay in the second-level cache
  constexpr int MOST = 4;                 // tokens and rows of the largest tile
  const auto *x = reinterpret_cast<const uint32_t *>(x_address), *w = reinterpret_cast<const uint32_t *>(w_address);
  const auto *x_sums = reinterpret_cast<const uint32_t *>(x_sums_address);
  const auto *w_sums = reinterpret_cast<const uint32_t *>(w_sums_address);
  const auto *x_scale = reinterpret_cast<const float *>(x_scale_address);
  const auto *w_scale = reinterpret_cast<const float *>(w_scale_address);
  const Kernel kernel = bit_planes::kernel();
  const int64_t groups = (words + group_words - 1) / group_words, x_plane = tokens * words, w_plane = rows * words;

  const auto exact = [=](uint32_t u, int64_t m, int64_t n, int64_t g) {
    const uint32_t columns = static_cast<uint32_t>(std::min(group_words * 32, length - g * group_words * 32));
    return alpha * u + beta_x * x_sums[m * groups + g] + beta_w * w_sums[n * groups + g] + gamma * columns;
  };
  const auto scaled = [=](uint32_t value, int64_t m, int64_t n, int64_t g) {
    return static_cast<float>(static_cast<int32_t>(value)) * (x_scale[m * groups + g] * w_scale[n * groups + g]);
  };
  auto *const y = reinterpret_cast<float *>(y_address);
  auto *const y_exact = reinterpret_cast<uint32_t *>(y_address);

  const auto one_token = [=](int64_t m, int64_t begin, int64_t end) {
    const Row row = kernel.row[x_bits - 1];
    for (int64_t n = begin; n < end; ++n) {
      for (int i = 0; i < w_bits; ++i)
        prefetch_pages(reinterpret_cast<const uint8_t *>(w + i * w_plane + n * words) + kPageDistance, 4 * words);
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * group_words, count = std::min(group_words, words - at);
        const uint32_t u = row(x + m * words + at, w + n * words + at, x_plane, w_plane, w_bits, count);
        if (x_scale != nullptr) {
          sum += scaled(exact(u, m, n, g), m, n, g);
        } else {
          y_exact[m * rows + n] = exact(u, m, n, g);
        }
      }
      if (x_scale != nullptr) y[m * rows + n] = sum;
    }
  };

  parallel_chunks(rows, kernel.rows, threads, [=](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
      const int64_t last = std::min(tokens, first + TOKENS_AT_ONCE);
      for (int64_t n = begin; n < end; n += kernel.rows) {
        for (int64_t m = first; m < last; m += kernel.tokens) {
          if (last - m == 1) {
            one_token(m, n, std::min(n + kernel.rows, end));
            break;
          }
          const uint32_t *x_rows[MOST], *w_rows[MOST];
          float sum[MOST * MOST] = {};
          uint32_t u[MOST * MOST];
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = g * group_words, count = std::min(group_words, words - at);
            for (int i = 0; i < kernel.tokens; ++i) x_rows[i] = x + std::min(m + i, last - 1) * words + at;
            for (int i = 0; i < kernel.rows; ++i) w_rows[i] = w + std::min(n + i, end - 1) * words + at;
            kernel.tile(x_rows, w_rows, x_plane, w_plane, x_bits, w_bits, count, u);
            for (int i = 0; i < kernel.tokens && m + i < last; ++i)
              for (int k = 0; k < kernel.rows && n + k < end; ++k) {
                const uint32_t value = exact(u[i * kernel.rows + k], m + i, n + k, g);
                if (x_scale != nullptr) {
                  sum[i * MOST + k] += scaled(value, m + i, n + k, g);
                } else {
                  y_exact[(m + i) * rows + n + k] = value;
                }
              }
          }
          if (x_scale != nullptr)
            for (int i = 0; i < kernel.tokens && m + i < last; ++i)
              for (int k = 0; k < kernel.rows && n + k < end; ++k) y[(m + i) * rows + n + k] = sum[i * MOST + k];
        }
      }
    }
  });
}

// Each bit of a byte as a byte, 0 or 1, the lowest first.
inline uint64_t spread(uint8_t bits) {
  const uint64_t own = (bits * 0x0101010101010101u) & 0x8040201008040201u;
  return ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

// One row of codes as bytes, less 128 if they have 8 bits, which XOR with 0x80 subtracts.
void expand_row(const uint8_t *planes, int64_t plane_bytes, uint8_t *bytes, int64_t length, int bits) {
  for (int64_t k = 0; k < length; k += 8) {
    uint64_t codes = bits == 8 ? 0x8080808080808080u : 0;
    for (int j = 0; j < bits; ++j) codes ^= spread(planes[j * plane_bytes + k / 8]) << j;
    std::memcpy(bytes + k, &codes, static_cast<size_t>(std::min<int64_t>(8, length - k)));
  }
}

#if TENSORMILL_X86
__attribute__((target("avx512f,avx512bw"))) void expand_row_avx512(const uint8_t *planes, int64_t plane_bytes,
                                                                   uint8_t *bytes, int64_t length, int bits) {
  for (int64_t k = 0; k < length; k += 64) {
    __m512i codes = bits == 8 ? _mm512_set1_epi8(static_cast<char>(0x80)) : _mm512_setzero_si512();
    for (int j = 0; j < bits; ++j) {
      uint64_t word;  // rows are whole 128 bits
      std::memcpy(&word, planes + j * plane_bytes + k / 8, sizeof word);
      codes = _mm512_xor_si512(codes, _mm512_maskz_set1_epi8(word, static_cast<char>(1 << j)));
    }
    const int64_t rest = length - k;
    _mm512_mask_storeu_epi8(bytes + k, rest < 64 ? (uint64_t{1} << rest) - 1 : ~uint64_t{0}, codes);
  }
}
#endif

// Codes as bytes, (rows, length).
void expand(uintptr_t planes_address, uintptr_t bytes_address, int64_t rows, int64_t length, int64_t words, int bits,
            int threads) {
  const auto *planes = reinterpret_cast<const uint8_t *>(planes_address);
  auto *bytes = reinterpret_cast<uint8_t *>(bytes_address);
  auto *row = &expand_row;
#if TENSORMILL_X86
  if (instruction_set() >= kAvx512) row = &expand_row_avx512;
#endif
  parallel_ranges(rows, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(planes + r * 4 * words, rows * 4 * words, bytes + r * length, length, bits);
  });
}

}  // namespace tensormill::bit_planes

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  using namespace tensormill::bit_planes;
  m.def("product", &product, nb::call_guard<nb::gil_scoped_release>());
  m.def("expand", &expand, nb::call_guard<nb::gil_scoped_release>());
  m.def("has_byte_products", [] { return tensormill::has_avx512_vnni(); });
  m.def("instruction_set", &tensormill::instruction_set_name);
}
