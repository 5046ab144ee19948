// A source's documents as one stream of tokens per epoch, without storing the order or the cuts.
//
// Documents come in the order of a formula permutation; all that is kept of an epoch is where every kStride-th of them
// begins in the stream. Locating a token is a binary search and at most kStride lengths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "xalign/packing.h"
#include "xalign/permutation.h"
#include "xalign/token_view.h"

namespace xalign {

class SourceStream;

// An epoch was asked for whose index is not there yet.
class missing_epoch : public std::runtime_error {
 public:
  missing_epoch(const SourceStream* of, std::int64_t number);
  const SourceStream* stream;
  std::int64_t epoch;
};

// Tokens of one document that a sample reads.
struct Piece {
  std::int32_t source;    // of the run
  std::int64_t document;  // of the file
  std::int64_t begin;     // the first of its tokens that is read
  std::int64_t tokens;    // how many, at least one
};

struct DocumentPlace {
  std::int64_t document;  // of the file
  std::int64_t length;    // in tokens
};

// How a stream is cut into windows.
struct Cutting {
  std::int64_t seq_length = 0;
  // false: at every seq_length tokens; a window reads one token more, which is the first of the next. As Megatron's
  // build_sample_idx; the last seq_length tokens or fewer of an epoch are in no window.
  // true: no document is cut; windows are packings (packing.h) of whole documents, seq_length tokens or fewer.
  bool whole_documents = false;
};

// Rows that counting fills, one for each window or document; any pointer but content may be nullptr.
template <typename Count>
struct Counts {
  Count* content = nullptr;  // [rows, languages of the file]: tokens of each language among the inputs
  Count* tokens = nullptr;   // [rows]: inputs that are no padding
  Count* eod = nullptr;      // [rows]: end-of-document tokens among the inputs that have a label
};

// A part of a file read again and again, every epoch in another order. Windows and documents have draws, numbers that
// count over epochs in the order they are read. Threads may share an object.
class SourceStream {
 public:
  static constexpr std::int64_t kStride = 32;
  static constexpr std::int64_t kMostEpochs = std::int64_t{1} << 20;

  // The documents that the split permutation has at positions part_begin..part_end-1; without a key it is the file's
  // own order. Throws std::invalid_argument if the part is not inside the file, or seq_length is outside 1..2^31 - 1.
  SourceStream(TokenFileView file, Cutting cutting, std::optional<std::uint64_t> split_key, std::int64_t part_begin,
               std::int64_t part_end);

  const TokenFileView& file() const { return file_; }
  const Cutting& cutting() const { return cutting_; }
  std::int64_t num_documents() const { return part_end_ - part_begin_; }

  // An epoch is told its keys (for the order of documents, and of windows) before anything else. Throws
  // std::invalid_argument if it is outside 0..kMostEpochs-1 or has other keys.
  void set_keys(std::int64_t epoch, std::uint64_t documents_key, std::uint64_t windows_key);

  // Where every kStride-th document begins in the stream and, last, the tokens of the stream: [num_documents / kStride
  // rounded up, + 1]. Exact, and the same for any number of threads. Throws missing_epoch without keys, damaged_file
  // also if a whole file's documents do not add up to its tokens.
  std::vector<std::int64_t> build_starts(std::int64_t epoch, int num_threads) const;
  // Gives an epoch what build_starts returned, now or in an earlier run; the keeper keeps the memory. Throws
  // std::invalid_argument if it does not fit.
  void use_starts(std::int64_t epoch, const std::int64_t* starts, std::size_t size, std::shared_ptr<void> keeper);

  // The same with whole_documents. Time O(documents x open windows), one thread.
  Packing build_packing(std::int64_t epoch) const;
  void use_packing(std::int64_t epoch, const std::int64_t* documents, std::size_t num_documents,
                   const std::int64_t* window_starts, std::size_t num_starts, std::shared_ptr<void> keeper);

  bool has_keys(std::int64_t epoch) const;
  bool has_windows(std::int64_t epoch) const;
  // Throws missing_epoch.
  std::int64_t num_windows(std::int64_t epoch) const;

  // Appends what window `draw` reads: seq_length + 1 tokens or, of whole documents, seq_length at most. Throws
  // missing_epoch, damaged_file, std::out_of_range if there is no such draw.
  void append_window(std::int64_t draw, std::int32_t source, std::vector<Piece>& pieces) const;
  // A document by its draw. Its epoch needs keys only. Throws as append_window.
  DocumentPlace document(std::int64_t draw) const;

  // Counts all windows of an epoch, in the order they are drawn. Documents are gone through once, in the order of the
  // stream; of a file whose only tokens without language are the last ones of documents neither tokens nor spans are
  // read. Count is std::uint16_t (throws std::invalid_argument if seq_length is above 65,535) or std::int32_t.
  template <typename Count>
  void count_epoch(std::int64_t epoch, const Counts<Count>& counts, int num_threads) const;
  // Counts documents by draw.
  void count_documents(std::int64_t first, std::int64_t count, const Counts<std::int32_t>& counts,
                       int num_threads) const;

  // Counts stretches of documents: tokens begins[i]..ends[i]-1 of the document with draw draws[i]. Throws also
  // std::invalid_argument if there are no such tokens.
  void count_stretches(const std::int64_t* draws, const std::int64_t* begins, const std::int64_t* ends,
                       std::int64_t count, const Counts<std::int32_t>& counts, int num_threads) const;

  // How the windows with draws 0..num_windows-1 fall on documents, a document counted once per epoch; documents without
  // tokens count for nothing.
  struct DocumentsRead {
    std::int64_t begun = 0;  // whose first token is in one of the windows
    std::int64_t cut = 0;    // that a border of one of the windows cuts
  };
  DocumentsRead documents_read(std::int64_t num_windows, int num_threads) const;

  // One reading of the part: tokens, and content tokens of each language of the file.
  struct Totals {
    std::int64_t tokens = 0;
    std::vector<std::int64_t> content;
  };
  Totals totals(int num_threads) const;

 private:
  struct Epoch;
  class Walk;
  struct Window {
    std::shared_ptr<const Epoch> epoch;
    std::int64_t number;  // in the epoch, in the order of the stream
  };

  std::shared_ptr<const Epoch> keyed(std::int64_t number) const;
  std::shared_ptr<const Epoch> indexed(std::int64_t number) const;
  void put(std::int64_t number, const Epoch& epoch);
  Window window_of(std::int64_t draw) const;
  std::int64_t block_of(const Epoch& epoch, std::int64_t token) const;
  std::pair<std::int64_t, std::int64_t> packed_places(const Epoch& epoch, std::int64_t window) const;
  void append_cut(const Epoch& epoch, std::int64_t window, std::int32_t source, std::vector<Piece>& pieces) const;
  void append_packed(const Epoch& epoch, std::int64_t window, std::int32_t source, std::vector<Piece>& pieces) const;
  template <typename Count>
  void count_cut(const Epoch& epoch, std::int64_t first, std::int64_t end, const Counts<Count>& counts) const;
  template <typename Count>
  void count_packed(const Epoch& epoch, std::int64_t first, std::int64_t end, const Counts<Count>& counts) const;
  DocumentsRead read_of_cut(const Epoch& epoch, std::int64_t num_drawn, std::int64_t first_document,
                            std::int64_t end_document) const;
  void fill_documents(const Permutation& order, std::int64_t first, std::int64_t count, std::int64_t* documents) const;
  void add_in_file_order(const Epoch& epoch, int num_threads, std::vector<std::int64_t>& tokens) const;
  void add_in_stream_order(const Epoch& epoch, int num_threads, std::vector<std::int64_t>& tokens) const;
  [[noreturn]] void stale(const char* what) const;

  TokenFileView file_;
  Cutting cutting_;
  std::int64_t part_begin_, part_end_;
  std::optional<Permutation> split_;
  mutable std::mutex mutex_;  // guards what follows; an Epoch never changes once it is there
  std::vector<std::shared_ptr<const Epoch>> epochs_;
  std::vector<std::int64_t> windows_until_;  // of epochs 0..i together, as far as all of them are indexed
};

}  // namespace xalign
