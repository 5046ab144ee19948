#include "xalign/blend.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "check.h"

using xalign::blend_order;

namespace {

std::vector<std::int32_t> order_of(const std::vector<std::int64_t>& weights, std::int64_t num_samples) {
  return blend_order(weights.data(), weights.size(), num_samples);
}

// A small pseudo-random sequence; the quality of the numbers does not matter here.
std::uint64_t scramble(std::uint64_t& state) { return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33; }

}  // namespace

void every_prefix_is_within_one_sample_of_its_quota() {
  std::uint64_t state = 1;
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<std::int64_t> weights(2 + scramble(state) % 30);
    std::int64_t total = 0;
    for (auto& weight : weights) total += weight = static_cast<std::int64_t>(scramble(state) % 50);
    weights[0] += 1;
    total += 1;
    const auto order = order_of(weights, 2 * total);
    std::vector<std::int64_t> given(weights.size(), 0);
    for (std::size_t k = 1; k <= order.size(); ++k) {
      ++given[static_cast<std::size_t>(order[k - 1])];
      for (std::size_t j = 0; j < weights.size(); ++j) {
        const std::int64_t deviation = given[j] * total - static_cast<std::int64_t>(k) * weights[j];
        CHECK(deviation < total && deviation > -total);
      }
    }
    for (std::size_t j = 0; j < weights.size(); ++j) CHECK(given[j] == 2 * weights[j]);
  }
}

void huge_weights_do_not_overflow() {
  const std::int64_t large = std::numeric_limits<std::int64_t>::max() / 2;
  const auto order = order_of({large, large}, 1001);
  for (std::size_t k = 0; k < order.size(); ++k) CHECK(order[k] == static_cast<std::int32_t>(k % 2));
  CHECK_THROWS(order_of({large, large, 2}, 1), std::invalid_argument);
}

void calls_of_any_size_give_one_order() {
  std::uint64_t state = 3;
  for (int trial = 0; trial < 30; ++trial) {
    std::vector<std::int64_t> weights(1 + scramble(state) % 600);
    for (auto& weight : weights) weight = static_cast<std::int64_t>(1 + scramble(state) % (trial % 2 ? 1000000000 : 3));
    const auto whole = order_of(weights, 20000);
    xalign::BlendOrder parts(weights.data(), weights.size());
    std::vector<std::uint16_t> order(20000);
    for (std::size_t done = 0; done < order.size();) {
      const auto now = std::min<std::size_t>(1 + scramble(state) % (trial % 3 ? 5000 : 10), order.size() - done);
      parts.fill(order.data() + done, static_cast<std::int64_t>(now));
      done += now;
    }
    CHECK(parts.num_samples() == 20000);
    for (std::size_t k = 0; k < order.size(); ++k) CHECK(order[k] == whole[k]);
  }
  const std::int64_t one = 1;
  std::uint8_t byte;
  xalign::BlendOrder single(&one, 1);
  CHECK_THROWS(single.fill(&byte, -1), std::invalid_argument);
  const std::vector<std::int64_t> many(257, 1);
  xalign::BlendOrder wide(many.data(), many.size());
  CHECK_THROWS(wide.fill(&byte, 1), std::invalid_argument);
}

void many_sources_of_very_different_weights_stay_within_one_sample() {
  std::uint64_t state = 5;
  std::vector<std::int64_t> weights(3000);
  __extension__ typedef __int128 int128;
  int128 total = 0;
  for (auto& weight : weights) total += weight = std::int64_t{1} << (scramble(state) % 48);
  const auto order = order_of(weights, 60000);
  std::vector<std::int64_t> given(weights.size(), 0);
  for (std::size_t k = 1; k <= order.size(); ++k) {
    ++given[static_cast<std::size_t>(order[k - 1])];
    if (k % 7 > 0 && k > 500) continue;
    for (std::size_t j = 0; j < weights.size(); ++j) {
      const int128 deviation = given[j] * total - static_cast<int128>(k) * weights[j];
      CHECK(deviation < total && deviation > -total);
    }
  }
}

void contradictions_are_refused() {
  CHECK_THROWS(order_of({}, 1), std::invalid_argument);
  CHECK_THROWS(order_of({0, 0}, 1), std::invalid_argument);
  CHECK_THROWS(order_of({1, -1}, 1), std::invalid_argument);
  CHECK_THROWS(order_of({1}, -1), std::invalid_argument);
}

int main() {
  every_prefix_is_within_one_sample_of_its_quota();
  huge_weights_do_not_overflow();
  calls_of_any_size_give_one_order();
  many_sources_of_very_different_weights_stay_within_one_sample();
  contradictions_are_refused();
}
