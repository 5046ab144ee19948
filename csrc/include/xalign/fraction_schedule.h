// The parallel fraction as it changes over a run, in integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// A phase ends at until_tokens tokens of the run and goes from begin to end in a straight line, both numerators of one
// denominator. The sample that begins at token t of a phase from a to b has begin + (end - begin) * (t - a) / (b - a),
// rounded down.
struct FractionPhase {
  std::int64_t until_tokens;
  std::int64_t begin;
  std::int64_t end;
};

class FractionSchedule {
 public:
  // Throws std::invalid_argument if there is no phase, until_tokens does not rise from above 0, the denominator is
  // outside 1..2^60, or a numerator outside 0..denominator.
  FractionSchedule(std::vector<FractionPhase> phases, std::int64_t denominator, std::int64_t seq_length);

  std::int64_t denominator() const { return denominator_; }
  std::size_t num_phases() const { return phases_.size(); }
  // The phase in which a sample begins; after the last phase, the last one.
  std::size_t phase_of(std::int64_t sample) const;
  // The numerator of a sample; after the last phase its end.
  std::int64_t numerator(std::int64_t sample) const;

 private:
  std::vector<FractionPhase> phases_;
  std::int64_t denominator_;
  std::int64_t seq_length_;
};

}  // namespace xalign
