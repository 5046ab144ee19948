#include "xalign/blender.h"

#include <stdexcept>

#include "check.h"

namespace {

std::uint64_t scramble(std::uint64_t& state) { return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33; }

// Two languages with a source each, and pairs of both.
xalign::BlendTarget plain_target(std::int64_t num_samples) {
  xalign::BlendTarget target;
  target.seq_length = 64;
  target.num_samples = num_samples;
  target.denominator = 20;
  target.phases = {{1000, 1, 1}};
  target.language_shares = {1, 1};
  target.language_rates_without = {1 << 20, 1 << 20};
  target.language_rates_with = {0, 0};
  target.group_of_source = {0, 1, -1};
  target.source_weights = {7, 9, 5};
  target.languages_of_source = {{0}, {1}, {0, 1}};
  target.batch_size = 4;
  target.batch_key = 17;
  return target;
}

// Random counts of as many draws as are asked for, whatever the source.
void feed(xalign::Blender& blender, std::int32_t source, std::size_t draws, bool documents, std::uint64_t& state) {
  const std::size_t columns = source == 2 ? 2 : 1;
  std::vector<std::int32_t> content, tokens, loss;
  for (std::size_t draw = 0; draw < draws; ++draw) {
    std::int32_t all = 0;
    for (std::size_t column = 0; column < columns; ++column) {
      content.push_back(static_cast<std::int32_t>(scramble(state) % 32));
      all += content.back();
    }
    tokens.push_back(documents ? all + 1 : 64);
    loss.push_back(tokens.back() - static_cast<std::int32_t>(scramble(state) % 2));
  }
  blender.feed(source, content.data(), tokens.data(), loss.data(), draws);
}

std::vector<std::uint16_t> all_rows(xalign::Blender& blender, bool documents) {
  std::uint64_t states[] = {1, 2, 3};
  std::vector<std::uint16_t> rows;
  for (;;) {
    const auto status = blender.run(7);
    const auto more = blender.take_rows();
    rows.insert(rows.end(), more.begin(), more.end());
    if (status.done) return rows;
    if (status.hungry_source >= 0) {
      feed(blender, status.hungry_source, 5, documents, states[static_cast<std::size_t>(status.hungry_source)]);
    }
  }
}

}  // namespace

void the_fraction_is_within_half_a_row() {
  for (const bool documents : {false, true}) {
    auto target = plain_target(400);
    target.documents = documents;
    xalign::Blender blender(target);
    const auto rows = all_rows(blender, documents);
    CHECK(blender.num_samples() >= 400);
    CHECK(blender.worst_parallel() * 2 <= static_cast<xalign::int128>(20) * 64);
    xalign::int128 asked = 0, parallel = 0;
    for (const auto number : blender.tally().asked()) asked += number;
    std::int64_t rows_counted = 0;
    for (const auto& source : blender.tally().sources()) rows_counted += source.rows;
    for (const auto& phase : blender.tally().phases()) parallel += phase.content[1][0] + phase.content[1][1];
    if (!documents) {
      CHECK(rows_counted == 400);
      CHECK(asked - 20 * parallel <= 20 * 64 && 20 * parallel - asked <= 20 * 64);
    }
    CHECK(rows.size() >= 400);
  }
}

void a_schedule_of_none_then_all_is_kept_to_the_row() {
  auto target = plain_target(100);
  target.phases = {{50 * 64, 0, 0}, {100 * 64, 20, 20}};
  xalign::Blender blender(target);
  const auto rows = all_rows(blender, false);
  for (std::size_t k = 0; k < 100; ++k) CHECK((rows[k] == 2) == (k >= 50));
}

void a_slope_is_rounded_down_sample_by_sample() {
  const xalign::FractionSchedule schedule({{100, 0, 0}, {200, 0, 10}, {300, 10, 3}}, 10, 7);
  for (std::int64_t sample = 0; sample < 60; ++sample) {
    const std::int64_t at = sample * 7;
    const std::int64_t expected = at < 100   ? 0
                                  : at < 200 ? 10 * (at - 100) / 100
                                  : at < 300 ? 10 - (7 * (at - 200) + 99) / 100
                                             : 3;
    CHECK(schedule.numerator(sample) == expected);
    CHECK(schedule.phase_of(sample) == static_cast<std::size_t>(at < 100 ? 0 : at < 200 ? 1 : 2));
  }
  const xalign::FractionSchedule far({{std::int64_t{1} << 62, 0, std::int64_t{1} << 60}}, std::int64_t{1} << 60, 1 << 30);
  CHECK(far.numerator(std::int64_t{1} << 31) == std::int64_t{1} << 59);
  CHECK(far.numerator(std::int64_t{1} << 40) == std::int64_t{1} << 60);
}

void whole_pairs_stay_inside_samples() {
  auto target = plain_target(200);
  target.documents = true;
  target.keep_pairs_whole = true;
  target.phases = {{1000, 10, 10}};
  xalign::Blender blender(target);
  const auto rows = all_rows(blender, true);
  for (const auto& border : blender.take_borders()) {
    CHECK(border.token == 0 || rows[static_cast<std::size_t>(border.row)] != 2);
  }
  CHECK(blender.tally().sources()[2].cut == 0);
}

void contradictions_are_refused() {
  CHECK(xalign::Blender(plain_target(1)).run(1).hungry_source == 0);
  auto wrong = plain_target(1);
  wrong.phases = {};
  CHECK_THROWS(xalign::Blender{wrong}, std::invalid_argument);
  wrong = plain_target(1);
  wrong.group_of_source = {0, 1, 0};
  CHECK_THROWS(xalign::Blender{wrong}, std::invalid_argument);
  wrong = plain_target(1);
  wrong.language_shares = {-1, 1};
  CHECK_THROWS(xalign::Blender{wrong}, std::invalid_argument);
  wrong = plain_target(1);
  wrong.languages_of_source = {{0}, {1}, {2}};
  CHECK_THROWS(xalign::Blender{wrong}, std::invalid_argument);
  xalign::Blender blender(plain_target(1));
  const std::int32_t content = 65, tokens = 64, loss = 64;
  CHECK_THROWS(blender.feed(0, &content, &tokens, &loss, 1), std::invalid_argument);
  CHECK_THROWS(blender.feed(3, &content, &tokens, &loss, 1), std::invalid_argument);
}

int main() {
  the_fraction_is_within_half_a_row();
  a_schedule_of_none_then_all_is_kept_to_the_row();
  a_slope_is_rounded_down_sample_by_sample();
  whole_pairs_stay_inside_samples();
  contradictions_are_refused();
}
