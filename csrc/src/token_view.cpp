#include "xalign/token_view.h"

#include <algorithm>
#include <limits>

namespace xalign {

namespace {

constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max();

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

template <typename Token>
std::int64_t count_equal(const void* tokens, std::int64_t first, std::int64_t count, std::int64_t id) {
  const auto wanted = static_cast<Token>(id);
  if (static_cast<std::int64_t>(wanted) != id) return 0;
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) found += item<Token>(tokens, first + i) == wanted;
  return found;
}

std::int64_t count_equal(const TokenFileView& file, std::int64_t first, std::int64_t count, std::int64_t id) {
  switch (file.type) {
    case TokenType::uint8: return count_equal<std::uint8_t>(file.tokens, first, count, id);
    case TokenType::int8: return count_equal<std::int8_t>(file.tokens, first, count, id);
    case TokenType::int16: return count_equal<std::int16_t>(file.tokens, first, count, id);
    case TokenType::uint16: return count_equal<std::uint16_t>(file.tokens, first, count, id);
    case TokenType::int32: return count_equal<std::int32_t>(file.tokens, first, count, id);
    case TokenType::int64: return count_equal<std::int64_t>(file.tokens, first, count, id);
  }
  throw std::invalid_argument("a token type that there is not.");
}

}  // namespace

std::int64_t bytes_of(TokenType type) {
  switch (type) {
    case TokenType::uint8:
    case TokenType::int8: return 1;
    case TokenType::int16:
    case TokenType::uint16: return 2;
    case TokenType::int32: return 4;
    case TokenType::int64: return 8;
  }
  throw std::invalid_argument("a token type that there is not.");
}

void TokenFileView::check() const {
  // So that no sum of positions and no product with a token's bytes leaves int64.
  constexpr std::int64_t kMost = std::int64_t{1} << 58;
  require(num_tokens >= 0 && num_tokens <= kMost, name + ": num_tokens is outside 0..2^58.");
  require(num_documents >= 0 && num_documents <= kMost, name + ": num_documents is outside 0..2^58.");
  require(num_spans >= 0 && num_spans <= kMost, name + ": num_spans is outside 0..2^58.");
  require(vocab_size >= 0, name + ": vocab_size is negative.");
  require(num_tokens == 0 || tokens != nullptr, name + ": there are no tokens.");
  require(num_documents == 0 || pointers != nullptr, name + ": there are no pointers to documents.");
  require(!run_language.empty() && run_language.size() <= 127, name + ": there must be 1 to 127 languages.");
  for (const std::int8_t language : run_language) require(language >= 0, name + ": a language of the run is negative.");
  if (content == Content::spans) {
    require(num_spans == 0 || (span_ends != nullptr && span_languages != nullptr), name + ": there are no spans.");
  } else {
    require(run_language.size() == 1, name + ": without spans there is one language.");
  }
}

void TokenFileView::bad_length(std::int64_t document, std::int64_t length) const {
  throw damaged_file(name + ": document " + std::to_string(document) + " has a length of " + std::to_string(length) +
                     " tokens; the index is damaged.");
}

void TokenFileView::bad_spans(std::int64_t document) const {
  throw damaged_file(name + ": the spans of document " + std::to_string(document) +
                     " do not cover it one after the other; they are damaged or of another index.");
}

std::int64_t TokenFileView::distance_to_next(std::int64_t document) const {
  const std::int64_t bytes = bytes_of(type), all = num_tokens * bytes;
  const auto from = item<std::int64_t>(pointers, document);
  const std::int64_t to = document + 1 < num_documents ? item<std::int64_t>(pointers, document + 1) : all;
  if (from < 0 || to > all || to < from || (to - from) % bytes != 0 || (to - from) / bytes > kLongest) {
    throw damaged_file(name + ": document " + std::to_string(document) + " lies in bytes " + std::to_string(from) +
                       ".." + std::to_string(to) + " of " + std::to_string(all) + "; the index is damaged.");
  }
  return (to - from) / bytes;
}

std::int64_t TokenFileView::start(std::int64_t document, std::int64_t length) const {
  const std::int64_t bytes = bytes_of(type);
  const auto from = item<std::int64_t>(pointers, document);
  if (from < 0 || from % bytes != 0 || from / bytes > num_tokens || length > num_tokens - from / bytes) {
    throw damaged_file(name + ": document " + std::to_string(document) + " has " + std::to_string(length) +
                       " tokens from byte " + std::to_string(from) + " on, in a file of " +
                       std::to_string(num_tokens * bytes) + " bytes; the index is damaged.");
  }
  return from / bytes;
}

TokenFileView::Span TokenFileView::span(std::int64_t index, std::int64_t token, std::int64_t document) const {
  if (index >= num_spans) bad_spans(document);
  const auto end = item<std::int64_t>(span_ends, index);
  const auto language = item<std::int8_t>(span_languages, index);
  if (end <= token || language < -1 || language >= static_cast<std::int64_t>(run_language.size())) bad_spans(document);
  return {index, end, language};
}

TokenFileView::Span TokenFileView::span_after(const Span& before, std::int64_t document) const {
  return span(before.index + 1, before.end, document);
}

TokenFileView::Span TokenFileView::span_at(std::int64_t token, std::int64_t document, bool is_first) const {
  // Mostly every document has as many spans as every other, and the token is the first of one.
  if (num_spans % num_documents == 0) {
    const std::int64_t guess = document * (num_spans / num_documents);
    if ((guess == 0 ? 0 : item<std::int64_t>(span_ends, guess - 1)) == token) return span(guess, token, document);
  }
  // Spans below `low` end at or before the token, spans from `high` on end after it. Spans are spread evenly enough
  // for a few guesses by proportion; halving then finds it whatever the file is like.
  std::int64_t low = 0, high = num_spans, low_token = 0, high_token = num_tokens;
  for (int guesses = 0; low < high; ++guesses) {
    std::int64_t middle = low + (high - low) / 2;
    const bool is_sane = 0 <= low_token && low_token <= token && token < high_token && high_token <= num_tokens;
    if (guesses < 8 && high - low > 16 && is_sane) {
      const double share = static_cast<double>(token - low_token) / static_cast<double>(high_token - low_token);
      middle = std::min(low + static_cast<std::int64_t>(share * static_cast<double>(high - low)), high - 1);
    }
    const auto end = item<std::int64_t>(span_ends, middle);
    if (end <= token) {
      low = middle + 1;
      low_token = end;
    } else {
      high = middle;
      high_token = end;
    }
  }
  if (is_first && (low == 0 ? 0 : item<std::int64_t>(span_ends, low - 1)) != token) bad_spans(document);
  return span(low, token, document);
}

void TokenFileView::count_by_reading(std::int64_t document, std::int64_t length, std::int64_t begin, std::int64_t end,
                                     std::int64_t* languages, std::int64_t* eod_tokens) const {
  const std::int64_t first = start(document, length);
  if (content == Content::not_eod) {
    const std::int64_t found = count_equal(*this, first + begin, end - begin, eod);
    languages[0] += end - begin - found;
    *eod_tokens += found;
    return;
  }
  const std::int64_t last = first + end;
  std::int64_t at = first + begin;
  for (Span here = span_at(at, document, begin == 0);; here = span_after(here, document)) {
    const std::int64_t stop = std::min(here.end, last);
    if (here.language >= 0) languages[here.language] += stop - at;
    at = stop;
    if (at == last) {
      if (end == length) check_last(here, document, last);
      *eod_tokens += end == length && here.language < 0;
      return;
    }
  }
}

}  // namespace xalign
