#include "xalign/fraction_schedule.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

__extension__ typedef __int128 int128;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

FractionSchedule::FractionSchedule(std::vector<FractionPhase> phases, std::int64_t denominator,
                                   std::int64_t seq_length)
    : phases_(std::move(phases)), denominator_(denominator), seq_length_(seq_length) {
  require(!phases_.empty(), "the schedule has no phase.");
  require(denominator > 0 && denominator <= std::int64_t{1} << 60, "the denominator is outside 1..2^60.");
  require(seq_length > 0, "seq_length=" + std::to_string(seq_length) + " is not positive.");
  std::int64_t before = 0;
  for (const FractionPhase& phase : phases_) {
    require(phase.until_tokens > before, "until_tokens=" + std::to_string(phase.until_tokens) + " does not come after " +
                                             std::to_string(before) + ".");
    for (const std::int64_t numerator : {phase.begin, phase.end}) {
      require(numerator >= 0 && numerator <= denominator,
              "a fraction of " + std::to_string(numerator) + "/" + std::to_string(denominator) + " is outside [0, 1].");
    }
    before = phase.until_tokens;
  }
}

std::size_t FractionSchedule::phase_of(std::int64_t sample) const {
  const int128 at = static_cast<int128>(sample) * seq_length_;
  const auto next = std::upper_bound(phases_.begin(), phases_.end(), at,
                                     [](int128 token, const FractionPhase& phase) { return token < phase.until_tokens; });
  return std::min(static_cast<std::size_t>(next - phases_.begin()), phases_.size() - 1);
}

std::int64_t FractionSchedule::numerator(std::int64_t sample) const {
  const std::size_t index = phase_of(sample);
  const FractionPhase& phase = phases_[index];
  if (phase.begin == phase.end) return phase.begin;
  const std::int64_t from = index == 0 ? 0 : phases_[index - 1].until_tokens;
  const int128 at = static_cast<int128>(sample) * seq_length_;
  if (at >= phase.until_tokens) return phase.end;
  const int128 gone = at - from, whole = static_cast<int128>(phase.until_tokens) - from;
  // |end - begin| < 2^61 and gone < 2^63, so the product fits. Rounded down, also where the fraction falls.
  const int128 change = (static_cast<int128>(phase.end) - phase.begin) * gone;
  const int128 rounded = change >= 0 ? change / whole : -((-change + whole - 1) / whole);
  return phase.begin + static_cast<std::int64_t>(rounded);
}

}  // namespace xalign
