#include "xalign/average_precision.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace xalign {
namespace {

constexpr int kDigitBits = 10;
constexpr std::uint32_t kBuckets = std::uint32_t{1} << kDigitBits;
// Scores are sorted by where they lie between the highest (0) and the lowest (this), to the nearest whole number.
constexpr std::int32_t kLastPlace = (std::int32_t{1} << (2 * kDigitBits)) - 1;
// Neurons whose scores are copied together, tile by tile: rows of [D, N] are then read a few cache lines at a time.
constexpr std::int64_t kBlockNeurons = 64, kTileDocuments = 8, kTileNeurons = 4;
// Rows are often a multiple of 4,096 bytes apart, so that few fit the first cache at once and none is fetched unasked.
constexpr std::int64_t kFetchedAhead = 16, kNeuronsOfLine = 16;
constexpr std::int64_t kLeastNeurons = 64;  // of a thread
constexpr std::size_t kLanes = 32;
constexpr std::size_t kPartialSums = 4;
// Moves by insertion, for each document, after which sorting by comparison is cheaper.
constexpr std::size_t kMostMoves = 8;

[[noreturn]] void refuse(double score, std::size_t document, std::int64_t neuron) {
  const std::string value = std::isnan(score) ? "nan" : score > 0 ? "inf" : "-inf";
  throw std::invalid_argument("scores_DN[" + std::to_string(document) + ", " + std::to_string(neuron) + "] is " + value +
                              "; an empty document or a diverged model gives such scores.");
}

// Ranks the documents of one neuron from the highest score down. Holds the memory for it between neurons.
template <typename T>
class Ranking {
 public:
  explicit Ranking(std::size_t num_documents)
      : document(num_documents), score(num_documents), place_(num_documents), half_(num_documents) {}

  std::vector<std::uint32_t> document;  // the ranking
  std::vector<T> score;                 // in its order
  bool ties = false;                    // whether two neighbours have the same score

  void rank(const T* scores, std::int64_t neuron) {
    const auto [lowest, highest] = bounds(scores, neuron);
    const T scale = static_cast<T>(kLastPlace) / (highest - lowest);
    // Not so where all scores are equal, and at the ends of what the type can hold.
    const bool placed = std::isfinite(scale) && scale > 0 && std::isfinite(highest - lowest);
    if (placed) {
      sort_by_place(scores, highest, scale);
    } else {
      std::iota(document.begin(), document.end(), std::uint32_t{0});
    }
    if (!insert_by_score(scores)) sort_by_score(scores);
  }

 private:
  // In lanes, so that no comparison waits for the one before.
  std::pair<T, T> bounds(const T* scores, std::int64_t neuron) const {
    const std::size_t size = document.size();
    std::array<T, kLanes> low, high;
    low.fill(scores[0]);
    high.fill(scores[0]);
    std::array<T, kLanes> zero{};  // not a number where one is not finite
    std::size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (std::size_t k = 0; k < kLanes; ++k) {
        const T own = scores[i + k];
        low[k] = own < low[k] ? own : low[k];
        high[k] = own > high[k] ? own : high[k];
        zero[k] += own * T{0};
      }
    }
    for (; i < size; ++i) {
      low[0] = std::min(low[0], scores[i]);
      high[0] = std::max(high[0], scores[i]);
      zero[0] += scores[i] * T{0};
    }
    const bool finite = std::all_of(zero.begin(), zero.end(), [](T one) { return one == T{0}; });
    for (std::size_t at = 0; !finite; ++at) {
      if (!std::isfinite(scores[at])) refuse(static_cast<double>(scores[at]), at, neuron);
    }
    return {*std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end())};
  }

  // Rounding keeps the order: a higher score never gets a later place. Least significant digit first; documents of one
  // place keep their order.
  void sort_by_place(const T* scores, T highest, T scale) {
    const std::size_t size = document.size();
    std::array<std::uint32_t, kBuckets> low{}, high{};
    for (std::size_t i = 0; i < size; ++i) {
      const T place = (highest - scores[i]) * scale;
      place_[i] = static_cast<std::int32_t>(place < static_cast<T>(kLastPlace) ? place : static_cast<T>(kLastPlace));
    }
    for (std::size_t i = 0; i < size; ++i) {
      const auto place = static_cast<std::uint32_t>(place_[i]);
      ++low[place % kBuckets];
      ++high[place / kBuckets];
    }
    std::uint32_t before_low = 0, before_high = 0;
    for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
      const std::uint32_t own_low = low[bucket], own_high = high[bucket];
      low[bucket] = before_low;
      high[bucket] = before_high;
      before_low += own_low;
      before_high += own_high;
    }
    for (std::size_t i = 0; i < size; ++i) {
      const auto place = static_cast<std::uint32_t>(place_[i]);
      half_[low[place % kBuckets]++] = {place / kBuckets, static_cast<std::uint32_t>(i)};
    }
    for (const Half& item : half_) document[high[item.bucket]++] = item.document;
  }

  // Puts right what shares a place and copies the scores. False, with the work undone in part, if that is too much.
  bool insert_by_score(const T* scores) {
    std::size_t moves = 0, equal = 0;
    T last = scores[document[0]];
    score[0] = last;
    for (std::size_t i = 1; i < document.size(); ++i) {
      const std::uint32_t own = document[i];
      const T value = scores[own];
      score[i] = value;
      if (value < last) {
        last = value;
        continue;
      }
      std::size_t to = i;
      for (; to > 0 && score[to - 1] < value; --to) {
        score[to] = score[to - 1];
        document[to] = document[to - 1];
      }
      score[to] = value;
      document[to] = own;
      equal += to > 0 && score[to - 1] == value;
      moves += i - to;
      if (moves > kMostMoves * document.size()) return false;
    }
    ties = equal != 0;
    return true;
  }

  void sort_by_score(const T* scores) {
    std::sort(document.begin(), document.end(), [&](std::uint32_t a, std::uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    ties = false;
    for (std::size_t i = 0; i < document.size(); ++i) {
      score[i] = scores[document[i]];
      ties |= i > 0 && score[i] == score[i - 1];
    }
  }

  struct Half {
    std::uint32_t bucket;
    std::uint32_t document;
  };

  std::vector<std::int32_t> place_;
  std::vector<Half> half_;
};

// The groupings of the documents: their labels document by document, and the size of each group.
struct Groups {
  std::vector<std::uint8_t> labels;  // [D, width]
  std::vector<double> sizes;
  std::size_t width;

  Groups(const std::uint8_t* given, std::size_t num_groupings, std::size_t num_documents)
      : labels(num_documents * num_groupings), sizes(num_groupings), width(num_groupings) {
    for (std::size_t group = 0; group < num_groupings; ++group) {
      std::size_t members = 0;
      for (std::size_t document = 0; document < num_documents; ++document) {
        const std::uint8_t label = given[group * num_documents + document];
        if (label > 1) throw std::invalid_argument("a label is " + std::to_string(label) + "; 0 or 1 is expected.");
        labels[document * width + group] = label;
        members += label;
      }
      if (members == 0 || members == num_documents) {
        throw std::invalid_argument(std::to_string(members) + " of " + std::to_string(num_documents) +
                                    " documents are in the language; both groups need at least one.");
      }
      sizes[group] = static_cast<double>(members);
    }
  }
};

// Average precisions of one ranking for kAtOnce groupings from number `first` on, which do not wait for one another.
template <std::size_t kAtOnce, typename T>
std::array<double, kAtOnce> precision_of(const Ranking<T>& ranking, const Groups& groups, std::size_t first,
                                         bool lowest_first, const double* inverse_rank) {
  const std::size_t size = ranking.document.size(), last = size - 1;
  const std::uint8_t* labels = groups.labels.data() + first;
  std::array<double, kAtOnce> sums{};
  std::array<std::int32_t, kAtOnce> hits{}, counted{};
  if (!ranking.ties && !lowest_first) {
    std::array<std::array<double, kAtOnce>, kPartialSums> partial{};
    const auto add = [&](std::size_t i, std::array<double, kAtOnce>& to) {
      const std::uint8_t* own = labels + std::size_t{ranking.document[i]} * groups.width;
      for (std::size_t k = 0; k < kAtOnce; ++k) {
        hits[k] += own[k];
        to[k] += static_cast<double>(hits[k] & -std::int32_t{own[k]}) * inverse_rank[i];
      }
    };
    std::size_t i = 0;
    for (; i + kPartialSums <= size; i += kPartialSums) {
      for (std::size_t j = 0; j < kPartialSums; ++j) add(i + j, partial[j]);
    }
    for (; i < size; ++i) add(i, sums);
    for (const auto& part : partial) {
      for (std::size_t k = 0; k < kAtOnce; ++k) sums[k] += part[k];
    }
  } else {
    for (std::size_t i = 0; i < size; ++i) {
      const std::size_t at = lowest_first ? last - i : i;
      const std::uint8_t* own = labels + std::size_t{ranking.document[at]} * groups.width;
      for (std::size_t k = 0; k < kAtOnce; ++k) hits[k] += own[k];
      if (i != last && ranking.score[at] == ranking.score[lowest_first ? at - 1 : at + 1]) continue;
      for (std::size_t k = 0; k < kAtOnce; ++k) {
        sums[k] += static_cast<double>(hits[k] - counted[k]) * static_cast<double>(hits[k]) * inverse_rank[i];
        counted[k] = hits[k];
      }
    }
  }
  for (std::size_t k = 0; k < kAtOnce; ++k) sums[k] /= groups.sizes[first + k];
  return sums;
}

// Copies a tile of scores turned round. Of a size known beforehand it goes through registers.
template <std::int64_t kDocuments, std::int64_t kNeurons, typename T>
void turn(const T* from, std::int64_t document_stride, T* to, std::int64_t size) {
  std::array<T, kDocuments * kNeurons> tile;
  for (std::int64_t j = 0; j < kDocuments; ++j) {
    for (std::int64_t i = 0; i < kNeurons; ++i) tile[i * kDocuments + j] = from[j * document_stride + i];
  }
  for (std::int64_t i = 0; i < kNeurons; ++i) {
    for (std::int64_t j = 0; j < kDocuments; ++j) to[i * size + j] = tile[i * kDocuments + j];
  }
}

// Copies some neurons' scores so that those of one neuron lie together: [count, D].
template <typename T>
void gather(const Scores<T>& scores, std::int64_t first, std::int64_t count, T* block) {
  const std::int64_t size = scores.num_documents, document_stride = scores.document_stride;
  for (std::int64_t document = 0; document < size; document += kTileDocuments) {
    const std::int64_t documents = std::min(kTileDocuments, size - document);
    const std::int64_t fetched = std::min(document + kFetchedAhead, size - documents);
    for (std::int64_t neuron = 0; neuron < count; neuron += kTileNeurons) {
      const std::int64_t neurons = std::min(kTileNeurons, count - neuron);
      const T* column = scores.data + (first + neuron) * scores.neuron_stride;
      const T* from = column + document * document_stride;
      T* to = block + neuron * size + document;
      if (documents == kTileDocuments && neurons == kTileNeurons && scores.neuron_stride == 1) {
        if (neuron % kNeuronsOfLine == 0) {
          for (std::int64_t j = 0; j < documents; ++j) __builtin_prefetch(column + (fetched + j) * document_stride);
        }
        turn<kTileDocuments, kTileNeurons>(from, document_stride, to, size);
        continue;
      }
      for (std::int64_t i = 0; i < neurons; ++i) {
        for (std::int64_t j = 0; j < documents; ++j) {
          to[i * size + j] = from[j * document_stride + i * scores.neuron_stride];
        }
      }
    }
  }
}

}  // namespace

template <typename T>
std::vector<double> average_precision(const Scores<T>& scores, const std::uint8_t* labels, std::size_t num_groupings,
                                      bool lowest_first, int num_threads) {
  // Hits and ranks are counted in 32 bits, of which one is the sign.
  const std::int64_t given = scores.num_documents;
  if (given < 1 || given > INT32_MAX) {
    throw std::invalid_argument(std::to_string(given) + " documents; 1 to 2^31 - 1 are expected.");
  }
  const auto num_documents = static_cast<std::size_t>(given);
  const auto num_neurons = static_cast<std::size_t>(scores.num_neurons);
  const Groups groups(labels, num_groupings, num_documents);
  std::vector<double> inverse_rank(num_documents);
  for (std::size_t i = 0; i < num_documents; ++i) inverse_rank[i] = 1.0 / static_cast<double>(i + 1);
  std::vector<double> precision(num_groupings * num_neurons);

  const bool together = scores.document_stride == 1;
  const auto rank_neurons = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    const std::int64_t most = together ? 0 : std::min(kBlockNeurons, end - begin);
    std::vector<T> block(num_documents * static_cast<std::size_t>(most));
    Ranking<T> ranking(num_documents);
    for (std::int64_t first = begin; first < end; first += kBlockNeurons) {
      const std::int64_t count = std::min(kBlockNeurons, end - first);
      if (!together) gather(scores, first, count, block.data());
      for (std::int64_t i = 0; i < count; ++i) {
        ranking.rank(together ? scores.data + (first + i) * scores.neuron_stride
                              : block.data() + i * scores.num_documents,
                     first + i);
        double* const to = precision.data() + first + i;
        const auto keep = [&](const auto& values, std::size_t group) {
          for (std::size_t k = 0; k < values.size(); ++k) to[(group + k) * num_neurons] = values[k];
        };
        std::size_t group = 0;
        for (; group + 4 <= num_groupings; group += 4) {
          keep(precision_of<4>(ranking, groups, group, lowest_first, inverse_rank.data()), group);
        }
        for (; group + 2 <= num_groupings; group += 2) {
          keep(precision_of<2>(ranking, groups, group, lowest_first, inverse_rank.data()), group);
        }
        if (group < num_groupings) {
          keep(precision_of<1>(ranking, groups, group, lowest_first, inverse_rank.data()), group);
        }
      }
    }
  };
  in_pieces(scores.num_neurons, kLeastNeurons, num_threads, rank_neurons);
  return precision;
}

template std::vector<double> average_precision<float>(const Scores<float>&, const std::uint8_t*, std::size_t, bool, int);
template std::vector<double> average_precision<double>(const Scores<double>&, const std::uint8_t*, std::size_t, bool,
                                                       int);

}  // namespace xalign
