// The order of a run as it is kept on disk: which source gives each row, and by counting, which of its draws that is.
//
// A row is a window (source_windows) or a document (mixed_documents), in the order it was chosen. Nothing here owns the
// arrays: they are memory maps of a cached file, so that a run of 1e9 samples starts without reading them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Where a row comes from: a source, and which of the source's windows or documents, counted over all its epochs.
struct Origin {
  std::int32_t source;
  std::int64_t draw;
};

// Rows of a block between two lines of SourceRows' table: at least 4,096, and enough that the table takes at most two
// bytes for each row. A power of two.
std::int64_t rows_per_block(std::int32_t num_sources);

// The source of every row, one or two bytes each, and before every block how often each source has come.
class SourceRows {
 public:
  // ids: [num_rows] of width_bytes (1 or 2). counts_before: [num_blocks + 1, num_sources], row b =
  // how often each source comes before row b * rows_per_block(num_sources) (the last one: in all rows). num_counts:
  // numbers in it. Throws std::invalid_argument on contradictory sizes. An id that is no source is found when it is read.
  SourceRows(const void* ids, int width_bytes, std::int64_t num_rows, const std::int64_t* counts_before,
             std::int64_t num_counts, std::int32_t num_sources);

  std::int64_t num_rows() const { return num_rows_; }
  std::int32_t num_sources() const { return num_sources_; }
  // Throws std::out_of_range if there is no such row, std::runtime_error if its id is no source.
  std::int32_t source(std::int64_t row) const;
  // How often the source comes before the row (0..num_rows). Reads half a block at most.
  std::int64_t count_before(std::int64_t row, std::int32_t source) const;
  Origin origin(std::int64_t row) const;

 private:
  const void* ids_;
  int width_bytes_;
  std::int64_t num_rows_;
  const std::int64_t* counts_before_;
  std::int32_t num_sources_;
  std::int64_t block_rows_;
};

// Goes through rows one after the other: the first draw of a source is looked up, the next ones are counted.
class RowWalk {
 public:
  RowWalk(const SourceRows& rows, std::int64_t first_row) : rows_(&rows), row_(first_row) {}
  std::int64_t row() const { return row_; }
  Origin next();  // the origin of row(), which then moves on; throws as SourceRows::source

 private:
  struct Next {
    std::int32_t source;
    std::int64_t draw;
  };
  const SourceRows* rows_;
  std::int64_t row_;
  std::vector<Next> next_;  // few sources in a sample: a list beats a table
};

// Counts for SourceRows as rows come in: lines() of all the blocks that began since the last call and, at the end, now().
class RowCounter {
 public:
  explicit RowCounter(std::int32_t num_sources);  // throws std::invalid_argument outside 1..65,536
  template <typename Id>  // std::uint8_t or std::uint16_t
  void append(const Id* ids, std::size_t num_rows);  // throws std::invalid_argument on an id that is no source
  std::vector<std::int64_t> take_lines();            // [new blocks, num_sources]
  const std::vector<std::int64_t>& now() const { return now_; }  // [num_sources], of all rows so far
  std::int64_t num_rows() const { return num_rows_; }
  std::int32_t num_sources() const { return num_sources_; }

 private:
  std::int32_t num_sources_;
  std::int64_t block_rows_;
  std::int64_t num_rows_ = 0;
  std::vector<std::int64_t> lines_;
  std::vector<std::int64_t> now_;
};

// Inside a global batch the chosen rows are turned by a seeded offset and then shuffled inside aligned runs of 8 slots
// (a shorter one at the end). The order they were chosen in is evenly spread and contiguous pieces of it stay
// contiguous but for the 8: so data-parallel ranks, which read contiguous pieces, get the same mixture for every number
// of ranks at once, and no rank the same place in the order step after step. The numbers come from SplitMix64 on (key,
// step) and (key, step, run): part of the meaning of a run, they must never change.
constexpr std::int64_t kSlotsOfARun = 8;
// The place in the chosen order of each slot of a step's batch: positions[slot], a permutation of 0..batch_size-1.
// Throws std::invalid_argument if batch_size is below 1 or step negative.
void batch_positions(std::uint64_t key, std::int64_t step, std::int64_t batch_size, std::int64_t* positions);
// positions[slot] alone, in constant time. Throws std::invalid_argument also if the slot is outside the batch.
std::int64_t batch_position(std::uint64_t key, std::int64_t step, std::int64_t slot, std::int64_t batch_size);

// Where a sample of packing: mixed_documents begins, and how many positions at its end hold nothing.
struct SampleBorder {
  std::int64_t row;      // of the document that its first token is in
  std::int32_t token;    // which token of that document
  std::int32_t padding;  // positions at the end of the sample without a token
};

}  // namespace xalign
