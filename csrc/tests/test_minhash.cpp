#include "xalign/minhash.h"

#include <cmath>
#include <set>
#include <stdexcept>

#include "check.h"
#include "folding_tables.h"

using xalign::document_keys;
using xalign::document_sketches;
using xalign::near_earlier;

void keys_are_those_of_the_folded_text() {
  const auto folding = test_folding();
  const std::vector<std::u32string> texts = {U"Hello, world", U"hello world!", U"hello  World", U"hello worlds", U"", U"?"};
  const auto all = views(texts);
  const auto keys = document_keys(folding, all.data(), nullptr, all.size());
  CHECK(keys.size() == 2 * texts.size());
  CHECK(keys[0] == keys[2] && keys[1] == keys[3] && keys[0] == keys[4] && keys[1] == keys[5]);
  CHECK(keys[0] != keys[6] && keys[1] != keys[7]);
  // Without a word, the text itself counts.
  CHECK(keys[8] != keys[10] && keys[9] != keys[11]);
}

void a_pair_has_one_key_both_ways_round() {
  const auto folding = test_folding();
  const std::vector<std::u32string> texts = {U"one", U"two", U"one", U"onet", U"one"};
  const std::vector<std::u32string> others = {U"two", U"one", U"three", U"wo", U"one"};
  const auto a = views(texts), b = views(others);
  const auto keys = document_keys(folding, a.data(), b.data(), a.size());
  CHECK(keys[0] == keys[2] && keys[1] == keys[3]);
  std::set<std::uint64_t> first(keys.begin(), keys.end());
  CHECK(first.size() == 8);
  const auto single = document_keys(folding, a.data(), nullptr, 1);
  CHECK(first.count(single[0]) == 0);
}

// Documents of which every gram is known to be shared or not: words of five letters between spaces share no gram with
// other words, but for the space between.
std::u32string words(std::size_t begin, std::size_t end) {
  std::u32string text;
  for (std::size_t word = begin; word < end; ++word) {
    for (std::size_t letter = 0, rest = word; letter < 5; ++letter, rest /= 23) text += U'a' + rest % 23;
    text += U' ';
  }
  return text;
}

double jaccard(const xalign::Folding& folding, const std::u32string& a, const std::u32string& b) {
  std::set<std::u32string> sets[2];
  for (int side = 0; side < 2; ++side) {
    const auto text = folded(folding, view(side == 0 ? a : b));
    for (std::size_t i = 0; i + xalign::kGramLength <= text.size(); ++i) {
      sets[side].insert(text.substr(i, xalign::kGramLength));
    }
  }
  std::size_t shared = 0;
  for (const auto& gram : sets[0]) shared += sets[1].count(gram);
  return static_cast<double>(shared) / static_cast<double>(sets[0].size() + sets[1].size() - shared);
}

void sketches_agree_as_often_as_sets_are_alike() {
  const auto folding = test_folding();
  for (const std::size_t size : {3, 30, 300, 3000}) {
    double agreeing = 0, expected = 0;
    const int trials = 60;
    for (int trial = 0; trial < trials; ++trial) {
      const std::size_t at = 100'000 + 7919 * static_cast<std::size_t>(trial) * 4;
      const auto first = words(at, at + size), second = words(at + size / 3, at + size + size / 3);
      const std::vector<std::u32string> texts = {first, second};
      const auto all = views(texts);
      const auto sketches = document_sketches(folding, folding, all.data(), nullptr, 2);
      const double similarity = jaccard(folding, first, second);
      for (std::size_t bin = 0; bin < xalign::kSketchBins; ++bin) {
        agreeing += sketches[bin] == sketches[xalign::kSketchBins + bin];
      }
      expected += static_cast<double>(xalign::kSketchBins) * (similarity + (1 - similarity) / 256);
    }
    // Five standard deviations of as many throws of a coin.
    const double throws = trials * static_cast<double>(xalign::kSketchBins), share = expected / throws;
    CHECK(std::abs(agreeing - expected) < 5 * std::sqrt(throws * share * (1 - share)));
  }
}

void both_sides_of_a_pair_make_one_set() {
  const auto folding = test_folding();
  const std::vector<std::u32string> texts = {U"the same text twice", U"another side"}, swapped = {texts[1], texts[0]};
  const auto a = views(texts), b = views(swapped);
  const auto sketches = document_sketches(folding, folding, a.data(), b.data(), 2);
  CHECK(std::equal(sketches.begin(), sketches.begin() + xalign::kSketchBins, sketches.begin() + xalign::kSketchBins));
  // Texts without a word are alike only if they are the same.
  const std::vector<std::u32string> signs = {U"??", U"!!", U"??"};
  const auto all = views(signs);
  const auto of_signs = document_sketches(folding, folding, all.data(), nullptr, 3);
  const auto* s = of_signs.data();
  CHECK(std::equal(s, s + xalign::kSketchBins, s + 2 * xalign::kSketchBins));
  CHECK(!std::equal(s, s + xalign::kSketchBins, s + xalign::kSketchBins));
}

void later_documents_are_compared_with_earlier_ones_of_their_group() {
  const std::uint8_t sketches[] = {1, 2, 3, 4, 1, 2, 3, 9, 9, 9, 9, 9, 1, 2, 3, 4};
  const std::int64_t one_group[] = {0, 4}, two_groups[] = {0, 3, 4};
  const std::uint8_t all[] = {1, 1, 1, 1}, not_the_last[] = {1, 1, 1, 0};
  using Answer = std::vector<std::uint8_t>;
  CHECK(near_earlier(sketches, 4, 4, one_group, 1, all, 3, 10) == (Answer{0, 1, 0, 1}));
  CHECK(near_earlier(sketches, 4, 4, one_group, 1, all, 4, 10) == (Answer{0, 0, 0, 1}));
  CHECK(near_earlier(sketches, 4, 4, two_groups, 2, all, 3, 10) == (Answer{0, 1, 0, 0}));
  CHECK(near_earlier(sketches, 4, 4, one_group, 1, not_the_last, 3, 10) == (Answer{0, 1, 0, 0}));
  const std::uint8_t late[] = {9, 9, 1, 1, 1, 1};
  const std::int64_t group[] = {0, 3};
  CHECK(near_earlier(late, 3, 2, group, 1, all, 2, 2) == (Answer{0, 0, 1}));
  CHECK(near_earlier(late, 3, 2, group, 1, all, 2, 1) == (Answer{0, 0, 0}));
  const std::int64_t falling[] = {0, 3, 2, 4}, not_from_zero[] = {1, 4}, not_to_the_end[] = {0, 3};
  CHECK_THROWS(near_earlier(sketches, 4, 4, falling, 3, all, 3, 10), std::invalid_argument);
  CHECK_THROWS(near_earlier(sketches, 4, 4, not_from_zero, 1, all, 3, 10), std::invalid_argument);
  CHECK_THROWS(near_earlier(sketches, 4, 4, not_to_the_end, 1, all, 3, 10), std::invalid_argument);
}

int main() {
  keys_are_those_of_the_folded_text();
  a_pair_has_one_key_both_ways_round();
  sketches_agree_as_often_as_sets_are_alike();
  both_sides_of_a_pair_make_one_set();
  later_documents_are_compared_with_earlier_ones_of_their_group();
}
