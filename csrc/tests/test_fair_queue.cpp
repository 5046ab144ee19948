#include "xalign/fair_queue.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "check.h"

using xalign::FairQueue;

namespace {

__extension__ typedef __int128 int128;

// A small pseudo-random sequence; the quality of the numbers does not matter here.
std::uint64_t scramble(std::uint64_t& state) { return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33; }

std::vector<std::int64_t> some_weights(std::uint64_t& state, std::size_t count, std::uint64_t largest) {
  std::vector<std::int64_t> weights(count);
  for (auto& weight : weights) weight = static_cast<std::int64_t>(1 + scramble(state) % largest);
  return weights;
}

}  // namespace

// Pieces of any size up to the window: no member is ever a window from its quota; documents: the largest one.
void every_member_stays_near_its_quota() {
  std::uint64_t state = 11;
  for (int trial = 0; trial < 300; ++trial) {
    const std::int64_t largest = 1 + static_cast<std::int64_t>(scramble(state) % 100);
    const std::int64_t window = trial % 2 ? largest : 0;
    const auto weights = some_weights(state, 1 + scramble(state) % 20, trial % 3 ? 50 : 1000000000000ULL);
    int128 total_weight = 0;
    for (const std::int64_t weight : weights) total_weight += weight;
    FairQueue queue(weights, window);
    const auto size = [&] {
      if (trial % 5 == 0) return largest;
      return static_cast<std::int64_t>(scramble(state) % static_cast<std::uint64_t>(largest + 1));
    };
    for (std::size_t j = 0; j < weights.size(); ++j) queue.offer(j, size());
    std::vector<std::int64_t> given(weights.size(), 0);
    int128 all = 0;
    for (int draw = 0; draw < 500; ++draw) {
      const std::size_t member = queue.best();
      CHECK(member == queue.best());
      given[member] += queue.size_of(member);
      all += queue.size_of(member);
      queue.take_best();
      queue.offer(member, size());
      for (std::size_t j = 0; j < weights.size(); ++j) {
        const int128 ahead = given[j] * total_weight - all * weights[j];
        CHECK(ahead < largest * total_weight + (largest == 0));
        CHECK(-ahead < largest * total_weight + (largest == 0));
      }
    }
  }
}

void pieces_of_nothing_are_taken_in_turn() {
  FairQueue queue({5, 1, 3}, 0);
  for (std::size_t j = 0; j < 3; ++j) queue.offer(j, 0);
  for (int draw = 0; draw < 20; ++draw) {
    const std::size_t member = queue.best();
    queue.take_best();
    queue.offer(member, 0);
  }
}

void large_numbers_do_not_overflow() {
  const std::int64_t half = std::int64_t{1} << 59, long_document = std::numeric_limits<std::int32_t>::max();
  FairQueue queue({half, half}, 0);
  std::vector<std::int64_t> given(2, 0);
  for (std::size_t j = 0; j < 2; ++j) queue.offer(j, long_document);
  for (int draw = 0; draw < 100000; ++draw) {
    const std::size_t member = queue.best();
    CHECK(member == static_cast<std::size_t>(draw % 2));
    queue.take_best();
    queue.offer(member, long_document);
  }
  CHECK_THROWS(FairQueue({half, half, 1}, 0), std::invalid_argument);
}

void contradictions_are_refused() {
  CHECK_THROWS(FairQueue({1, 0}, 4), std::invalid_argument);
  CHECK_THROWS(FairQueue({1, -1}, 4), std::invalid_argument);
  CHECK_THROWS(FairQueue({1}, -1), std::invalid_argument);
  FairQueue queue({1, 1}, 4);
  queue.offer(0, 4);
  CHECK_THROWS(queue.best(), std::logic_error);
  CHECK_THROWS(queue.offer(0, 1), std::invalid_argument);
  CHECK_THROWS(queue.offer(1, 5), std::invalid_argument);
  CHECK_THROWS(queue.offer(1, -1), std::invalid_argument);
  CHECK_THROWS(queue.offer(2, 1), std::out_of_range);
}

int main() {
  every_member_stays_near_its_quota();
  pieces_of_nothing_are_taken_in_turn();
  large_numbers_do_not_overflow();
  contradictions_are_refused();
}
