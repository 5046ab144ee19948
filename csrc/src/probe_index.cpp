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
  entries_ = std::move(entries);
  std::sort(entries_.begin(), entries_.end());
  int slot_bits = 1;
  while ((std::size_t{1} << slot_bits) < 2 * entries_.size()) ++slot_bits;
  const int bits = std::max(slot_bits + 3, 6);
  shift_ = 64 - bits;
  slot_shift_ = 64 - slot_bits;
  bits_.assign(std::size_t{1} << (bits - 6), 0);
  first_.assign(std::size_t{1} << slot_bits, -1);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const std::uint64_t hash = entries_[i].first;
    if (i > 0 && hash == entries_[i - 1].first) continue;
    bits_[hash >> shift_ >> 6] |= std::uint64_t{1} << (hash >> shift_ & 63);
    std::size_t slot = hash >> slot_shift_;
    while (first_[slot] >= 0) slot = (slot + 1) & (first_.size() - 1);
    first_[slot] = static_cast<std::int32_t>(i);
  }
}

std::pair<const HashIndex::Entry*, const HashIndex::Entry*> HashIndex::find(std::uint64_t hash) const {
  if ((bits_[hash >> shift_ >> 6] >> (hash >> shift_ & 63) & 1) == 0) return {nullptr, nullptr};
  for (std::size_t slot = hash >> slot_shift_; first_[slot] >= 0; slot = (slot + 1) & (first_.size() - 1)) {
    const auto begin = static_cast<std::size_t>(first_[slot]);
    if (entries_[begin].first != hash) continue;
    std::size_t end = begin + 1;
    while (end < entries_.size() && entries_[end].first == hash) ++end;
    return {entries_.data() + begin, entries_.data() + end};
  }
  return {nullptr, nullptr};
}

struct ProbeIndex::Scratch {
  Buffer<std::uint64_t> grams;
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
  const auto same = whole_.find(hash_of(text.data(), text.size()));
  for (const auto* entry = same.first; entry != same.second; ++entry) {
    const auto& held = sentences_[static_cast<std::size_t>(entry->second)];
    if (std::equal(held.begin(), held.end(), text.begin(), text.end())) return true;
  }
  if (text.size() < min_contained_ + 2) return false;
  std::uint64_t hash = 0, leaving = 1;
  for (std::size_t i = 0; i < min_contained_; ++i) {
    hash = hash * kBase + text[1 + i] + 1;
    leaving *= kBase;
  }
  for (std::size_t at = 1;; ++at) {
    const auto found = beginning_.find(spread(hash));
    for (const auto* entry = found.first; entry != found.second; ++entry) {
      if (matches_at(text, at, static_cast<std::size_t>(entry->second))) return true;
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
  for (const std::uint64_t gram : grams) {
    const auto found = rare_.find(gram);
    for (const auto* entry = found.first; entry != found.second; ++entry) {
      if (scratch.hits[static_cast<std::size_t>(entry->second)]++ == 0) scratch.hit_sentences.push_back(entry->second);
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
