// Text without what makes no difference: a table says what becomes of each code point, this says how words are joined.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace xalign {

// A text as CPython holds it: 1, 2 or 4 bytes for each code point. The memory belongs to somebody else.
struct TextView {
  const void* data;
  std::int64_t length;  // in code points
  std::int32_t bytes_per_character;
};

// Working memory used again and again. Unlike a vector's, its new room is not cleared: whoever asks for it writes it.
template <typename Item>
class Buffer {
 public:
  // Room for at least so many items; the first size() stay what they are.
  Item* reserve(std::size_t items) {
    if (items > capacity_) {
      capacity_ = std::max(items, capacity_ + capacity_ / 2);
      std::unique_ptr<Item[]> larger(new Item[capacity_]);
      std::copy_n(items_.get(), size_, larger.get());
      items_ = std::move(larger);
    }
    return items_.get();
  }
  void set_size(std::size_t size) { size_ = size; }  // at most what was reserved
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const Item* data() const { return items_.get(); }
  const Item* begin() const { return items_.get(); }
  const Item* end() const { return items_.get() + size_; }
  Item operator[](std::size_t i) const { return items_[i]; }

 private:
  std::unique_ptr<Item[]> items_;
  std::size_t capacity_ = 0, size_ = 0;
};

constexpr std::uint32_t kCodePoints = 0x110000;

// What a code point does to a folded text.
enum class Kind : std::uint32_t {
  kSpace = 0,      // shows nothing and parts words
  kSign = 1,       // shows, is no part of a word, parts words
  kLetter = 2,     // part of a word; words are parted by one space
  kIgnored = 3,    // shows nothing and parts nothing
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
  void fold(const TextView& text, Buffer<std::uint32_t>& folded) const;

  Kind kind(std::uint32_t code_point) const { return static_cast<Kind>((table_[code_point] >> 21) & 7U); }

 private:
  template <typename Unit>
  void fold_units(const Unit* text, std::size_t length, Buffer<std::uint32_t>& folded) const;

  std::vector<std::uint32_t> table_;
  std::vector<std::uint32_t> expansions_;
};

// How many code points of each kind a text has: [num_texts, num_kinds], row-major. kinds holds one byte for each of
// kCodePoints. Throws std::invalid_argument if a kind is num_kinds or more, or num_kinds is outside 1..256.
std::vector<std::int64_t> count_characters(const TextView* texts, std::size_t num_texts, const std::uint8_t* kinds,
                                           std::size_t num_kinds);

// What kinds of code points each text has: kinds[c] of all its code points c, or-ed together. kinds holds one byte for
// each of kCodePoints; a text of few kinds is told from others at a fraction of what counting takes.
std::vector<std::uint8_t> kinds_in_texts(const TextView* texts, std::size_t num_texts, const std::uint8_t* kinds);

// Bytes of each text in UTF-8; half of a UTF-16 pair counts as three.
std::vector<std::int64_t> utf8_lengths(const TextView* texts, std::size_t num_texts);

}  // namespace xalign
