// Butterflies for one instruction set. cpu.cpp includes this file once per instruction set, after defining
//   ISA         namespace of this copy
//   ISA_TARGET  function attribute that enables the instructions (may be empty)
//   ISA_BYTES   bytes of a vector register
//   ISA_RADIX   log2 of the vectors that one pass holds in registers
// There is no include guard on purpose.
//
// A transform is log2(n) commuting stages, one per bit of the index. Stages on the lowest bits exchange lanes of a
// register, all others add and subtract whole registers. A pass loads 2^r registers, does r stages and stores: with
// r = 4 an index bit costs a quarter of a trip to the cache.

#define ISA_INLINE ISA_TARGET inline __attribute__((always_inline))

namespace tensormill::hadamard::ISA {

template <class T>
using Vector = typename Register<T, ISA_BYTES>::type;
template <class T>
constexpr int LANES = ISA_BYTES / sizeof(T);
template <class T>
constexpr int LANE_BITS = log2_floor(LANES<T>);

ISA_INLINE void load(Vector<float> &v, const float *p) { std::memcpy(&v, p, sizeof v); }
ISA_INLINE void load(Vector<double> &v, const double *p) { std::memcpy(&v, p, sizeof v); }
ISA_INLINE void store(float *p, const Vector<float> &v) { std::memcpy(p, &v, sizeof v); }
ISA_INLINE void store(double *p, const Vector<double> &v) { std::memcpy(p, &v, sizeof v); }

#if ISA_BYTES == 64
// Zero-masked conversions, because the plain ones make g++ 12 warn about its own header.
ISA_INLINE void load(Vector<float> &v, const Half *p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  v = (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, halves);
}
ISA_INLINE void store(Half *p, const Vector<float> &v) {
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), halves);
}
#elif ISA_BYTES == 32
ISA_INLINE void load(Vector<float> &v, const Half *p) {
  v = (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
ISA_INLINE void store(Half *p, const Vector<float> &v) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif
template <class S>
ISA_INLINE void load(Vector<float> &v, const S *p) {
  float values[LANES<float>];
  for (int i = 0; i < LANES<float>; ++i) values[i] = widen(p[i]);
  std::memcpy(&v, values, sizeof v);
}
template <class S>
ISA_INLINE void store(S *p, const Vector<float> &v) {
  float values[LANES<float>];
  std::memcpy(values, &v, sizeof v);
  for (int i = 0; i < LANES<float>; ++i) p[i] = narrow<S>(values[i]);
}

// One stage on lane bit H: lane i becomes v[i] + v[i ^ H], or v[i ^ H] - v[i] where i has the bit.
template <class T, int H, size_t... I>
ISA_INLINE void exchange_lanes(Vector<T> &v, std::index_sequence<I...>) {
  const Vector<T> other = TENSORMILL_SHUFFLE(T, ISA_BYTES, v, v, (int(I) ^ H)...);
  v = v * Vector<T>{((int(I) & H) ? T(-1) : T(1))...} + other;
}

template <class T, int STAGES>
ISA_INLINE void within(Vector<T> &v) {
  constexpr auto lanes = std::make_index_sequence<LANES<T>>{};
  if constexpr (STAGES > 0) exchange_lanes<T, 1>(v, lanes);
  if constexpr (STAGES > 1) exchange_lanes<T, 2>(v, lanes);
  if constexpr (STAGES > 2) exchange_lanes<T, 4>(v, lanes);
  if constexpr (STAGES > 3) exchange_lanes<T, 8>(v, lanes);
}

template <class T, int BITS>
ISA_INLINE void across(Vector<T> (&v)[1 << BITS]) {
#pragma GCC unroll 4
  for (int h = 1; h < (1 << BITS); h *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < (1 << BITS); ++i) {
      if (i & h) continue;
      const Vector<T> a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// Transforms of LANES << BITS contiguous elements each, entirely in registers.
template <class T, class In, class Out, int BITS, bool SCALED>
ISA_TARGET void chunks(const In *x, Out *y, int64_t count, T scale) {
  constexpr int64_t size = int64_t(LANES<T>) << BITS;
  for (int64_t c = 0; c < count; ++c, x += size, y += size) {
    Vector<T> v[1 << BITS];
#pragma GCC unroll 16
    for (int i = 0; i < (1 << BITS); ++i) {
      load(v[i], x + i * LANES<T>);
      within<T, LANE_BITS<T>>(v[i]);
    }
    across<T, BITS>(v);
#pragma GCC unroll 16
    for (int i = 0; i < (1 << BITS); ++i) {
      if constexpr (SCALED) v[i] *= scale;
      store(y + i * LANES<T>, v[i]);
    }
  }
}

template <class T, class In, class Out, bool SCALED>
ISA_TARGET void chunks(const In *x, Out *y, int bits, int64_t count, T scale) {
  switch (bits) {
    case 0: return chunks<T, In, Out, 0, SCALED>(x, y, count, scale);
    case 1: return chunks<T, In, Out, 1, SCALED>(x, y, count, scale);
    case 2: return chunks<T, In, Out, 2, SCALED>(x, y, count, scale);
    case 3: return chunks<T, In, Out, 3, SCALED>(x, y, count, scale);
#if ISA_RADIX > 3
    case 4: return chunks<T, In, Out, 4, SCALED>(x, y, count, scale);
#endif
  }
}

// Transforms of 2^STAGES elements, fewer than a register holds: many at once, the last few through a copy.
template <class T, class In, class Out, int STAGES>
ISA_TARGET void tiny(const In *x, Out *y, int64_t elements, T scale) {
  Vector<T> v;
  int64_t i = 0;
  for (; i + LANES<T> <= elements; i += LANES<T>) {
    load(v, x + i);
    within<T, STAGES>(v);
    v *= scale;
    store(y + i, v);
  }
  if (i < elements) {
    In first[LANES<T>] = {};
    Out last[LANES<T>];
    std::copy(x + i, x + elements, first);
    load(v, first);
    within<T, STAGES>(v);
    v *= scale;
    store(last, v);
    std::copy(last, last + (elements - i), y + i);
  }
}

// A matrix of rows, `width` contiguous elements of each: BITS stages over the row index, from bit `low` on.
template <class T, class In, class Out, int BITS, bool SCALED>
ISA_TARGET void pass(const In *x, int64_t x_stride, Out *y, int64_t y_stride, int bits, int low, int64_t width,
                     T scale) {
  for (int64_t group = 0; group < int64_t{1} << (bits - BITS); ++group) {
    const int64_t row = (group >> low << (low + BITS)) | (group & ((int64_t{1} << low) - 1));
    const In *from = x + row * x_stride;
    Out *to = y + row * y_stride;
    const int64_t x_step = x_stride << low, y_step = y_stride << low;
    for (int64_t c = 0; c < width; c += LANES<T>) {
      Vector<T> v[1 << BITS];
#pragma GCC unroll 16
      for (int i = 0; i < (1 << BITS); ++i) load(v[i], from + i * x_step + c);
      across<T, BITS>(v);
#pragma GCC unroll 16
      for (int i = 0; i < (1 << BITS); ++i) {
        if constexpr (SCALED) v[i] *= scale;
        store(to + i * y_step + c, v[i]);
      }
    }
  }
}

template <class T, class In, class Out, bool SCALED>
ISA_TARGET void pass(int radix, const In *x, int64_t x_stride, Out *y, int64_t y_stride, int bits, int low,
                     int64_t width, T scale) {
  switch (radix) {
    case 1: return pass<T, In, Out, 1, SCALED>(x, x_stride, y, y_stride, bits, low, width, scale);
    case 2: return pass<T, In, Out, 2, SCALED>(x, x_stride, y, y_stride, bits, low, width, scale);
    case 3: return pass<T, In, Out, 3, SCALED>(x, x_stride, y, y_stride, bits, low, width, scale);
#if ISA_RADIX > 3
    case 4: return pass<T, In, Out, 4, SCALED>(x, x_stride, y, y_stride, bits, low, width, scale);
#endif
  }
}

// All `bits` stages over the row index of `width` columns. Where one pass does not do, what lies between the first
// and the last is in `between` (row stride `between_stride`): y itself, or scratch that stays in the cache although
// the rows of y are far apart.
template <class T, class In, class Out, bool SCALED>
ISA_TARGET void columns(const In *x, int64_t x_stride, T *between, int64_t between_stride, Out *y, int64_t y_stride,
                        int bits, int64_t width, T scale) {
  const int passes = (bits + ISA_RADIX - 1) / ISA_RADIX;
  if (passes == 1) {
    pass<T, In, Out, SCALED>(bits, x, x_stride, y, y_stride, bits, 0, width, scale);
    return;
  }
  const auto radix = [=](int i) { return bits / passes + (i < bits % passes); };
  pass<T, In, T, false>(radix(0), x, x_stride, between, between_stride, bits, 0, width, T(1));
  int low = radix(0);
  for (int i = 1; i < passes - 1; low += radix(i++)) {
    pass<T, T, T, false>(radix(i), between, between_stride, between, between_stride, bits, low, width, T(1));
  }
  pass<T, T, Out, SCALED>(radix(passes - 1), between, between_stride, y, y_stride, bits, low, width, scale);
}

// A block of columns, `block` at a time through `scratch` ((1 << bits) * block elements).
template <class T, class In>
ISA_TARGET void column_blocks(const In *x, T *y, T *scratch, int bits, int64_t stride, int64_t block, int64_t begin,
                              int64_t end) {
  for (int64_t c = begin; c < end; c += block) {
    const int64_t width = std::min(block, end - c);
    columns<T, In, T, false>(x + c, stride, scratch, width, y + c, stride, bits, width, T(1));
  }
}

// Whole transforms of `count` contiguous rows of 2^log_n elements that fit in the nearest cache.
template <class T, class In, class Out>
ISA_TARGET void rows(const In *x, Out *y, T *scratch, int log_n, int64_t count, T scale) {
  constexpr int CHUNK_BITS = LANE_BITS<T> + ISA_RADIX;
  if (log_n < LANE_BITS<T>) {
    switch (log_n) {
      case 0: return tiny<T, In, Out, 0>(x, y, count, scale);
      case 1: return tiny<T, In, Out, 1>(x, y, count << 1, scale);
      case 2: return tiny<T, In, Out, 2>(x, y, count << 2, scale);
      case 3: return tiny<T, In, Out, 3>(x, y, count << 3, scale);
    }
  }
  if (log_n <= CHUNK_BITS) return chunks<T, In, Out, true>(x, y, log_n - LANE_BITS<T>, count, scale);
  const int64_t n = int64_t{1} << log_n, chunk = int64_t{1} << CHUNK_BITS;
  for (int64_t r = 0; r < count; ++r, x += n, y += n) {
    T *between = scratch;
    if constexpr (std::is_same_v<T, Out>) between = y;
    chunks<T, In, T, ISA_RADIX, false>(x, between, n >> CHUNK_BITS, T(1));
    columns<T, T, Out, true>(between, chunk, between, chunk, y, chunk, log_n - CHUNK_BITS, chunk, scale);
  }
}

template <class S>
Kernels<S> kernels() {
  using T = compute_t<S>;
  return {column_blocks<T, S>, column_blocks<T, T>, rows<T, S, S>, rows<T, T, S>};
}

}  // namespace tensormill::hadamard::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
#undef ISA_RADIX
#undef ISA_INLINE
