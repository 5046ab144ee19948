// Seeded permutations that stay the same for ever, on every machine and under every version of anything.
#pragma once

#include <array>
#include <cstddef>
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

// The numbers 0..size-1 in an order that depends on key and size alone, as a formula: nothing is stored, any position
// costs the same, and the way back too. Up to kShuffledSize numbers are shuffled by Fisher-Yates (all orders are
// equally likely); more go through a Feistel network over the next power of two, again and again until the result is
// below size (on average less than twice). The order is part of the meaning of a run: it must never change. Threads
// may share an object.
class Permutation {
 public:
  static constexpr std::int64_t kShuffledSize = 256;
  static constexpr std::int64_t kLargestSize = std::int64_t{1} << 62;

  // Throws std::invalid_argument if size is negative or above kLargestSize.
  Permutation(std::uint64_t key, std::int64_t size);
  // Of no numbers.
  Permutation() : Permutation(0, 0) {}

  std::int64_t size() const { return size_; }
  // The number at a position, and the position of a number. Throw std::out_of_range outside 0..size-1.
  std::int64_t at(std::int64_t position) const;
  std::int64_t position_of(std::int64_t number) const;
  // The same for positions (numbers) first..first+count-1, several times faster. Throw std::out_of_range if they are
  // not all there.
  void fill(std::int64_t first, std::int64_t count, std::int64_t* numbers) const;
  void fill_positions(std::int64_t first, std::int64_t count, std::int64_t* positions) const;
  // Puts the number at each of some positions in its place, and the position of each of some numbers. Throw
  // std::out_of_range if one is outside.
  void map(std::int64_t* positions, std::size_t count) const;
  void map_back(std::int64_t* numbers, std::size_t count) const;

 private:
  static constexpr int kRounds = 8;
  void check_range(std::int64_t first, std::int64_t count) const;

  std::int64_t size_;
  int high_bits_ = 0;  // of the two halves of a number; 0 if size is at most kShuffledSize
  int low_bits_ = 0;
  std::array<std::uint32_t, kRounds> keys_{};
  std::array<std::uint8_t, kShuffledSize> shuffled_{}, unshuffled_{};
};

}  // namespace xalign
