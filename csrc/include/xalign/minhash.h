// Texts as fixed-size keys: equal keys for equal texts, and sketches whose agreement estimates how much two texts share.
//
// What a text is made of is decided by a Folding. The keys are written to files, so they must never change without a new
// version of the file format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "xalign/folding.h"

namespace xalign {

// Code points of a gram: five in a row of a folded text, the spaces at both ends included; of a text of fewer, the whole.
constexpr std::size_t kGramLength = 5;
// Bins of a sketch, one byte each.
constexpr std::size_t kSketchBins = 128;

// Appends 64-bit hashes of a folded text's grams, one for each position, repeats included.
void add_gram_hashes(const Buffer<std::uint32_t>& folded, Buffer<std::uint64_t>& grams);

// A text's key, two 61-bit numbers spread over 64 bits each. Two code points of the folded text (of a text that folds to
// nothing, of the text itself) make one digit, (c_1 + 1) + (c_2 + 1) 2^21, the last maybe half of one; the n digits d make
// a number in two fixed bases b, modulo 2^61 - 1: b^n + d_1 b^(n-1) + ... + d_n (Carter and Wegman 1979). Two different
// texts of n digits agree in both for at most (n / 2^61)^2 of all pairs of bases. [num_texts, 2], row-major.
std::vector<std::uint64_t> text_keys(const Folding& folding, const TextView* texts, std::size_t num_texts);

// Keys of documents: of one text, or of two if `others` is not null, whichever of the two comes first.
// [num_documents, 2].
std::vector<std::uint64_t> document_keys(const Folding& folding, const TextView* texts, const TextView* others,
                                         std::size_t num_documents);

// Sketches of the sets of grams of documents, both sides in one set: [num_documents, kSketchBins]. Each bin of two
// sketches agrees with probability J + (1 - J) / 256, J being the Jaccard similarity of the two sets, and the bins are
// nearly independent, for sets of any size. A document without a word is a set of one gram, its key under `exact`.
//
// Fast similarity sketching: every gram is thrown into one bin at random with a random value; a bin keeps the smallest
// value. While a bin is empty, another round of throws fills the empty ones; a bin that is empty after kSketchBins rounds
// takes the smallest of another value of every gram. A byte of the value is kept. Source: Dahlgaard, Knudsen and Thorup 2017,
// arXiv:1704.04370. Time O(grams + kSketchBins log kSketchBins).
std::vector<std::uint8_t> document_sketches(const Folding& folding, const Folding& exact, const TextView* texts,
                                            const TextView* others, std::size_t num_documents);

// Which documents have an earlier one beside them in their group whose sketch agrees in at least min_agreeing bins.
// sketches is [num_documents, num_bins]; group g is documents group_starts[g] .. group_starts[g + 1], in order. Only
// documents with asked set are answered (others are 0), each compared with at most the first max_earlier of its group.
// Throws std::invalid_argument if the starts decrease, do not begin at 0 or do not end at num_documents.
std::vector<std::uint8_t> near_earlier(const std::uint8_t* sketches, std::size_t num_documents, std::size_t num_bins,
                                       const std::int64_t* group_starts, std::size_t num_groups,
                                       const std::uint8_t* asked, std::int64_t min_agreeing, std::int64_t max_earlier);

}  // namespace xalign
