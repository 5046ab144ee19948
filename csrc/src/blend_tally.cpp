#include "xalign/blend_tally.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "xalign/order_store.h"

namespace xalign {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

BlendTally::BlendTally(const FractionSchedule& schedule, std::vector<bool> is_parallel,
                       std::vector<std::vector<std::int32_t>> languages_of_source, std::size_t num_languages,
                       bool count_all_tokens, std::int64_t batch_size, std::uint64_t batch_key)
    : schedule_(schedule),
      is_parallel_(std::move(is_parallel)),
      languages_of_source_(std::move(languages_of_source)),
      count_all_tokens_(count_all_tokens),
      batch_size_(batch_size),
      batch_key_(batch_key) {
  require(batch_size >= 1, "batch_size=" + std::to_string(batch_size) + " is below 1.");
  require(languages_of_source_.size() == is_parallel_.size(), "languages_of_source and sources differ in length.");
  for (const auto& languages : languages_of_source_) {
    for (const std::int32_t language : languages) {
      require(language >= 0 && static_cast<std::size_t>(language) < num_languages,
              "language " + std::to_string(language) + " is outside 0.." + std::to_string(num_languages) + ".");
    }
  }
  sources_.resize(is_parallel_.size());
  for (std::size_t j = 0; j < sources_.size(); ++j) sources_[j].content.resize(languages_of_source_[j].size());
  phases_.assign(schedule.num_phases(), TextSums(num_languages));
  asked_.resize(schedule.num_phases(), 0);
  slots_.assign(static_cast<std::size_t>(batch_size), TextSums(num_languages));
  padding_of_slots_.resize(static_cast<std::size_t>(batch_size), 0);
  positions_.resize(static_cast<std::size_t>(batch_size));
  slot_of_position_.resize(static_cast<std::size_t>(batch_size));
}

void BlendTally::check(std::int32_t source, std::int64_t sample) const {
  if (source >= 0 && static_cast<std::size_t>(source) < sources_.size() && sample >= 0) return;
  throw std::invalid_argument("there is no source " + std::to_string(source) + " or no sample " +
                              std::to_string(sample) + ".");
}

void BlendTally::go_to(std::int64_t sample) {
  if (sample == sample_) return;
  sample_ = sample;
  phase_ = schedule_.phase_of(sample);
  // Not before the first sample of a step and not batch_size after it; nothing here overflows.
  if (step_ < 0 || sample < step_ * batch_size_ || sample - step_ * batch_size_ >= batch_size_) {
    step_ = sample / batch_size_;
    batch_positions(batch_key_, step_, batch_size_, positions_.data());
    for (std::size_t slot = 0; slot < positions_.size(); ++slot) {
      slot_of_position_[static_cast<std::size_t>(positions_[slot])] = static_cast<std::int64_t>(slot);
    }
  }
  slot_ = static_cast<std::size_t>(slot_of_position_[static_cast<std::size_t>(sample - step_ * batch_size_)]);
}

std::int64_t BlendTally::numerator_of(std::int64_t sample) {
  if (sample != numerator_sample_) {
    numerator_sample_ = sample;
    numerator_ = schedule_.numerator(sample);
  }
  return numerator_;
}

void BlendTally::add_asked(std::int64_t sample, std::int64_t begun_in, std::int64_t counted) {
  go_to(sample);
  asked_[phase_] += static_cast<int128>(numerator_of(begun_in)) * counted;
}

void BlendTally::add_content(std::int32_t source, std::int64_t sample, std::int64_t begun_in,
                             const std::int32_t* content) {
  const auto j = static_cast<std::size_t>(source);
  const auto& languages = languages_of_source_[j];
  const std::size_t origin = is_parallel_[j];
  go_to(sample);
  auto& of_phase = phases_[phase_].content[origin];
  auto& of_slot = slots_[slot_].content[origin];
  std::int64_t sum = 0;
  for (std::size_t column = 0; column < languages.size(); ++column) {
    const auto language = static_cast<std::size_t>(languages[column]);
    sources_[j].content[column] += content[column];
    of_phase[language] += content[column];
    of_slot[language] += content[column];
    sum += content[column];
  }
  if (!count_all_tokens_) add_asked(sample, begun_in, sum);
}

void BlendTally::add(std::int32_t source, std::int64_t sample, std::int64_t begun_in, const std::int32_t* content,
                     std::int64_t tokens, std::int64_t loss, bool begins_row) {
  check(source, sample);
  check(source, begun_in);
  const auto j = static_cast<std::size_t>(source);
  const std::size_t origin = is_parallel_[j];
  sources_[j].tokens += tokens;
  sources_[j].loss += loss;
  sources_[j].rows += begins_row;
  go_to(sample);
  for (TextSums* sums : {&phases_[phase_], &slots_[slot_]}) {
    sums->tokens[origin] += tokens;
    sums->loss[origin] += loss;
    sums->rows[origin] += begins_row;
  }
  if (count_all_tokens_) add_asked(sample, begun_in, tokens);
  if (content != nullptr) add_content(source, sample, begun_in, content);
}

void BlendTally::add_content(const CutPiece& piece, const std::int32_t* content, std::int32_t masked) {
  check(piece.source, piece.sample);
  check(piece.source, piece.begun_in);
  require(piece.begin >= 0 && piece.begin <= piece.end, "a piece ends before it begins.");
  std::int64_t sum = 0;
  for (std::size_t column = 0; column < sources_[static_cast<std::size_t>(piece.source)].content.size(); ++column) {
    require(content[column] >= 0, "a piece of source " + std::to_string(piece.source) + " has a negative count.");
    sum += content[column];
  }
  require(sum <= piece.end - piece.begin,
          "a piece of source " + std::to_string(piece.source) + " has more content than tokens.");
  require(masked >= 0 && masked <= piece.end - piece.begin,
          "a piece of source " + std::to_string(piece.source) + " has more tokens without loss than tokens.");
  add_content(piece.source, piece.sample, piece.begun_in, content);
  take_back_loss(piece.source, piece.sample, masked);
}

void BlendTally::take_back_loss(std::int32_t source, std::int64_t sample, std::int64_t tokens) {
  check(source, sample);
  const auto j = static_cast<std::size_t>(source);
  const std::size_t origin = is_parallel_[j];
  sources_[j].loss -= tokens;
  go_to(sample);
  phases_[phase_].loss[origin] -= tokens;
  slots_[slot_].loss[origin] -= tokens;
}

void BlendTally::add_padding(std::int64_t sample, std::int64_t tokens) {
  check(0, sample);
  go_to(sample);
  padding_of_slots_[slot_] += tokens;
}

void BlendTally::add_left_out(std::int32_t source, std::int64_t tokens) {
  check(source, 0);
  ++sources_[static_cast<std::size_t>(source)].left_out_rows;
  sources_[static_cast<std::size_t>(source)].left_out_tokens += tokens;
}

}  // namespace xalign
