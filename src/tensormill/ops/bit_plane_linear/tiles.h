// A row and a tile of a product of bit planes, for one instruction set; included once for each by cpu.cpp, which
// defines ISA (a namespace), ISA_TARGET (a function attribute), ISA_TOKENS and ISA_ROWS (the tile).
namespace tensormill::bit_planes::ISA {

#if ISA_LEVEL == 2

using Vector = __m512i;
constexpr int WORDS = 16;
ISA_TARGET inline Vector zero() { return _mm512_setzero_si512(); }
ISA_TARGET inline Vector load(const uint32_t *from, int64_t count) {
  return count >= WORDS ? _mm512_loadu_si512(from)
                        : _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from);
}
ISA_TARGET inline Vector add_common(Vector sum, Vector a, Vector b) {
  return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
}
ISA_TARGET inline Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
ISA_TARGET inline Vector twice(Vector sum) { return _mm512_slli_epi64(sum, 1); }
ISA_TARGET inline uint32_t total(Vector sum) { return static_cast<uint32_t>(_mm512_reduce_add_epi64(sum)); }

#elif ISA_LEVEL == 1

using Vector = __m256i;
constexpr int WORDS = 8;
ISA_TARGET inline Vector zero() { return _mm256_setzero_si256(); }
ISA_TARGET inline Vector load(const uint32_t *from, int64_t count) {
  if (count >= WORDS) return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));  // rows are whole 128 bits
}
// Counts of nibbles by table, summed over eight bytes.
ISA_TARGET inline Vector add_common(Vector sum, Vector a, Vector b) {
  const Vector counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                         2, 3, 2, 3, 3, 4);
  const Vector low = _mm256_set1_epi8(15), common = _mm256_and_si256(a, b);
  const Vector bytes =
      _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(common, low)),
                      _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(common, 4), low)));
  return _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
}
ISA_TARGET inline Vector add(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
ISA_TARGET inline Vector twice(Vector sum) { return _mm256_slli_epi64(sum, 1); }
ISA_TARGET inline uint32_t total(Vector sum) {
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  return static_cast<uint32_t>(_mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1));
}

#else

using Vector = uint64_t;
constexpr int WORDS = 2;
inline Vector zero() { return 0; }
inline Vector load(const uint32_t *from, int64_t) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline int count_bits(uint64_t word) {
#if defined(__GNUC__)
  return __builtin_popcountll(word);
#else
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  return static_cast<int>((((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}
inline Vector add_common(Vector sum, Vector a, Vector b) { return sum + count_bits(a & b); }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector twice(Vector sum) { return 2 * sum; }
inline uint32_t total(Vector sum) { return static_cast<uint32_t>(sum); }

#endif

// U of TOKENS x ROWS outputs over `words` words: pairs of planes from the most significant on, doubled in between.
template <int TOKENS, int ROWS>
ISA_TARGET void tile(const uint32_t *const *x, const uint32_t *const *w, int64_t x_plane, int64_t w_plane, int x_bits,
                     int w_bits, int64_t words, uint32_t *u) {
  Vector sum[TOKENS][ROWS];
  for (int m = 0; m < TOKENS; ++m)
    for (int n = 0; n < ROWS; ++n) sum[m][n] = zero();
  for (int level = x_bits + w_bits - 2; level >= 0; --level) {
    for (int m = 0; m < TOKENS; ++m)
      for (int n = 0; n < ROWS; ++n) sum[m][n] = twice(sum[m][n]);
    for (int j = std::max(0, level - w_bits + 1); j <= std::min(level, x_bits - 1); ++j) {
      const int64_t x_at = j * x_plane, w_at = (level - j) * w_plane;
      for (int64_t k = 0; k < words; k += WORDS) {
        Vector a[TOKENS];
        for (int m = 0; m < TOKENS; ++m) a[m] = load(x[m] + x_at + k, words - k);
        for (int n = 0; n < ROWS; ++n) {
          const Vector b = load(w[n] + w_at + k, words - k);
          for (int m = 0; m < TOKENS; ++m) sum[m][n] = add_common(sum[m][n], a[m], b);
        }
      }
    }
  }
  for (int m = 0; m < TOKENS; ++m)
    for (int n = 0; n < ROWS; ++n) u[m * ROWS + n] = total(sum[m][n]);
}

// U of one token and one row, whose planes are read once, in order.
template <int X_BITS>
ISA_TARGET uint32_t row(const uint32_t *x, const uint32_t *w, int64_t x_plane, int64_t w_plane, int w_bits,
                        int64_t words) {
  Vector sum = zero();
  for (int i = w_bits - 1; i >= 0; --i) {
    const uint32_t *plane = w + i * w_plane;
    Vector of[X_BITS];
#pragma GCC unroll 8
    for (int j = 0; j < X_BITS; ++j) of[j] = zero();
    int64_t k = 0;
    for (; k + WORDS <= words; k += WORDS) {
      const Vector b = load(plane + k, WORDS);
#pragma GCC unroll 8
      for (int j = 0; j < X_BITS; ++j) of[j] = add_common(of[j], load(x + j * x_plane + k, WORDS), b);
    }
    if (k < words) {
      const Vector b = load(plane + k, words - k);
#pragma GCC unroll 8
      for (int j = 0; j < X_BITS; ++j) of[j] = add_common(of[j], load(x + j * x_plane + k, words - k), b);
    }
    Vector level = of[X_BITS - 1];
#pragma GCC unroll 8
    for (int j = X_BITS - 2; j >= 0; --j) level = add(twice(level), of[j]);
    sum = add(twice(sum), level);
  }
  return total(sum);
}

inline Kernel kernel() {
  return {{&row<1>, &row<2>, &row<3>, &row<4>, &row<5>, &row<6>, &row<7>, &row<8>},
          &tile<ISA_TOKENS, ISA_ROWS>, ISA_TOKENS, ISA_ROWS};
}

}  // namespace tensormill::bit_planes::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_LEVEL
#undef ISA_TOKENS
#undef ISA_ROWS
