#include "xalign/blender.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

constexpr std::int64_t kLargestSum = std::int64_t{1} << 60;
constexpr std::int64_t kLargestRate = std::int64_t{1} << 31;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_sum(const std::vector<std::int64_t>& numbers, const char* name) {
  std::int64_t sum = 0;
  for (const std::int64_t number : numbers) {
    require(number >= 0, std::string(name) + " holds the negative number " + std::to_string(number) + ".");
    require(number <= kLargestSum - sum, std::string(name) + " add up to more than 2^60.");
    sum += number;
  }
}

int128 magnitude(int128 x) { return x < 0 ? -x : x; }

std::vector<bool> are_parallel(const std::vector<std::int32_t>& group_of_source) {
  std::vector<bool> parallel;
  for (const std::int32_t group : group_of_source) parallel.push_back(group < 0);
  return parallel;
}

}  // namespace

Blender::Blender(BlendTarget target)
    : target_(std::move(target)),
      schedule_(target_.phases, target_.denominator, target_.seq_length),
      tally_(schedule_, are_parallel(target_.group_of_source), target_.languages_of_source,
             target_.language_shares.size(), target_.count_all_tokens, target_.batch_size, target_.batch_key) {
  const std::size_t num_sources = target_.group_of_source.size(), num_languages = target_.language_shares.size();
  require(num_sources > 0 && num_languages > 0, "there is no source or no language.");
  require(num_sources <= 65536, std::to_string(num_sources) + " sources are more than 65536.");
  require(target_.num_samples >= 0, "num_samples=" + std::to_string(target_.num_samples) + " is negative.");
  require(target_.seq_length <= std::numeric_limits<std::int32_t>::max(), "seq_length is above 2147483647.");
  require(target_.language_rates_without.size() == num_languages && target_.language_rates_with.size() == num_languages,
          "language_rates and language_shares differ in length.");
  require(target_.source_weights.size() == num_sources, "source_weights and sources differ in length.");
  check_sum(target_.language_shares, "language_shares");
  check_sum(target_.source_weights, "source_weights");
  for (const auto* rates : {&target_.language_rates_without, &target_.language_rates_with}) {
    for (const std::int64_t rate : *rates) {
      require(rate >= -kLargestRate && rate <= kLargestRate, "a language rate is beyond 2^31.");
    }
  }
  for (const std::int64_t share : target_.language_shares) all_shares_ += share;

  groups_.resize(num_languages + 1);
  supplies_.resize(num_sources);
  std::vector<std::vector<std::int64_t>> weights(groups_.size());
  for (std::size_t j = 0; j < num_sources; ++j) {
    const std::int32_t group = target_.group_of_source[j];
    require(group >= -1 && group < static_cast<std::int32_t>(num_languages),
            "group_of_source[" + std::to_string(j) + "]=" + std::to_string(group) + " is no language.");
    Supply& supply = supplies_[j];
    supply.columns = target_.languages_of_source[j];
    supply.width = supply.columns.size() + 2;
    supply.group = group < 0 ? num_languages : static_cast<std::size_t>(group);
    if (target_.source_weights[j] == 0) continue;
    supply.member = groups_[supply.group].sources.size();
    groups_[supply.group].sources.push_back(static_cast<std::int32_t>(j));
    weights[supply.group].push_back(target_.source_weights[j]);
  }
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    groups_[group].queue =
        std::make_unique<FairQueue>(weights[group], target_.documents ? 0 : target_.seq_length);
    for (const std::int32_t source : groups_[group].sources) hungry_.push_back(source);
  }
  std::reverse(hungry_.begin(), hungry_.end());
  bool any_parallel = false, any_monolingual = false;
  for (const FractionPhase& phase : target_.phases) {
    any_parallel |= phase.begin > 0 || phase.end > 0;
    any_monolingual |= phase.begin < target_.denominator || phase.end < target_.denominator;
  }
  require(!any_parallel || !groups_.back().sources.empty(),
          "the parallel fraction is above zero and no parallel source has weight.");
  require(!any_monolingual || all_shares_ > 0, "the parallel fraction is below one and all language shares are zero.");
  for (std::size_t language = 0; language < num_languages; ++language) {
    require(!any_monolingual || target_.language_shares[language] == 0 || !groups_[language].sources.empty(),
            "language " + std::to_string(language) + " has a share and no source with weight.");
  }
  held_index_.resize(num_languages, -1);
  for (std::size_t k = 0; k < num_languages; ++k) {
    if (target_.language_shares[k] == 0 || groups_[k].sources.empty()) continue;
    held_index_[k] = static_cast<std::int32_t>(held_.size());
    held_.push_back({k, target_.language_shares[k]});
  }
  drawn_.resize(num_sources, 0);
  numerator_ = schedule_.numerator(0);
}

void Blender::feed(std::int32_t source, const std::int32_t* content, const std::int32_t* tokens,
                   const std::int32_t* loss, std::size_t num_draws) {
  require(source >= 0 && static_cast<std::size_t>(source) < supplies_.size(),
          "source " + std::to_string(source) + " is outside 0.." + std::to_string(supplies_.size()) + ".");
  Supply& supply = supplies_[static_cast<std::size_t>(source)];
  supply.rows.erase(supply.rows.begin(), supply.rows.begin() + static_cast<std::ptrdiff_t>(supply.next));
  supply.next = 0;
  supply.rows.reserve(supply.rows.size() + num_draws * supply.width);
  for (std::size_t draw = 0; draw < num_draws; ++draw) {
    const std::size_t before = supply.rows.size();
    const auto fail = [&](const char* what) {
      // Half a draw would be read as one.
      supply.rows.resize(before);
      throw std::invalid_argument("source " + std::to_string(source) + " has " + what + ".");
    };
    std::int64_t sum = 0;
    for (std::size_t column = 0; column < supply.columns.size(); ++column, ++content) {
      if (*content < 0) fail("a negative count");
      sum += *content;
      supply.rows.push_back(*content);
    }
    if (sum > tokens[draw]) fail("more content than tokens");
    if (!target_.documents && tokens[draw] > target_.seq_length) fail("a window of too many tokens");
    if (loss[draw] < 0 || loss[draw] > tokens[draw]) fail("a count of loss that does not fit its tokens");
    supply.rows.push_back(tokens[draw]);
    supply.rows.push_back(loss[draw]);
  }
}

const std::int32_t* Blender::row_of(std::int32_t source) const {
  const Supply& supply = supplies_[static_cast<std::size_t>(source)];
  return supply.next < supply.rows.size() ? supply.rows.data() + supply.next : nullptr;
}

bool Blender::look(std::int32_t source) {
  Supply& supply = supplies_[static_cast<std::size_t>(source)];
  while (const std::int32_t* row = row_of(source)) {
    const std::int64_t tokens = row[supply.columns.size()];
    const bool too_long = target_.documents && target_.keep_pairs_whole && supply.group == groups_.size() - 1 &&
                          tokens > target_.seq_length;
    if (target_.documents && (tokens == 0 || too_long)) {
      // Takes no place; but it is a row, so that counting rows counts draws.
      if (too_long) tally_.add_left_out(source, tokens);
      rows_.push_back(static_cast<std::uint16_t>(source));
      ++rows_taken_;
      ++drawn_[static_cast<std::size_t>(source)];
      supply.next += supply.width;
      continue;
    }
    std::int64_t content = 0;
    for (std::size_t column = 0; column < supply.columns.size(); ++column) content += row[column];
    groups_[supply.group].queue->offer(supply.member, content);
    return true;
  }
  return false;
}

Blender::Head Blender::head_of(std::size_t group) {
  Group& g = groups_[group];
  const std::size_t member = g.queue->best();
  const std::int32_t source = g.sources[member];
  const std::int64_t tokens = row_of(source)[supplies_[static_cast<std::size_t>(source)].columns.size()];
  const std::int64_t content = g.queue->size_of(member);
  return {source, content, tokens, target_.count_all_tokens ? tokens : content};
}

void Blender::update_rates() {
  // A rate is one number of a sample's fraction, and most samples have the fraction of the one before.
  if (numerator_ == rates_at_) return;
  rates_at_ = numerator_;
  for (Language& language : held_) {
    const int128 without = target_.language_rates_without[language.index];
    const int128 with = target_.language_rates_with[language.index];
    const int128 mean = without * (target_.denominator - numerator_) + with * numerator_;
    language.rate = std::max<std::int64_t>(static_cast<std::int64_t>(mean / target_.denominator), 1);
  }
}

int128 Blender::owed(const Language& language) const {
  return static_cast<int128>(language.share) * steered_ - static_cast<int128>(all_shares_) * language.given;
}

std::int32_t Blender::next_language() {
  update_rates();
  const Language* best = nullptr;
  bool best_eligible = false;
  int128 best_slack = 0;
  for (Language& language : held_) {
    const std::int64_t window = target_.documents ? language.size : target_.seq_length;
    const int128 debt = owed(language);
    language.worst = std::max(language.worst, magnitude(debt));
    const int128 room = static_cast<int128>(all_shares_) * window;
    const bool eligible = static_cast<int128>(all_shares_ - language.share) * language.size - debt < room;
    // Far from any feasible target the debt grows with the run; beyond this bound only its sign matters.
    constexpr int128 kFar = static_cast<int128>(1) << 94;
    const int128 slack = std::clamp(room - debt, -kFar, kFar);
    if (best == nullptr || (eligible && !best_eligible) ||
        (eligible == best_eligible && slack * best->rate < best_slack * language.rate)) {
      best = &language;
      best_eligible = eligible;
      best_slack = slack;
    }
  }
  return best == nullptr ? -1 : static_cast<std::int32_t>(best->index);
}

std::vector<int128> Blender::worst_languages() const {
  std::vector<int128> worst(held_index_.size(), 0);
  for (const Language& language : held_) worst[language.index] = std::max(language.worst, magnitude(owed(language)));
  return worst;
}

void Blender::choose() {
  const std::size_t parallel = groups_.size() - 1;
  const std::int64_t denominator = target_.denominator;
  const std::int32_t language = numerator_ < denominator ? next_language() : -1;
  if (numerator_ == 0) return take(static_cast<std::size_t>(language));
  const Head pair = head_of(parallel);
  const bool waits = target_.documents && target_.keep_pairs_whole && pair.tokens > target_.seq_length - filled_;
  if (language < 0) return waits ? pad() : take(parallel);
  const Head text = head_of(static_cast<std::size_t>(language));
  const int128 after_pair = surplus_ + static_cast<int128>(denominator - numerator_) * pair.counted;
  const int128 after_text = surplus_ - static_cast<int128>(numerator_) * text.counted;
  if (magnitude(after_pair) >= magnitude(after_text)) return take(static_cast<std::size_t>(language));
  if (!waits) return take(parallel);
  if (magnitude(after_text) <= static_cast<int128>(denominator) * std::max(pair.counted, text.counted)) {
    return take(static_cast<std::size_t>(language));
  }
  pad();
}

void Blender::take(std::size_t group) {
  const Head head = head_of(group);
  Supply& supply = supplies_[static_cast<std::size_t>(head.source)];
  const std::int32_t* row = row_of(head.source);
  const bool is_parallel = group == groups_.size() - 1;
  surplus_ += is_parallel ? static_cast<int128>(target_.denominator - numerator_) * head.counted
                          : -static_cast<int128>(numerator_) * head.counted;
  largest_row_ = std::max(largest_row_, head.counted);
  worst_parallel_ = std::max(worst_parallel_, magnitude(surplus_));
  if (!is_parallel || target_.parallel_fills_languages) {
    // Languages held to nothing are left out of the sum that shares are shares of.
    for (std::size_t column = 0; column < supply.columns.size(); ++column) {
      const std::int32_t held = held_index_[static_cast<std::size_t>(supply.columns[column])];
      if (held < 0) continue;
      steered_ += row[column];
      held_[static_cast<std::size_t>(held)].given += row[column];
    }
  }
  if (target_.documents) {
    place_document(head.source);
  } else {
    place_window(head.source);
  }
  rows_.push_back(static_cast<std::uint16_t>(head.source));
  ++rows_taken_;
  ++drawn_[static_cast<std::size_t>(head.source)];
  groups_[group].queue->take_best();
  supply.next += supply.width;
  hungry_.push_back(head.source);
}

void Blender::place_window(std::int32_t source) {
  const std::int32_t* row = row_of(source);
  const std::size_t columns = supplies_[static_cast<std::size_t>(source)].columns.size();
  tally_.add(source, sample_, sample_, row, row[columns], row[columns + 1], true);
  if (row[columns] < target_.seq_length) tally_.add_padding(sample_, target_.seq_length - row[columns]);
  end_sample(0);
}

void Blender::place_document(std::int32_t source) {
  const std::int32_t* row = row_of(source);
  const std::size_t columns = supplies_[static_cast<std::size_t>(source)].columns.size();
  const std::int64_t length = row[columns], begun_in = sample_;
  const std::int64_t masked = length - row[columns + 1];
  const bool whole = length <= target_.seq_length - filled_;
  if (border_is_next_) {
    borders_.push_back({rows_taken_, 0, 0});
    border_is_next_ = false;
  }
  for (std::int64_t begin = 0, end; begin < length; begin = end) {
    end = std::min(length, begin + target_.seq_length - filled_);
    const bool is_last = end == length;
    if (sample_ < target_.num_samples) {
      tally_.add(source, sample_, begun_in, whole ? row : nullptr, end - begin, end - begin - (whole ? masked : 0),
                 begin == 0);
      if (!whole) {
        cut_pieces_.push_back({source, drawn_[static_cast<std::size_t>(source)], begin, end, sample_, begun_in});
      }
    }
    filled_ += end - begin;
    if (filled_ < target_.seq_length) break;
    end_sample(0);
    if (!is_last) {
      borders_.push_back({rows_taken_, static_cast<std::int32_t>(end), 0});
      border_is_next_ = false;
    }
  }
  if (!whole && begun_in < target_.num_samples) tally_.add_cut(source);
  last_source_ = source;
  last_bears_loss_ = masked == 0;
}

void Blender::pad() {
  // What comes after the last token is padding, which nobody is to predict.
  if (last_bears_loss_ && sample_ < target_.num_samples) tally_.take_back_loss(last_source_, sample_, 1);
  const std::int64_t padding = target_.seq_length - filled_;
  if (sample_ < target_.num_samples) tally_.add_padding(sample_, padding);
  end_sample(padding);
}

void Blender::end_sample(std::int64_t padding) {
  if (target_.documents) borders_.back().padding = static_cast<std::int32_t>(padding);
  last_padding_ = padding;
  ++sample_;
  filled_ = 0;
  border_is_next_ = true;
  numerator_ = schedule_.numerator(sample_);
}

Blender::Status Blender::run(std::size_t max_rows) {
  const std::int64_t until = rows_taken_ + static_cast<std::int64_t>(std::min<std::size_t>(max_rows, kLargestSum));
  // The last label of the last sample is a token of a document after it, unless the sample ends in padding.
  const auto done = [&] {
    if (sample_ < target_.num_samples) return false;
    if (!target_.documents || target_.num_samples == 0) return true;
    const bool has_label = sample_ > target_.num_samples || !border_is_next_;
    return has_label || last_padding_ > 0;
  };
  while (!done()) {
    for (; !hungry_.empty(); hungry_.pop_back()) {
      const std::int32_t source = hungry_.back();
      if (!look(source)) return {source, false};
      changed_.push_back(supplies_[static_cast<std::size_t>(source)].group);
    }
    for (; !changed_.empty(); changed_.pop_back()) {
      FairQueue& queue = *groups_[changed_.back()].queue;
      const std::int64_t size = queue.size_of(queue.best());
      if (changed_.back() == groups_.size() - 1) continue;
      const std::int32_t held = held_index_[changed_.back()];
      if (held >= 0) held_[static_cast<std::size_t>(held)].size = size;
    }
    if (rows_taken_ >= until) return {-1, false};
    choose();
  }
  return {-1, true};
}

std::vector<std::uint16_t> Blender::take_rows() { return std::exchange(rows_, {}); }

std::vector<SampleBorder> Blender::take_borders() {
  // Those of samples that have ended; in documents, a border is there for the sample at hand if one was begun.
  const std::size_t open = border_is_next_ ? 0 : 1;
  std::vector<SampleBorder> whole(borders_.begin(), borders_.end() - static_cast<std::ptrdiff_t>(open));
  borders_.erase(borders_.begin(), borders_.end() - static_cast<std::ptrdiff_t>(open));
  return whole;
}

std::vector<CutPiece> Blender::take_cut_pieces() { return std::exchange(cut_pieces_, {}); }

}  // namespace xalign
