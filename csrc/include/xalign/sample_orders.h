// The samples of a run by number, as the reader takes them: windows in the order they were chosen, or the pieces of a
// stream of documents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "xalign/order_store.h"
#include "xalign/reader.h"

namespace xalign {

// packing: source_windows. Sample k of the run is the row that its slot of its step's batch names.
class SampleOrder final : public SampleIndex {
 public:
  // The rows must be whole batches. Throws std::invalid_argument otherwise.
  SampleOrder(SourceRows rows, std::int64_t batch_size, std::uint64_t batch_key, std::shared_ptr<void> keeper = nullptr);
  std::int64_t num_samples() const override { return rows_.num_rows(); }
  void append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const override;
  // Its place in the chosen order. Throws std::out_of_range if there is no such sample.
  std::int64_t position_of(std::int64_t sample) const;
  Origin origin(std::int64_t sample) const { return rows_.origin(position_of(sample)); }
  const SourceRows& rows() const { return rows_; }

 private:
  SourceRows rows_;
  std::int64_t batch_size_;
  std::uint64_t batch_key_;
  std::shared_ptr<void> keeper_;  // of the memory that the rows are in
};

// packing: mixed_documents. The stream is the documents of all rows one behind the other, but for padding. A sample
// reads seq_length - padding tokens from its border on and, if it has no padding, one more, its last label.
class DocumentOrder final : public SampleIndex {
 public:
  // borders: [num_samples] in the chosen order. keeps_whole: [num_sources] whether documents of the source that are
  // longer than a sample take no place. Throws std::invalid_argument if sizes disagree or the samples are not whole
  // batches; a border that is not in the rows is found when it is read (std::runtime_error).
  DocumentOrder(SourceRows rows, const SampleBorder* borders, std::int64_t num_samples, std::vector<bool> keeps_whole,
                std::int64_t batch_size, std::uint64_t batch_key, std::shared_ptr<void> keeper = nullptr);
  std::int64_t num_samples() const override { return num_samples_; }
  void append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const override;
  std::int64_t position_of(std::int64_t sample) const;
  // Throws std::out_of_range if there is no such sample.
  SampleBorder border(std::int64_t sample) const { return borders_[position_of(sample)]; }
  const SourceRows& rows() const { return rows_; }

 private:
  SourceRows rows_;
  const SampleBorder* borders_;
  std::int64_t num_samples_;
  std::vector<bool> keeps_whole_;
  std::int64_t batch_size_;
  std::uint64_t batch_key_;
  std::shared_ptr<void> keeper_;  // of the memory that the rows are in
};

}  // namespace xalign
