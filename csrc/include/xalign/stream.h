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
#include <string>
#include <vector>

#include "xalign/permutation.h"

namespace xalign {

// A token file contradicts itself: the message names the file and the document.
class damaged_file : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class SourceStream;

// An epoch was asked for whose index is not there yet.
class missing_epoch : public std::runtime_error {
 public:
  missing_epoch(const SourceStream* of, std::int64_t number);
  const SourceStream* stream;
  std::int64_t epoch;
};

enum class TokenType { uint8, int8, int16, uint16, int32, int64 };
std::int64_t bytes_of(TokenType type);

// Which tokens of a file belong to a language.
enum class Content {
  all,            // every one
  all_but_last,   // every one but the last of each document, its end-of-document token
  spans,          // as the spans say
  not_eod,        // every one that is not the end-of-document id
};

// A token file as its memory maps hold it; the memory belongs to somebody else and may be unaligned. Nothing in it is
// trusted: everything is checked when it is used.
struct TokenFileView {
  std::string name;  // for messages
  const void* tokens = nullptr;
  TokenType type = TokenType::uint16;
  std::int64_t num_tokens = 0;
  std::int64_t num_documents = 0;
  const void* lengths = nullptr;   // int32 [num_documents] in tokens; nullptr: a document ends where the next begins
  const void* pointers = nullptr;  // int64 [num_documents] in bytes
  Content content = Content::all;
  std::int64_t eod = -1;
  const void* span_ends = nullptr;       // int64 [num_spans], exclusive, in tokens of the file, increasing
  const void* span_languages = nullptr;  // int8 [num_spans], language of the file or -1
  std::int64_t num_spans = 0;
  std::vector<std::int8_t> run_language;  // language of the run of each language of the file; one, unless with spans
};

struct DocumentPlace {
  std::int64_t document;  // of the file
  std::int64_t length;    // in tokens
};

// Tokens of one document that a sample reads.
struct Piece {
  std::int32_t source;    // of the run
  std::int64_t document;  // of the file
  std::int64_t begin;     // the first of its tokens that is read
  std::int64_t tokens;    // how many, at least one
};

// How a stream is cut into windows.
struct Cutting {
  std::int64_t seq_length = 0;
  // false: at every seq_length tokens; a window reads one token more, which is the first of the next.
  // true: no document is cut; windows hold whole documents of at most seq_length tokens together, packed by best fit.
  bool whole_documents = false;
};

// One reading of a part of a file, and then another, in other orders. Draw d of windows (or documents) counts over
// epochs. Threads may share an object.
class SourceStream {
 public:
  static constexpr std::int64_t kStride = 32;

  // The documents that the split permutation has at positions part_begin..part_end-1; without a key, the file's order
  // is the split permutation. Throws std::invalid_argument if the part is not inside the file or seq_length is not in
  // 1..2147483646.
  SourceStream(TokenFileView file, Cutting cutting, std::optional<std::uint64_t> split_key, std::int64_t part_begin,
               std::int64_t part_end);

  const TokenFileView& file() const { return file_; }
  const Cutting& cutting() const { return cutting_; }
  std::int64_t num_documents() const { return part_end_ - part_begin_; }

  // Epochs are told their keys first (of the order of documents, and of windows) ...
  void set_keys(std::int64_t epoch, std::uint64_t documents_key, std::uint64_t windows_key);
  // ... then built, or given what an earlier build returned.
  //
  // Where every kStride-th document begins and, last, the tokens of the stream: num_documents / kStride rounded up, + 1
  // numbers. Exact, the same for any number of threads. Throws damaged_file, std::overflow_error.
  std::vector<std::int64_t> build_starts(std::int64_t epoch, int num_threads) const;
  void use_starts(std::int64_t epoch, const std::int64_t* starts, std::size_t size, std::shared_ptr<void> keeper);
  // Best-fit packing of whole documents: documents of the file window after window, where each window begins in that
  // list, and how many documents were longer than a window and left out. Deterministic. At most 64 windows are open at
  // a time, so time is O(documents). Throws damaged_file.
  struct Packing {
    std::vector<std::int64_t> documents;
    std::vector<std::int64_t> window_starts;  // number of windows + 1
    std::int64_t left_out_documents = 0;
    std::int64_t left_out_tokens = 0;
  };
  Packing build_packing(std::int64_t epoch) const;
  void use_packing(std::int64_t epoch, const std::int64_t* documents, std::size_t num_documents,
                   const std::int64_t* window_starts, std::size_t num_window_starts, std::shared_ptr<void> keeper);
  bool has_windows(std::int64_t epoch) const;

  // Windows of an epoch. Throws missing_epoch.
  std::int64_t num_windows(std::int64_t epoch) const;
  // Appends the pieces that make a window: seq_length + 1 tokens, or at most seq_length with whole documents (then the
  // last token has no label). Throws missing_epoch, damaged_file, std::out_of_range if there is no such draw.
  void append_window(std::int64_t draw, std::int32_t source, std::vector<Piece>& pieces) const;
  // A document by its draw. Needs only the keys of its epoch. Throws as append_window.
  DocumentPlace document(std::int64_t draw) const;

  // Counts of windows or documents first..first+count-1 by draw, written row by row: content tokens of each language
  // of the run (int32 [count, num_languages]), tokens that are no padding, and ends of documents among them that are
  // end-of-document tokens. Windows of cut streams and documents alike. Throws as append_window.
  struct Counts {
    std::int32_t* content;       // [count, num_languages]
    std::int32_t* tokens;        // [count]
    std::int32_t* eod;           // [count]
    std::int64_t num_languages;
  };
  void count_windows(std::int64_t first, std::int64_t count, const Counts& counts, int num_threads) const;
  void count_documents(std::int64_t first, std::int64_t count, const Counts& counts, int num_threads) const;

  // Documents whose first token is in one of the first windows drawn, and documents cut by a border of one of them; a
  // document counts once per epoch. Documents without tokens count for nothing.
  struct DocumentsRead {
    std::int64_t begun;
    std::int64_t cut;
  };
  DocumentsRead documents_read(std::int64_t num_windows, int num_threads) const;

  // Of one reading of the part: tokens, and content tokens of each language of the run.
  struct Totals {
    std::int64_t tokens;
    std::vector<std::int64_t> content;
  };
  Totals totals(std::int64_t num_languages, int num_threads) const;

 private:
  struct Epoch;
  TokenFileView file_;
  Cutting cutting_;
  Permutation split_;
  bool has_split_;
  std::int64_t part_begin_, part_end_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Epoch>> epochs_;
};

}  // namespace xalign
