// The inner loop for one instruction set. cpu.cpp includes this file once per instruction set, after defining
//   ISA         namespace of this copy
//   ISA_TARGET  function attribute that enables the instructions (may be empty)
//   ISA_BYTES   bytes of a vector register
// There is no include guard on purpose.

namespace tensormill::digital_net::ISA {

template <class T>
struct Vectors {  // of words, and of what they mean; unaligned
  using word = word_t<T>;
  typedef word words __attribute__((vector_size(ISA_BYTES), aligned(alignof(word)), may_alias));
  typedef T values __attribute__((vector_size(ISA_BYTES), aligned(alignof(word)), may_alias));
};

// out[r, i] = base[i] ^ table[r, i]; as the value of type T that the word stands for where VALUES.
template <class T, bool VALUES>
ISA_TARGET void rows(const word_t<T> *base, const word_t<T> *table, word_t<T> *out, int64_t count, int64_t length) {
  using words = typename Vectors<T>::words;
  using values = typename Vectors<T>::values;
  constexpr int64_t LANES = ISA_BYTES / sizeof(T);
  const auto vector = [&](int64_t i) __attribute__((always_inline)) ISA_TARGET {
    const words word = *reinterpret_cast<const words *>(base + i) ^ *reinterpret_cast<const words *>(table + i);
    if constexpr (VALUES && std::is_floating_point_v<T>) {
      *reinterpret_cast<values *>(out + i) = reinterpret_cast<const values &>(word) - T{1};
    } else {
      *reinterpret_cast<words *>(out + i) = word;
    }
  };
  for (int64_t r = 0; r < count; ++r, table += length, out += length) {
    if (length < LANES) {
      for (int64_t i = 0; i < length; ++i) out[i] = one<T, VALUES>(base[i] ^ table[i]);
      continue;
    }
    int64_t i = 0;
    for (; i + 4 * LANES <= length; i += 4 * LANES) {
      vector(i);
      vector(i + LANES);
      vector(i + 2 * LANES);
      vector(i + 3 * LANES);
    }
    for (; i + LANES <= length; i += LANES) vector(i);
    if (i < length) vector(length - LANES);  // writes some words twice, with the same values
  }
}

template <class T>
Kernels<T> kernels() {
  return {&rows<T, false>, &rows<T, true>};
}

}  // namespace tensormill::digital_net::ISA

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
