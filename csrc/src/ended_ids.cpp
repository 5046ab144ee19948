#include "xalign/ended_ids.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace xalign {

namespace {

constexpr std::size_t kBlock = 128;

// Below the first of a range numbers wrap around to large ones.
bool is_in(std::uint32_t id, const IdRange& range) { return id - range.first <= range.last - range.first; }

// Whether an id of some is in a range; all are looked at, so that a machine's vectors can do it.
std::uint32_t is_any_in(const std::uint32_t* ids, std::size_t size, const IdRange& range) {
  std::uint32_t found = 0;
  for (std::size_t i = 0; i < size; ++i) found |= static_cast<std::uint32_t>(is_in(ids[i], range));
  return found;
}

template <typename Token>
std::uint32_t copy(const std::uint32_t* ids, std::size_t size, Token* out) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < size; ++i) {
    out[i] = static_cast<Token>(ids[i]);
    largest = std::max(largest, ids[i]);
  }
  return largest;
}

}  // namespace

template <typename Token>
EndedIds cut_at_ends(const std::uint32_t* ids, std::size_t num_ids, std::uint32_t end, const IdRange* ranges,
                     std::size_t num_ranges, std::uint32_t num_known, Token* out) {
  constexpr auto kMostKnown = static_cast<std::uint32_t>(std::numeric_limits<Token>::max()) + std::uint64_t{1};
  if (num_known > kMostKnown) throw std::invalid_argument("num_known is more than the width of a token holds.");
  EndedIds found;
  std::size_t text_begin = 0;
  std::uint8_t marked = 0;
  for (std::size_t begin = 0; begin < num_ids; begin += kBlock) {
    const std::size_t size = std::min(kBlock, num_ids - begin);
    const std::uint32_t* block = ids + begin;
    if (const std::uint32_t largest = copy(block, size, out + begin); largest >= num_known) {
      throw std::invalid_argument("id " + std::to_string(largest) + " leaves the vocabulary of " +
                                  std::to_string(num_known) + ".");
    }
    std::uint32_t has_marks = 0;
    for (std::size_t r = 0; r < num_ranges; ++r) has_marks |= is_any_in(block, size, ranges[r]);
    if (!has_marks && !is_any_in(block, size, {end, end})) continue;
    for (std::size_t i = 0; i < size; ++i) {
      if (has_marks) {
        for (std::size_t r = 0; r < num_ranges; ++r) marked |= static_cast<std::uint8_t>(is_in(block[i], ranges[r]));
      }
      if (block[i] != end) continue;
      found.lengths.push_back(static_cast<std::int64_t>(begin + i + 1 - text_begin));
      found.marked.push_back(marked);
      text_begin = begin + i + 1;
      marked = 0;
    }
  }
  found.rest = num_ids - text_begin;
  return found;
}

template EndedIds cut_at_ends(const std::uint32_t*, std::size_t, std::uint32_t, const IdRange*, std::size_t,
                              std::uint32_t, std::uint16_t*);
template EndedIds cut_at_ends(const std::uint32_t*, std::size_t, std::uint32_t, const IdRange*, std::size_t,
                              std::uint32_t, std::int32_t*);

}  // namespace xalign
