// Sums of activations over groups of tokens (the tokens of a language, or of a sentence), in one pass over them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xalign {

// The upper half of a float's bits.
struct BFloat16 {
  std::uint16_t bits;
};

// Values of `width` neurons at `num_tokens` tokens: value (t, f) lies at data[t * token_stride + f].
template <typename T>
struct Activations {
  const T* data;
  std::int64_t num_tokens;
  std::int64_t width;
  std::int64_t token_stride;
};

// Where the results of G groups go: number (g, f) lies at data[g * group_stride + f]. A null pointer asks for nothing.
template <typename T>
struct PerGroup {
  T* data = nullptr;
  std::int64_t group_stride = 0;
};

struct GroupSums {
  std::int64_t num_groups = 0;
  PerGroup<double> sum;              // += value
  PerGroup<double> sum_of_squares;   // += value squared
  PerGroup<float> max;               // the larger; not a number once a value was not a number
  PerGroup<std::int64_t> positive;   // += 1 where the value is above zero
};

// Adds the values of every token to the sums of its group, groups[t]; a token of group -1 belongs to none.
//
// Sums are those of a plain loop over the tokens in double precision, in their order: a value is exact as a double, and
// so is its square, so a sum of n values differs from the true one by at most n * 2^-53 of the sum of their sizes. Each
// value is read once, whatever is asked for. Time O(num_tokens * width), memory O(num_tokens + num_groups).
//
// What can be asked for: everything, sum and sum_of_squares, sum alone, or positive alone. Throws std::invalid_argument
// on any other choice, on 2^31 tokens or more, and if a group is outside -1..num_groups - 1; nothing is then added.
template <typename T>
void add_to_groups(const Activations<T>& values, const std::int32_t* groups, const GroupSums& sums);

extern template void add_to_groups<float>(const Activations<float>&, const std::int32_t*, const GroupSums&);
extern template void add_to_groups<BFloat16>(const Activations<BFloat16>&, const std::int32_t*, const GroupSums&);

}  // namespace xalign
