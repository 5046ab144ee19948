#include "xalign/permutation.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

__extension__ typedef unsigned __int128 uint128;

std::uint64_t rotate_left(std::uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

}  // namespace

std::uint64_t SplitMix64::next() {
  std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

Xoshiro256::Xoshiro256(std::uint64_t seed) {
  SplitMix64 words(seed);
  for (auto& word : state_) word = words.next();
}

std::uint64_t Xoshiro256::next() {
  const std::uint64_t result = rotate_left(state_[1] * 5, 7) * 9;
  const std::uint64_t t = state_[1] << 17;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= t;
  state_[3] = rotate_left(state_[3], 45);
  return result;
}

std::uint64_t Xoshiro256::below(std::uint64_t bound) {
  uint128 product = static_cast<uint128>(next()) * bound;
  if (static_cast<std::uint64_t>(product) < bound) {
    const std::uint64_t threshold = (0 - bound) % bound;
    while (static_cast<std::uint64_t>(product) < threshold) product = static_cast<uint128>(next()) * bound;
  }
  return static_cast<std::uint64_t>(product >> 64);
}

std::vector<std::int64_t> permutation(std::uint64_t seed, std::int64_t size) {
  if (size < 0) throw std::invalid_argument("size=" + std::to_string(size) + " is negative.");
  std::vector<std::int64_t> order(static_cast<std::size_t>(size));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  Xoshiro256 random(seed);
  for (std::size_t left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[static_cast<std::size_t>(random.below(left))]);
  }
  return order;
}

namespace {

constexpr int kRounds = 8;
// Numbers go through the network a block at a time, so that several share one instruction.
constexpr std::size_t kBlock = 512;

struct Halves {
  std::uint32_t high[kBlock];
  std::uint32_t low[kBlock];
};

// Two multiplications by primes of xxHash; the upper bits of the product depend on all bits of x and key.
inline __attribute__((always_inline)) std::uint32_t mix(std::uint32_t x, std::uint32_t key) {
  x = (x ^ key) * 0x9E3779B1U;
  x ^= x >> 15;
  return x * 0x85EBCA77U;
}

// One pass of `count` numbers, at most kBlock, forth or back through the Feistel network.
template <bool kForth>
inline __attribute__((always_inline)) void network(Halves& x, std::size_t count, const std::uint32_t* keys,
                                                   int high_bits, int low_bits) {
  const int of_high = 32 - high_bits, of_low = 32 - low_bits;
  // A few numbers too many cost less than the last ones one by one.
  for (; count % 8; ++count) x.high[count] = x.low[count] = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t high = x.high[i], low = x.low[i];
    for (int step = 0; step < kRounds; step += 2) {
      if (kForth) {
        high ^= mix(low, keys[step]) >> of_high;
        low ^= mix(high, keys[step + 1]) >> of_low;
      } else {
        low ^= mix(high, keys[kRounds - 1 - step]) >> of_low;
        high ^= mix(low, keys[kRounds - 2 - step]) >> of_high;
      }
    }
    x.high[i] = high;
    x.low[i] = low;
  }
}

// What of a permutation a walk needs to know.
struct Network {
  std::int64_t size;
  const std::uint32_t* keys;
  int high_bits, low_bits;
};

// Sends numbers(0), numbers(1), .. numbers(count - 1) through the network until all are below size. They may be read from
// out itself.
template <bool kForth, typename Numbers>
inline __attribute__((always_inline)) void walk(const Network& net, std::size_t count, Numbers numbers,
                                                std::int64_t* out) {
  const int low_bits = net.low_bits;
  const std::int64_t size = net.size;
  const auto low_mask = (std::uint32_t{1} << low_bits) - 1;
  Halves x;
  std::uint32_t again[kBlock];  // places in out of those that are not below size yet
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    std::size_t here = std::min(kBlock, count - begin);
    std::int64_t* const to = out + begin;
    for (std::size_t i = 0; i < here; ++i) {
      const auto number = static_cast<std::uint64_t>(numbers(begin + i));
      x.high[i] = static_cast<std::uint32_t>(number >> low_bits);
      x.low[i] = static_cast<std::uint32_t>(number) & low_mask;
    }
    network<kForth>(x, here, net.keys, net.high_bits, low_bits);
    for (std::size_t i = 0; i < here; ++i) {
      to[i] = static_cast<std::int64_t>((static_cast<std::uint64_t>(x.high[i]) << low_bits) | x.low[i]);
    }
    std::size_t left = 0;
    for (std::size_t i = 0; i < here; ++i) {
      again[left] = static_cast<std::uint32_t>(i);
      left += to[i] >= size;
    }
    while (left > 0) {
      for (std::size_t i = 0; i < left; ++i) {
        const auto number = static_cast<std::uint64_t>(to[again[i]]);
        x.high[i] = static_cast<std::uint32_t>(number >> low_bits);
        x.low[i] = static_cast<std::uint32_t>(number) & low_mask;
      }
      network<kForth>(x, left, net.keys, net.high_bits, low_bits);
      here = left;
      left = 0;
      for (std::size_t i = 0; i < here; ++i) {
        const std::uint32_t place = again[i];
        const auto number = static_cast<std::int64_t>((static_cast<std::uint64_t>(x.high[i]) << low_bits) | x.low[i]);
        to[place] = number;
        again[left] = place;
        left += number >= size;
      }
    }
  }
}

template <bool kForth, typename Numbers>
void walk_anywhere(const Network& net, std::size_t count, Numbers numbers, std::int64_t* out) {
  walk<kForth>(net, count, numbers, out);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same for processors whose vectors multiply eight numbers at once; the build itself asks for no such processor.
template <bool kForth, typename Numbers>
__attribute__((target("avx2"))) void walk_avx2(const Network& net, std::size_t count, Numbers numbers,
                                               std::int64_t* out) {
  walk<kForth>(net, count, numbers, out);
}

bool has_avx2() {
  static const bool kHas = __builtin_cpu_supports("avx2");
  return kHas;
}
#endif

template <bool kForth, typename Numbers>
void send(const Network& net, std::size_t count, Numbers numbers, std::int64_t* out) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx2()) return walk_avx2<kForth>(net, count, numbers, out);
#endif
  walk_anywhere<kForth>(net, count, numbers, out);
}

// Numbers one after the other, and numbers of a list.
struct From {
  std::int64_t first;
  inline __attribute__((always_inline)) std::int64_t operator()(std::size_t i) const {
    return first + static_cast<std::int64_t>(i);
  }
};
struct Of {
  const std::int64_t* list;
  inline __attribute__((always_inline)) std::int64_t operator()(std::size_t i) const { return list[i]; }
};

}  // namespace

Permutation::Permutation(std::uint64_t key, std::int64_t size) : size_(size) {
  if (size < 0 || size > kLargestSize) {
    throw std::invalid_argument("size=" + std::to_string(size) + " is outside 0..2^62.");
  }
  if (size <= kShuffledSize) {
    for (std::int64_t i = 0; i < size; ++i) shuffled_[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i);
    Xoshiro256 random(key);
    for (auto left = static_cast<std::size_t>(size); left > 1; --left) {
      std::swap(shuffled_[left - 1], shuffled_[static_cast<std::size_t>(random.below(left))]);
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(size); ++i) {
      unshuffled_[shuffled_[i]] = static_cast<std::uint8_t>(i);
    }
    return;
  }
  int bits = 9;
  while ((std::int64_t{1} << bits) < size) ++bits;
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
  SplitMix64 words(key);
  for (auto& round_key : keys_) round_key = static_cast<std::uint32_t>(words.next() >> 32);
}

void Permutation::check_range(std::int64_t first, std::int64_t count) const {
  if (first < 0 || count < 0 || first > size_ || count > size_ - first) {
    throw std::out_of_range("numbers " + std::to_string(first) + " and " + std::to_string(count) +
                            " from there on are not all in 0.." + std::to_string(size_) + ".");
  }
}

void Permutation::fill(std::int64_t first, std::int64_t count, std::int64_t* numbers) const {
  check_range(first, count);
  if (high_bits_ == 0) {
    for (std::int64_t i = 0; i < count; ++i) numbers[i] = shuffled_[static_cast<std::size_t>(first + i)];
  } else {
    const Network net{size_, keys_.data(), high_bits_, low_bits_};
    send<true>(net, static_cast<std::size_t>(count), From{first}, numbers);
  }
}

void Permutation::fill_positions(std::int64_t first, std::int64_t count, std::int64_t* positions) const {
  check_range(first, count);
  if (high_bits_ == 0) {
    for (std::int64_t i = 0; i < count; ++i) positions[i] = unshuffled_[static_cast<std::size_t>(first + i)];
  } else {
    const Network net{size_, keys_.data(), high_bits_, low_bits_};
    send<false>(net, static_cast<std::size_t>(count), From{first}, positions);
  }
}

void Permutation::map(std::int64_t* positions, std::size_t count) const {
  for (std::size_t i = 0; i < count; ++i) check_range(positions[i], 1);
  if (high_bits_ == 0) {
    for (std::size_t i = 0; i < count; ++i) positions[i] = shuffled_[static_cast<std::size_t>(positions[i])];
  } else {
    const Network net{size_, keys_.data(), high_bits_, low_bits_};
    send<true>(net, count, Of{positions}, positions);
  }
}

void Permutation::map_back(std::int64_t* numbers, std::size_t count) const {
  for (std::size_t i = 0; i < count; ++i) check_range(numbers[i], 1);
  if (high_bits_ == 0) {
    for (std::size_t i = 0; i < count; ++i) numbers[i] = unshuffled_[static_cast<std::size_t>(numbers[i])];
  } else {
    const Network net{size_, keys_.data(), high_bits_, low_bits_};
    send<false>(net, count, Of{numbers}, numbers);
  }
}

std::int64_t Permutation::at(std::int64_t position) const {
  std::int64_t number = 0;
  fill(position, 1, &number);
  return number;
}

std::int64_t Permutation::position_of(std::int64_t number) const {
  std::int64_t position = 0;
  fill_positions(number, 1, &position);
  return position;
}

}  // namespace xalign
