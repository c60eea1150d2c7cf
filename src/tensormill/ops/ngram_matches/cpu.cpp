// Clipped n-gram matches with one small hash table per prompt and order, threads over prompts.
//
// An n-gram of a prompt's references is named by the position of its first occurrence in them (the references
// stand one behind the other). The table maps to that name and keeps no keys: two 1-grams are equal if their
// tokens are, two n-grams if the names of their (n-1)-grams and of their last tokens are, so it is exact, and at
// 16 KiB for 1024 tokens it stays in the first-level cache. Two facts keep the higher orders cheap: an n-gram can
// only match where its first n - 1 tokens and its last token did, so only such positions are kept, on both sides;
// and an (n-1)-gram that occurs once in the references has one possible successor, which needs no table.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace nb = nanobind;

namespace {

inline uint64_t scramble(uint64_t key) {
  key *= 0x9E3779B97F4A7C15ull;
  key ^= key >> 32;
  return key * 0xD6E8FEB86659FD93ull;
}

// Open addressing over names; `same(name)` says whether the n-gram of that name is the one looked for. It is also
// asked about name 0 where a slot is free: one branch per probe that is nearly always right beats two that are not.
class Table {
 public:
  void clear(int64_t entries) {
    int bits = 6;
    while ((int64_t{1} << bits) < 3 * entries) ++bits;
    shift_ = 64 - bits;
    mask_ = (uint64_t{1} << bits) - 1;
    if (names_.size() <= mask_) names_.resize(mask_ + 1);
    std::memset(names_.data(), 0xff, (mask_ + 1) * sizeof(int32_t));
  }
  template <class Same>
  int32_t insert(uint64_t key, int32_t name, Same &&same) {
    const uint64_t at = probe(key, same);
    const int32_t found = names_[at] < 0 ? name : names_[at];
    names_[at] = found;
    return found;
  }
  template <class Same>
  int32_t find(uint64_t key, Same &&same) const {
    return names_[probe(key, same)];
  }

 private:
  template <class Same>
  uint64_t probe(uint64_t key, Same &&same) const {
    uint64_t at = scramble(key) >> shift_;
    while ((names_[at] >= 0) & !same(std::max(names_[at], 0))) at = (at + 1) & mask_;
    return at;
  }

  int shift_ = 58;
  uint64_t mask_ = 63;
  std::vector<int32_t> names_;
};

inline uint64_t pair_key(int32_t prefix, int32_t token) {
  return static_cast<uint64_t>(static_cast<uint32_t>(prefix)) << 32 | static_cast<uint32_t>(token);
}

// What is known of the n-gram of each name, at one order.
struct Count {
  int32_t allowed;  // most occurrences in one reference
  int32_t total;    // occurrences in all references
  int32_t running;  // occurrences in the sequence being counted; 0 between sequences
  int32_t hit;      // whether a candidate of the prompt has it
};

// The positions of a sequence that can still match, and the name of the n-gram at each.
struct Alive {
  std::vector<int32_t> position, name;
  int64_t count = 0;
  void reserve(int64_t length) {
    position.resize(length);
    name.resize(length);
  }
};

struct Workspace {
  Table table;
  std::vector<Alive> candidates, references;
  std::vector<int32_t> candidate_tokens, reference_tokens;  // names of the tokens, by position; -1: in no reference
  std::vector<int32_t> end;                                 // where the reference that holds a position ends
  std::vector<int32_t> prefix;                              // name of the (n-1)-gram, by position
  std::vector<Count> counts, before;                        // by name: this order and the one before
  std::vector<uint8_t> token_hit;
};

// Kept from call to call: allocated afresh it costs page faults each time. Not inlined, or the compiler asks for the
// thread's address again at every access.
__attribute__((noinline)) Workspace &thread_workspace() {
  static thread_local Workspace work;
  return work;
}

// After all of a reference has been counted: keep the larger count, and leave `running` at 0.
void settle(std::vector<Count> &counts, const Alive &reference) {
  for (int64_t k = 0; k < reference.count; ++k) {
    Count &count = counts[reference.name[k]];
    count.allowed = std::max(count.allowed, count.running);
    count.running = 0;
  }
}

// Counts a candidate's n-grams and keeps the positions whose n-gram a reference has; name(k) is -1 for the others.
template <class Name>
int32_t count_candidate(std::vector<Count> &counts, Alive &candidate, Name &&name) {
  int64_t kept = 0;
  int32_t matched = 0;
  for (int64_t k = 0; k < candidate.count; ++k) {
    const int32_t found = name(k);
    candidate.position[kept] = candidate.position[k];
    candidate.name[kept] = found;
    const int32_t here = found >= 0;
    kept += here;
    Count &count = counts[std::max(found, 0)];
    matched += here & static_cast<int32_t>(count.running < count.allowed);
    count.running += here;
  }
  candidate.count = kept;
  for (int64_t k = 0; k < kept; ++k) {
    counts[candidate.name[k]].running = 0;
    counts[candidate.name[k]].hit = 1;
  }
  return matched;
}

inline int64_t clamped(int64_t length, int64_t row) { return std::min(std::max<int64_t>(length, 0), row); }

// Totals of a candidate, and the reference length closest to its own: the shorter at a tie, 0 without references.
void count_lengths(int64_t length, const int64_t *reference_lengths, int64_t count, int64_t longest, int64_t max_n,
                   int32_t *totals, int32_t *closest) {
  for (int64_t n = 0; n < max_n; ++n) totals[n] = static_cast<int32_t>(std::max<int64_t>(0, length - n));
  int64_t best = 0, distance = INT64_MAX;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t size = std::min(reference_lengths[r], longest), away = size > length ? size - length : length - size;
    if (size < 1 || away > distance || (away == distance && size > best)) continue;
    best = size;
    distance = away;
  }
  *closest = static_cast<int32_t>(best);
}

// One prompt: `group` candidates against `count` references.
template <class Token>
void one_prompt(Workspace &work, const Token *candidates, const int64_t *candidate_lengths, int64_t group,
                int64_t width, const Token *references, const int64_t *reference_lengths, int64_t count,
                int64_t longest, int64_t max_n, int32_t *matches) {
  std::memset(matches, 0, sizeof(int32_t) * group * max_n);
  const int64_t positions = count * longest;
  if (positions == 0) return;
  if (static_cast<int64_t>(work.candidates.size()) < group) work.candidates.resize(group);
  if (static_cast<int64_t>(work.references.size()) < count) work.references.resize(count);
  work.candidate_tokens.resize(group * width);
  // An n-gram's last token may be looked for past the last position, where no n-gram stands.
  for (auto *array : {&work.reference_tokens, &work.end, &work.prefix}) array->resize(positions + max_n);
  work.counts.resize(positions);
  work.before.resize(positions);
  work.token_hit.resize(positions);
  Table &table = work.table;
  std::vector<int32_t> &token = work.reference_tokens, &end = work.end, &prefix = work.prefix;
  std::vector<Count> &counts = work.counts, &before = work.before;

  int64_t total = 0;
  for (int64_t r = 0; r < count; ++r) total += clamped(reference_lengths[r], longest);
  table.clear(total);
  for (int64_t r = 0; r < count; ++r) {
    Alive &reference = work.references[r];
    reference.count = clamped(reference_lengths[r], longest);
    reference.reserve(longest);
    const int32_t first = static_cast<int32_t>(r * longest), past = static_cast<int32_t>(first + reference.count);
    for (int32_t j = first; j < past; ++j) {
      counts[j] = Count{0, 0, 0, 0};
      const Token wanted = references[j];
      const int32_t name = table.insert(static_cast<uint64_t>(static_cast<int64_t>(wanted)), j,
                                        [&](int32_t other) { return references[other] == wanted; });
      ++counts[name].running;
      ++counts[name].total;
      end[j] = past;
      token[j] = name;
      reference.position[j - first] = j;
      reference.name[j - first] = name;
    }
    settle(counts, reference);
  }
  for (int64_t g = 0; g < group; ++g) {
    Alive &candidate = work.candidates[g];
    const Token *row = candidates + g * width;
    int32_t *names = work.candidate_tokens.data() + g * width;
    candidate.count = clamped(candidate_lengths[g], width);
    candidate.reserve(width);
    for (int64_t i = 0; i < candidate.count; ++i) {
      const Token wanted = row[i];
      names[i] = table.find(static_cast<uint64_t>(static_cast<int64_t>(wanted)),
                            [&](int32_t other) { return references[other] == wanted; });
      candidate.position[i] = static_cast<int32_t>(i);
    }
    matches[g * max_n] = count_candidate(counts, candidate, [&](int64_t k) { return names[k]; });
  }
  for (int64_t r = 0; r < count; ++r) {
    const Alive &reference = work.references[r];
    for (int64_t k = 0; k < reference.count; ++k)
      work.token_hit[reference.position[k]] = static_cast<uint8_t>(counts[reference.position[k]].hit);
  }

  for (int64_t n = 2; n <= max_n; ++n) {
    std::swap(counts, before);
    const int32_t last = static_cast<int32_t>(n - 1);  // offset of an n-gram's last token
    int64_t possible = 0, ambiguous = 0;
    for (int64_t r = 0; r < count; ++r) {
      Alive &reference = work.references[r];
      int64_t kept = 0;
      for (int64_t k = 0; k < reference.count; ++k) {
        const int32_t j = reference.position[k], name = reference.name[k];
        if (j + last >= end[j]) break;
        prefix[j] = name;
        counts[j] = Count{0, 0, 0, 0};
        reference.position[kept] = j;
        reference.name[kept] = name;
        const bool keep = before[name].hit && work.token_hit[token[j + last]];
        kept += keep;
        ambiguous += keep && before[name].total > 1;
      }
      reference.count = kept;
      possible += kept;
    }
    if (possible == 0) return;
    // A branch that is taken at random costs more than a look into the table.
    const bool always = 8 * ambiguous > possible;
    table.clear(always ? possible : ambiguous);
    for (int64_t r = 0; r < count; ++r) {
      Alive &reference = work.references[r];
      for (int64_t k = 0; k < reference.count; ++k) {
        const int32_t j = reference.position[k], before_last = reference.name[k];
        int32_t name = j;
        if (always || before[before_last].total > 1) {
          const int32_t tail = token[j + last];
          name = table.insert(pair_key(before_last, tail), j, [&](int32_t other) {
            return (prefix[other] == before_last) & (token[other + last] == tail);
          });
        }
        ++counts[name].running;
        ++counts[name].total;
        reference.name[k] = name;
      }
      settle(counts, reference);
    }
    for (int64_t g = 0; g < group; ++g) {
      Alive &candidate = work.candidates[g];
      const int64_t past = clamped(candidate_lengths[g], width);
      const int32_t *names = work.candidate_tokens.data() + g * width;
      matches[g * max_n + last] = count_candidate(counts, candidate, [&](int64_t k) -> int32_t {
        const int32_t i = candidate.position[k], before_last = candidate.name[k];
        if (i + last >= past) return -1;
        const int32_t tail = names[i + last];
        if (!always && before[before_last].total == 1) {
          const bool same = before_last + last < end[before_last] && token[before_last + last] == tail;
          return same ? before_last : -1;
        }
        return table.find(pair_key(before_last, tail), [&](int32_t other) {
          return (prefix[other] == before_last) & (token[other + last] == tail);
        });
      });
    }
  }
}

template <class Token>
void count_all(const Token *candidates, const int64_t *candidate_lengths, const Token *references,
               const int64_t *reference_lengths, int32_t *matches, int32_t *totals, int32_t *closest, int64_t prompts,
               int64_t group, int64_t width, int64_t count, int64_t longest, int64_t max_n, int threads) {
  // With fewer prompts than threads a prompt's group is shared out; each part builds the tables again.
  int64_t part = group;
  while (part > 4 && prompts * ((group + part - 1) / part) < threads) part = (part + 1) / 2;
  const int64_t parts = part > 0 ? (group + part - 1) / part : 0;
  tensormill::parallel_ranges(prompts * parts, 1, threads, [&](int64_t begin, int64_t end) {
    Workspace &work = thread_workspace();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit / parts, first = p * group + unit % parts * part;
      const int64_t size = std::min(part, (p + 1) * group - first);
      one_prompt(work, candidates + first * width, candidate_lengths + first, size, width,
                 references + p * count * longest, reference_lengths + p * count, count, longest, max_n,
                 matches + first * max_n);
      for (int64_t b = first; b < first + size; ++b)
        count_lengths(clamped(candidate_lengths[b], width), reference_lengths + p * count, count, longest, max_n,
                      totals + b * max_n, closest + b);
    }
  });
}

void ngram_matches(uintptr_t candidates, uintptr_t candidate_lengths, uintptr_t references,
                   uintptr_t reference_lengths, uintptr_t matches, uintptr_t totals, uintptr_t closest, int64_t prompts, int64_t group, int64_t width,
                   int64_t count, int64_t longest, int64_t max_n, bool wide, int threads) {
  const auto *sizes = reinterpret_cast<const int64_t *>(candidate_lengths);
  const auto *reference_sizes = reinterpret_cast<const int64_t *>(reference_lengths);
  auto *out = reinterpret_cast<int32_t *>(matches), *out_totals = reinterpret_cast<int32_t *>(totals),
       *out_closest = reinterpret_cast<int32_t *>(closest);
  if (wide) {
    count_all(reinterpret_cast<const int64_t *>(candidates), sizes, reinterpret_cast<const int64_t *>(references),
              reference_sizes, out, out_totals, out_closest, prompts, group, width, count, longest, max_n, threads);
  } else {
    count_all(reinterpret_cast<const int32_t *>(candidates), sizes, reinterpret_cast<const int32_t *>(references),
              reference_sizes, out, out_totals, out_closest, prompts, group, width, count, longest, max_n, threads);
  }
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("ngram_matches", &ngram_matches, nb::call_guard<nb::gil_scoped_release>());
}
