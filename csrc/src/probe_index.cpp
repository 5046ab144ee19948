#include "xalign/probe_index.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "xalign/minhash.h"

namespace xalign {

namespace {

constexpr std::uint64_t kBase = 0xD1342543DE82EF95ULL;
// Share of a sentence's grams that are looked up beyond those a near text may lack: the more, the fewer sentences are
// compared in full, and the more there is to look up.
constexpr double kMoreGrams = 0.2;

// A multiplication spreads a sum of powers over the upper bits, which HashIndex looks at.
std::uint64_t spread(std::uint64_t hash) { return (hash ^ (hash >> 32)) * 0x9E3779B97F4A7C15ULL; }

std::uint64_t hash_of(const std::uint32_t* begin, std::size_t length) {
  std::uint64_t hash = 0;
  for (std::size_t i = 0; i < length; ++i) hash = hash * kBase + begin[i] + 1;
  return spread(hash);
}

}  // namespace

void HashIndex::build(std::vector<Entry> entries) {
  std::sort(entries.begin(), entries.end());
  std::size_t different = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) different += i == 0 || entries[i].first != entries[i - 1].first;
  int slot_bits = 1;
  while ((std::size_t{1} << slot_bits) < different + different / 2) ++slot_bits;
  const int bits = std::max(slot_bits + 2, 6);
  shift_ = 64 - bits;
  slot_shift_ = 64 - slot_bits;
  bits_.assign(std::size_t{1} << (bits - 6), 0);
  slots_.assign(std::size_t{1} << slot_bits, {0, 0, 0});
  numbers_.clear();
  for (std::size_t i = 0; i < entries.size();) {
    const std::uint64_t hash = entries[i].first;
    std::size_t slot = hash >> slot_shift_;
    while (slots_[slot].begin != slots_[slot].end) slot = (slot + 1) & (slots_.size() - 1);
    const auto begin = static_cast<std::int32_t>(i);
    for (; i < entries.size() && entries[i].first == hash; ++i) numbers_.push_back(entries[i].second);
    slots_[slot] = {hash, begin, static_cast<std::int32_t>(i)};
    bits_[hash >> shift_ >> 6] |= std::uint64_t{1} << (hash >> shift_ & 63);
  }
}

HashIndex::Range HashIndex::look_up(std::uint64_t hash) const {
  for (std::size_t at = hash >> slot_shift_;; at = (at + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[at];
    if (slot.begin == slot.end) return {nullptr, nullptr};
    if (slot.hash == hash) return {numbers_.data() + slot.begin, numbers_.data() + slot.end};
  }
}

struct ProbeIndex::Scratch {
  Buffer<std::uint64_t> grams;
  std::vector<HashIndex::Range> found;
  std::vector<std::int32_t> hits;  // one for each sentence, zero between texts
  std::vector<std::int32_t> hit_sentences;
};

ProbeIndex::ProbeIndex(const Folding& folding, const TextView* sentences, std::size_t num_sentences, double near,
                       std::int64_t min_contained)
    : folding_(folding), near_(near), min_contained_(static_cast<std::size_t>(min_contained)) {
  if (!(near >= 0.5 && near <= 1.0)) throw std::invalid_argument("near is outside [0.5, 1].");
  if (min_contained < 1) throw std::invalid_argument("min_contained is below 1.");
  std::vector<HashIndex::Entry> whole, beginning, rare;
  std::unordered_map<std::uint64_t, std::int32_t> frequency;
  std::set<std::vector<std::uint32_t>> seen;
  Buffer<std::uint32_t> folded;
  Buffer<std::uint64_t> gram_buffer;
  for (std::size_t s = 0; s < num_sentences; ++s) {
    folding_.fold(sentences[s], folded);
    if (folded.empty()) throw std::invalid_argument("held-out sentence " + std::to_string(s) + " has no word.");
    std::vector<std::uint32_t> sentence(folded.begin(), folded.end());
    // One of several equal sentences answers for all; the others would only lengthen the lists.
    if (!seen.insert(sentence).second) continue;
    const auto id = static_cast<std::int32_t>(sentences_.size());
    whole.emplace_back(hash_of(folded.data(), folded.size()), id);
    if (folded.size() - 2 >= min_contained_) beginning.emplace_back(hash_of(folded.data() + 1, min_contained_), id);
    gram_buffer.set_size(0);
    add_gram_hashes(folded, gram_buffer);
    std::vector<std::uint64_t> grams(gram_buffer.begin(), gram_buffer.end());
    std::sort(grams.begin(), grams.end());
    grams.erase(std::unique(grams.begin(), grams.end()), grams.end());
    grams.shrink_to_fit();
    for (const std::uint64_t gram : grams) ++frequency[gram];
    longest_ = std::max(longest_, folded.size());
    sentences_.push_back(std::move(sentence));
    grams_.push_back(std::move(grams));
  }
  for (std::size_t s = 0; s < sentences_.size(); ++s) {
    std::vector<std::pair<std::int32_t, std::uint64_t>> rarest;
    for (const std::uint64_t gram : grams_[s]) rarest.emplace_back(frequency[gram], gram);
    std::sort(rarest.begin(), rarest.end());
    const auto count = static_cast<double>(rarest.size());
    const auto may_lack = static_cast<std::size_t>(std::floor((1.0 - near_) * count + 1e-9));
    const auto more = std::max<std::size_t>(1, static_cast<std::size_t>(kMoreGrams * count));
    const std::size_t indexed = std::min(rarest.size(), may_lack + more);
    needed_.push_back(static_cast<std::int32_t>(indexed - may_lack));
    for (std::size_t i = 0; i < indexed; ++i) rare.emplace_back(rarest[i].second, static_cast<std::int32_t>(s));
  }
  whole_.build(std::move(whole));
  beginning_.build(std::move(beginning));
  rare_.build(std::move(rare));
}

bool ProbeIndex::matches_at(const Buffer<std::uint32_t>& text, std::size_t at, std::size_t sentence) const {
  const auto& held = sentences_[sentence];
  const std::size_t length = held.size() - 2;
  if (at + length >= text.size()) return false;
  if (!std::equal(held.begin() + 1, held.end() - 1, text.begin() + at)) return false;
  const auto unspaced = [&](std::size_t i) {
    while (folding_.kind(text[i]) == Kind::kMark && i > 0) --i;
    return folding_.kind(text[i]) == Kind::kUnspaced;
  };
  // The text has a space before its first word and behind its last, so both neighbours exist.
  if (text[at - 1] != ' ' && !unspaced(at - 1) && !unspaced(at)) return false;
  const std::uint32_t next = text[at + length];
  if (next == ' ') return true;
  return folding_.kind(next) != Kind::kMark && (unspaced(at + length) || unspaced(at + length - 1));
}

bool ProbeIndex::contains(const Buffer<std::uint32_t>& text) const {
  for (const std::int32_t id : whole_.find(hash_of(text.data(), text.size()))) {
    const auto& held = sentences_[static_cast<std::size_t>(id)];
    if (std::equal(held.begin(), held.end(), text.begin(), text.end())) return true;
  }
  if (text.size() < min_contained_ + 2) return false;
  std::uint64_t hash = 0, leaving = 1;
  for (std::size_t i = 0; i < min_contained_; ++i) {
    hash = hash * kBase + text[1 + i] + 1;
    leaving *= kBase;
  }
  for (std::size_t at = 1;; ++at) {
    for (const std::int32_t id : beginning_.find(spread(hash))) {
      if (matches_at(text, at, static_cast<std::size_t>(id))) return true;
    }
    if (at + min_contained_ + 1 >= text.size()) return false;
    hash = hash * kBase + text[at + min_contained_] + 1 - leaving * (std::uint64_t{text[at]} + 1);
  }
}

bool ProbeIndex::resembles(const Buffer<std::uint32_t>& text, Scratch& scratch) const {
  if (text.size() > 2 * longest_) return false;
  auto& grams = scratch.grams;
  grams.set_size(0);
  add_gram_hashes(text, grams);
  // The table is larger than the nearest cache: memory is asked for some grams ahead.
  constexpr std::size_t ahead = 12;
  for (std::size_t i = 0; i < std::min(ahead, grams.size()); ++i) rare_.prefetch(grams[i]);
  scratch.found.clear();
  for (std::size_t i = 0; i < grams.size(); ++i) {
    if (i + ahead < grams.size()) rare_.prefetch(grams[i + ahead]);
    const auto range = rare_.find(grams[i]);
    if (range.first == range.last) continue;
    __builtin_prefetch(range.first);
    scratch.found.push_back(range);
  }
  for (const auto& range : scratch.found) {
    for (const std::int32_t id : range) {
      if (scratch.hits[static_cast<std::size_t>(id)]++ == 0) scratch.hit_sentences.push_back(id);
    }
  }
  bool near = false, sorted = false;
  for (const std::int32_t id : scratch.hit_sentences) {
    const auto s = static_cast<std::size_t>(id);
    const bool compare = !near && scratch.hits[s] >= needed_[s] && text.size() <= 2 * sentences_[s].size();
    scratch.hits[s] = 0;
    if (!compare) continue;
    if (!sorted) {
      std::uint64_t* first = grams.reserve(grams.size());
      std::sort(first, first + grams.size());
      grams.set_size(static_cast<std::size_t>(std::unique(first, first + grams.size()) - first));
      sorted = true;
    }
    const auto& held = grams_[s];
    std::size_t shared = 0;
    for (std::size_t i = 0, j = 0; i < grams.size() && j < held.size();) {
      if (grams[i] == held[j]) ++shared;
      const bool step_i = grams[i] <= held[j], step_j = held[j] <= grams[i];
      i += step_i;
      j += step_j;
    }
    near = static_cast<double>(shared) >= near_ * static_cast<double>(grams.size() + held.size() - shared);
  }
  scratch.hit_sentences.clear();
  return near;
}

std::vector<std::uint8_t> ProbeIndex::touch(const TextView* texts, std::size_t num_texts) const {
  std::vector<std::uint8_t> touches(num_texts, static_cast<std::uint8_t>(Touch::kNone));
  Buffer<std::uint32_t> folded;
  Scratch scratch;
  scratch.hits.assign(sentences_.size(), 0);
  for (std::size_t i = 0; i < num_texts; ++i) {
    folding_.fold(texts[i], folded);
    if (folded.empty()) continue;
    if (contains(folded)) {
      touches[i] = static_cast<std::uint8_t>(Touch::kContained);
    } else if (resembles(folded, scratch)) {
      touches[i] = static_cast<std::uint8_t>(Touch::kNear);
    }
  }
  return touches;
}

}  // namespace xalign
