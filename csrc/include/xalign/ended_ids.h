// Ids of texts that an engine saw in one stretch, each closed by the same id: cut, looked through and made narrow in
// one pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Ids from `first` to `last`, both included.
struct IdRange {
  std::uint32_t first = 0;
  std::uint32_t last = 0;
};

struct EndedIds {
  std::vector<std::int64_t> lengths;  // [num_texts] in ids, the closing one counted
  std::vector<std::uint8_t> marked;   // [num_texts] 1 where an id of a range is among them
  std::size_t rest = 0;               // ids behind the last closing one
};

// Writes the ids to `out`, [num_ids], in its width. Throws std::invalid_argument if that does not hold all ids below
// `num_known`, or if an id is `num_known` or more. Time O(num_ids * (1 + num_ranges)), without a branch for each id.
template <typename Token>
EndedIds cut_at_ends(const std::uint32_t* ids, std::size_t num_ids, std::uint32_t end, const IdRange* ranges,
                     std::size_t num_ranges, std::uint32_t num_known, Token* out);

}  // namespace xalign
