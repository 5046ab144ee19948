// Seeded permutations that stay the same for ever, on every machine and under every version of anything.
#pragma once

#include <cstdint>
#include <vector>

namespace xalign {

// SplitMix64 (Steele, Lea and Flood 2014): spreads a 64-bit seed over as many words as are asked for.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();

 private:
  std::uint64_t state_;
};

// xoshiro256** 1.0 (Blackman and Vigna 2018), its four words filled by SplitMix64.
class Xoshiro256 {
 public:
  explicit Xoshiro256(std::uint64_t seed);
  std::uint64_t next();
  // Uniform in [0, bound), without bias (Lemire 2019, arXiv:1805.10941). bound must be positive.
  std::uint64_t below(std::uint64_t bound);

 private:
  std::uint64_t state_[4];
};

// The numbers 0..size-1 in an order that depends on seed and size alone (Fisher-Yates from the back). The order is part
// of the meaning of a run: it must never change. Time O(size), memory 8 bytes x size. Throws std::invalid_argument on a
// negative size.
std::vector<std::int64_t> permutation(std::uint64_t seed, std::int64_t size);

}  // namespace xalign
