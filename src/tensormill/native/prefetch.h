// Weights that are read once, in order.
#pragma once

#include <cstdint>

namespace tensormill {

// How far ahead of what is read pages are asked for.
constexpr int64_t kPageDistance = 96 << 10;

// Has the addresses of [from, from + bytes) translated, by fetching a line of every 4 KB. Processors fetch lines that
// follow by themselves, but not past the end of a page, and the first access to the next one waits for page tables in
// memory. Into the first-level cache: prefetches into the second had no effect where translations were missing (Zen 4).
inline void prefetch_pages(const uint8_t *from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(from + i, 0, 3);
#else
  static_cast<void>(from);
  static_cast<void>(bytes);
#endif
}

}  // namespace tensormill
