// Fourier butterflies for one instruction set. cpu.cpp includes this file once per instruction set, after defining
//   ISA         namespace of this copy
//   ISA_TARGET  function attribute that enables the instructions (may be empty)
//   ISA_BYTES   bytes of a vector register
//   ISA_RADIX   log2 of the register pairs that one pass holds
// There is no include guard on purpose.
//
// Outside, complex numbers are interleaved. Between passes a pair of registers, LANES real and LANES imaginary parts,
// takes the same place in memory as the LANES complex numbers that it stands for; so addresses don't depend on the
// format, and only the first load and the last store of a transform shuffle.
//
// Forward is decimation in time: stages from index bit 0 up, second input multiplied before the butterfly. Inverse is
// its adjoint, decimation in frequency: the same stages from the top down, multiplied by the conjugate after it. The
// stage with distance h multiplies by exp(-pi i j / h), j the position in its half block.

#define ISA_INLINE ISA_TARGET inline __attribute__((always_inline))

namespace tensormill::fft::ISA {

template <class T>
using Vector = typename Register<T, ISA_BYTES>::type;
template <class T>
constexpr int LANES = ISA_BYTES / sizeof(T);
template <class T>
constexpr int LANE_BITS = log2_floor(LANES<T>);

template <class T>
ISA_INLINE void fetch(Vector<T> &v, const T *p) {
  std::memcpy(&v, p, sizeof v);
}

template <class T, size_t... I>
ISA_INLINE void deinterleave(Vector<T> &a, Vector<T> &b, std::index_sequence<I...>) {
  const Vector<T> re = TENSORMILL_SHUFFLE(T, ISA_BYTES, a, b, (2 * int(I))...);
  b = TENSORMILL_SHUFFLE(T, ISA_BYTES, a, b, (2 * int(I) + 1)...);
  a = re;
}

template <class T, size_t... I>
ISA_INLINE void interleave(Vector<T> &a, Vector<T> &b, std::index_sequence<I...>) {
  constexpr int L = LANES<T>;
  const Vector<T> low = TENSORMILL_SHUFFLE(T, ISA_BYTES, a, b, (int(I) / 2 + (int(I) % 2) * L)...);
  b = TENSORMILL_SHUFFLE(T, ISA_BYTES, a, b, (int(I) / 2 + (int(I) % 2) * L + L / 2)...);
  a = low;
}

template <class T, bool INTERLEAVED>
ISA_INLINE void load(Vector<T> &re, Vector<T> &im, const T *p) {
  fetch<T>(re, p);
  fetch<T>(im, p + LANES<T>);
  if constexpr (INTERLEAVED) deinterleave<T>(re, im, std::make_index_sequence<LANES<T>>{});
}

template <class T, bool INTERLEAVED>
ISA_INLINE void store(T *p, Vector<T> &re, Vector<T> &im) {
  if constexpr (INTERLEAVED) interleave<T>(re, im, std::make_index_sequence<LANES<T>>{});
  std::memcpy(p, &re, sizeof re);
  std::memcpy(p + LANES<T>, &im, sizeof im);
}

// Lane i becomes v[i] + v[i ^ H], or v[i ^ H] - v[i] where i has the bit.
template <class T, int H, size_t... I>
ISA_INLINE void exchange_lanes(Vector<T> &v, std::index_sequence<I...>) {
  const Vector<T> other = TENSORMILL_SHUFFLE(T, ISA_BYTES, v, v, (int(I) ^ H)...);
  v = v * Vector<T>{((int(I) & H) ? T(-1) : T(1))...} + other;
}

// The stage on a lane bit; `w` has the factors of all lanes, 1 where the bit is not set.
template <class T, bool INVERSE, int STAGE>
ISA_INLINE void within(Vector<T> &re, Vector<T> &im, const T *w) {
  constexpr auto lanes = std::make_index_sequence<LANES<T>>{};
  if constexpr (INVERSE) {
    exchange_lanes<T, 1 << STAGE>(re, lanes);
    exchange_lanes<T, 1 << STAGE>(im, lanes);
  }
  if constexpr (STAGE > 0) {
    Vector<T> wr, wi;
    fetch<T>(wr, w + STAGE * 2 * LANES<T>);
    fetch<T>(wi, w + STAGE * 2 * LANES<T> + LANES<T>);
    const Vector<T> r = re, i = im;
    re = INVERSE ? r * wr + i * wi : r * wr - i * wi;
    im = INVERSE ? i * wr - r * wi : i * wr + r * wi;
  }
  if constexpr (!INVERSE) {
    exchange_lanes<T, 1 << STAGE>(re, lanes);
    exchange_lanes<T, 1 << STAGE>(im, lanes);
  }
}

template <class T, bool INVERSE, int STAGES>
ISA_INLINE void within_all(Vector<T> &re, Vector<T> &im, const T *w) {
  if constexpr (!INVERSE && STAGES > 1) within_all<T, INVERSE, STAGES - 1>(re, im, w);
  if constexpr (STAGES > 0) within<T, INVERSE, STAGES - 1>(re, im, w);
  if constexpr (INVERSE && STAGES > 1) within_all<T, INVERSE, STAGES - 1>(re, im, w);
}

template <class T, bool INVERSE>
ISA_INLINE void butterfly(Vector<T> &ar, Vector<T> &ai, Vector<T> &br, Vector<T> &bi, const Vector<T> &wr,
                          const Vector<T> &wi) {
  if constexpr (INVERSE) {
    const Vector<T> dr = ar - br, di = ai - bi;
    ar += br;
    ai += bi;
    br = dr * wr + di * wi;
    bi = di * wr - dr * wi;
  } else {  // a - w b as 2 a - (a + w b): six fused operations instead of eight
    const Vector<T> sr = ar + wr * br - wi * bi, si = ai + wr * bi + wi * br;
    br = T(2) * ar - sr;
    bi = T(2) * ai - si;
    ar = sr;
    ai = si;
  }
}

// Stage `STAGE` of a pass over 2^BITS register pairs, w = exp(-pi i j / (h 2^STAGE)). Pairs whose index i has low bits
// need the factor of position j + i h: w times eighths of a turn.
template <class T, bool INVERSE, int BITS, int STAGE>
ISA_INLINE void stage(Vector<T> (&re)[1 << BITS], Vector<T> (&im)[1 << BITS], const T *w) {
  static_assert(STAGE < 3);
  constexpr int half = 1 << STAGE;
  Vector<T> wr[2], wi[2];
  fetch<T>(wr[0], w);
  fetch<T>(wi[0], w + LANES<T>);
  if constexpr (STAGE == 2) {
    constexpr T s = T(0.70710678118654752440);
    wr[1] = (wr[0] + wi[0]) * s;
    wi[1] = (wi[0] - wr[0]) * s;
  }
#pragma GCC unroll 8
  for (int i = 0; i < (1 << BITS); ++i) {
    if (i & half) continue;
    const int phase = i & (half - 1), eighth = STAGE == 2 ? phase & 1 : 0;
    if (STAGE > 0 && phase >= half / 2) {
      const Vector<T> turned = -wr[eighth];
      butterfly<T, INVERSE>(re[i], im[i], re[i + half], im[i + half], wi[eighth], turned);
    } else {
      butterfly<T, INVERSE>(re[i], im[i], re[i + half], im[i + half], wr[eighth], wi[eighth]);
    }
  }
}

template <class T, bool INVERSE, int BITS>
ISA_INLINE void across(Vector<T> (&re)[1 << BITS], Vector<T> (&im)[1 << BITS], const T *const (&w)[3], int64_t at) {
  if constexpr (INVERSE) {
    if constexpr (BITS > 2) stage<T, true, BITS, 2>(re, im, w[2] + at);
    if constexpr (BITS > 1) stage<T, true, BITS, 1>(re, im, w[1] + at);
    if constexpr (BITS > 0) stage<T, true, BITS, 0>(re, im, w[0] + at);
  } else {
    if constexpr (BITS > 0) stage<T, false, BITS, 0>(re, im, w[0] + at);
    if constexpr (BITS > 1) stage<T, false, BITS, 1>(re, im, w[1] + at);
    if constexpr (BITS > 2) stage<T, false, BITS, 2>(re, im, w[2] + at);
  }
}

// The stages on the lowest index bits: LANES << BITS contiguous elements at a time, entirely in registers. If they are
// the whole transform (ALONE), both sides are interleaved and the scale is applied. With APART, imaginary parts come
// from an array of their own, `imag` numbers behind the real ones.
template <class T, bool INVERSE, int BITS, bool ALONE, bool APART>
ISA_TARGET void chunks(const T *x, int64_t imag, T *y, int64_t count, T scale) {
  constexpr int64_t step = 2 * LANES<T>, x_step = APART ? LANES<T> : step;
  const T *const lanes = lane_factors<T>(LANES<T>);
  const T *w[3] = {};
  for (int b = 0; b < BITS; ++b) w[b] = factors<T>(LANE_BITS<T>, b, LANES<T>);
  for (int64_t c = 0; c < count; ++c, x += x_step << BITS, y += step << BITS) {
    Vector<T> re[1 << BITS], im[1 << BITS];
#pragma GCC unroll 8
    for (int i = 0; i < (1 << BITS); ++i) {
      if constexpr (APART) {
        fetch<T>(re[i], x + i * x_step);
        fetch<T>(im[i], x + imag + i * x_step);
      } else {
        load<T, !INVERSE || ALONE>(re[i], im[i], x + i * step);
      }
      if constexpr (!INVERSE) within_all<T, false, LANE_BITS<T>>(re[i], im[i], lanes);
    }
    across<T, INVERSE, BITS>(re, im, w, 0);
#pragma GCC unroll 8
    for (int i = 0; i < (1 << BITS); ++i) {
      if constexpr (INVERSE) within_all<T, true, LANE_BITS<T>>(re[i], im[i], lanes);
      if constexpr (ALONE) {
        re[i] *= scale;
        im[i] *= scale;
      }
      store<T, INVERSE || ALONE>(y + i * step, re[i], im[i]);
    }
  }
}

template <class T, bool INVERSE, bool APART>
ISA_TARGET void whole_chunks(const T *x, int64_t imag, T *y, int bits, int64_t count, T scale) {
  switch (bits) {
    case 0: return chunks<T, INVERSE, 0, true, APART>(x, imag, y, count, scale);
    case 1: return chunks<T, INVERSE, 1, true, APART>(x, imag, y, count, scale);
    case 2: return chunks<T, INVERSE, 2, true, APART>(x, imag, y, count, scale);
#if ISA_RADIX > 2
    case 3: return chunks<T, INVERSE, 3, true, APART>(x, imag, y, count, scale);
#endif
  }
}

// Transforms of 2^STAGES elements, fewer than a register has lanes: many at once, the last few through a copy.
template <class T, bool INVERSE, int STAGES>
ISA_TARGET void tiny(const T *x, T *y, int64_t elements, T scale) {
  constexpr int64_t step = 2 * LANES<T>;
  const T *const lanes = lane_factors<T>(LANES<T>);
  T copy[step] = {};
  for (int64_t i = 0; i < 2 * elements; i += step) {
    const int64_t left = 2 * elements - i;
    if (left < step) std::copy(x + i, x + i + left, copy);
    Vector<T> re, im;
    load<T, true>(re, im, left < step ? copy : x + i);
    within_all<T, INVERSE, STAGES>(re, im, lanes);
    re *= scale;
    im *= scale;
    store<T, true>(left < step ? copy : y + i, re, im);
    if (left < step) std::copy(copy, copy + left, y + i);
  }
}

// A matrix of complex rows, `width` of its 2^log_columns columns, from `column` on: BITS stages over the row index,
// from bit `low` on. At the OUTER edge of a transform the numbers are interleaved (the input of the inverse, the
// output of the forward transform), and the scale is applied.
template <class T, bool INVERSE, int BITS, bool OUTER>
ISA_TARGET void pass(const T *x, int64_t x_stride, T *y, int64_t y_stride, int bits, int low, int log_columns,
                     int64_t column, int64_t width, T scale) {
  constexpr int64_t step = 2 * LANES<T>;
  const T *w[3] = {};
  for (int b = 0; b < BITS; ++b) w[b] = factors<T>(log_columns + low, b, LANES<T>);
  const int64_t x_step = 2 * (x_stride << low), y_step = 2 * (y_stride << low);
  for (int64_t group = 0; group < int64_t{1} << (bits - BITS); ++group) {
    const int64_t below = group & ((int64_t{1} << low) - 1), row = (group >> low << (low + BITS)) | below;
    const int64_t at = 2 * ((below << log_columns) + column);
    const T *from = x + 2 * row * x_stride;
    T *to = y + 2 * row * y_stride;
    for (int64_t c = 0; c < 2 * width; c += step) {
      Vector<T> re[1 << BITS], im[1 << BITS];
#pragma GCC unroll 8
      for (int i = 0; i < (1 << BITS); ++i) {
        load<T, INVERSE && OUTER>(re[i], im[i], from + i * x_step + c);
        if constexpr (INVERSE && OUTER) {
          re[i] *= scale;
          im[i] *= scale;
        }
      }
      across<T, INVERSE, BITS>(re, im, w, at + c);
#pragma GCC unroll 8
      for (int i = 0; i < (1 << BITS); ++i) {
        if constexpr (!INVERSE && OUTER) {
          re[i] *= scale;
          im[i] *= scale;
        }
        store<T, !INVERSE && OUTER>(to + i * y_step + c, re[i], im[i]);
      }
    }
  }
}

template <class T, bool INVERSE, bool OUTER>
ISA_TARGET void pass(int radix, const T *x, int64_t x_stride, T *y, int64_t y_stride, int bits, int low,
                     int log_columns, int64_t column, int64_t width, T scale) {
  const auto run = [&](auto kernel) {
    kernel(x, x_stride, y, y_stride, bits, low, log_columns, column, width, scale);
  };
  switch (radix) {
    case 1: return run(pass<T, INVERSE, 1, OUTER>);
    case 2: return run(pass<T, INVERSE, 2, OUTER>);
#if ISA_RADIX > 2
    case 3: return run(pass<T, INVERSE, 3, OUTER>);
#endif
  }
}

// All `bits` stages over the row index of `width` columns. What lies between the first and the last pass is in
// `between`: y itself, or scratch that stays in the cache although the rows of y are far apart.
template <class T, bool INVERSE>
ISA_TARGET void columns(const T *x, int64_t x_stride, T *between, int64_t between_stride, T *y, int64_t y_stride,
                        int bits, int log_columns, int64_t column, int64_t width, bool outer, T scale) {
  const int passes = (bits + ISA_RADIX - 1) / ISA_RADIX;
  for (int k = 0; k < passes; ++k) {
    const int p = INVERSE ? passes - 1 - k : k;
    const int radix = bits / passes + (p < bits % passes), low = p * (bits / passes) + std::min(p, bits % passes);
    const bool first = k == 0, last = k == passes - 1;
    const T *from = first ? x : between;
    T *to = last ? y : between;
    const int64_t from_stride = first ? x_stride : between_stride, to_stride = last ? y_stride : between_stride;
    if (outer && (INVERSE ? first : last)) {
      pass<T, INVERSE, true>(radix, from, from_stride, to, to_stride, bits, low, log_columns, column, width, scale);
    } else {
      pass<T, INVERSE, false>(radix, from, from_stride, to, to_stride, bits, low, log_columns, column, width, scale);
    }
  }
}

// Columns `begin` to `end`, `block` at a time through `scratch` (2 << bits times `block` numbers).
template <class T, bool INVERSE>
ISA_TARGET void column_blocks(const T *x, T *y, T *scratch, int bits, int log_columns, int64_t block, int64_t begin,
                              int64_t end, T scale) {
  const int64_t stride = int64_t{1} << log_columns;
  for (int64_t c = begin; c < end; c += block) {
    const int64_t width = std::min(block, end - c);
    columns<T, INVERSE>(x + 2 * c, stride, scratch, width, y + 2 * c, stride, bits, log_columns, c, width, true,
                        scale);
  }
}

// Transforms of `count` contiguous rows of 2^log_n elements that fit in the nearest caches. If they are only a part
// of longer ones (not `outer`), the side that the columns see stays split. APART as in `chunks`; at least LANES long.
template <class T, bool INVERSE, bool APART>
ISA_TARGET void rows(const T *x, int64_t imag, T *y, int log_n, int64_t count, bool outer, T scale) {
  constexpr int CHUNK_BITS = LANE_BITS<T> + ISA_RADIX;
  if constexpr (!APART) {
    switch (log_n < LANE_BITS<T> ? log_n : -1) {
      case 0: return tiny<T, INVERSE, 0>(x, y, count, scale);
      case 1: return tiny<T, INVERSE, 1>(x, y, count << 1, scale);
      case 2: return tiny<T, INVERSE, 2>(x, y, count << 2, scale);
      case 3: return tiny<T, INVERSE, 3>(x, y, count << 3, scale);
    }
  }
  if (log_n <= CHUNK_BITS) return whole_chunks<T, INVERSE, APART>(x, imag, y, log_n - LANE_BITS<T>, count, scale);
  const int64_t n = int64_t{1} << log_n, chunk = int64_t{1} << CHUNK_BITS;
  for (int64_t r = 0; r < count; ++r, x += APART ? n : 2 * n, y += 2 * n) {
    if constexpr (!INVERSE) chunks<T, false, ISA_RADIX, false, APART>(x, imag, y, n >> CHUNK_BITS, scale);
    columns<T, INVERSE>(INVERSE ? x : y, chunk, y, chunk, y, chunk, log_n - CHUNK_BITS, CHUNK_BITS, 0, chunk, outer,
                        scale);
    if constexpr (INVERSE) chunks<T, true, ISA_RADIX, false, false>(y, 0, y, n >> CHUNK_BITS, scale);
  }
}

template <class T, size_t... I>
ISA_INLINE void turn_round(Vector<T> &v, std::index_sequence<I...>) {
  v = TENSORMILL_SHUFFLE(T, ISA_BYTES, v, v, (LANES<T> - 1 - int(I))...);
}

// Z, the transform of (first half) + i (second half) of 2^log_n real samples, is in the first half of y; it becomes
// their transform Y. Frequencies k, h - k, h + k and n - k, where h = n / 2, come from Z_k and Z_{h-k}; here for blocks
// `begin` to `end` of LANES numbers k < h / 2. Block 0 has no partner in a register, and takes k = h / 2 with it.
template <class T>
ISA_TARGET void unpack(T *y, int log_n, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  constexpr auto lanes = std::make_index_sequence<L>{};
  const int64_t n = int64_t{1} << log_n, h = n / 2;
  const T *w = factors<T>(log_n - 2, 1, L);
  if (begin == 0) {
    for (int k = 1; k < L; ++k) {
      const T ar = y[2 * k], ai = y[2 * k + 1], br = y[2 * (h - k)], bi = y[2 * (h - k) + 1];
      const T er = ar + br, ei = ai - bi, dr = ai + bi, di = br - ar;
      const T tr = w[k] * dr - w[L + k] * di, ti = w[k] * di + w[L + k] * dr;
      y[2 * k] = y[2 * (n - k)] = er + tr;
      y[2 * k + 1] = ei + ti;
      y[2 * (n - k) + 1] = -(ei + ti);
      y[2 * (h - k)] = y[2 * (h + k)] = er - tr;
      y[2 * (h + k) + 1] = ei - ti;
      y[2 * (h - k) + 1] = ti - ei;
    }
    const T re = 2 * y[0], im = 2 * y[1], middle_re = 2 * y[h], middle_im = 2 * y[h + 1];
    y[0] = re + im;
    y[2 * h] = re - im;
    y[1] = y[2 * h + 1] = 0;
    y[h] = y[3 * h] = middle_re;
    y[h + 1] = -middle_im;
    y[3 * h + 1] = middle_im;
    ++begin;
  }
  for (int64_t k = begin * L; k < end * L; k += L) {
    Vector<T> ar, ai, br, bi, wr, wi;
    load<T, true>(ar, ai, y + 2 * k);
    load<T, true>(br, bi, y + 2 * (h - k - L + 1));
    turn_round<T>(br, lanes);
    turn_round<T>(bi, lanes);
    fetch<T>(wr, w + 2 * k);
    fetch<T>(wi, w + 2 * k + L);
    const Vector<T> er = ar + br, ei = ai - bi, dr = ai + bi, di = br - ar;
    const Vector<T> tr = wr * dr - wi * di, ti = wr * di + wi * dr;
    Vector<T> sr = er + tr, si = ei + ti, mr = er - tr, mi = ei - ti;
    Vector<T> s_back = sr, s_conjugate = -si, m_back = mr, m_conjugate = -mi;
    turn_round<T>(s_back, lanes);
    turn_round<T>(s_conjugate, lanes);
    turn_round<T>(m_back, lanes);
    turn_round<T>(m_conjugate, lanes);
    store<T, true>(y + 2 * k, sr, si);
    store<T, true>(y + 2 * (h + k), mr, mi);
    store<T, true>(y + 2 * (h - k - L + 1), m_back, m_conjugate);
    store<T, true>(y + 2 * (n - k - L + 1), s_back, s_conjugate);
  }
}

template <class T>
Kernels<T> kernels() {
  return {{column_blocks<T, false>, column_blocks<T, true>},
          {rows<T, false, false>, rows<T, true, false>},
          rows<T, false, true>,
          unpack<T>,
          LANES<T>};
}

}  // namespace tensormill::fft::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
#undef ISA_RADIX
#undef ISA_INLINE
