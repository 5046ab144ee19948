#include "xalign/reader.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

constexpr std::size_t kMostStreams = std::numeric_limits<std::int16_t>::max();

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// A piece whose place in its file is known.
struct PlacedPiece {
  std::int32_t source;
  std::int64_t document;
  std::int64_t length;  // of the whole document
  std::int64_t begin;
  std::int64_t tokens;
  std::int64_t first;  // token of the file
};

// Widens tokens to int64, into two places at once: inputs, and the labels of the inputs before them. False if one is
// negative or, with a vocabulary, not below its size.
template <typename Token>
bool widen(const void* from, std::int64_t first, std::int64_t count, std::int64_t vocab_size,
           std::int64_t* __restrict inputs, std::int64_t* __restrict labels) {
  // The sign bit of `outside` is set by any id that is outside.
  const std::int64_t last = vocab_size > 0 ? vocab_size - 1 : std::numeric_limits<std::int64_t>::max();
  if (sizeof(Token) <= 2) {
    // Two bytes fit into 32 bits with room for the difference, and twice as many of those share an instruction.
    const auto last_32 = static_cast<std::int32_t>(std::min<std::int64_t>(last, 1 << 20));
    std::int32_t outside = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto token = static_cast<std::int32_t>(item<Token>(from, first + i));
      inputs[i] = token;
      labels[i] = token;
      outside |= token | (last_32 - token);
    }
    return outside >= 0;
  }
  std::int64_t outside = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto token = static_cast<std::int64_t>(item<Token>(from, first + i));
    inputs[i] = token;
    labels[i] = token;
    outside |= token | (token > last ? std::int64_t{-1} : 0);
  }
  return outside >= 0;
}

bool widen(const TokenFileView& file, std::int64_t first, std::int64_t count, std::int64_t* inputs,
           std::int64_t* labels) {
  switch (file.type) {
    case TokenType::uint8: return widen<std::uint8_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
    case TokenType::int8: return widen<std::int8_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
    case TokenType::int16: return widen<std::int16_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
    case TokenType::uint16: return widen<std::uint16_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
    case TokenType::int32: return widen<std::int32_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
    case TokenType::int64: return widen<std::int64_t>(file.tokens, first, count, file.vocab_size, inputs, labels);
  }
  throw std::invalid_argument("a token type that there is not.");
}

// One row of a batch being filled.
class Row {
 public:
  Row(const Streams& streams, std::int64_t seq_length, const ReadOptions& options)
      : streams_(streams),
        seq_length_(seq_length),
        options_(options),
        languages_(static_cast<std::size_t>(seq_length) + 1) {}

  void fill(const PlacedPiece* pieces, std::size_t num_pieces, const BatchArrays& batch, std::int64_t row) {
    const std::int64_t at = row * seq_length_;
    std::int64_t* const tokens = batch.tokens + at;
    std::int64_t* const labels = batch.labels + at;
    std::int64_t* const positions = batch.position_ids ? batch.position_ids + at : nullptr;
    float* const loss = batch.loss_mask + at;
    std::fill(loss, loss + seq_length_, 1.0F);
    if (positions && !options_.reset_position_ids) count_up(positions, seq_length_);
    std::int64_t done = 0;
    for (std::size_t i = 0; i < num_pieces; ++i) {
      const PlacedPiece& piece = pieces[i];
      const std::int64_t inputs = std::min(piece.tokens, seq_length_ - done);
      read_tokens(piece, done, tokens, labels);
      read_languages(piece, tokens + done, inputs, labels[seq_length_ - 1], languages_.data() + done);
      std::fill_n(batch.source_ids + at + done, inputs, static_cast<std::int16_t>(piece.source));
      std::fill_n(batch.document_ids + at + done, inputs, static_cast<std::int32_t>(i));
      if (options_.reset_position_ids) count_up(positions + done, inputs);
      if (options_.eod_mask_loss) mask_eod(piece, tokens + done, languages_.data() + done, inputs, loss + done);
      done += piece.tokens;
    }
    // What is left has no input; and the last token, unless it is a label itself, has none.
    const std::int64_t inputs = std::min(done, seq_length_), missing = seq_length_ - inputs;
    std::fill_n(tokens + inputs, missing, options_.padding_token);
    std::fill(languages_.begin() + done, languages_.end(), std::int8_t{-1});
    std::fill_n(batch.source_ids + at + inputs, missing, std::int16_t{-1});
    std::fill_n(batch.document_ids + at + inputs, missing, std::int32_t{-1});
    if (options_.reset_position_ids) count_up(positions + inputs, missing);
    const std::int64_t num_labels = std::max<std::int64_t>(done - 1, 0);
    std::fill(labels + num_labels, labels + seq_length_, options_.padding_token);
    std::fill(loss + num_labels, loss + seq_length_, 0.0F);
    std::copy_n(languages_.begin(), seq_length_, batch.language_ids + at);
    std::copy_n(languages_.begin() + 1, seq_length_, batch.label_language_ids + at);
  }

 private:
  static void count_up(std::int64_t* numbers, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) numbers[i] = i;
  }

  const TokenFileView& file_of(const PlacedPiece& piece) const {
    return streams_[static_cast<std::size_t>(piece.source)]->file();
  }

  // Token `done` of the row and those after it. Not by copying inputs to labels: the two lie at the same place of
  // different pages, where a processor takes a load for one that has to wait for the store just before.
  void read_tokens(const PlacedPiece& piece, std::int64_t done, std::int64_t* tokens, std::int64_t* labels) const {
    const TokenFileView& file = file_of(piece);
    std::int64_t none = 0;
    const std::int64_t begin = done == 0, end = std::min(piece.tokens, seq_length_ - done);
    bool good = begin == 0 || widen(file, piece.first, 1, tokens, &none);
    good &= begin >= end ||
            widen(file, piece.first + begin, end - begin, tokens + done + begin, labels + done + begin - 1);
    good &= end == piece.tokens || widen(file, piece.first + end, 1, &none, labels + seq_length_ - 1);
    if (!good) {
      throw damaged_file(file.name + ": document " + std::to_string(piece.document) +
                         " has a token id outside its vocabulary of " + std::to_string(file.vocab_size) +
                         "; the file is damaged.");
    }
  }

  // Of all tokens of a piece, the one behind its inputs included if there is one.
  void read_languages(const PlacedPiece& piece, const std::int64_t* tokens, std::int64_t inputs, std::int64_t behind,
                      std::int8_t* languages) const {
    const TokenFileView& file = file_of(piece);
    if (file.content == Content::spans) return read_spans(piece, languages);
    std::fill_n(languages, piece.tokens, file.run_language[0]);
    if (file.content == Content::all_but_last) {
      if (piece.begin + piece.tokens == piece.length) languages[piece.tokens - 1] = -1;
    } else if (file.content == Content::not_eod) {
      for (std::int64_t i = 0; i < inputs; ++i) languages[i] = tokens[i] == file.eod ? std::int8_t{-1} : languages[i];
      if (inputs < piece.tokens && behind == file.eod) languages[inputs] = -1;
    }
  }

  void read_spans(const PlacedPiece& piece, std::int8_t* languages) const {
    const TokenFileView& file = file_of(piece);
    auto span = file.span_at(piece.first, piece.document, piece.begin == 0);
    for (std::int64_t done = 0; done < piece.tokens;) {
      const std::int64_t until = std::min(span.end - piece.first, piece.tokens);
      const std::int8_t language =
          span.language < 0 ? std::int8_t{-1} : file.run_language[static_cast<std::size_t>(span.language)];
      std::fill(languages + done, languages + until, language);
      done = until;
      if (done < piece.tokens) span = file.span_after(span, piece.document);
    }
    if (piece.begin + piece.tokens == piece.length) {
      file.check_last(span, piece.document, piece.first + piece.tokens);
    }
  }

  // The same tokens as TokenFileView::count counts.
  void mask_eod(const PlacedPiece& piece, const std::int64_t* tokens, const std::int8_t* languages, std::int64_t inputs,
                float* loss) const {
    const TokenFileView& file = file_of(piece);
    if (file.content == Content::not_eod) {
      for (std::int64_t i = 0; i < inputs; ++i) {
        if (tokens[i] == file.eod) loss[i] = 0.0F;
      }
    } else if (file.content != Content::all && inputs > 0 && piece.begin + inputs == piece.length) {
      if (languages[inputs - 1] < 0) loss[inputs - 1] = 0.0F;
    }
  }

  const Streams& streams_;
  std::int64_t seq_length_;
  const ReadOptions& options_;
  std::vector<std::int8_t> languages_;  // one more than seq_length: the last is only a label's
};

// Bytes of a cache line; and how many of a piece are asked for before they are read.
constexpr std::int64_t kLine = 64, kMostPrefetched = 512;

void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// Has what says where pieces lie on its way to the cache; it is used once the pieces of all samples are known.
void ask_for_places(const std::vector<Piece>& pieces, std::size_t first, const Streams& streams) {
  for (std::size_t i = first; i < pieces.size(); ++i) {
    const auto source = static_cast<std::size_t>(pieces[i].source);
    if (source >= streams.size()) return;
    const TokenFileView& file = streams[source]->file();
    if (pieces[i].document < 0 || pieces[i].document >= file.num_documents) return;
    prefetch(static_cast<const char*>(file.pointers) + pieces[i].document * 8);
  }
}

// Where a piece lies in its file; its first tokens are on their way to the cache when this returns.
PlacedPiece place(const Piece& piece, const Streams& streams) {
  if (piece.source < 0 || static_cast<std::size_t>(piece.source) >= streams.size()) {
    throw std::invalid_argument("the sample index names source " + std::to_string(piece.source) + " of " +
                                std::to_string(streams.size()) + ".");
  }
  const TokenFileView& file = streams[static_cast<std::size_t>(piece.source)]->file();
  if (piece.document < 0 || piece.document >= file.num_documents) {
    throw std::invalid_argument("the sample index names document " + std::to_string(piece.document) + " of " +
                                file.name + ", which has " + std::to_string(file.num_documents) + ".");
  }
  const std::int64_t length = file.length(piece.document);
  if (piece.begin < 0 || piece.tokens <= 0 || piece.begin > length || piece.tokens > length - piece.begin) {
    throw std::invalid_argument("the sample index names tokens " + std::to_string(piece.begin) + " and " +
                                std::to_string(piece.tokens) + " from there on of document " +
                                std::to_string(piece.document) + " of " + file.name + ", which has " +
                                std::to_string(length) + ".");
  }
  const std::int64_t first = file.start(piece.document, length) + piece.begin;
  // What is read on and on after that, a processor fetches ahead by itself.
  const char* const from = static_cast<const char*>(file.tokens) + first * bytes_of(file.type);
  const std::int64_t bytes = std::min(piece.tokens * bytes_of(file.type), kMostPrefetched);
  for (std::int64_t at = 0; at < bytes; at += kLine) prefetch(from + at);
  prefetch(from + bytes - 1);
  return {piece.source, piece.document, length, piece.begin, piece.tokens, first};
}

}  // namespace

ListedSamples::ListedSamples(std::vector<std::int32_t> sources, std::vector<std::int64_t> draws)
    : sources_(std::move(sources)), draws_(std::move(draws)) {
  require(sources_.size() == draws_.size(), "sources and draws differ in length.");
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    if (sources_[i] < 0 || draws_[i] < 0) {
      throw std::invalid_argument("sample " + std::to_string(i) + " has a negative source or draw.");
    }
  }
}

void ListedSamples::append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const {
  if (sample < 0 || sample >= num_samples()) {
    throw std::out_of_range("sample " + std::to_string(sample) + " of " + std::to_string(num_samples()) + ".");
  }
  const auto at = static_cast<std::size_t>(sample);
  const auto source = static_cast<std::size_t>(sources_[at]);
  if (source >= streams.size()) {
    throw std::invalid_argument("sample " + std::to_string(sample) + " is of source " + std::to_string(source) +
                                " of " + std::to_string(streams.size()) + ".");
  }
  streams[source]->append_window(draws_[at], sources_[at], pieces);
}

std::vector<MissingEpoch> read_batch(const SampleIndex& index, const Streams& streams, const std::int64_t* samples,
                                     std::size_t num_samples, std::int64_t seq_length, const ReadOptions& options,
                                     const BatchArrays& batch) {
  require(seq_length >= 1, "seq_length=" + std::to_string(seq_length) + " is below 1.");
  require(batch.position_ids || !options.reset_position_ids, "position_ids that start again have to be written.");
  require(streams.size() <= kMostStreams, "there are " + std::to_string(streams.size()) + " sources; source ids have " +
                                              std::to_string(kMostStreams) + " numbers.");
  std::vector<Piece> pieces;
  std::vector<std::size_t> ends;
  std::vector<MissingEpoch> missing;
  ends.reserve(num_samples);
  for (std::size_t i = 0; i < num_samples; ++i) {
    if (samples[i] < 0 || samples[i] >= index.num_samples()) {
      throw std::out_of_range("sample " + std::to_string(samples[i]) + " of " + std::to_string(index.num_samples()) + ".");
    }
    try {
      index.append_pieces(samples[i], streams, pieces);
    } catch (const missing_epoch& absent) {
      for (std::size_t source = 0; source < streams.size(); ++source) {
        if (streams[source].get() == absent.stream) {
          missing.push_back({static_cast<std::int32_t>(source), absent.epoch});
        }
      }
      if (missing.empty()) throw;
    }
    ask_for_places(pieces, ends.empty() ? 0 : ends.back(), streams);
    ends.push_back(pieces.size());
  }
  if (!missing.empty()) return missing;

  std::vector<PlacedPiece> placed;
  placed.reserve(pieces.size());
  std::size_t begin = 0;
  for (std::size_t i = 0; i < num_samples; ++i) {
    std::int64_t tokens = 0;
    for (std::size_t at = begin; at < ends[i]; ++at) {
      placed.push_back(place(pieces[at], streams));
      tokens += pieces[at].tokens;
      if (tokens > seq_length + 1) {
        throw std::invalid_argument("the sample index gives sample " + std::to_string(samples[i]) +
                                    " more than seq_length + 1 tokens.");
      }
    }
    begin = ends[i];
  }
  Row row(streams, seq_length, options);
  begin = 0;
  for (std::size_t i = 0; i < num_samples; ++i) {
    row.fill(placed.data() + begin, ends[i] - begin, batch, static_cast<std::int64_t>(i));
    begin = ends[i];
  }
  return missing;
}

}  // namespace xalign
