#include "xalign/group_sums.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace xalign {
namespace {

// Neurons worked on together: what is kept of a group then fits the first-level cache.
constexpr std::int64_t kBlock = 512;

inline float as_float(float value) { return value; }

inline float as_float(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// The tokens of each group, in their order: those of group g are token[first[g]] to token[first[g + 1] - 1].
struct Grouped {
  std::vector<std::int64_t> first, token;

  Grouped(const std::int32_t* groups, std::int64_t num_tokens, std::int64_t num_groups)
      : first(static_cast<std::size_t>(num_groups) + 1) {
    std::int64_t members = 0;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      if (groups[t] < -1 || groups[t] >= num_groups) {
        throw std::invalid_argument("token " + std::to_string(t) + " is of group " + std::to_string(groups[t]) +
                                    "; -1 to " + std::to_string(num_groups - 1) + " are expected.");
      }
      if (groups[t] >= 0) {
        ++first[static_cast<std::size_t>(groups[t]) + 1];
        ++members;
      }
    }
    for (std::size_t g = 1; g < first.size(); ++g) first[g] += first[g - 1];
    token.resize(static_cast<std::size_t>(members));
    std::vector<std::int64_t> next(first.begin(), first.end() - 1);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      if (groups[t] >= 0) token[static_cast<std::size_t>(next[static_cast<std::size_t>(groups[t])]++)] = t;
    }
  }
};

// What is kept of one group for a block of neurons while its tokens pass.
struct Kept {
  double sum[kBlock], squares[kBlock];
  float max[kBlock];
  std::int32_t positive[kBlock];
};

template <bool kSum, bool kSquares, bool kMax, bool kPositive, typename T>
inline void add_row(const T* __restrict row, std::int64_t width, Kept& __restrict kept) {
  for (std::int64_t f = 0; f < width; ++f) {
    const float value = as_float(row[f]);
    if constexpr (kSum) {
      const double wide = value;
      kept.sum[f] += wide;
      if constexpr (kSquares) kept.squares[f] += wide * wide;
    }
    if constexpr (kMax) {
      const float most = kept.max[f];
      kept.max[f] = (value > most) | (value != value) ? value : most;
    }
    if constexpr (kPositive) kept.positive[f] += value > 0.0f;
  }
}

// The numbers of a group from one neuron on.
template <typename T>
T* place(const PerGroup<T>& numbers, std::int64_t group, std::int64_t neuron) {
  return numbers.data + group * numbers.group_stride + neuron;
}

template <bool kSum, bool kSquares, bool kMax, bool kPositive, typename T>
void add(const Activations<T>& values, const Grouped& grouped, const GroupSums& sums) {
  Kept kept;
  for (std::int64_t neuron = 0; neuron < values.width; neuron += kBlock) {
    const std::int64_t width = std::min(kBlock, values.width - neuron);
    for (std::int64_t group = 0; group < sums.num_groups; ++group) {
      const auto g = static_cast<std::size_t>(group);
      const auto begin = static_cast<std::size_t>(grouped.first[g]), end = static_cast<std::size_t>(grouped.first[g + 1]);
      if (begin == end) continue;
      // Sums go on from what is there: they are those of one loop over all tokens, however many calls they came in.
      if constexpr (kSum) std::copy_n(place(sums.sum, group, neuron), width, kept.sum);
      if constexpr (kSquares) std::copy_n(place(sums.sum_of_squares, group, neuron), width, kept.squares);
      if constexpr (kMax) std::copy_n(place(sums.max, group, neuron), width, kept.max);
      if constexpr (kPositive) std::fill_n(kept.positive, width, 0);
      for (std::size_t i = begin; i < end; ++i) {
        add_row<kSum, kSquares, kMax, kPositive>(values.data + grouped.token[i] * values.token_stride + neuron, width,
                                                 kept);
      }
      if constexpr (kSum) std::copy_n(kept.sum, width, place(sums.sum, group, neuron));
      if constexpr (kSquares) std::copy_n(kept.squares, width, place(sums.sum_of_squares, group, neuron));
      if constexpr (kMax) std::copy_n(kept.max, width, place(sums.max, group, neuron));
      if constexpr (kPositive) {
        std::int64_t* const own = place(sums.positive, group, neuron);
        for (std::int64_t f = 0; f < width; ++f) own[f] += kept.positive[f];
      }
    }
  }
}

}  // namespace

template <typename T>
void add_to_groups(const Activations<T>& values, const std::int32_t* groups, const GroupSums& sums) {
  if (values.num_tokens > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument(std::to_string(values.num_tokens) + " tokens at once; 2^31 - 1 can be counted.");
  }
  const bool sum = sums.sum.data, squares = sums.sum_of_squares.data, max = sums.max.data;
  const bool positive = sums.positive.data;
  const bool all = sum && squares && max && positive;
  const bool some = max ? all : sum ? !positive : positive && !squares;
  if (!some) {
    throw std::invalid_argument("everything, sum and sum_of_squares, sum alone or positive alone can be asked for.");
  }
  const Grouped grouped(groups, values.num_tokens, sums.num_groups);
  if (all) {
    add<true, true, true, true>(values, grouped, sums);
  } else if (squares) {
    add<true, true, false, false>(values, grouped, sums);
  } else if (sum) {
    add<true, false, false, false>(values, grouped, sums);
  } else {
    add<false, false, false, true>(values, grouped, sums);
  }
}

template void add_to_groups<float>(const Activations<float>&, const std::int32_t*, const GroupSums&);
template void add_to_groups<BFloat16>(const Activations<BFloat16>&, const std::int32_t*, const GroupSums&);

}  // namespace xalign
