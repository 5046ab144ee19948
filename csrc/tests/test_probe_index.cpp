#include "xalign/probe_index.h"

#include <stdexcept>

#include "check.h"
#include "folding_tables.h"

using xalign::ProbeIndex;

std::vector<std::uint8_t> touch(const ProbeIndex& index, const std::vector<std::u32string>& texts) {
  const auto all = views(texts);
  return index.touch(all.data(), all.size());
}

ProbeIndex index_of(const std::vector<std::u32string>& sentences, double near = 0.7, std::int64_t min_contained = 10) {
  const auto all = views(sentences);
  return ProbeIndex(test_folding(), all.data(), all.size(), near, min_contained);
}

void sentences_are_found_whole_at_word_boundaries() {
  const auto index = index_of({U"The cat sat on the mat.", U"short", U"กขกขกขกขกขกข"});
  using Answer = std::vector<std::uint8_t>;
  CHECK(touch(index, {U"the CAT sat, on the mat", U"He said: the cat sat on the mat! And left it there for all to see."}) ==
        (Answer{2, 2}));
  CHECK(touch(index, {U"and then the cat sat on the matter of fact without a word to anybody", U"", U"?", U"a"}) ==
        (Answer{0, 0, 0, 0}));
  // A sentence shorter than min_contained is found only by itself.
  CHECK(touch(index, {U"Short!", U"in short words and other ones"}) == (Answer{2, 0}));
  // Scripts without spaces have no boundaries, but a letter's marks belong to it.
  CHECK(touch(index, {U"ขขขกขกขกขกขกขกขกกก", U"x กขกขกขกขกขกข", U"xกขกขกขกขกขกขy"}) == (Answer{2, 2, 2}));
  CHECK(touch(index, {U"กขกขกขกขกขกข\u0301"}) != (Answer{2}));
}

void near_is_the_share_of_common_grams() {
  const std::u32string sentence = U"one two three four five six seven eight nine ten";
  // Of 50 code points with the spaces at both ends: 46 grams, all different.
  const auto index = index_of({sentence}, 0.7, 1000);
  using Answer = std::vector<std::uint8_t>;
  CHECK(touch(index, {U"one two three four five six seven eight nine tan"}) == (Answer{1}));
  // Nine grams of "seven" are gone and nine others come: 37 of 55.
  CHECK(touch(index, {U"one two three four five six xxxxx eight nine ten"}) == (Answer{0}));
  CHECK(touch(index_of({sentence}, 0.67, 1000), {U"one two three four five six xxxxx eight nine ten"}) == (Answer{1}));
  CHECK(touch(index_of({sentence}, 0.68, 1000), {U"one two three four five six xxxxx eight nine ten"}) == (Answer{0}));
  CHECK(touch(index, {U"something else altogether, of about the same length"}) == (Answer{0}));
  // The same grams, but more than twice as long.
  CHECK(touch(index, {sentence + U" " + sentence + U" " + sentence}) == (Answer{0}));
  // The same sentence several times is one sentence.
  CHECK(touch(index_of({sentence, sentence, sentence}), {sentence}) == (Answer{2}));
}

void bad_arguments_are_refused() {
  CHECK_THROWS(index_of({U"fine", U"?!"}), std::invalid_argument);
  CHECK_THROWS(index_of({U"fine"}, 0.4), std::invalid_argument);
  CHECK_THROWS(index_of({U"fine"}, 1.1), std::invalid_argument);
  CHECK_THROWS(index_of({U"fine"}, 0.7, 0), std::invalid_argument);
  CHECK(touch(index_of({}), {U"anything at all"}) == (std::vector<std::uint8_t>{0}));
}

int main() {
  sentences_are_found_whole_at_word_boundaries();
  near_is_the_share_of_common_grams();
  bad_arguments_are_refused();
}
