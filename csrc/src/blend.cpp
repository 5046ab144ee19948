#include "xalign/blend.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

// A slot no run reaches, far below what adding to it could overflow.
constexpr std::int64_t kNever = std::int64_t{1} << 61;
constexpr std::uint32_t kSmallestStretch = 1 << 11;
// A job is one word: deadline (21 bits), release (20) and source (16), of which the deadline and the release count from
// the first slot of the stretch. The longest stretch is 2^19 slots.
constexpr int kReleaseBit = 16, kDeadlineBit = 36;
constexpr std::uint64_t kSource = (1 << 16) - 1, kSlot = (1 << 20) - 1;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

BlendOrder::BlendOrder(const std::int64_t* weights, std::size_t num_sources) : num_sources_(num_sources) {
  require(num_sources > 0, "weights is empty.");
  require(num_sources <= 65536, std::to_string(num_sources) + " sources are more than 65536.");
  std::int64_t total = 0;
  for (std::size_t j = 0; j < num_sources; ++j) {
    require(weights[j] >= 0, "weights[" + std::to_string(j) + "]=" + std::to_string(weights[j]) + " is negative.");
    require(weights[j] <= std::numeric_limits<std::int64_t>::max() - total, "weights add up to more than int64 holds.");
    total += weights[j];
  }
  require(total > 0, "all weights are zero.");
  for (std::size_t j = 0; j < num_sources; ++j) {
    if (weights[j] == 0) continue;
    Source source{};
    source.release = 1;
    source.weight = static_cast<std::uint64_t>(weights[j]);
    source.step = std::min(total / weights[j], kNever);
    source.step_rest = static_cast<std::uint64_t>(total % weights[j]);
    source.floor = source.step;
    source.rest = source.step_rest;
    source.index = static_cast<std::int32_t>(j);
    sources_.push_back(source);
  }
  // Long enough that the sources, gone through once for each, do not weigh.
  stretch_ = kSmallestStretch;
  while (stretch_ < 8 * sources_.size()) stretch_ *= 2;
  last_.resize(sources_.size());
  for (const Source& source : sources_) indices_.push_back(source.index);
}

void BlendOrder::list_jobs(std::uint32_t num_slots) {
  late_.clear();
  // No more are listed than there are slots and, of each source, one that comes later.
  if (jobs_.size() < num_slots + sources_.size()) jobs_.resize(num_slots + sources_.size());
  starts_.assign(2 * static_cast<std::size_t>(num_slots) + 1, 0);
  const std::int64_t first = slots_ + 1, end = first + num_slots, late = first + 2 * static_cast<std::int64_t>(num_slots);
  std::uint32_t* const starts = starts_.data();
  Job* const jobs = jobs_.data();
  std::size_t count = 0;
  for (std::size_t j = 0; j < sources_.size(); ++j) {
    Source source = sources_[j];
    Source before = source;
    while (source.release < end) {
      before = source;
      const std::int64_t deadline = source.floor + (source.rest > 0);
      const Job job = static_cast<Job>(std::max<std::int64_t>(source.release - first, 0)) << kReleaseBit | j;
      if (deadline < late) {
        const auto relative = static_cast<Job>(deadline - first);
        ++starts[relative + 1];
        jobs[count++] = job | relative << kDeadlineBit;
      } else {
        late_.emplace_back(deadline, job);
      }
      source.release = source.floor + 1;
      source.rest += source.step_rest;
      const bool carry = source.rest >= source.weight;
      source.rest -= carry ? source.weight : 0;
      source.floor = std::min(source.floor + source.step + carry, kNever);
    }
    last_[j] = before;
    sources_[j] = source;
  }
  num_jobs_ = count;
}

void BlendOrder::sort_jobs() {
  for (std::size_t d = 1; d < starts_.size(); ++d) starts_[d] += starts_[d - 1];
  sorted_.resize(num_jobs_ + late_.size());
  for (std::size_t i = 0; i < num_jobs_; ++i) sorted_[starts_[jobs_[i] >> kDeadlineBit]++] = jobs_[i];
  std::sort(late_.begin(), late_.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first < b.first : (a.second & kSource) < (b.second & kSource);
  });
  std::size_t at = num_jobs_;
  for (const auto& job : late_) sorted_[at++] = job.second;
}

template <typename Id>
void BlendOrder::fill_stretch(Id* order, std::uint32_t num_slots) {
  list_jobs(num_slots);
  sort_jobs();
  const std::size_t num_words = (static_cast<std::size_t>(num_slots) + 63) / 64;
  free_.assign(num_words + 1, ~std::uint64_t{0});
  if (num_slots % 64) free_[num_words - 1] = (std::uint64_t{1} << (num_slots % 64)) - 1;
  free_[num_words] = 1;  // ends every search: the slot after the last
  std::size_t first_free = 0;
  for (const Job job : sorted_) {
    const std::size_t release = job >> kReleaseBit & kSlot, source = job & kSource;
    std::size_t word = release / 64;
    std::uint64_t bits = free_[word] & (~std::uint64_t{0} << (release % 64));
    if (bits == 0) {
      while (free_[first_free] == 0) ++first_free;
      word = std::max(word + 1, first_free);
      while ((bits = free_[word]) == 0) ++word;
    }
    if (word == num_words) {
      sources_[source] = last_[source];  // comes later
      continue;
    }
    free_[word] ^= bits & (0 - bits);
    order[word * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))] = static_cast<Id>(indices_[source]);
  }
  slots_ += num_slots;
}

template <typename Id>
void BlendOrder::fill(Id* order, std::int64_t num_samples) {
  require(num_samples >= 0, "num_samples=" + std::to_string(num_samples) + " is negative.");
  require(num_sources_ - 1 <= static_cast<std::uint64_t>(std::numeric_limits<Id>::max()),
          std::to_string(num_sources_) + " sources do not fit the type of the order.");
  while (num_samples > 0) {
    const auto slots = static_cast<std::uint32_t>(std::min<std::int64_t>(num_samples, stretch_));
    fill_stretch(order, slots);
    order += slots;
    num_samples -= slots;
  }
}

template void BlendOrder::fill(std::uint8_t*, std::int64_t);
template void BlendOrder::fill(std::uint16_t*, std::int64_t);
template void BlendOrder::fill(std::int32_t*, std::int64_t);

std::vector<std::int32_t> blend_order(const std::int64_t* weights, std::size_t num_sources, std::int64_t num_samples) {
  BlendOrder order(weights, num_sources);
  require(num_samples >= 0, "num_samples=" + std::to_string(num_samples) + " is negative.");
  std::vector<std::int32_t> sources(static_cast<std::size_t>(num_samples));
  order.fill(sources.data(), num_samples);
  return sources;
}

}  // namespace xalign
