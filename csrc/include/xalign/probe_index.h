// Which texts are, contain or resemble one of a set of held-out sentences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "xalign/folding.h"

namespace xalign {

enum class Touch : std::uint8_t {
  kNone = 0,
  kNear = 1,      // resembles a sentence
  kContained = 2  // is or contains a sentence
};

// Numbers by 64-bit hash. Most hashes that are not there are told by one bit, the others by one look at the table.
class HashIndex {
 public:
  using Entry = std::pair<std::uint64_t, std::int32_t>;
  struct Range {
    const std::int32_t* first;
    const std::int32_t* last;
    const std::int32_t* begin() const { return first; }
    const std::int32_t* end() const { return last; }
  };
  void build(std::vector<Entry> entries);
  // The numbers of a hash, ascending.
  Range find(std::uint64_t hash) const {
    if ((bits_[hash >> shift_ >> 6] >> (hash >> shift_ & 63) & 1) == 0) return {nullptr, nullptr};
    return look_up(hash);
  }
  // Asks for the memory that find() will look at.
  void prefetch(std::uint64_t hash) const { __builtin_prefetch(&slots_[hash >> slot_shift_]); }

 private:
  struct Slot {
    std::uint64_t hash;
    std::int32_t begin, end;  // in numbers_; equal where the slot is free
  };
  Range look_up(std::uint64_t hash) const;

  std::vector<std::uint64_t> bits_;  // one for each value of a hash's upper bits
  std::vector<Slot> slots_;          // open addressing
  std::vector<std::int32_t> numbers_;
  int shift_ = 63, slot_shift_ = 63;
};

// Sentences and texts are folded. A text is compared with a sentence in three ways:
// - equal;
// - contains it whole, at word boundaries (anywhere in scripts without spaces), if the sentence has at least
//   min_contained code points;
// - near: the Jaccard similarity of their sets of grams (minhash.h) is at least `near`, and the text is at most twice as
//   long as the sentence, spaces at both ends included. Computed exactly, but for equal 64-bit hashes of unequal grams.
//   Only sentences that share many of their rarest grams with the text are compared in full: at most (1 - near) of a
//   sentence's grams may be missing from a near text.
class ProbeIndex {
 public:
  // Throws std::invalid_argument if a sentence has no word (its number is named), near is outside [0.5, 1] or
  // min_contained is below 1.
  ProbeIndex(const Folding& folding, const TextView* sentences, std::size_t num_sentences, double near,
             std::int64_t min_contained);

  // The strongest touch of each text: [num_texts].
  std::vector<std::uint8_t> touch(const TextView* texts, std::size_t num_texts) const;

 private:
  struct Scratch;
  bool contains(const Buffer<std::uint32_t>& text) const;
  bool resembles(const Buffer<std::uint32_t>& text, Scratch& scratch) const;
  bool matches_at(const Buffer<std::uint32_t>& text, std::size_t at, std::size_t sentence) const;

  Folding folding_;
  double near_;
  std::size_t min_contained_;
  std::vector<std::vector<std::uint32_t>> sentences_;     // folded
  std::vector<std::vector<std::uint64_t>> grams_;         // sorted, each once
  std::vector<std::int32_t> needed_;                      // of a sentence's rarest grams, so many are in any near text
  HashIndex whole_, beginning_, rare_;
  std::size_t longest_ = 0;
};

}  // namespace xalign
