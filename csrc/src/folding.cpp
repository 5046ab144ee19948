#include "xalign/folding.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace xalign {

namespace {

constexpr std::uint32_t kCodePointMask = (1U << 21) - 1;

Kind kind_of(std::uint32_t entry) { return static_cast<Kind>((entry >> 21) & 7U); }

std::uint32_t combining_class(std::uint32_t entry) { return entry >> 24; }

// Calls with the text's code points in the width they are held in, and how many there are.
template <typename Call>
void with_units(const TextView& text, const Call& call) {
  const auto length = static_cast<std::size_t>(text.length);
  switch (text.bytes_per_character) {
    case 1:
      return call(static_cast<const std::uint8_t*>(text.data), length);
    case 2:
      return call(static_cast<const std::uint16_t*>(text.data), length);
    case 4:
      return call(static_cast<const std::uint32_t*>(text.data), length);
    default:
      throw std::invalid_argument("a text has " + std::to_string(text.bytes_per_character) +
                                  " bytes per character; 1, 2 or 4 expected.");
  }
}

template <typename Unit>
void check_units(const Unit* text, std::size_t length) {
  if constexpr (sizeof(Unit) > 2) {
    std::uint32_t largest = 0;
    for (std::size_t i = 0; i < length; ++i) largest = std::max(largest, text[i]);
    if (largest >= kCodePoints) throw std::invalid_argument("a text holds a number that is no code point.");
  }
}

void check_entry(std::uint32_t entry) {
  if ((entry & kCodePointMask) >= kCodePoints) {
    throw std::invalid_argument("a folding entry points at no code point.");
  }
  if (combining_class(entry) != 0 && kind_of(entry) != Kind::kMark) {
    throw std::invalid_argument("a code point with a combining class is not a mark.");
  }
}

}  // namespace

Folding::Folding(const std::uint32_t* table, std::size_t table_size, const std::uint32_t* expansions,
                 std::size_t num_expansions)
    : table_(table, table + table_size), expansions_(expansions, expansions + num_expansions) {
  if (table_size != kCodePoints) {
    throw std::invalid_argument("a folding table has " + std::to_string(table_size) + " entries; " +
                                std::to_string(kCodePoints) + " expected.");
  }
  for (const std::uint32_t entry : table_) {
    if (kind_of(entry) != Kind::kExpansion) {
      check_entry(entry);
      continue;
    }
    const std::size_t at = entry & kCodePointMask;
    if (at >= num_expansions || expansions_[at] >= num_expansions - at) {
      throw std::invalid_argument("a folding entry points outside the expansions.");
    }
    for (std::size_t i = 1; i <= expansions_[at]; ++i) {
      if (kind_of(expansions_[at + i]) == Kind::kExpansion) throw std::invalid_argument("an expansion is expanded.");
      check_entry(expansions_[at + i]);
    }
  }
}

template <typename Unit>
void Folding::fold_units(const Unit* text, std::size_t length, Buffer<std::uint32_t>& folded) const {
  check_units(text, length);
  // Each code point gives at most itself and a space, and one more place is written to and not kept; expansions make
  // room for themselves.
  folded.set_size(0);
  std::uint32_t* out = folded.reserve(2 * length + 3);
  std::size_t size = 0;
  out[size++] = ' ';
  Kind word = Kind::kSpace;  // Of the letter last written; kSpace before the first.
  bool parted = false;
  std::size_t run_begin = 0, run_length = 0;  // Combining marks at the end of what is written.
  bool run_in_order = true;

  const auto end_run = [&] {
    if (run_length > 1 && !run_in_order) {
      std::stable_sort(out + run_begin, out + run_begin + run_length, [&](std::uint32_t a, std::uint32_t b) {
        return combining_class(table_[a]) < combining_class(table_[b]);
      });
    }
    run_length = 0;
    run_in_order = true;
  };
  const auto add = [&](std::uint32_t entry) {
    Kind kind = kind_of(entry);
    const std::uint32_t combining = combining_class(entry);
    if (combining == 0 && run_length != 0) end_run();
    if (kind == Kind::kIgnored) return;
    if (kind == Kind::kSpace || kind == Kind::kSign) {
      parted = true;
      return;
    }
    if (kind == Kind::kMark) {
      if (parted || word == Kind::kSpace) kind = Kind::kLetter;  // A mark on nothing is a letter.
    }
    if (kind != Kind::kMark) {
      if (word != Kind::kSpace && (kind == Kind::kIdeograph || word == Kind::kIdeograph ||
                                   (parted && kind == Kind::kLetter && word == Kind::kLetter))) {
        out[size++] = ' ';
      }
      word = kind;
      parted = false;
    }
    if (combining != 0) {
      if (run_length == 0) {
        run_begin = size;
      } else if (combining < combining_class(table_[out[size - 1]])) {
        run_in_order = false;
      }
      ++run_length;
    }
    out[size++] = entry & kCodePointMask;
  };

  const std::uint32_t* table = table_.data();
  for (std::size_t i = 0; i < length; ++i) {
    const std::uint32_t entry = table[text[i]];
    // Nearly all text is this: letters, and what parts words. Without branches, for where a word ends is hard to predict.
    if (entry >> 21 <= static_cast<std::uint32_t>(Kind::kLetter) && word == Kind::kLetter && run_length == 0) {
      const bool letter = entry >> 21 == static_cast<std::uint32_t>(Kind::kLetter);
      out[size] = ' ';
      size += parted && letter;
      out[size] = entry & kCodePointMask;
      size += letter;
      parted = !letter;
      continue;
    }
    if (kind_of(entry) != Kind::kExpansion) {
      add(entry);
      continue;
    }
    const std::uint32_t* expansion = expansions_.data() + (entry & kCodePointMask);
    const std::uint32_t count = expansion[0];
    folded.set_size(size);
    out = folded.reserve(size + 2 * (count + (length - i)) + 3);
    for (std::uint32_t j = 1; j <= count; ++j) add(expansion[j]);
  }
  end_run();
  out[size++] = ' ';
  folded.set_size(word == Kind::kSpace ? 0 : size);
}

void Folding::fold(const TextView& text, Buffer<std::uint32_t>& folded) const {
  with_units(text, [&](const auto* units, std::size_t length) { fold_units(units, length, folded); });
}

namespace {

template <typename Unit>
void count_units(const Unit* text, std::size_t length, const std::uint8_t* kinds,
                 std::array<std::array<std::int64_t, 256>, 2>& counts) {
  check_units(text, length);
  // Two histograms, so that a run of one kind does not wait for its own counter.
  std::size_t i = 0;
  for (; i + 1 < length; i += 2) {
    ++counts[0][kinds[text[i]]];
    ++counts[1][kinds[text[i + 1]]];
  }
  if (i < length) ++counts[0][kinds[text[i]]];
}

}  // namespace

std::vector<std::int64_t> count_characters(const TextView* texts, std::size_t num_texts, const std::uint8_t* kinds,
                                           std::size_t num_kinds) {
  if (num_kinds < 1 || num_kinds > 256) throw std::invalid_argument("num_kinds is outside 1..256.");
  std::uint8_t largest = 0;
  for (std::size_t c = 0; c < kCodePoints; ++c) largest = std::max(largest, kinds[c]);
  if (largest >= num_kinds) throw std::invalid_argument("a character's kind is not below num_kinds.");
  std::vector<std::int64_t> result(num_texts * num_kinds);
  std::array<std::array<std::int64_t, 256>, 2> counts;
  for (std::size_t i = 0; i < num_texts; ++i) {
    for (auto& half : counts) std::fill_n(half.begin(), num_kinds, 0);
    with_units(texts[i], [&](const auto* text, std::size_t length) { count_units(text, length, kinds, counts); });
    for (std::size_t kind = 0; kind < num_kinds; ++kind) {
      result[i * num_kinds + kind] = counts[0][kind] + counts[1][kind];
    }
  }
  return result;
}

namespace {

template <typename Unit>
std::int64_t utf8_length(const Unit* text, std::size_t length) {
  // Sums of bytes in stretches that cannot overflow 32 bits, so that the compiler can work on many code points at once.
  constexpr std::size_t stretch = std::size_t{1} << 24;
  std::int64_t total = 0;
  for (std::size_t begin = 0; begin < length; begin += stretch) {
    const std::size_t end = std::min(length, begin + stretch);
    std::uint32_t more = 0;
    for (std::size_t i = begin; i < end; ++i) {
      more += text[i] >= 0x80U;
      if constexpr (sizeof(Unit) > 1) more += text[i] >= 0x800U;
      if constexpr (sizeof(Unit) > 2) more += text[i] >= 0x10000U;
    }
    total += static_cast<std::int64_t>(end - begin) + more;
  }
  return total;
}

}  // namespace

std::vector<std::uint8_t> kinds_in_texts(const TextView* texts, std::size_t num_texts, const std::uint8_t* kinds) {
  std::vector<std::uint8_t> result(num_texts);
  const bool looks_at_bytes = std::any_of(kinds, kinds + 256, [](std::uint8_t kind) { return kind != 0; });
  for (std::size_t i = 0; i < num_texts; ++i) {
    if (texts[i].bytes_per_character == 1 && !looks_at_bytes) continue;
    with_units(texts[i], [&](const auto* text, std::size_t length) {
      check_units(text, length);
      std::uint8_t found = 0;
      for (std::size_t j = 0; j < length; ++j) found |= kinds[text[j]];
      result[i] = found;
    });
  }
  return result;
}

std::vector<std::int64_t> utf8_lengths(const TextView* texts, std::size_t num_texts) {
  std::vector<std::int64_t> result(num_texts);
  for (std::size_t i = 0; i < num_texts; ++i) {
    with_units(texts[i], [&](const auto* text, std::size_t length) { result[i] = utf8_length(text, length); });
  }
  return result;
}

}  // namespace xalign
