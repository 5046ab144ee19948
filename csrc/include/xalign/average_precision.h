// Average precision of many scores for many groupings, from one sort of each score.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Scores of N neurons on D documents, anywhere in memory: score (d, n) lies at data[d * document_stride +
// n * neuron_stride]. Strides count items and may be negative.
template <typename T>
struct Scores {
  const T* data;
  std::int64_t num_documents;
  std::int64_t num_neurons;
  std::int64_t document_stride;
  std::int64_t neuron_stride;
};

// How well each neuron ranks the documents of a group above all others: sum over distinct scores, from the highest
// down, of (recall gained) x (precision so far). Equal scores enter together; 0.0 and -0.0 are equal.
//
// `labels` is [num_groupings, D], 1 for a document in the group and 0 for one outside. Returns [num_groupings, N]. With
// `lowest_first` the documents are ranked from the lowest score up, as if all scores were negated.
//
// Each neuron is sorted once, whatever the number of groupings: two radix passes over where its scores lie between its
// highest and its lowest, then insertion of what shares a place; a neuron whose scores are too uneven for that is sorted
// by comparison. Memory beyond the result: under a kilobyte (float) a document for each thread, less where the scores of
// a neuron lie together. The result does not depend on the number of threads. Throws std::invalid_argument if a group is empty or holds every document, a label is
// neither 0 nor 1, there are no or more than 2^31 - 1 documents, or a score is not finite (it names the first neuron
// with one, and in it the first document).
template <typename T>
std::vector<double> average_precision(const Scores<T>& scores, const std::uint8_t* labels, std::size_t num_groupings,
                                      bool lowest_first, int num_threads);

extern template std::vector<double> average_precision<float>(const Scores<float>&, const std::uint8_t*, std::size_t,
                                                             bool, int);
extern template std::vector<double> average_precision<double>(const Scores<double>&, const std::uint8_t*, std::size_t,
                                                              bool, int);

}  // namespace xalign
