// A token file as its memory maps hold it, with everything checked at the moment it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace xalign {

// A token file contradicts itself: the message names the file and the document.
class damaged_file : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class TokenType { uint8, int8, int16, uint16, int32, int64 };
std::int64_t bytes_of(TokenType type);

// Which tokens of a file belong to a language.
enum class Content {
  all,           // every one
  all_but_last,  // every one but the last of each document, its end-of-document token
  spans,         // as the spans say; the last of a document is an end-of-document token if it has no language
  not_eod,       // every one that is not the end-of-document id
};

// Item `index` of an array that may lie at any address, as arrays behind a header do.
template <typename T>
inline T item(const void* array, std::int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(array) + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// Nothing in the memory is trusted.
struct TokenFileView {
  std::string name;  // for messages
  const void* tokens = nullptr;
  TokenType type = TokenType::uint16;
  std::int64_t num_tokens = 0;
  std::int64_t vocab_size = 0;  // ids are below; 0: not known
  std::int64_t num_documents = 0;
  const void* lengths = nullptr;   // int32 [num_documents] in tokens; nullptr: a document ends where the next begins
  const void* pointers = nullptr;  // int64 [num_documents] in bytes
  Content content = Content::all;
  std::int64_t eod = -1;                 // for Content::not_eod
  const void* span_ends = nullptr;       // int64 [num_spans], exclusive, in tokens of the file, increasing
  const void* span_languages = nullptr;  // int8 [num_spans], language of the file or -1
  std::int64_t num_spans = 0;
  std::shared_ptr<void> keeper;           // of the memory, if it needs one
  std::vector<std::int8_t> run_language;  // language of the run of each language of the file; one, unless with spans

  // Throws std::invalid_argument if a field contradicts another.
  void check() const;
  std::size_t num_languages() const { return run_language.size(); }

  // Tokens of a document, at most 2^31 - 1. Throws damaged_file.
  std::int64_t length(std::int64_t document) const {
    if (lengths == nullptr) return distance_to_next(document);
    const auto tokens_in_it = item<std::int32_t>(lengths, document);
    if (tokens_in_it < 0) bad_length(document, tokens_in_it);
    return tokens_in_it;
  }
  // The file's token that a document begins with, where `length` tokens follow. Throws damaged_file.
  std::int64_t start(std::int64_t document, std::int64_t length) const;

  // The span that a token lies in, the span after it, and a check that a document's last span ends with it. Throw
  // damaged_file; span_at also if the token is a document's first and no span begins with it.
  struct Span {
    std::int64_t index;
    std::int64_t end;
    std::int8_t language;  // of the file, or -1
  };
  Span span_at(std::int64_t token, std::int64_t document, bool is_first) const;
  Span span_after(const Span& span, std::int64_t document) const;
  void check_last(const Span& span, std::int64_t document, std::int64_t document_end) const {
    if (span.end != document_end) bad_spans(document);
  }

  // What tokens begin..end-1 of a document of `length` tokens are: adds those of each language of the file to
  // languages[num_languages()], and 1 to eod_tokens if they hold its end-of-document token (the number of such tokens
  // with Content::not_eod). Throws damaged_file.
  void count(std::int64_t document, std::int64_t length, std::int64_t begin, std::int64_t end, std::int64_t* languages,
             std::int64_t* eod_tokens) const {
    if (begin >= end) return;
    if (content == Content::all_but_last) {
      const bool with_last = end == length;
      languages[0] += end - begin - with_last;
      *eod_tokens += with_last;
    } else if (content == Content::all) {
      languages[0] += end - begin;
    } else {
      count_by_reading(document, length, begin, end, languages, eod_tokens);
    }
  }

 private:
  std::int64_t distance_to_next(std::int64_t document) const;
  void count_by_reading(std::int64_t document, std::int64_t length, std::int64_t begin, std::int64_t end,
                        std::int64_t* languages, std::int64_t* eod_tokens) const;
  [[noreturn]] void bad_length(std::int64_t document, std::int64_t length) const;
  [[noreturn]] void bad_spans(std::int64_t document) const;
  Span span(std::int64_t index, std::int64_t token, std::int64_t document) const;
};

}  // namespace xalign
