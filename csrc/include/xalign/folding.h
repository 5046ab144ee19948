// Text without what makes no difference: a table says what becomes of each code point, this says how words are joined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// A text as CPython holds it: 1, 2 or 4 bytes for each code point. The memory belongs to somebody else.
struct TextView {
  const void* data;
  std::int64_t length;  // in code points
  std::int32_t bytes_per_character;
};

constexpr std::uint32_t kCodePoints = 0x110000;

// What a code point does to a folded text.
enum class Kind : std::uint32_t {
  kSpace = 0,      // shows nothing and parts words
  kIgnored = 1,    // shows nothing and parts nothing
  kSign = 2,       // shows, is no part of a word, parts words
  kLetter = 3,     // part of a word; words are parted by one space
  kIdeograph = 4,  // a word by itself
  kUnspaced = 5,   // a letter of a script written without spaces: spaces and signs beside it are dropped
  kMark = 6,       // belongs to the letter before it
  kExpansion = 7   // stands for several code points
};

// Folds texts by a table of one entry per code point. An entry holds what the code point becomes (bits 0 to 20), its
// kind (21 to 23) and, of what it becomes, the canonical combining class (24 to 31). Of an expansion, bits 0 to 20 are a
// position in a second table: a count, then as many entries.
class Folding {
 public:
  // Throws std::invalid_argument if the table has not kCodePoints entries, or an entry points outside the tables, or a
  // combining code point is not a mark.
  Folding(const std::uint32_t* table, std::size_t table_size, const std::uint32_t* expansions,
          std::size_t num_expansions);

  // Replaces `folded` by a space, the words of the text joined by single spaces, and a space; empty if there is no word.
  // Runs of combining marks are put in canonical order (Unicode Standard Annex 15), so that a table of full
  // decompositions makes canonically equivalent texts equal. Time O(length), O(n log n) for a run of n marks.
  void fold(const TextView& text, std::vector<std::uint32_t>& folded) const;

  Kind kind(std::uint32_t code_point) const { return static_cast<Kind>((table_[code_point] >> 21) & 7U); }

 private:
  template <typename Unit>
  void fold_units(const Unit* text, std::size_t length, std::vector<std::uint32_t>& folded) const;

  std::vector<std::uint32_t> table_;
  std::vector<std::uint32_t> expansions_;
};

// How many code points of each kind a text has: [num_texts, num_kinds], row-major. kinds holds one byte for each of
// kCodePoints. Throws std::invalid_argument if a kind is num_kinds or more, or num_kinds is outside 1..256.
std::vector<std::int64_t> count_characters(const TextView* texts, std::size_t num_texts, const std::uint8_t* kinds,
                                           std::size_t num_kinds);

}  // namespace xalign
