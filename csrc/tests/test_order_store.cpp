#include "xalign/order_store.h"

#include <algorithm>
#include <stdexcept>

#include "check.h"

namespace {

std::uint64_t scramble(std::uint64_t& state) { return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33; }

template <typename Id>
void counts_are_those_of_counting(std::int32_t num_sources, std::int64_t num_rows) {
  std::uint64_t state = static_cast<std::uint64_t>(num_sources) * 7919 + static_cast<std::uint64_t>(num_rows);
  std::vector<Id> ids(static_cast<std::size_t>(num_rows));
  // Some sources often, some hardly ever.
  for (auto& id : ids) {
    const std::uint64_t all = static_cast<std::uint64_t>(num_sources);
    id = static_cast<Id>(scramble(state) % (scramble(state) % 4 ? std::min<std::uint64_t>(all, 3) : all));
  }
  xalign::RowCounter counter(num_sources);
  std::vector<std::int64_t> counts;
  const auto take = [&](const std::vector<std::int64_t>& lines) { counts.insert(counts.end(), lines.begin(), lines.end()); };
  for (std::size_t done = 0; done < ids.size();) {
    const std::size_t now = std::min<std::size_t>(1 + scramble(state) % 9000, ids.size() - done);
    counter.append(ids.data() + done, now);
    done += now;
    if (scramble(state) % 2) take(counter.take_lines());
  }
  take(counter.take_lines());
  take(counter.now());
  CHECK(counter.num_rows() == num_rows);
  const xalign::SourceRows rows(ids.data(), sizeof(Id), num_rows, counts.data(), static_cast<std::int64_t>(counts.size()),
                                num_sources);
  std::vector<std::int64_t> drawn(static_cast<std::size_t>(num_sources), 0);
  xalign::RowWalk walk(rows, 0);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int32_t source = ids[static_cast<std::size_t>(row)];
    CHECK(rows.source(row) == source);
    if (row % 61 == 0 || row % 4096 > 4093 || row % 4096 < 3) {
      CHECK(rows.origin(row).draw == drawn[static_cast<std::size_t>(source)]);
    }
    if (row < 20000) {
      const auto origin = walk.next();
      CHECK(origin.source == source && origin.draw == drawn[static_cast<std::size_t>(source)]);
    }
    ++drawn[static_cast<std::size_t>(source)];
  }
  for (std::int32_t source = 0; source < num_sources; ++source) {
    CHECK(rows.count_before(num_rows, source) == drawn[static_cast<std::size_t>(source)]);
  }
  CHECK_THROWS(rows.source(num_rows), std::out_of_range);
  CHECK_THROWS(rows.source(-1), std::out_of_range);
  CHECK_THROWS(rows.count_before(num_rows + 1, 0), std::out_of_range);
  CHECK_THROWS(rows.count_before(0, num_sources), std::out_of_range);
}

}  // namespace

void a_damaged_order_is_an_error() {
  const std::uint8_t ids[] = {0, 1, 7};
  const std::vector<std::int64_t> counts = {0, 0, 1, 1};
  const xalign::SourceRows rows(ids, 1, 3, counts.data(), 4, 2);
  CHECK_THROWS(rows.origin(2), std::runtime_error);
  CHECK_THROWS(xalign::SourceRows(ids, 1, 3, counts.data(), 3, 2), std::invalid_argument);
  CHECK_THROWS(xalign::SourceRows(ids, 3, 3, counts.data(), 4, 2), std::invalid_argument);
  CHECK_THROWS(xalign::SourceRows(ids, 1, -1, counts.data(), 4, 2), std::invalid_argument);
  CHECK_THROWS(xalign::SourceRows(ids, 1, 3, counts.data(), 2 * 257, 257), std::invalid_argument);
  xalign::RowCounter counter(2);
  CHECK_THROWS(counter.append(ids, 3), std::invalid_argument);
  CHECK_THROWS(xalign::RowCounter(0), std::invalid_argument);
}

// For every number of ranks, a rank's slots are a contiguous piece of the order (turned round) but for the runs at its
// two ends.
void a_batch_is_turned_and_shuffled_in_runs() {
  for (const std::int64_t batch : {1, 2, 7, 8, 9, 64, 100, 1024, 1030}) {
    std::int64_t moved = 0;
    for (std::int64_t step = 0; step < 50; ++step) {
      std::vector<std::int64_t> positions(static_cast<std::size_t>(batch));
      xalign::batch_positions(99, step, batch, positions.data());
      auto sorted = positions;
      std::sort(sorted.begin(), sorted.end());
      for (std::int64_t i = 0; i < batch; ++i) CHECK(sorted[static_cast<std::size_t>(i)] == i);
      moved += positions[0] != 0;
      for (std::int64_t slot = 0; slot < batch; ++slot) {
        CHECK(positions[static_cast<std::size_t>(slot)] == xalign::batch_position(99, step, slot, batch));
      }
      // All slots of a run have their places in one run of the order after the same turn.
      std::int64_t turn = -1;
      for (std::int64_t candidate = 0; candidate < batch && turn < 0; ++candidate) {
        bool fits = true;
        for (std::int64_t slot = 0; slot < batch && fits; ++slot) {
          const std::int64_t place = (positions[static_cast<std::size_t>(slot)] - candidate + batch) % batch;
          fits = place / xalign::kSlotsOfARun == slot / xalign::kSlotsOfARun;
        }
        if (fits) turn = candidate;
      }
      CHECK(turn >= 0);
    }
    CHECK(batch < 8 || moved > 25);
  }
  CHECK_THROWS(xalign::batch_position(1, 0, 0, 0), std::invalid_argument);
  CHECK_THROWS(xalign::batch_position(1, -1, 0, 1), std::invalid_argument);
  CHECK_THROWS(xalign::batch_position(1, 0, 1, 1), std::invalid_argument);
}

int main() {
  counts_are_those_of_counting<std::uint8_t>(1, 0);
  counts_are_those_of_counting<std::uint8_t>(1, 10000);
  counts_are_those_of_counting<std::uint8_t>(3, 4096);
  counts_are_those_of_counting<std::uint8_t>(256, 30001);
  counts_are_those_of_counting<std::uint16_t>(2, 12289);
  counts_are_those_of_counting<std::uint16_t>(3000, 40000);
  a_damaged_order_is_an_error();
  a_batch_is_turned_and_shuffled_in_runs();
}
