// Points of digital nets in base 2, point after point: (replications, n, d).
//
// Points are made in blocks of 2^k consecutive indices. The index bits below k give a table of exclusive ors of
// columns, the same for all blocks and small enough for the first-level cache; the bits above give one row, the base,
// and a point is base ^ table row. From one block to the next the base changes by one precomputed exclusive or, as in
// a Gray code: adding 1 flips the trailing ones of the index and the zero above them. The Gray order itself is the
// natural order of other columns. For floating-point results columns are cut to the digits of the mantissa
// beforehand, and the base carries the exponent of numbers in [1, 2), from which 1 is subtracted: no conversion.
#include <nanobind/nanobind.h>

#include <cstring>
#include <memory>
#include <type_traits>

#include "isa.h"
#include "parallel.h"

namespace tensormill::digital_net {

template <class T>
struct Format;
template <>
struct Format<double> {
  using word = uint64_t;
  static constexpr int DIGITS = 52;
  static constexpr word ONE = uint64_t{1023} << 52;
};
template <>
struct Format<float> {
  using word = uint32_t;
  static constexpr int DIGITS = 23;
  static constexpr word ONE = uint32_t{127} << 23;
};
template <>
struct Format<int64_t> {
  using word = uint64_t;
  static constexpr int DIGITS = 0;  // all there are
  static constexpr word ONE = 0;
};
template <class T>
using word_t = typename Format<T>::word;

template <class T, bool VALUES>
inline word_t<T> one(word_t<T> word) {
  if constexpr (VALUES && std::is_floating_point_v<T>) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    value -= T{1};
    std::memcpy(&word, &value, sizeof value);
  }
  return word;
}

// What is needed from one instruction set: rows of base ^ table, as words and as values.
template <class T>
struct Kernels {
  using Rows = void (*)(const word_t<T> *, const word_t<T> *, word_t<T> *, int64_t, int64_t);
  Rows words, values;
};

}  // namespace tensormill::digital_net

#define ISA portable
#define ISA_TARGET
#define ISA_BYTES 16
#include "rows.h"

#if TENSORMILL_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA_BYTES 32
#include "rows.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define ISA_BYTES 64
#include "rows.h"
#endif

namespace tensormill::digital_net {

template <class T>
const Kernels<T> &kernels() {
  static const Kernels<T> chosen = TENSORMILL_BEST_COPY(kernels<T>());
  return chosen;
}

inline int bit_length(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

struct Net {
  const int64_t *matrices, *shift;  // (R, d, m), and (R, d) or null
  int64_t replications, d, m, start, n;
  int bits;
  bool gray;
};

template <class T>
class Generator {
  using W = word_t<T>;
  struct alignas(64) Line {
    W words[64 / sizeof(W)];
  };

 public:
  Generator(const Net &net, W *out) : net_(net), out_(out) {
    constexpr int64_t TABLE = (16 << 10) / sizeof(W), LEAST_POINTS = 16, GLUED = 64;
    // Points are glued together until rows are long enough for the inner loop to be worth its start.
    while ((int64_t{1} << glued_bits_) * net.d < GLUED) ++glued_bits_;
    block_bits_ = bit_length(static_cast<uint64_t>(std::max(LEAST_POINTS, TABLE / net.d))) - 1;
    block_bits_ = std::min(block_bits_, std::max(glued_bits_, bit_length(static_cast<uint64_t>(net.n - 1))));
    first_ = net.start >> block_bits_;
    blocks_ = ((net.start + net.n - 1) >> block_bits_) - first_ + 1;
    index_bits_ = bit_length(static_cast<uint64_t>(net.start + net.n - 1));
  }

  void run(int threads) const {
    constexpr int64_t WORTH_A_THREAD = int64_t{1} << 15;  // words; below, waking a thread costs more than it saves
    const int64_t block_words = net_.d << block_bits_, words = net_.replications * net_.n * net_.d;
    threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, words / WORTH_A_THREAD)));
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / 2 / block_words);
    parallel_chunks(net_.replications * blocks_, grain, threads, [&](int64_t begin, int64_t end) {
      const int64_t rows = std::max(index_bits_, block_bits_), row = int64_t{1} << glued_bits_;
      const auto columns = scratch(rows * net_.d), table = scratch(block_words), base = scratch(row * net_.d);
      while (begin < end) {
        const int64_t replication = begin / blocks_, stop = std::min(end, (replication + 1) * blocks_);
        blocks(replication, begin % blocks_, stop - replication * blocks_, columns[0].words, table[0].words,
               base[0].words);
        begin = stop;
      }
    });
  }

 private:
  static std::unique_ptr<Line[]> scratch(int64_t words) {
    return std::unique_ptr<Line[]>(new Line[words * sizeof(W) / sizeof(Line) + 1]);
  }

  W word(int64_t digits) const {
    if constexpr (std::is_floating_point_v<T>) {
      constexpr int DIGITS = Format<T>::DIGITS;
      const uint64_t all = static_cast<uint64_t>(digits);
      return static_cast<W>(net_.bits >= DIGITS ? all >> (net_.bits - DIGITS) : all << (DIGITS - net_.bits));
    } else {
      return static_cast<W>(digits);
    }
  }

  // Columns in the order of the index's bits, (rows, d); bits that no index has belong to columns of zeros.
  void load_columns(int64_t replication, W *columns) const {
    const int64_t d = net_.d, rows = std::max(index_bits_, block_bits_);
    for (int64_t j = 0; j < d; ++j) {
      const int64_t *given = net_.matrices + (replication * d + j) * net_.m;
      int64_t before = 0;
      for (int64_t c = 0; c < rows; ++c) {
        const int64_t column = c < index_bits_ ? given[c] : 0;
        columns[c * d + j] = word(column ^ before);
        before = net_.gray ? column : 0;  // i ^ (i >> 1) is linear in i
      }
    }
  }

  void repeat(W *row) const {  // the first d words, 2^glued_bits times
    const int64_t d = net_.d;
    for (int bit = 0; bit < glued_bits_; ++bit) std::memcpy(row + (d << bit), row, (d << bit) * sizeof(W));
  }

  // table[p] = exclusive or of the columns of p's set bits, for p < 2^block_bits
  void fill_table(const W *columns, W *table, W *row) const {
    const int64_t d = net_.d;
    std::fill_n(table, d, W{0});
    for (int bit = 0; bit < block_bits_; ++bit) {
      const W *column = columns + bit * d;
      const int64_t size = d << bit;
      if (bit < glued_bits_) {
        for (int64_t p = 0; p < size; p += d)
          for (int64_t j = 0; j < d; ++j) table[size + p + j] = table[p + j] ^ column[j];
        continue;
      }
      std::copy_n(column, d, row);
      repeat(row);
      kernels<T>().words(row, table, table + size, int64_t{1} << (bit - glued_bits_), d << glued_bits_);
    }
  }

  void blocks(int64_t replication, int64_t begin, int64_t end, W *columns, W *table, W *base) const {
    const int64_t d = net_.d, size = int64_t{1} << block_bits_, row = int64_t{1} << glued_bits_;
    const auto values = kernels<T>().values;
    load_columns(replication, columns);
    fill_table(columns, table, base);
    for (int64_t j = 0; j < d; ++j)
      base[j] = (net_.shift ? word(net_.shift[replication * d + j]) : W{0}) ^ Format<T>::ONE;
    for (int64_t c = block_bits_; c < index_bits_; ++c)
      if ((first_ + begin) << block_bits_ >> c & 1)
        for (int64_t j = 0; j < d; ++j) base[j] ^= columns[c * d + j];
    for (int64_t i = (block_bits_ + 1) * d; i < index_bits_ * d; ++i) columns[i] ^= columns[i - d];
    W *out = out_ + replication * net_.n * d;
    for (int64_t b = begin; b < end; ++b) {
      repeat(base);
      const int64_t index = (first_ + b) << block_bits_;  // of the block's first point
      int64_t p = std::max<int64_t>(0, net_.start - index);
      const int64_t stop = std::min(size, net_.start + net_.n - index);
      W *target = out + (index - net_.start) * d;
      const int64_t aligned = std::min(stop, (p + row - 1) / row * row), whole = (stop - aligned) / row;
      if (p < aligned) singly(values, base, table, target, p, aligned);
      values(base, table + aligned * d, target + aligned * d, whole, row * d);
      p = aligned + whole * row;
      if (p < stop) singly(values, base, table, target, p, stop);
      if (b + 1 == end) break;
      const W *step = columns + (block_bits_ + __builtin_ctzll(static_cast<uint64_t>(first_ + b + 1))) * d;
      for (int64_t j = 0; j < d; ++j) base[j] ^= step[j];
    }
  }

  void singly(typename Kernels<T>::Rows values, const W *base, const W *table, W *out, int64_t p, int64_t stop) const {
    for (; p < stop; ++p) values(base, table + p * net_.d, out + p * net_.d, 1, net_.d);
  }

  Net net_;
  W *out_;
  int glued_bits_ = 0, block_bits_ = 0, index_bits_ = 0;
  int64_t first_ = 0, blocks_ = 0;
};

template <class T>
void generate(uintptr_t matrices, uintptr_t shift, uintptr_t out, int64_t replications, int64_t d, int64_t m,
              int64_t start, int64_t n, int bits, bool gray, int threads) {
  const Net net{reinterpret_cast<const int64_t *>(matrices),
                reinterpret_cast<const int64_t *>(shift),
                replications,
                d,
                m,
                start,
                n,
                bits,
                gray};
  if (replications > 0 && n > 0 && d > 0) Generator<T>(net, reinterpret_cast<word_t<T> *>(out)).run(threads);
}

}  // namespace tensormill::digital_net

NB_MODULE(_cpu, m) {
  namespace nb = nanobind;
  using namespace tensormill::digital_net;
  m.def("float32", &generate<float>, nb::call_guard<nb::gil_scoped_release>());
  m.def("float64", &generate<double>, nb::call_guard<nb::gil_scoped_release>());
  m.def("int64", &generate<int64_t>, nb::call_guard<nb::gil_scoped_release>());
  m.def("instruction_set", &tensormill::instruction_set_name);
}
