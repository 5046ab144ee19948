#include "xalign/packing.h"

#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "xalign/permutation.h"

using xalign::BestFitPacker;
using xalign::Packing;

namespace {

Packing pack(const std::vector<std::int64_t>& lengths, std::int64_t room) {
  BestFitPacker packer(room);
  for (std::size_t i = 0; i < lengths.size(); ++i) packer.add(static_cast<std::int64_t>(i), lengths[i]);
  return packer.finish();
}

}  // namespace

void documents_go_where_they_leave_the_least_room() {
  // 6 opens a window (4 left), 7 another one (3 left); 3 fits both and fills the second, 4 fills the first.
  const Packing packing = pack({6, 7, 3, 4, 2}, 10);
  CHECK(packing.documents == (std::vector<std::int64_t>{1, 2, 0, 3, 4}));
  CHECK(packing.window_starts == (std::vector<std::int64_t>{0, 2, 4, 5}));
  // Of two that leave as much, the one opened first.
  CHECK(pack({6, 6, 3}, 10).documents == (std::vector<std::int64_t>{0, 2, 1}));
}

void the_fullest_window_makes_room_for_a_new_one() {
  std::vector<std::int64_t> lengths(BestFitPacker::kOpenWindows, 60);
  lengths[5] = 70;
  lengths.push_back(90);
  lengths.push_back(30);  // the window with 30 left is closed by now
  const Packing packing = pack(lengths, 100);
  CHECK(packing.documents.front() == 5);
  CHECK(packing.window_starts[1] == 1);
  CHECK(packing.documents[1] == 0 || packing.documents.back() != 65);
}

void every_document_is_in_one_window_or_left_out() {
  xalign::Xoshiro256 random(3);
  for (int trial = 0; trial < 300; ++trial) {
    const auto room = static_cast<std::int64_t>(1 + random.below(200));
    std::vector<std::int64_t> lengths(random.below(600));
    for (auto& length : lengths) length = static_cast<std::int64_t>(random.below(120));
    const Packing packing = pack(lengths, room);
    std::vector<bool> seen(lengths.size(), false);
    for (std::size_t window = 0; window + 1 < packing.window_starts.size(); ++window) {
      std::int64_t held = 0;
      CHECK(packing.window_starts[window] < packing.window_starts[window + 1]);
      for (auto i = packing.window_starts[window]; i < packing.window_starts[window + 1]; ++i) {
        const auto document = static_cast<std::size_t>(packing.documents[static_cast<std::size_t>(i)]);
        CHECK(!seen[document]);
        seen[document] = true;
        held += lengths[document];
      }
      CHECK(held > 0 && held <= room);
    }
    CHECK(packing.window_starts.back() == static_cast<std::int64_t>(packing.documents.size()));
    std::int64_t left_out = 0, tokens = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      CHECK(seen[i] == (lengths[i] > 0 && lengths[i] <= room));
      if (lengths[i] > room) ++left_out, tokens += lengths[i];
    }
    CHECK(packing.left_out_documents == left_out && packing.left_out_tokens == tokens);
  }
}

int main() {
  documents_go_where_they_leave_the_least_room();
  the_fullest_window_makes_room_for_a_new_one();
  every_document_is_in_one_window_or_left_out();
  CHECK(pack({}, 5).window_starts == (std::vector<std::int64_t>{0}));
  CHECK_THROWS(BestFitPacker(0), std::invalid_argument);
  BestFitPacker packer(5);
  CHECK_THROWS((packer.add(0, -1), 0), std::invalid_argument);
  packer.add(0, 5);
  CHECK(packer.finish().documents.size() == 1);
  CHECK(packer.finish().documents.empty());
}
