// A source's documents as one stream of tokens, cut into windows of equal length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Where a window begins: a document by its position in the stream, and a token of it.
struct Border {
  std::int64_t document;
  std::int64_t offset;
};

// The windows that a stream of documents is cut into. Window w reads the tokens w * seq_length .. (w + 1) * seq_length,
// both included: its last token is the label of the one before and begins the next window. Returns the first token of
// every whole window and, last, the token that ends the last one: num_windows + 1 borders, where num_windows =
// (tokens - 1) / seq_length rounded down. Empty if there is not one window. The same as Megatron's build_sample_idx for
// one epoch with its extra token. Throws std::invalid_argument on a negative length or a seq_length below 1, and
// std::overflow_error if the lengths add up to more than int64 holds.
template <typename Length>
std::vector<Border> sample_index(const Length* document_lengths, std::size_t num_documents, std::int64_t seq_length);

// How many tokens of each language come before each position: [num_positions, num_languages], row-major. Tokens of
// language -1 count for none. Positions must not decrease and lie in 0..num_tokens. Throws std::invalid_argument
// otherwise, or if a language is outside -1..num_languages-1.
std::vector<std::int64_t> count_languages(const std::int8_t* language_ids, std::size_t num_tokens,
                                          const std::int64_t* positions, std::size_t num_positions,
                                          std::size_t num_languages);

// The pieces tokens[starts[i] .. stops[i]) one after the other, widened to int64. Throws std::invalid_argument if a
// piece is not inside the tokens.
template <typename Token>
std::vector<std::int64_t> gather(const Token* tokens, std::size_t num_tokens, const std::int64_t* starts,
                                 const std::int64_t* stops, std::size_t num_pieces);

}  // namespace xalign
