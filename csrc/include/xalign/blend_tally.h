// What a blend holds, counted row by row as it is chosen: per source, per phase of the schedule, and per slot of the
// global batch, from which it follows for every number of data-parallel ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "xalign/fraction_schedule.h"

namespace xalign {

__extension__ typedef __int128 int128;

// Sums of some part of a run, monolingual [0] and parallel [1] text apart.
struct TextSums {
  explicit TextSums(std::size_t num_languages) : content{std::vector<std::int64_t>(num_languages), {}} {
    content[1].resize(num_languages);
  }
  std::vector<std::int64_t> content[2];  // tokens of each language
  std::int64_t tokens[2] = {0, 0};       // read, padding excluded
  std::int64_t loss[2] = {0, 0};         // whose label bears loss
  std::int64_t rows[2] = {0, 0};         // windows, or documents by where they begin
};

struct SourceSums {
  std::vector<std::int64_t> content;  // tokens of each of its languages
  std::int64_t rows = 0;              // windows drawn, or documents begun
  std::int64_t tokens = 0;
  std::int64_t loss = 0;
  std::int64_t cut = 0;               // documents with a border of a sample inside (mixed_documents)
  std::int64_t left_out_rows = 0;     // documents too long to be kept whole
  std::int64_t left_out_tokens = 0;
};

// A part of a document that a border of a sample cuts: what is in it is known only once the document is looked into.
struct CutPiece {
  std::int32_t source;
  std::int64_t draw;
  std::int64_t begin;   // tokens of the document
  std::int64_t end;
  std::int64_t sample;  // in the chosen order
  std::int64_t begun_in;  // the sample that the document begins in, whose fraction it is held to
};

class BlendTally {
 public:
  // is_parallel, languages_of_source: [num_sources]. Throws std::invalid_argument if batch_size is below 1, the lists
  // differ in length, or a language is outside 0..num_languages-1.
  BlendTally(const FractionSchedule& schedule, std::vector<bool> is_parallel,
             std::vector<std::vector<std::int32_t>> languages_of_source, std::size_t num_languages,
             bool count_all_tokens, std::int64_t batch_size, std::uint64_t batch_key);

  // A window or a piece of a document. content: of each language of the source; nullptr: add_content follows.
  // begins_row: the window or document begins in it. This and what follows throw std::invalid_argument if there is no
  // such source or a sample is negative.
  void add(std::int32_t source, std::int64_t sample, std::int64_t begun_in, const std::int32_t* content,
           std::int64_t tokens, std::int64_t loss, bool begins_row);
  // The content, of each language of its source, of a piece that was added without it, and how many of its tokens that
  // were added as bearing loss do not. Throws std::invalid_argument if the piece names no source, a count is negative or
  // there are more than its tokens.
  void add_content(const CutPiece& piece, const std::int32_t* content, std::int32_t masked);
  void take_back_loss(std::int32_t source, std::int64_t sample, std::int64_t tokens);
  void add_padding(std::int64_t sample, std::int64_t tokens);
  void add_cut(std::int32_t source) {
    check(source, 0);
    ++sources_[static_cast<std::size_t>(source)].cut;
  }
  void add_left_out(std::int32_t source, std::int64_t tokens);

  const std::vector<SourceSums>& sources() const { return sources_; }
  const std::vector<TextSums>& phases() const { return phases_; }
  const std::vector<TextSums>& slots() const { return slots_; }
  const std::vector<std::int64_t>& padding_of_slots() const { return padding_of_slots_; }
  // The sum over counted tokens of the fraction that was asked for them, times the denominator, by phase.
  const std::vector<int128>& asked() const { return asked_; }

 private:
  void check(std::int32_t source, std::int64_t sample) const;
  void go_to(std::int64_t sample);
  std::int64_t numerator_of(std::int64_t sample);
  void add_content(std::int32_t source, std::int64_t sample, std::int64_t begun_in, const std::int32_t* content);
  void add_asked(std::int64_t sample, std::int64_t begun_in, std::int64_t counted);

  FractionSchedule schedule_;
  std::vector<bool> is_parallel_;
  std::vector<std::vector<std::int32_t>> languages_of_source_;
  bool count_all_tokens_;
  std::int64_t batch_size_;
  std::uint64_t batch_key_;
  std::vector<SourceSums> sources_;
  std::vector<TextSums> phases_, slots_;
  std::vector<std::int64_t> padding_of_slots_;
  std::vector<int128> asked_;
  // Of the sample at hand; most pieces are of the one of the piece before.
  std::int64_t sample_ = -1;
  std::size_t phase_ = 0, slot_ = 0;
  std::int64_t numerator_sample_ = -1, numerator_ = 0;
  std::int64_t step_ = -1;
  std::vector<std::int64_t> positions_, slot_of_position_;  // of step_
};

}  // namespace xalign
