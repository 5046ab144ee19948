#include "xalign/windows.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace xalign {

template <typename Length>
std::vector<Border> sample_index(const Length* document_lengths, std::size_t num_documents, std::int64_t seq_length) {
  if (seq_length < 1) throw std::invalid_argument("seq_length=" + std::to_string(seq_length) + " is below 1.");
  std::int64_t tokens = 0;
  for (std::size_t d = 0; d < num_documents; ++d) {
    const auto length = static_cast<std::int64_t>(document_lengths[d]);
    if (length < 0) {
      throw std::invalid_argument("document " + std::to_string(d) + " has a length of " + std::to_string(length) + ".");
    }
    if (length > std::numeric_limits<std::int64_t>::max() - tokens) {
      throw std::overflow_error("document lengths add up to more than int64 holds.");
    }
    tokens += length;
  }
  std::vector<Border> borders;
  if (tokens <= seq_length) return borders;
  const std::int64_t num_windows = (tokens - 1) / seq_length;
  borders.reserve(static_cast<std::size_t>(num_windows) + 1);
  std::int64_t before = 0, next = 0;
  const std::int64_t last = num_windows * seq_length;
  for (std::size_t d = 0; d < num_documents && next <= last; ++d) {
    const auto length = static_cast<std::int64_t>(document_lengths[d]);
    while (next <= last && next - before < length) {
      borders.push_back({static_cast<std::int64_t>(d), next - before});
      // The step past the last border may be past int64 too.
      if (next == last) return borders;
      next += seq_length;
    }
    before += length;
  }
  return borders;
}

template std::vector<Border> sample_index(const std::int32_t*, std::size_t, std::int64_t);
template std::vector<Border> sample_index(const std::int64_t*, std::size_t, std::int64_t);

std::vector<std::int64_t> count_languages(const std::int8_t* language_ids, std::size_t num_tokens,
                                          const std::int64_t* positions, std::size_t num_positions,
                                          std::size_t num_languages) {
  std::vector<std::int64_t> counts(num_positions * num_languages);
  std::vector<std::int64_t> so_far(num_languages, 0);
  std::size_t token = 0;
  for (std::size_t p = 0; p < num_positions; ++p) {
    if (positions[p] < static_cast<std::int64_t>(token) || positions[p] > static_cast<std::int64_t>(num_tokens)) {
      throw std::invalid_argument("position " + std::to_string(positions[p]) + " is outside 0.." +
                                  std::to_string(num_tokens) + " or below the one before it.");
    }
    for (; token < static_cast<std::size_t>(positions[p]); ++token) {
      const std::int8_t language = language_ids[token];
      if (language < -1 || language >= static_cast<std::int64_t>(num_languages)) {
        throw std::invalid_argument("token " + std::to_string(token) + " has language " + std::to_string(language) +
                                    " of " + std::to_string(num_languages) + ".");
      }
      if (language >= 0) ++so_far[static_cast<std::size_t>(language)];
    }
    for (std::size_t k = 0; k < num_languages; ++k) counts[p * num_languages + k] = so_far[k];
  }
  return counts;
}

template <typename Token>
std::vector<std::int64_t> gather(const Token* tokens, std::size_t num_tokens, const std::int64_t* starts,
                                 const std::int64_t* stops, std::size_t num_pieces) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < num_pieces; ++i) {
    if (starts[i] < 0 || stops[i] < starts[i] || stops[i] > static_cast<std::int64_t>(num_tokens)) {
      throw std::invalid_argument("tokens " + std::to_string(starts[i]) + ".." + std::to_string(stops[i]) +
                                  " are outside 0.." + std::to_string(num_tokens) + ".");
    }
    total += static_cast<std::size_t>(stops[i] - starts[i]);
  }
  std::vector<std::int64_t> gathered;
  gathered.reserve(total);
  for (std::size_t i = 0; i < num_pieces; ++i) {
    for (std::int64_t at = starts[i]; at < stops[i]; ++at) gathered.push_back(static_cast<std::int64_t>(tokens[at]));
  }
  return gathered;
}

template std::vector<std::int64_t> gather(const std::uint8_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);
template std::vector<std::int64_t> gather(const std::int8_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);
template std::vector<std::int64_t> gather(const std::uint16_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);
template std::vector<std::int64_t> gather(const std::int16_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);
template std::vector<std::int64_t> gather(const std::int32_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);
template std::vector<std::int64_t> gather(const std::int64_t*, std::size_t, const std::int64_t*, const std::int64_t*,
                                          std::size_t);

}  // namespace xalign
