// Samples of a run as arrays: what the model reads, what it has to predict, and what each token is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "xalign/stream.h"

namespace xalign {

using Streams = std::vector<std::shared_ptr<const SourceStream>>;

// What the samples of a run are made of. Implementations are immutable: threads share them.
class SampleIndex {
 public:
  virtual ~SampleIndex() = default;
  virtual std::int64_t num_samples() const = 0;
  // Appends the pieces of sample k in the order they are read, seq_length + 1 tokens or fewer. The first seq_length are
  // inputs, token i + 1 is the label of token i. Where there are fewer, the rest of the inputs is padding, and the last
  // token has no label. 0 <= sample < num_samples().
  //
  // An index of windows calls streams[source]->append_window(draw, source, pieces); an index of documents asks
  // streams[source]->document(draw) for the document and its length and appends parts of it. Both let missing_epoch of
  // a stream through.
  virtual void append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const = 0;
};

// The windows of given sources, one by one: what tests and validation sets are.
class ListedSamples final : public SampleIndex {
 public:
  // Sample k is window draws[k] of source sources[k]. Throws std::invalid_argument if the lists differ in length or
  // hold a negative number.
  ListedSamples(std::vector<std::int32_t> sources, std::vector<std::int64_t> draws);
  std::int64_t num_samples() const override { return static_cast<std::int64_t>(sources_.size()); }
  void append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const override;

 private:
  std::vector<std::int32_t> sources_;
  std::vector<std::int64_t> draws_;
};

struct ReadOptions {
  std::int64_t padding_token = 0;
  bool reset_position_ids = false;  // positions start again at every document
  bool eod_mask_loss = false;       // no loss where the input is an end-of-document token
};

// A caller's buffers, each [num_samples, seq_length] row by row.
struct BatchArrays {
  std::int64_t* tokens;        // padding: padding_token
  std::int64_t* labels;        // where there is none: padding_token
  // In the sample or, with reset_position_ids, in the document; padding counts on. Null, without reset_position_ids:
  // not written, since every row is 0, 1, 2, ..
  std::int64_t* position_ids;
  float* loss_mask;            // 1 where the label bears loss
  std::int8_t* language_ids;   // of each input, a language of the run; -1: none
  std::int8_t* label_language_ids;
  std::int16_t* source_ids;    // of each input; padding: -1
  std::int32_t* document_ids;  // 0, 1, 2, .. in each sample; padding: -1
};

struct MissingEpoch {
  std::int32_t source;
  std::int64_t epoch;
};

// Fills the rows of a batch. Returns the epochs that have to be there first; if there are any, nothing was written.
// Throws std::out_of_range if there is no such sample, std::invalid_argument if seq_length is below 1, there are more
// than 32,767 streams, positions that start again have no place, or the index names a source or tokens that are not
// there; damaged_file, also on a token id outside the vocabulary of its file.
std::vector<MissingEpoch> read_batch(const SampleIndex& index, const Streams& streams, const std::int64_t* samples,
                                     std::size_t num_samples, std::int64_t seq_length, const ReadOptions& options,
                                     const BatchArrays& batch);

}  // namespace xalign
