#include "xalign/average_precision.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "xalign/permutation.h"

using xalign::average_precision;
using xalign::Scores;

namespace {

// For every distinct score, from the highest down: precision among the documents at or above it, times recall gained.
template <typename T>
double by_definition(const std::vector<T>& scores, const std::vector<std::uint8_t>& labels, bool lowest_first) {
  double total = 0, members = 0;
  for (const auto label : labels) members += label;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    bool seen = false;
    for (std::size_t j = 0; j < i; ++j) seen = seen || scores[j] == scores[i];
    if (seen) continue;
    double above = 0, hits = 0, here = 0;
    for (std::size_t j = 0; j < scores.size(); ++j) {
      if (scores[j] == scores[i]) here += labels[j];
      if (lowest_first ? scores[j] <= scores[i] : scores[j] >= scores[i]) {
        above += 1;
        hits += labels[j];
      }
    }
    total += here / members * hits / above;
  }
  return total;
}

template <typename T>
std::vector<double> of_one(const std::vector<T>& scores, const std::vector<std::uint8_t>& labels,
                           bool lowest_first = false) {
  const auto size = static_cast<std::int64_t>(scores.size());
  return average_precision(Scores<T>{scores.data(), size, 1, 1, size}, labels.data(), labels.size() / scores.size(),
                           lowest_first, 1);
}

template <typename T>
void check_random() {
  xalign::Xoshiro256 random(7);
  for (int trial = 0; trial < 400; ++trial) {
    const std::size_t size = 2 + random.below(40), kinds = 1 + random.below(30), groupings = 1 + random.below(9);
    std::vector<T> scores(size);
    for (auto& score : scores) {
      score = static_cast<T>(static_cast<double>(random.below(kinds)) - static_cast<double>(kinds) / 2);
      switch (random.below(24)) {
        case 0: score = -T{0}; break;
        case 1: score *= std::numeric_limits<T>::max() / 64; break;
        case 2: score *= std::numeric_limits<T>::denorm_min(); break;
        case 3: score = std::nextafter(score, T{1}); break;
        default: break;
      }
    }
    std::vector<std::uint8_t> labels(groupings * size);
    for (std::size_t group = 0; group < groupings; ++group) {
      for (std::size_t i = 0; i < size; ++i) labels[group * size + i] = random.below(2) == 1;
      labels[group * size] = 1;
      labels[group * size + 1] = 0;
    }
    for (const bool lowest_first : {false, true}) {
      const auto found = of_one(scores, labels, lowest_first);
      CHECK(found.size() == groupings);
      for (std::size_t group = 0; group < groupings; ++group) {
        const std::vector<std::uint8_t> own(labels.begin() + static_cast<std::ptrdiff_t>(group * size),
                                            labels.begin() + static_cast<std::ptrdiff_t>((group + 1) * size));
        CHECK(std::abs(found[group] - by_definition(scores, own, lowest_first)) < 1e-12);
      }
    }
  }
}

}  // namespace

void scores_are_ranked_as_by_definition() {
  check_random<float>();
  check_random<double>();
}

void one_enormous_score_does_not_hide_the_order_of_the_others() {
  std::vector<float> scores(3000);
  std::vector<std::uint8_t> labels(3000);
  xalign::Xoshiro256 random(1);
  for (std::size_t i = 0; i < 3000; ++i) {
    scores[i] = static_cast<float>(random.below(1 << 20)) * 1e-9f;
    labels[i] = scores[i] > 5e-4f;
  }
  CHECK(of_one(scores, labels)[0] == 1.0);
  scores[17] = 3e30f;
  labels[17] = 1;
  CHECK(std::abs(of_one(scores, labels)[0] - 1.0) < 1e-12);
}

void layout_and_threads_change_nothing() {
  constexpr std::int64_t kDocuments = 90, kNeurons = 700;
  xalign::Xoshiro256 random(2);
  std::vector<float> rows(kDocuments * kNeurons), columns(rows.size()), backwards(rows.size());
  for (std::int64_t d = 0; d < kDocuments; ++d) {
    for (std::int64_t n = 0; n < kNeurons; ++n) {
      const auto score = static_cast<float>(random.below(50)) - 25.0f;
      rows[static_cast<std::size_t>(d * kNeurons + n)] = score;
      columns[static_cast<std::size_t>(n * kDocuments + d)] = score;
      backwards[static_cast<std::size_t>((kDocuments - 1 - d) * kNeurons + n)] = score;
    }
  }
  std::vector<std::uint8_t> labels(kDocuments);
  for (auto& label : labels) label = random.below(3) == 0;
  const auto expected =
      average_precision(Scores<float>{rows.data(), kDocuments, kNeurons, kNeurons, 1}, labels.data(), 1, false, 1);
  CHECK(expected == average_precision(Scores<float>{rows.data(), kDocuments, kNeurons, kNeurons, 1}, labels.data(), 1,
                                      false, 5));
  CHECK(expected == average_precision(Scores<float>{columns.data(), kDocuments, kNeurons, 1, kDocuments}, labels.data(),
                                      1, false, 3));
  CHECK(expected == average_precision(Scores<float>{backwards.data() + (kDocuments - 1) * kNeurons, kDocuments,
                                                    kNeurons, -kNeurons, 1},
                                      labels.data(), 1, false, 2));
}

void bad_input_is_refused() {
  const std::vector<std::uint8_t> labels{1, 0, 0};
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    CHECK_THROWS(of_one(std::vector<float>{1, 2, bad}, labels), std::invalid_argument);
  }
  CHECK_THROWS(of_one(std::vector<float>{1, 2, 3}, {1, 1, 1}), std::invalid_argument);
  CHECK_THROWS(of_one(std::vector<float>{1, 2, 3}, {0, 0, 0}), std::invalid_argument);
  CHECK_THROWS(of_one(std::vector<float>{1, 2, 3}, {0, 2, 1}), std::invalid_argument);
  CHECK_THROWS(average_precision(Scores<float>{nullptr, 0, 1, 1, 1}, labels.data(), 1, false, 1),
               std::invalid_argument);
}

int main() {
  scores_are_ranked_as_by_definition();
  one_enormous_score_does_not_hide_the_order_of_the_others();
  layout_and_threads_change_nothing();
  bad_input_is_refused();
}
