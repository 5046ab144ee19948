#include "xalign/permutation.h"

#include <algorithm>
#include <stdexcept>

#include "check.h"

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

int main() {
  split_mix_gives_the_published_numbers();
  every_number_comes_once();
  bounded_numbers_stay_below_and_are_even();
  CHECK(permutation(1, 50) == permutation(1, 50));
  CHECK(permutation(1, 50) != permutation(2, 50));
  CHECK_THROWS(permutation(1, -1), std::invalid_argument);
}
