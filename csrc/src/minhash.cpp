#include "xalign/minhash.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace xalign {

namespace {

__extension__ typedef unsigned __int128 uint128;

constexpr std::uint64_t kPrime = (std::uint64_t{1} << 61) - 1;
// Any numbers below the prime will do: the first 61 bits of the fractions of pi and of e.
constexpr std::uint64_t kBases[2] = {0x243F6A8885A308D3ULL >> 3, 0xB7E151628AED2A6AULL >> 3};
constexpr std::uint64_t kGramBase = 0x9E3779B97F4A7C15ULL;

// SplitMix64's output function (Steele, Lea and Flood 2014): a permutation of 64-bit numbers that mixes all bits.
std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

std::uint64_t multiply_add(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  const uint128 product = static_cast<uint128>(a) * b + c;
  std::uint64_t sum = (static_cast<std::uint64_t>(product) & kPrime) + static_cast<std::uint64_t>(product >> 61);
  if (sum >= kPrime) sum -= kPrime;
  return sum;
}

struct Key {
  std::uint64_t words[2];
};

template <typename Unit>
Key key_of_units(const Unit* units, std::size_t length) {
  static_assert(kCodePoints < std::uint32_t{1} << 21, "a code point and one fit 21 bits");
  std::uint64_t first = 1, second = 1;
  for (std::size_t i = 0; i < length; i += 2) {
    std::uint64_t digit = std::uint64_t{units[i]} + 1;
    if (i + 1 < length) digit |= (std::uint64_t{units[i + 1]} + 1) << 21;
    first = multiply_add(first, kBases[0], digit);
    second = multiply_add(second, kBases[1], digit);
  }
  return {{mix(first), mix(second)}};
}

Key key_of(const Folding& folding, const TextView& text, Buffer<std::uint32_t>& folded) {
  folding.fold(text, folded);
  if (!folded.empty()) return key_of_units(folded.data(), folded.size());
  const auto length = static_cast<std::size_t>(text.length);
  switch (text.bytes_per_character) {
    case 1:
      return key_of_units(static_cast<const std::uint8_t*>(text.data), length);
    case 2:
      return key_of_units(static_cast<const std::uint16_t*>(text.data), length);
    default:
      return key_of_units(static_cast<const std::uint32_t*>(text.data), length);
  }
}

// Adding is the same both ways round; a document of one text must not look like one of two.
Key key_of_document(const Folding& folding, const TextView& text, const TextView* other,
                    Buffer<std::uint32_t>& folded) {
  Key key = key_of(folding, text, folded);
  if (other != nullptr) {
    const Key second = key_of(folding, *other, folded);
    for (int word = 0; word < 2; ++word) key.words[word] = mix(key.words[word] + second.words[word]);
  }
  return key;
}

// The round in the upper byte makes every throw of a round larger than any of the rounds before it.
constexpr int kRoundShift = 56;
static_assert(kSketchBins < 256, "a round fits one byte");
constexpr int kBinBits = 7;
static_assert(std::size_t{1} << kBinBits == kSketchBins, "a bin is chosen by some bits of a hash");
// Which byte of a value is kept: not the lowest, which a multiplication mixes least.
constexpr int kByteShift = 8;
constexpr std::uint64_t kHalfMask = (std::uint64_t{1} << (32 - kBinBits)) - 1;

// Keeps the smaller value; written so that the compiler needs no branch, which would be hard to predict.
void keep_least(std::uint64_t& least, std::uint64_t value) { least = value < least ? value : least; }

void sketch(const Buffer<std::uint64_t>& grams, std::uint8_t* bytes) {
  constexpr std::uint64_t empty = std::numeric_limits<std::uint64_t>::max();
  constexpr std::uint64_t value_mask = (std::uint64_t{1} << kRoundShift) - 1;
  std::uint64_t least[kSketchBins];
  std::fill_n(least, kSketchBins, empty);
  for (const std::uint64_t gram : grams) keep_least(least[gram >> (64 - kBinBits)], gram & value_mask);
  const auto unfilled = [&] { return std::find(least, least + kSketchBins, empty) != least + kSketchBins; };
  // Gram hashes are mixed already, so a multiplication makes another hash of them. Two rounds share one: only small sets
  // come here, for which half the bits of a value are enough.
  for (std::uint64_t round = 1; round < kSketchBins && unfilled(); round += 2) {
    const std::uint64_t factor = mix(round) | 1, top = round << kRoundShift, next_top = (round + 1) << kRoundShift;
    for (const std::uint64_t gram : grams) {
      const std::uint64_t hash = gram * factor;
      keep_least(least[hash >> (64 - kBinBits)], (hash >> 32 & kHalfMask) | top);
      keep_least(least[hash >> (32 - kBinBits) & (kSketchBins - 1)], (hash & kHalfMask) | next_top);
    }
  }
  for (std::size_t bin = 0; bin < kSketchBins; ++bin) {
    if (least[bin] != empty) continue;
    const std::uint64_t salt = (bin + 1) * kGramBase;
    for (const std::uint64_t gram : grams) keep_least(least[bin], mix(gram + salt));
  }
  for (std::size_t bin = 0; bin < kSketchBins; ++bin) bytes[bin] = static_cast<std::uint8_t>(least[bin] >> kByteShift);
}

}  // namespace

void add_gram_hashes(const Buffer<std::uint32_t>& folded, Buffer<std::uint64_t>& grams) {
  const std::size_t length = folded.size();
  if (length == 0) return;
  const std::size_t first = std::min(length, kGramLength), count = length - first + 1;
  std::uint64_t* out = grams.reserve(grams.size() + count) + grams.size();
  grams.set_size(grams.size() + count);
  std::uint64_t hash = 0, leaving = 1;
  for (std::size_t i = 0; i < first; ++i) hash = hash * kGramBase + folded[i] + 1;
  for (std::size_t i = 0; i < kGramLength; ++i) leaving *= kGramBase;
  *out++ = mix(hash);
  for (std::size_t i = first; i < length; ++i) {
    hash = hash * kGramBase + folded[i] + 1 - leaving * (std::uint64_t{folded[i - kGramLength]} + 1);
    *out++ = mix(hash);
  }
}

std::vector<std::uint64_t> text_keys(const Folding& folding, const TextView* texts, std::size_t num_texts) {
  return document_keys(folding, texts, nullptr, num_texts);
}

std::vector<std::uint64_t> document_keys(const Folding& folding, const TextView* texts, const TextView* others,
                                         std::size_t num_documents) {
  std::vector<std::uint64_t> keys(2 * num_documents);
  Buffer<std::uint32_t> folded;
  for (std::size_t d = 0; d < num_documents; ++d) {
    const Key key = key_of_document(folding, texts[d], others == nullptr ? nullptr : others + d, folded);
    keys[2 * d] = key.words[0];
    keys[2 * d + 1] = key.words[1];
  }
  return keys;
}

std::vector<std::uint8_t> document_sketches(const Folding& folding, const Folding& exact, const TextView* texts,
                                            const TextView* others, std::size_t num_documents) {
  std::vector<std::uint8_t> sketches(num_documents * kSketchBins);
  Buffer<std::uint32_t> folded;
  Buffer<std::uint64_t> grams;
  for (std::size_t d = 0; d < num_documents; ++d) {
    grams.set_size(0);
    folding.fold(texts[d], folded);
    add_gram_hashes(folded, grams);
    if (others != nullptr) {
      folding.fold(others[d], folded);
      add_gram_hashes(folded, grams);
    }
    if (grams.empty()) {
      *grams.reserve(1) = key_of_document(exact, texts[d], others == nullptr ? nullptr : others + d, folded).words[0];
      grams.set_size(1);
    }
    sketch(grams, sketches.data() + d * kSketchBins);
  }
  return sketches;
}

std::vector<std::uint8_t> near_earlier(const std::uint8_t* sketches, std::size_t num_documents, std::size_t num_bins,
                                       const std::int64_t* group_starts, std::size_t num_groups,
                                       const std::uint8_t* asked, std::int64_t min_agreeing, std::int64_t max_earlier) {
  if (group_starts[0] != 0 || group_starts[num_groups] != static_cast<std::int64_t>(num_documents)) {
    throw std::invalid_argument("groups do not begin at 0 and end at " + std::to_string(num_documents) + ".");
  }
  for (std::size_t g = 0; g < num_groups; ++g) {
    if (group_starts[g] > group_starts[g + 1]) throw std::invalid_argument("group_starts decrease.");
  }
  std::vector<std::uint8_t> near(num_documents, 0);
  for (std::size_t g = 0; g < num_groups; ++g) {
    for (std::int64_t later = group_starts[g] + 1; later < group_starts[g + 1]; ++later) {
      if (asked[later] == 0) continue;
      const std::uint8_t* mine = sketches + static_cast<std::size_t>(later) * num_bins;
      const std::int64_t end = max_earlier < later - group_starts[g] ? group_starts[g] + max_earlier : later;
      for (std::int64_t earlier = group_starts[g]; earlier < end; ++earlier) {
        const std::uint8_t* its = sketches + static_cast<std::size_t>(earlier) * num_bins;
        std::int32_t agreeing = 0;
        for (std::size_t bin = 0; bin < num_bins; ++bin) agreeing += mine[bin] == its[bin];
        if (agreeing >= min_agreeing) {
          near[static_cast<std::size_t>(later)] = 1;
          break;
        }
      }
    }
  }
  return near;
}

}  // namespace xalign
