#include "xalign/windows.h"

#include <limits>
#include <stdexcept>

#include "check.h"

using xalign::count_languages;
using xalign::gather;
using xalign::sample_index;

void borders_are_every_seq_length_tokens() {
  const std::vector<std::int32_t> lengths = {3, 0, 5, 1, 1, 7};
  std::vector<std::pair<std::int64_t, std::int64_t>> stream;
  for (std::size_t d = 0; d < lengths.size(); ++d) {
    for (std::int32_t t = 0; t < lengths[d]; ++t) stream.emplace_back(d, t);
  }
  for (std::int64_t seq_length = 1; seq_length <= 20; ++seq_length) {
    const auto borders = sample_index(lengths.data(), lengths.size(), seq_length);
    const auto windows = (static_cast<std::int64_t>(stream.size()) - 1) / seq_length;
    CHECK(borders.size() == (windows ? static_cast<std::size_t>(windows) + 1 : 0));
    for (std::size_t w = 0; w < borders.size(); ++w) {
      const auto& at = stream[w * static_cast<std::size_t>(seq_length)];
      CHECK(borders[w].document == at.first && borders[w].offset == at.second);
    }
  }
}

void documents_beyond_int32_are_counted_exactly() {
  const std::int64_t large = std::int64_t{3} << 40;
  const std::vector<std::int64_t> lengths = {large, large};
  const auto borders = sample_index(lengths.data(), lengths.size(), large - 1);
  CHECK(borders.size() == 3);
  CHECK(borders[1].document == 0 && borders[1].offset == large - 1);
  CHECK(borders[2].document == 1 && borders[2].offset == large - 2);
  const std::vector<std::int64_t> too_many(2, std::numeric_limits<std::int64_t>::max());
  CHECK_THROWS(sample_index(too_many.data(), 2, std::int64_t{1}), std::overflow_error);
  const std::vector<std::int64_t> most = {std::numeric_limits<std::int64_t>::max()};
  CHECK(sample_index(most.data(), 1, std::numeric_limits<std::int64_t>::max() - 1).size() == 2);
}

void bad_arguments_are_refused() {
  const std::vector<std::int32_t> negative = {3, -1};
  CHECK_THROWS(sample_index(negative.data(), 2, std::int64_t{2}), std::invalid_argument);
  CHECK_THROWS(sample_index(negative.data(), 1, std::int64_t{0}), std::invalid_argument);

  const std::int8_t languages[] = {0, 1, -1, 1, 0};
  const std::int64_t positions[] = {0, 2, 2, 5};
  CHECK(count_languages(languages, 5, positions, 4, 2) == (std::vector<std::int64_t>{0, 0, 1, 1, 1, 1, 2, 2}));
  const std::int64_t falling[] = {2, 1}, outside[] = {6}, negative_position[] = {-1};
  CHECK_THROWS(count_languages(languages, 5, falling, 2, 2), std::invalid_argument);
  CHECK_THROWS(count_languages(languages, 5, outside, 1, 2), std::invalid_argument);
  CHECK_THROWS(count_languages(languages, 5, negative_position, 1, 2), std::invalid_argument);
  CHECK_THROWS(count_languages(languages, 5, positions, 4, 1), std::invalid_argument);

  const std::uint16_t tokens[] = {10, 11, 12, 65535};
  const std::int64_t starts[] = {3, 0, 2}, stops[] = {4, 2, 2};
  CHECK(gather(tokens, 4, starts, stops, 3) == (std::vector<std::int64_t>{65535, 10, 11}));
  const std::int64_t past[] = {5}, before[] = {-1}, backwards[] = {2};
  CHECK_THROWS(gather(tokens, 4, starts, past, 1), std::invalid_argument);
  CHECK_THROWS(gather(tokens, 4, before, stops, 1), std::invalid_argument);
  CHECK_THROWS(gather(tokens, 4, starts, backwards, 1), std::invalid_argument);
}

int main() {
  borders_are_every_seq_length_tokens();
  documents_beyond_int32_are_counted_exactly();
  bad_arguments_are_refused();
}
