#include "xalign/blend.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

__extension__ typedef __int128 int128;

constexpr std::int64_t kLargestSum = std::int64_t{1} << 60;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::int64_t checked_sum(const std::vector<std::int64_t>& numbers, const char* name) {
  std::int64_t sum = 0;
  for (const std::int64_t number : numbers) {
    require(number >= 0, std::string(name) + " holds the negative number " + std::to_string(number) + ".");
    require(number <= kLargestSum - sum, std::string(name) + " add up to more than 2^60.");
    sum += number;
  }
  return sum;
}

// Parties that each are to get a fixed share of what is drawn by all of them.
class Quotas {
 public:
  Quotas(std::vector<std::int64_t> weights, std::vector<std::int64_t> rates, std::int64_t window)
      : weights_(std::move(weights)), rates_(std::move(rates)), owed_(weights_.size(), 0), window_(window) {
    for (const std::int64_t weight : weights_) total_ += weight;
    // A rate only ranks deadlines; 31 bits keep the products below within 128.
    std::int64_t largest = 1;
    for (const std::int64_t rate : rates_) largest = std::max(largest, rate);
    int shift = 0;
    while ((largest >> shift) >= (std::int64_t{1} << 31)) ++shift;
    for (std::int64_t& rate : rates_) rate = std::max<std::int64_t>(rate >> shift, 1);
  }

  // The candidate with the earliest deadline among those that would stay less than one window ahead of their share;
  // sizes[j] is what j would draw. -1 if there is no candidate.
  template <typename Size, typename Candidate>
  std::int32_t next(Size size, Candidate candidate) const {
    std::int32_t best = -1;
    bool best_eligible = false;
    int128 best_slack = 0;
    for (std::size_t j = 0; j < weights_.size(); ++j) {
      if (!candidate(j) || weights_[j] == 0) continue;
      const std::int64_t drawn = size(j);
      const int128 ahead = static_cast<int128>(total_ - weights_[j]) * drawn - owed_[j];
      const bool eligible = ahead < static_cast<int128>(total_) * window_;
      // Far from any feasible target the debt grows with the run; beyond this bound only its sign matters.
      constexpr int128 kFar = static_cast<int128>(1) << 94;
      const int128 slack = std::clamp(static_cast<int128>(total_) * window_ - owed_[j], -kFar, kFar);
      const bool better = best < 0 || (eligible && !best_eligible) ||
                          (eligible == best_eligible &&
                           slack * rates_[static_cast<std::size_t>(best)] < best_slack * rates_[j]);
      if (better) {
        best = static_cast<std::int32_t>(j);
        best_eligible = eligible;
        best_slack = slack;
      }
    }
    return best;
  }

  void draw(std::size_t party, std::int64_t size) {
    for (std::size_t j = 0; j < weights_.size(); ++j) owed_[j] += static_cast<int128>(weights_[j]) * size;
    owed_[party] -= static_cast<int128>(total_) * size;
  }

 private:
  std::vector<std::int64_t> weights_;
  std::vector<std::int64_t> rates_;
  std::vector<int128> owed_;  // total * (share of what was drawn - what it drew itself)
  std::int64_t window_;
  std::int64_t total_ = 0;
};

}  // namespace

BlendOfWindows blend_windows(const BlendTarget& target, const std::vector<WindowCounts>& sources,
                             std::int64_t num_samples) {
  const std::size_t num_sources = sources.size();
  const std::size_t num_languages = target.language_shares.size();
  require(num_sources > 0 && num_languages > 0, "there is no source or no language.");
  require(num_samples >= 0, "num_samples=" + std::to_string(num_samples) + " is negative.");
  require(target.seq_length > 0 && target.seq_length <= std::numeric_limits<std::int32_t>::max(),
          "seq_length=" + std::to_string(target.seq_length) + " is outside 1..2147483647.");
  require(target.parallel_denominator > 0 && target.parallel_denominator <= kLargestSum,
          "the denominator of the parallel fraction is outside 1..2^60.");
  require(target.parallel_numerator >= 0 && target.parallel_numerator <= target.parallel_denominator,
          "the parallel fraction is outside [0, 1].");
  require(target.language_rates.size() == num_languages, "language_rates and language_shares differ in length.");
  require(target.language_of_source.size() == num_sources, "language_of_source and sources differ in length.");
  require(target.source_weights.size() == num_sources, "source_weights and sources differ in length.");
  const std::int64_t all_shares = checked_sum(target.language_shares, "language_shares");
  checked_sum(target.language_rates, "language_rates");
  checked_sum(target.source_weights, "source_weights");

  // Groups: one per language, and the parallel sources last.
  const std::size_t parallel = num_languages;
  std::vector<std::vector<std::size_t>> members(num_languages + 1);
  for (std::size_t j = 0; j < num_sources; ++j) {
    const std::int32_t language = target.language_of_source[j];
    require(language >= -1 && language < static_cast<std::int32_t>(num_languages),
            "language_of_source[" + std::to_string(j) + "]=" + std::to_string(language) + " is no language.");
    require(sources[j].num_windows >= 0 && (sources[j].num_windows == 0 || sources[j].content != nullptr),
            "windows of source " + std::to_string(j) + " are missing.");
    if (target.source_weights[j] > 0) members[language < 0 ? parallel : static_cast<std::size_t>(language)].push_back(j);
  }
  require(target.parallel_numerator == 0 || !members[parallel].empty(),
          "the parallel fraction is above zero and no parallel source has weight.");
  const bool any_monolingual = target.parallel_numerator < target.parallel_denominator;
  require(!any_monolingual || all_shares > 0, "the parallel fraction is below one and all language shares are zero.");
  for (std::size_t language = 0; language < num_languages; ++language) {
    require(!any_monolingual || target.language_shares[language] == 0 || !members[language].empty(),
            "language " + std::to_string(language) + " has a share and no source with weight.");
  }

  std::vector<Quotas> within;
  for (const auto& group : members) {
    std::vector<std::int64_t> weights;
    for (const std::size_t j : group) weights.push_back(target.source_weights[j]);
    within.emplace_back(weights, weights, target.seq_length);
  }
  Quotas languages(target.language_shares, target.language_rates, target.seq_length);

  std::vector<std::int64_t> given(num_sources, 0);
  std::vector<std::int64_t> content(num_sources, 0);  // of the next window of each source
  BlendOfWindows blend{{}, -1};
  const auto row = [&](std::size_t j) { return sources[j].content + given[j] * static_cast<std::int64_t>(num_languages); };
  const auto look = [&](std::size_t j) {
    if (given[j] >= sources[j].num_windows) {
      blend.exhausted_source = static_cast<std::int32_t>(j);
      return;
    }
    std::int64_t sum = 0;
    for (std::size_t language = 0; language < num_languages; ++language) {
      require(row(j)[language] >= 0, "a window of source " + std::to_string(j) + " has a negative count.");
      sum += row(j)[language];
    }
    require(sum <= target.seq_length, "a window of source " + std::to_string(j) + " has more content than tokens.");
    content[j] = sum;
  };
  for (const auto& group : members) {
    for (const std::size_t j : group) look(j);
  }

  std::vector<std::int32_t> choice(num_languages + 1, -1);
  const auto choose = [&](std::size_t group) {
    if (members[group].empty()) return;
    choice[group] = within[group].next([&](std::size_t i) { return content[members[group][i]]; },
                                       [](std::size_t) { return true; });
  };
  for (std::size_t group = 0; group <= num_languages; ++group) choose(group);
  const auto source_of = [&](std::size_t group) { return members[group][static_cast<std::size_t>(choice[group])]; };
  const auto magnitude = [](int128 x) { return x < 0 ? -x : x; };

  blend.source_of_sample.reserve(static_cast<std::size_t>(num_samples));
  const std::int64_t numerator = target.parallel_numerator, denominator = target.parallel_denominator;
  int128 surplus = 0;  // denominator * parallel tokens - numerator * all tokens
  for (std::int64_t sample = 0; sample < num_samples && blend.exhausted_source < 0; ++sample) {
    std::int32_t language = -1;
    if (any_monolingual) {
      language = languages.next([&](std::size_t k) { return content[source_of(k)]; },
                                [&](std::size_t k) { return choice[k] >= 0; });
    }
    const auto counted = [&](std::size_t group) {
      return target.count_all_tokens ? target.seq_length : content[source_of(group)];
    };
    bool take_parallel = language < 0;
    if (language >= 0 && numerator > 0) {
      const int128 after_parallel =
          surplus + static_cast<int128>(denominator - numerator) * counted(parallel);
      const int128 after_monolingual =
          surplus - static_cast<int128>(numerator) * counted(static_cast<std::size_t>(language));
      take_parallel = magnitude(after_parallel) < magnitude(after_monolingual);
    }
    const std::size_t group = take_parallel ? parallel : static_cast<std::size_t>(language);
    const std::size_t source = source_of(group);
    surplus += take_parallel ? static_cast<int128>(denominator - numerator) * counted(group)
                             : -static_cast<int128>(numerator) * counted(group);
    if (!take_parallel || target.parallel_fills_languages) {
      for (std::size_t k = 0; k < num_languages; ++k) {
        // Languages held to nothing are left out of the sum that shares are shares of.
        if (target.language_shares[k] > 0 && row(source)[k] > 0) languages.draw(k, row(source)[k]);
      }
    }
    within[group].draw(static_cast<std::size_t>(choice[group]), content[source]);
    blend.source_of_sample.push_back(static_cast<std::int32_t>(source));
    ++given[source];
    look(source);
    choose(group);
  }
  // A source that ran out with the last sample is missed by nobody.
  if (static_cast<std::int64_t>(blend.source_of_sample.size()) == num_samples) blend.exhausted_source = -1;
  return blend;
}

}  // namespace xalign
