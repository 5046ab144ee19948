#include "xalign/ended_ids.h"

#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"

using xalign::EndedIds;
using xalign::IdRange;

namespace {

template <typename Token>
EndedIds cut(const std::vector<std::uint32_t>& ids, std::uint32_t end, const std::vector<IdRange>& ranges,
             std::uint32_t num_known, std::vector<Token>& out) {
  out.assign(ids.size(), Token{});
  return xalign::cut_at_ends(ids.data(), ids.size(), end, ranges.data(), ranges.size(), num_known, out.data());
}

void texts_end_at_the_closing_id() {
  std::vector<std::uint16_t> out;
  const EndedIds found = cut({5, 6, 1, 1, 65535, 1, 7}, 1, {}, 65536, out);
  CHECK((found.lengths == std::vector<std::int64_t>{3, 1, 2}));
  CHECK((found.marked == std::vector<std::uint8_t>{0, 0, 0}));
  CHECK(found.rest == 1);
  CHECK((out == std::vector<std::uint16_t>{5, 6, 1, 1, 65535, 1, 7}));
  CHECK(cut({}, 1, {}, 10, out).lengths.empty());
}

// However the ids fall into blocks: against a plain loop.
void every_block_is_looked_through() {
  std::uint64_t state = 12345;
  const auto draw = [&state](std::uint64_t below) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::uint32_t>((state >> 33) % below);
  };
  const std::vector<IdRange> ranges{{0, 0}, {2, 4}, {90000, 90000}};
  for (const std::size_t size : {1U, 127U, 128U, 129U, 1000U, 5000U}) {
    for (const std::uint64_t rarity : {3U, 50U, 3000U}) {
      std::vector<std::uint32_t> ids(size);
      for (auto& id : ids) id = draw(rarity) == 0 ? draw(6) : 6 + draw(90000);
      std::vector<std::int32_t> out;
      const EndedIds found = cut(ids, 1, ranges, 90006, out);
      EndedIds plain;
      std::int64_t length = 0;
      std::uint8_t marked = 0;
      for (std::size_t i = 0; i < size; ++i) {
        CHECK(out[i] == static_cast<std::int32_t>(ids[i]));
        ++length;
        for (const auto& range : ranges) marked |= ids[i] >= range.first && ids[i] <= range.last;
        if (ids[i] != 1) continue;
        plain.lengths.push_back(length);
        plain.marked.push_back(marked);
        length = marked = 0;
      }
      CHECK(found.lengths == plain.lengths);
      CHECK(found.marked == plain.marked);
      CHECK(found.rest == static_cast<std::size_t>(length));
    }
  }
}

void unknown_ids_are_refused() {
  std::vector<std::uint16_t> narrow;
  std::vector<std::int32_t> wide;
  CHECK_THROWS(cut({1, 10}, 1, {}, 10, narrow), std::invalid_argument);
  CHECK_THROWS(cut({std::numeric_limits<std::uint32_t>::max()}, 1, {}, 1U << 31U, wide), std::invalid_argument);
  CHECK_THROWS(cut({1}, 1, {}, 65537, narrow), std::invalid_argument);
  CHECK_THROWS(cut({1}, 1, {}, (1U << 31U) + 1, wide), std::invalid_argument);
  CHECK(cut({65536, 1}, 1, {}, 1U << 31U, wide).rest == 0);
}

}  // namespace

int main() {
  texts_end_at_the_closing_id();
  every_block_is_looked_through();
  unknown_ids_are_refused();
}
