#include "xalign/permutation.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

#include "check.h"

using xalign::Permutation;
using xalign::permutation;

// First outputs for seed 1234567 as published with the reference implementation (prng.di.unimi.it/splitmix64.c).
void split_mix_gives_the_published_numbers() {
  xalign::SplitMix64 random(1234567);
  CHECK(random.next() == 6457827717110365317ULL);
  CHECK(random.next() == 3203168211198807973ULL);
  CHECK(random.next() == 9817491932198370423ULL);
}

void every_number_comes_once() {
  for (std::int64_t size : {0, 1, 2, 3, 100, 4097}) {
    auto order = permutation(42, size);
    CHECK(static_cast<std::int64_t>(order.size()) == size);
    std::sort(order.begin(), order.end());
    for (std::int64_t i = 0; i < size; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
  }
}

void bounded_numbers_stay_below_and_are_even() {
  xalign::Xoshiro256 random(7);
  std::int64_t counts[6] = {};
  for (int i = 0; i < 60000; ++i) {
    const std::uint64_t number = random.below(6);
    CHECK(number < 6);
    ++counts[number];
  }
  for (const std::int64_t count : counts) CHECK(count > 9500 && count < 10500);
  // A bound just above half of 2^64 makes half of all draws be drawn again.
  const std::uint64_t bound = (std::uint64_t{1} << 63) + 1;
  for (int i = 0; i < 1000; ++i) CHECK(random.below(bound) < bound);
}

std::vector<std::int64_t> all_of(const Permutation& order) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(order.size()));
  order.fill(0, order.size(), numbers.data());
  return numbers;
}

// The formula once more, one number at a time.
std::int64_t network(std::uint64_t key, std::int64_t size, std::int64_t position) {
  int bits = 9;
  while ((std::int64_t{1} << bits) < size) ++bits;
  const int low_bits = bits / 2, high_bits = bits - low_bits;
  xalign::SplitMix64 words(key);
  std::uint32_t keys[8];
  for (auto& round_key : keys) round_key = static_cast<std::uint32_t>(words.next() >> 32);
  auto number = static_cast<std::uint64_t>(position);
  do {
    auto high = static_cast<std::uint32_t>(number >> low_bits);
    auto low = static_cast<std::uint32_t>(number & ((std::uint64_t{1} << low_bits) - 1));
    for (int round = 0; round < 8; ++round) {
      std::uint32_t x = ((round % 2 ? high : low) ^ keys[round]) * 0x9E3779B1U;
      x = (x ^ (x >> 15)) * 0x85EBCA77U;
      if (round % 2) {
        low ^= x >> (32 - low_bits);
      } else {
        high ^= x >> (32 - high_bits);
      }
    }
    number = (static_cast<std::uint64_t>(high) << low_bits) | low;
  } while (number >= static_cast<std::uint64_t>(size));
  return static_cast<std::int64_t>(number);
}

void the_formula_is_a_permutation_of_every_size() {
  std::vector<std::int64_t> sizes = {255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 65535, 65536, 65537, 100003};
  for (std::int64_t size = 0; size <= 40; ++size) sizes.push_back(size);
  for (const std::int64_t size : sizes) {
    const Permutation order(99, size);
    const auto numbers = all_of(order);
    std::vector<bool> seen(numbers.size(), false);
    std::vector<std::int64_t> positions(numbers.size());
    order.fill_positions(0, size, positions.data());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const auto number = static_cast<std::size_t>(numbers[i]);
      CHECK(numbers[i] >= 0 && numbers[i] < size && !seen[number]);
      seen[number] = true;
      CHECK(positions[number] == static_cast<std::int64_t>(i));
      if (size > 256 && i % 7 == 0) CHECK(network(99, size, static_cast<std::int64_t>(i)) == numbers[i]);
    }
  }
}

void any_piece_is_the_same_as_all() {
  for (std::int64_t size : {std::int64_t{200}, std::int64_t{3001}}) {
    const Permutation order(5, size);
    const auto numbers = all_of(order);
    for (std::int64_t first = 0; first < size; first += 37) {
      for (std::int64_t count : {std::int64_t{0}, std::int64_t{1}, std::int64_t{9}, std::int64_t{700}}) {
        if (first + count > size) continue;
        std::vector<std::int64_t> piece(static_cast<std::size_t>(count));
        order.fill(first, count, piece.data());
        CHECK(std::equal(piece.begin(), piece.end(), numbers.begin() + first));
      }
      CHECK(order.at(first) == numbers[static_cast<std::size_t>(first)]);
      CHECK(order.position_of(order.at(first)) == first);
    }
    std::vector<std::int64_t> some = {size - 1, 0, 17, 17, 3};
    order.map(some.data(), some.size());
    CHECK(some == (std::vector<std::int64_t>{numbers.back(), numbers[0], numbers[17], numbers[17], numbers[3]}));
    auto every = numbers;
    order.map(every.data(), every.size());
    for (std::size_t i = 0; i < every.size(); ++i) CHECK(every[i] == numbers[static_cast<std::size_t>(numbers[i])]);
    order.map_back(every.data(), every.size());
    CHECK(every == numbers);
    order.map_back(some.data(), some.size());
    CHECK(some == (std::vector<std::int64_t>{size - 1, 0, 17, 17, 3}));
  }
}

void huge_sizes_go_forth_and_back() {
  for (int bits = 30; bits <= 62; ++bits) {
    for (std::int64_t less : {std::int64_t{0}, std::int64_t{1}, std::int64_t{1} << (bits - 2)}) {
      const std::int64_t size = (std::int64_t{1} << bits) - less;
      const Permutation order(7, size);
      for (std::int64_t position : {std::int64_t{0}, size / 3, size - 1}) {
        const std::int64_t number = order.at(position);
        CHECK(number >= 0 && number < size);
        CHECK(order.position_of(number) == position);
        CHECK(network(7, size, position) == number);
      }
    }
  }
}

// How far a count of observations is from what chance gives, in standard deviations of chi-square.
double surprise(const std::vector<double>& observed, const std::vector<double>& expected) {
  double chi_square = 0;
  double freedom = -1;
  for (std::size_t i = 0; i < observed.size(); ++i) {
    if (expected[i] == 0) {
      CHECK(observed[i] == 0);
      continue;
    }
    chi_square += (observed[i] - expected[i]) * (observed[i] - expected[i]) / expected[i];
    freedom += 1;
  }
  return (chi_square - freedom) / std::sqrt(2 * freedom);
}

void all_orders_of_a_few_numbers_are_equally_likely() {
  std::size_t orders = 1;
  for (std::int64_t size = 1; size <= 6; ++size) {
    orders *= static_cast<std::size_t>(size);
    const std::size_t keys = 200 * orders;
    std::map<std::vector<std::int64_t>, double> counts;
    for (std::size_t key = 0; key < keys; ++key) ++counts[all_of(Permutation(key, size))];
    CHECK(counts.size() == orders);
    std::vector<double> observed;
    for (const auto& entry : counts) observed.push_back(entry.second);
    if (size > 1) CHECK(surprise(observed, std::vector<double>(orders, 200.0)) < 5);
  }
  // Of up to ten, every number is met at every place.
  for (std::int64_t size = 7; size <= 10; ++size) {
    const auto n = static_cast<std::size_t>(size);
    std::vector<double> observed(n * n, 0.0);
    for (std::uint64_t key = 0; key < 4000; ++key) {
      const auto numbers = all_of(Permutation(key, size));
      for (std::size_t i = 0; i < n; ++i) ++observed[i * n + static_cast<std::size_t>(numbers[i])];
    }
    CHECK(surprise(observed, std::vector<double>(n * n, 4000.0 / static_cast<double>(n))) < 5);
  }
}

// Over keys: where a number comes, where two neighbours come together, and what is between two of them. Sizes just over
// a power of two, where most numbers go through the network twice, and just under it.
void positions_look_drawn_by_lot() {
  constexpr std::size_t kBins = 16, kKeys = 20000;
  for (std::int64_t size : {257, 300, 512, 513, 1000, 4096, 4097, 70000}) {
    const std::vector<std::pair<std::int64_t, std::int64_t>> pairs = {
        {0, 1}, {0, 2}, {0, size / 2}, {size - 2, size - 1}, {0, 16}, {0, size - 1}, {size / 3, size / 3 + 1}};
    std::vector<double> in_bin(kBins, 0.0);
    for (std::int64_t number = 0; number < size; ++number) {
      ++in_bin[static_cast<std::size_t>(number) * kBins / static_cast<std::size_t>(size)];
    }
    const double n = static_cast<double>(size);
    std::vector<double> expected(kBins * kBins);
    for (std::size_t a = 0; a < kBins; ++a) {
      for (std::size_t b = 0; b < kBins; ++b) {
        expected[a * kBins + b] = kKeys * in_bin[a] * (in_bin[b] - (a == b)) / (n * (n - 1));
      }
    }
    for (const auto& pair : pairs) {
      std::vector<double> together(kBins * kBins, 0.0), apart(kBins, 0.0), between(kBins, 0.0);
      for (std::int64_t step = 1; step < size; ++step) {
        ++between[static_cast<std::size_t>(step) * kBins / static_cast<std::size_t>(size)];
      }
      for (auto& count : between) count *= kKeys / (n - 1);
      for (std::uint64_t key = 0; key < kKeys; ++key) {
        const Permutation order(key * 0x9E3779B97F4A7C15ULL, size);
        const auto a = static_cast<std::size_t>(order.at(pair.first));
        const auto b = static_cast<std::size_t>(order.at(pair.second));
        const auto all = static_cast<std::size_t>(size);
        ++together[a * kBins / all * kBins + b * kBins / all];
        ++apart[(a + all - b) % all * kBins / all];
      }
      CHECK(surprise(together, expected) < 5);
      CHECK(surprise(apart, between) < 5);
    }
  }
}

// Inside one order: neighbours are not correlated, half of the steps go down, about one number stays in its place.
void neighbours_know_nothing_of_each_other() {
  for (std::int64_t size : {300, 5000, 65537}) {
    const double n = static_cast<double>(size), middle = (n - 1) / 2, variance = (n * n - 1) / 12;
    double correlation = 0, descents = 0, fixed = 0;
    constexpr int kKeys = 100;
    for (std::uint64_t key = 0; key < kKeys; ++key) {
      const auto numbers = all_of(Permutation(key, size));
      double product = 0, down = 0;
      for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {
        product += (static_cast<double>(numbers[i]) - middle) * (static_cast<double>(numbers[i + 1]) - middle);
        down += numbers[i] > numbers[i + 1];
      }
      for (std::size_t i = 0; i < numbers.size(); ++i) fixed += numbers[i] == static_cast<std::int64_t>(i);
      correlation += product / variance / std::sqrt(n);
      descents += (down - (n - 1) / 2) / std::sqrt((n + 1) / 12);
    }
    CHECK(std::abs(correlation) / std::sqrt(double{kKeys}) < 4.5);
    CHECK(std::abs(descents) / std::sqrt(double{kKeys}) < 4.5);
    CHECK(std::abs(fixed - kKeys) / std::sqrt(double{kKeys}) < 4.5);
  }
}

// A run's samples hang on these numbers.
void orders_never_change() {
  CHECK(all_of(Permutation(1234, 12)) == permutation(1234, 12));
  const Permutation order(1234, 1000003);
  std::vector<std::int64_t> numbers(6);
  order.fill(0, 6, numbers.data());
  CHECK(numbers == (std::vector<std::int64_t>{881701, 697768, 45798, 890858, 103963, 863115}));
}

void outside_is_refused() {
  CHECK_THROWS(Permutation(1, -1), std::invalid_argument);
  CHECK_THROWS(Permutation(1, (std::int64_t{1} << 62) + 1), std::invalid_argument);
  std::int64_t numbers[4];
  for (const std::int64_t size : {std::int64_t{0}, std::int64_t{3}, std::int64_t{1000}}) {
    const Permutation order(1, size);
    CHECK_THROWS(order.at(size), std::out_of_range);
    CHECK_THROWS(order.at(-1), std::out_of_range);
    CHECK_THROWS(order.position_of(size), std::out_of_range);
    CHECK_THROWS(order.fill(size, 1, numbers), std::out_of_range);
    CHECK_THROWS(order.fill(0, size + 1, numbers), std::out_of_range);
    CHECK_THROWS(order.fill(0, -1, numbers), std::out_of_range);
    CHECK_THROWS(order.fill(1, std::int64_t{0x7FFFFFFFFFFFFFFF}, numbers), std::out_of_range);
    order.fill(size, 0, numbers);
    numbers[0] = size;
    CHECK_THROWS((order.map(numbers, 1), 0), std::out_of_range);
    CHECK_THROWS((order.map_back(numbers, 1), 0), std::out_of_range);
    numbers[0] = -1;
    CHECK_THROWS((order.map(numbers, 1), 0), std::out_of_range);
    CHECK_THROWS((order.map_back(numbers, 1), 0), std::out_of_range);
  }
}

int main() {
  the_formula_is_a_permutation_of_every_size();
  any_piece_is_the_same_as_all();
  huge_sizes_go_forth_and_back();
  all_orders_of_a_few_numbers_are_equally_likely();
  positions_look_drawn_by_lot();
  neighbours_know_nothing_of_each_other();
  orders_never_change();
  outside_is_refused();
  split_mix_gives_the_published_numbers();
  every_number_comes_once();
  bounded_numbers_stay_below_and_are_even();
  CHECK(permutation(1, 50) == permutation(1, 50));
  CHECK(permutation(1, 50) != permutation(2, 50));
  CHECK_THROWS(permutation(1, -1), std::invalid_argument);
}
