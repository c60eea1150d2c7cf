// The smoother of one series for one instruction set. cpu.cpp includes this file once per instruction set, after
// defining
//   ISA         namespace of this copy
//   ISA_TARGET  function attribute that enables the instructions (may be empty)
//   ISA_SIZES   whether there are copies for the sizes most used, which take most of the time to compile
// There is no include guard on purpose.
//
// Every covariance is kept as a factor F with P = F F', every precision likewise, and a product of Gaussians becomes
//   (P^-1 + J)^-1 = F (I + F'JF)^-1 F',
// where the matrix in the middle is symmetric with eigenvalues of at least one: its Cholesky factor always exists, and
// the result is positive semidefinite by construction, whatever was rounded. J may be singular; so may P.

#define ISA_INLINE ISA_TARGET inline  // "flatten" below inlines them where the size is known, and nothing else has to

namespace tensormill::kalman::ISA {

// c (m x n) = a (m x k) b (k x n) [+ c]; all row by row
template <class T>
ISA_INLINE void multiply(const T *__restrict a, const T *__restrict b, T *__restrict c, int m, int k, int n,
                         bool add = false) {
  for (int i = 0; i < m; ++i) {
    T *row = c + i * n;
    if (!add) for (int j = 0; j < n; ++j) row[j] = 0;
    for (int l = 0; l < k; ++l) {
      const T factor = a[i * k + l];
      for (int j = 0; j < n; ++j) row[j] += factor * b[l * n + j];
    }
  }
}

// c (m x n) = a' b for a (k x m) and b (k x n) [+ c]
template <class T>
ISA_INLINE void multiply_transposed(const T *__restrict a, const T *__restrict b, T *__restrict c, int m, int k, int n,
                                    bool add = false) {
  if (!add) for (int i = 0; i < m * n; ++i) c[i] = 0;
  for (int l = 0; l < k; ++l)
    for (int i = 0; i < m; ++i) {
      const T factor = a[l * m + i];
      T *row = c + i * n;
      for (int j = 0; j < n; ++j) row[j] += factor * b[l * n + j];
    }
}

template <class T>
ISA_INLINE void transpose(const T *__restrict a, T *__restrict b, int m, int n) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) b[j * m + i] = a[i * n + j];
}

// y (m) = a (m x n) x [+ y]
template <class T>
ISA_INLINE void apply(const T *a, const T *x, T *y, int m, int n, bool add = false) {
  for (int i = 0; i < m; ++i) {
    T sum = add ? y[i] : T(0);
    for (int j = 0; j < n; ++j) sum += a[i * n + j] * x[j];
    y[i] = sum;
  }
}

// y (n) = a' x for a (m x n) [+ y]
template <class T>
ISA_INLINE void apply_transposed(const T *a, const T *x, T *y, int m, int n, bool add = false) {
  if (!add) for (int j = 0; j < n; ++j) y[j] = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) y[j] += a[i * n + j] * x[i];
}

// Upper factor u with a = u'u, for a symmetric and positive definite; only its upper half is read. Returns whether every
// pivot exceeded `least` times its diagonal element: then u'u is a up to rounding.
template <class T>
ISA_INLINE bool cholesky(const T *__restrict a, T *__restrict u, int n, T least = 0) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) u[i * n + j] = j < i ? T(0) : a[i * n + j];
  }
  for (int i = 0; i < n; ++i) {
    if (u[i * n + i] <= least * a[i * n + i]) return false;
    const T root = std::sqrt(u[i * n + i]), scale = 1 / root;
    u[i * n + i] = root;
    for (int j = i + 1; j < n; ++j) u[i * n + j] *= scale;
    for (int l = i + 1; l < n; ++l) {
      const T factor = u[i * n + l];
      for (int j = l; j < n; ++j) u[l * n + j] -= factor * u[i * n + j];
    }
  }
  return true;
}

// Any f with a = f'f, for a positive semidefinite and singular, where elimination in the given order amplifies rounding
// without bound: the largest pivot of the matrix scaled to a unit diagonal comes first, and when none exceeds the rounding,
// the rest is zero. NaN is taken as the largest, so that it shows in the result. Rarely needed, so not inlined.
template <class T>
ISA_TARGET __attribute__((noinline)) void factorize_singular(const T *a, T *f, T *rest, T *scale, int n, T rounding) {
  for (int i = 0; i < n; ++i) scale[i] = a[i * n + i] <= 0 ? T(0) : std::sqrt(a[i * n + i]);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const T product = scale[i] * scale[j];
      rest[i * n + j] = product == 0 ? T(0) : a[i * n + j] / product;
    }
  for (int step = 0; step < n; ++step) {
    T *row = f + step * n;
    int pivot = 0;
    for (int i = 1; i < n; ++i)
      if (!(rest[i * n + i] <= rest[pivot * n + pivot])) pivot = i;
    const T largest = rest[pivot * n + pivot];
    if (largest <= rounding) {
      for (int j = 0; j < (n - step) * n; ++j) row[j] = 0;
      break;
    }
    const T inverse = 1 / std::sqrt(largest);
    for (int j = 0; j < n; ++j) row[j] = rest[pivot * n + j] * inverse;
    for (int i = 0; i < n; ++i) {
      const T factor = row[i];
      for (int j = 0; j < n; ++j) rest[i * n + j] -= factor * row[j];
    }
    for (int j = 0; j < n; ++j) rest[pivot * n + j] = rest[j * n + pivot] = 0;
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) f[i * n + j] *= scale[j];
}

// Any f with a = f'f, for a positive semidefinite.
template <class T>
ISA_INLINE void factorize(const T *a, T *f, T *spare, T *scale, int n) {
  const T rounding = n * std::numeric_limits<T>::epsilon();
  if (!cholesky(a, f, n, 4 * rounding)) factorize_singular(a, f, spare, scale, n, rounding);
}

// x (n x m) = u^-T b for upper u (n x n) of nonzero diagonal
template <class T>
ISA_INLINE void solve_transposed(const T *__restrict u, const T *__restrict b, T *__restrict x, int n, int m) {
  for (int i = 0; i < n * m; ++i) x[i] = b[i];
  for (int i = 0; i < n; ++i) {
    const T scale = 1 / u[i * n + i];
    for (int j = 0; j < m; ++j) x[i * m + j] *= scale;
    for (int l = i + 1; l < n; ++l) {
      const T factor = u[i * n + l];
      for (int j = 0; j < m; ++j) x[l * m + j] -= factor * x[i * m + j];
    }
  }
}

// Given f (n x n) with P = f'f: out = f after multiplying by the potential of precision j, and work holds the Cholesky
// factor of I + f J f'. out must not be f.
template <class T>
ISA_INLINE void narrow(const T *f, const T *j, T *out, T *work, T *spare, int n) {
  multiply(f, j, spare, n, n, n);
  transpose(f, out, n, n);
  multiply(spare, out, work, n, n, n);
  for (int i = 0; i < n; ++i) work[i * n + i] += 1;
  cholesky(work, spare, n);
  solve_transposed(spare, f, out, n, n);
  for (int i = 0; i < n * n; ++i) work[i] = spare[i];
}

// A size known at compile time (SIZE above 0) lets the compiler unroll the products.
template <class T, int SIZE>
ISA_TARGET inline __attribute__((always_inline)) void run(const Arguments<T> &in, const Results<T> &out, int64_t steps, int size, int outputs) {
  const int s = SIZE > 0 ? SIZE : size, r = outputs;
  const int64_t ss = int64_t{s} * s;
  std::vector<T> buffer(steps * ss + 8 * ss + 2 * int64_t{r} * s + 6 * s + 4 * r);
  T *factors = buffer.data(), *p = factors + steps * ss, *f = p + ss, *g = f + ss, *work = g + ss, *spare = work + ss,
    *site = spare + ss, *later = site + ss, *moved = later + ss, *lh = moved + ss, *unused = lh + int64_t{r} * s,
    *mean = unused + int64_t{r} * s, *news = mean + s, *future = news + s, *shifted = future + s, *other = shifted + s,
    *last = other + s, *u = last + s, *v = u + r, *w = v + r;

  for (int i = 0; i < s; ++i) mean[i] = in.initial_mean[i];
  factorize(in.initial_covariance, f, spare, other, s);
  double evidence = 0;
  for (int64_t t = 0; t < steps; ++t) {
    const T *a = in.transition + t * ss, *l = in.precision + t * r * r, *h = in.information + t * r;
    apply(a, mean, shifted, s, s);
    transpose(a, moved, s, s);
    multiply(f, moved, g, s, s, s);  // rows of f A'
    for (int64_t i = 0; i < ss; ++i) p[i] = in.process_noise[t * ss + i];
    multiply_transposed(g, g, p, s, s, s, true);
    factorize(p, f, spare, other, s);
    multiply(l, in.emission, lh, r, r, s);
    multiply_transposed(in.emission, lh, site, s, r, s);
    T *factor = factors + t * ss;
    narrow(f, site, factor, work, spare, s);
    T *covariance = out.filtered_covariance + t * ss;
    multiply_transposed(factor, factor, covariance, s, s, s);
    apply(in.emission, shifted, u, r, s);
    apply(l, u, v, r, r);
    for (int i = 0; i < r; ++i) {
      w[i] = h[i] - v[i];
      evidence += double(h[i] + w[i]) * double(u[i]) / 2;
    }
    apply_transposed(in.emission, w, news, r, s);
    for (int i = 0; i < s; ++i) mean[i] = shifted[i];
    apply(factor, news, other, s, s);
    for (int i = 0; i < s; ++i) evidence += double(other[i]) * double(other[i]) / 2;
    apply_transposed(factor, other, mean, s, s, true);
    for (int i = 0; i < s; ++i) {
      evidence -= std::log(double(work[i * s + i]));
      out.filtered_mean[t * s + i] = mean[i];
    }
    for (int64_t i = 0; i < ss; ++i) f[i] = factor[i];
  }
  *out.log_evidence = static_cast<T>(evidence);

  for (int i = 0; i < s; ++i) future[i] = 0;
  for (int64_t i = 0; i < ss; ++i) later[i] = 0;
  for (int64_t t = steps; t-- > 0;) {
    const T *l = in.precision + t * r * r, *h = in.information + t * r, *m = out.filtered_mean + t * s;
    narrow(factors + t * ss, later, g, work, spare, s);
    multiply_transposed(g, g, out.covariance + t * ss, s, s, s);
    apply(later, m, news, s, s);
    for (int i = 0; i < s; ++i) news[i] = future[i] - news[i];
    apply(g, news, other, s, s);
    for (int i = 0; i < s; ++i) out.mean[t * s + i] = m[i];
    apply_transposed(g, other, out.mean + t * s, s, s, true);

    T *precision = out.future_precision + t * ss, *information = out.future_information + t * s;
    multiply(l, in.emission, lh, r, r, s);
    for (int64_t i = 0; i < ss; ++i) precision[i] = later[i];
    multiply_transposed(in.emission, lh, precision, s, r, s, true);
    for (int i = 0; i < s; ++i) information[i] = future[i];
    apply_transposed(in.emission, h, information, r, s, true);
    if (t == 0) break;
    const T *a = in.transition + t * ss, *q = in.process_noise + t * ss;
    factorize(precision, f, spare, other, s);
    narrow(f, q, g, work, spare, s);  // g'g: the precision that is left after the noise
    apply(q, information, other, s, s);
    apply(g, other, last, s, s);
    for (int i = 0; i < s; ++i) shifted[i] = 0;
    apply_transposed(g, last, shifted, s, s);
    for (int i = 0; i < s; ++i) shifted[i] = information[i] - shifted[i];
    apply_transposed(a, shifted, future, s, s);
    multiply(g, a, moved, s, s, s);
    multiply_transposed(moved, moved, later, s, s, s);
  }
}

template <class T, int SIZE>
ISA_TARGET __attribute__((flatten)) void series(const Arguments<T> &in, const Results<T> &out, int64_t steps, int size,
                                                int outputs) {
  run<T, SIZE>(in, out, steps, size, outputs);
}

template <class T>
ISA_TARGET void series_of_any_size(const Arguments<T> &in, const Results<T> &out, int64_t steps, int size,
                                   int outputs) {
  run<T, 0>(in, out, steps, size, outputs);
}

template <class T>
Series<T> series_of(int size) {
#if ISA_SIZES
  switch (size) {
    case 1: return series<T, 1>;
    case 2: return series<T, 2>;
    case 3: return series<T, 3>;
    case 4: return series<T, 4>;
    case 6: return series<T, 6>;
    case 9: return series<T, 9>;
  }
#endif
  static_cast<void>(size);
  return series_of_any_size<T>;
}

}  // namespace tensormill::kalman::ISA

#undef ISA_INLINE
#undef ISA
#undef ISA_TARGET
#undef ISA_SIZES
