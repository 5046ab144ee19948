#include "xalign/group_sums.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "xalign/permutation.h"

using xalign::Activations;
using xalign::add_to_groups;
using xalign::BFloat16;
using xalign::GroupSums;

namespace {

// Sums of G groups of F neurons, with a gap between groups that must stay as it is.
struct Totals {
  std::int64_t num_groups, width, stride;
  std::vector<double> sum, squares;
  std::vector<float> max;
  std::vector<std::int64_t> positive;

  Totals(std::int64_t groups, std::int64_t neurons)
      : num_groups(groups), width(neurons), stride(neurons + 3), sum(size()), squares(size()),
        max(size(), -std::numeric_limits<float>::infinity()), positive(size()) {}
  std::size_t size() const { return static_cast<std::size_t>(num_groups * stride); }
  GroupSums all() {
    return {num_groups, {sum.data(), stride}, {squares.data(), stride}, {max.data(), stride}, {positive.data(), stride}};
  }
  bool operator==(const Totals& other) const {
    return sum == other.sum && squares == other.squares && max == other.max && positive == other.positive;
  }
};

float number(float value) { return value; }
float number(BFloat16 value) {
  float result;
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  std::memcpy(&result, &bits, 4);
  return result;
}
void set(float& to, float value) { to = value; }
void set(BFloat16& to, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = static_cast<std::uint16_t>(bits >> 16);
}

template <typename T>
struct Made {
  std::int64_t num_tokens, width, stride;
  std::vector<T> items;
  std::vector<std::int32_t> groups;

  Made(std::uint64_t seed, std::int64_t tokens, std::int64_t neurons, std::int64_t num_groups)
      : num_tokens(tokens), width(neurons), stride(2 * neurons), items(static_cast<std::size_t>(tokens * stride)),
        groups(static_cast<std::size_t>(tokens)) {
    xalign::Xoshiro256 random(seed);
    for (auto& item : items) set(item, (static_cast<float>(random.below(2001)) - 1000.0f) * 0.37f);
    // The last group, where there are two or more, has no token.
    const auto kinds = static_cast<std::uint64_t>(num_groups > 1 ? num_groups : num_groups + 1);
    for (auto& group : groups) group = static_cast<std::int32_t>(random.below(kinds)) - 1;
  }
  Activations<T> view() const { return {items.data(), num_tokens, width, stride}; }
  float at(std::int64_t t, std::int64_t f) const { return number(items[static_cast<std::size_t>(t * stride + f)]); }
};

// Token by token, neuron by neuron.
template <typename T>
void by_definition(const Made<T>& made, Totals& totals) {
  for (std::int64_t t = 0; t < made.num_tokens; ++t) {
    const std::int64_t group = made.groups[static_cast<std::size_t>(t)];
    if (group < 0) continue;
    for (std::int64_t f = 0; f < made.width; ++f) {
      const auto to = static_cast<std::size_t>(group * totals.stride + f);
      const double value = made.at(t, f);
      totals.sum[to] += value;
      totals.squares[to] += value * value;
      totals.max[to] = std::max(totals.max[to], made.at(t, f));
      totals.positive[to] += value > 0;
    }
  }
}

template <typename T>
void check_sums() {
  const std::int64_t sizes[][3] = {{1, 1, 1}, {7, 5, 3}, {64, 511, 2}, {50, 513, 4}, {300, 1200, 9}, {0, 4, 2}, {5, 0, 2}};
  std::uint64_t seed = 0;
  for (const auto& [tokens, width, groups] : sizes) {
    Totals expected(groups, width), found(groups, width), parts(groups, width);
    for (int pass = 0; pass < 2; ++pass) {
      const Made<T> made(++seed, tokens, width, groups);
      by_definition(made, expected);
      add_to_groups(made.view(), made.groups.data(), found.all());
      auto sums = parts.all();
      add_to_groups(made.view(), made.groups.data(), GroupSums{groups, sums.sum, sums.sum_of_squares, {}, {}});
      add_to_groups(made.view(), made.groups.data(), GroupSums{groups, {}, {}, {}, sums.positive});
    }
    // The same bits: sums are taken in the order of the tokens.
    CHECK(found == expected);
    parts.max = expected.max;
    CHECK(parts == expected);
  }
}

}  // namespace

void sums_are_those_of_a_plain_loop_to_the_last_bit() {
  check_sums<float>();
  check_sums<BFloat16>();
}

void sums_alone_are_the_same() {
  const Made<float> made(3, 90, 70, 5);
  Totals expected(5, 70), found(5, 70);
  by_definition(made, expected);
  add_to_groups(made.view(), made.groups.data(), GroupSums{5, found.all().sum, {}, {}, {}});
  CHECK(found.sum == expected.sum);
}

void what_is_not_a_number_stays_so_and_zero_is_not_positive() {
  Made<float> made(4, 4, 6, 1);
  made.groups = {0, 0, 0, 0};
  for (auto& item : made.items) item = -1.0f;
  made.items[0] = NAN;
  made.items[1] = INFINITY;
  made.items[2] = 0.0f;
  made.items[3] = -0.0f;
  made.items[4] = std::numeric_limits<float>::denorm_min();
  Totals found(1, 6);
  add_to_groups(made.view(), made.groups.data(), found.all());
  CHECK(std::isnan(found.sum[0]) && std::isnan(found.max[0]) && found.positive[0] == 0);
  CHECK(std::isinf(found.sum[1]) && std::isinf(found.max[1]) && found.positive[1] == 1);
  CHECK(found.max[2] == 0.0f && found.positive[2] == 0 && found.positive[3] == 0);
  CHECK(found.positive[4] == 1 && found.sum[5] == -4.0);
}

void large_offsets_lose_no_digits() {
  Made<float> made(5, 4096, 3, 1);
  for (auto& group : made.groups) group = 0;
  for (auto& item : made.items) item = 16777216.0f;
  made.items[0] = 16777218.0f;
  Totals found(1, 3);
  add_to_groups(made.view(), made.groups.data(), found.all());
  CHECK(found.sum[0] == 4096.0 * 16777216.0 + 2.0);
  CHECK(found.sum[1] == 4096.0 * 16777216.0);
}

void bad_input_is_refused_and_nothing_is_added() {
  Made<float> made(6, 5, 4, 3);
  Totals found(3, 4);
  const Totals before = found;
  for (const std::int32_t bad : {-2, 3, 1000000}) {
    made.groups[4] = bad;
    CHECK_THROWS(add_to_groups(made.view(), made.groups.data(), found.all()), std::invalid_argument);
  }
  made.groups[4] = 0;
  auto sums = found.all();
  for (const auto& [sum, squares, max, positive] :
       {std::array<bool, 4>{false, false, false, false}, {true, false, true, true}, {false, true, false, true},
        {true, true, true, false}, {true, false, false, true}, {false, true, false, false}}) {
    GroupSums asked{3, {}, {}, {}, {}};
    if (sum) asked.sum = sums.sum;
    if (squares) asked.sum_of_squares = sums.sum_of_squares;
    if (max) asked.max = sums.max;
    if (positive) asked.positive = sums.positive;
    CHECK_THROWS(add_to_groups(made.view(), made.groups.data(), asked), std::invalid_argument);
  }
  CHECK_THROWS(add_to_groups(Activations<float>{made.items.data(), std::int64_t{1} << 31, 4, 8}, made.groups.data(),
                             found.all()),
               std::invalid_argument);
  CHECK(found == before);
}

int main() {
  sums_are_those_of_a_plain_loop_to_the_last_bit();
  sums_alone_are_the_same();
  what_is_not_a_number_stays_so_and_zero_is_not_positive();
  large_offsets_lose_no_digits();
  bad_input_is_refused_and_nothing_is_added();
}
