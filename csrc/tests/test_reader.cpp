#include "xalign/reader.h"

#include <stdexcept>
#include <thread>

#include "check.h"
#include "made_file.h"

using xalign::Content;
using xalign::ListedSamples;
using xalign::Piece;
using xalign::SourceStream;
using xalign::Streams;

namespace {

// Buffers of a batch, filled with numbers that a reader never writes.
struct Buffers {
  Buffers(std::size_t rows, std::size_t seq_length)
      : tokens(rows * seq_length, 77), labels(tokens), positions(tokens), loss(tokens.size(), 7.0F),
        languages(tokens.size(), 77), label_languages(languages), sources(tokens.size(), 77),
        documents(tokens.size(), 77) {}
  xalign::BatchArrays arrays() {
    return {tokens.data(), labels.data(), positions.data(), loss.data(),
            languages.data(), label_languages.data(), sources.data(), documents.data()};
  }
  std::vector<std::int64_t> tokens, labels, positions;
  std::vector<float> loss;
  std::vector<std::int8_t> languages, label_languages;
  std::vector<std::int16_t> sources;
  std::vector<std::int32_t> documents;
};

// Samples made of given pieces.
class GivenPieces final : public xalign::SampleIndex {
 public:
  explicit GivenPieces(std::vector<std::vector<Piece>> samples) : samples_(std::move(samples)) {}
  std::int64_t num_samples() const override { return static_cast<std::int64_t>(samples_.size()); }
  void append_pieces(std::int64_t sample, const Streams&, std::vector<Piece>& pieces) const override {
    const auto& of_sample = samples_.at(static_cast<std::size_t>(sample));
    pieces.insert(pieces.end(), of_sample.begin(), of_sample.end());
  }

 private:
  std::vector<std::vector<Piece>> samples_;
};

std::shared_ptr<SourceStream> stream_of(const xalign::TokenFileView& file, std::int64_t seq_length) {
  return std::make_shared<SourceStream>(file, xalign::Cutting{seq_length, false}, std::nullopt, 0, file.num_documents);
}

std::vector<xalign::MissingEpoch> read(const xalign::SampleIndex& index, const Streams& streams,
                                       const std::vector<std::int64_t>& samples, std::int64_t seq_length,
                                       const xalign::ReadOptions& options, Buffers& buffers) {
  return xalign::read_batch(index, streams, samples.data(), samples.size(), seq_length, options, buffers.arrays());
}

template <typename T>
using V = std::vector<T>;

}  // namespace

void a_sample_of_pieces_is_written_as_stated() {
  MadeFile plain({4, 6}), pairs({7, 3}, true, Content::spans);
  const Streams streams = {stream_of(plain.view(), 8), stream_of(pairs.view(), 8)};
  // The end of one document, a document of the other source and the beginning of the next; then a short sample.
  const GivenPieces index({{{0, 0, 2, 2}, {1, 0, 0, 7}}, {{1, 1, 0, 3}}, {{0, 1, 0, 6}, {0, 0, 0, 3}}, {}});
  for (const bool reset : {false, true}) {
    Buffers got(4, 8);
    CHECK(read(index, streams, {0, 1, 2, 3}, 8, {99, reset, true}, got).empty());
    // Document 0 of the first: 1 2 3 end; of the second: 1 2 3 4 5 6 end, by threes of two languages.
    CHECK(V<std::int64_t>(got.tokens.begin(), got.tokens.begin() + 8) == (V<std::int64_t>{3, 0, 1, 2, 3, 4, 5, 6}));
    CHECK(V<std::int64_t>(got.labels.begin(), got.labels.begin() + 8) == (V<std::int64_t>{0, 1, 2, 3, 4, 5, 6, 0}));
    CHECK(V<std::int8_t>(got.languages.begin(), got.languages.begin() + 8) ==
          (V<std::int8_t>{3, -1, 3, 3, 3, 1, 1, 1}));
    CHECK(V<std::int8_t>(got.label_languages.begin(), got.label_languages.begin() + 8) ==
          (V<std::int8_t>{-1, 3, 3, 3, 1, 1, 1, -1}));
    CHECK(V<float>(got.loss.begin(), got.loss.begin() + 8) == (V<float>{1, 0, 1, 1, 1, 1, 1, 1}));
    CHECK(V<std::int16_t>(got.sources.begin(), got.sources.begin() + 8) ==
          (V<std::int16_t>{0, 0, 1, 1, 1, 1, 1, 1}));
    CHECK(V<std::int32_t>(got.documents.begin(), got.documents.begin() + 8) ==
          (V<std::int32_t>{0, 0, 1, 1, 1, 1, 1, 1}));
    const V<std::int64_t> in_documents = {0, 1, 0, 1, 2, 3, 4, 5}, in_sample = {0, 1, 2, 3, 4, 5, 6, 7};
    CHECK(V<std::int64_t>(got.positions.begin(), got.positions.begin() + 8) == (reset ? in_documents : in_sample));
    // The second: document 1 of the pairs is 32 33 end, then padding.
    CHECK(V<std::int64_t>(got.tokens.begin() + 8, got.tokens.begin() + 16) ==
          (V<std::int64_t>{32, 33, 0, 99, 99, 99, 99, 99}));
    CHECK(V<std::int64_t>(got.labels.begin() + 8, got.labels.begin() + 16) ==
          (V<std::int64_t>{33, 0, 99, 99, 99, 99, 99, 99}));
    CHECK(V<float>(got.loss.begin() + 8, got.loss.begin() + 16) == (V<float>{1, 1, 0, 0, 0, 0, 0, 0}));
    CHECK(V<std::int8_t>(got.languages.begin() + 8, got.languages.begin() + 16) ==
          (V<std::int8_t>{3, 3, -1, -1, -1, -1, -1, -1}));
    CHECK(V<std::int16_t>(got.sources.begin() + 8, got.sources.begin() + 16) ==
          (V<std::int16_t>{1, 1, 1, -1, -1, -1, -1, -1}));
    CHECK(V<std::int32_t>(got.documents.begin() + 8, got.documents.begin() + 16) ==
          (V<std::int32_t>{0, 0, 0, -1, -1, -1, -1, -1}));
    const V<std::int64_t> reset_positions = {0, 1, 2, 0, 1, 2, 3, 4};
    CHECK(V<std::int64_t>(got.positions.begin() + 8, got.positions.begin() + 16) ==
          (reset ? reset_positions : in_sample));
    // The third ends with a label that is the last of what was read.
    CHECK(got.labels[23] == 3 && got.loss[23] == 1.0F && got.label_languages[23] == 3);
    // The fourth holds nothing.
    CHECK(got.tokens[24] == 99 && got.loss[24] == 0.0F && got.documents[31] == -1 && got.positions[31] == 7);
  }
}

void positions_in_the_sample_need_no_place() {
  MadeFile plain({4, 6});
  const Streams streams = {stream_of(plain.view(), 8)};
  const GivenPieces index({{{0, 0, 2, 2}, {0, 1, 0, 6}}});
  Buffers with(1, 8), without(1, 8);
  CHECK(read(index, streams, {0}, 8, {99, false, true}, with).empty());
  xalign::BatchArrays arrays = without.arrays();
  arrays.position_ids = nullptr;
  const std::int64_t sample = 0;
  CHECK(xalign::read_batch(index, streams, &sample, 1, 8, {99, false, true}, arrays).empty());
  CHECK(without.tokens == with.tokens && without.labels == with.labels && without.loss == with.loss);
  CHECK(without.documents == with.documents && without.positions == V<std::int64_t>(8, 77));
  CHECK_THROWS(xalign::read_batch(index, streams, &sample, 1, 8, {99, true, true}, arrays), std::invalid_argument);
}

void many_threads_read_the_same() {
  std::vector<std::int64_t> lengths;
  for (std::int64_t i = 0; i < 3000; ++i) lengths.push_back(i % 17 + 1);
  MadeFile file(lengths, true, Content::spans);
  auto stream = stream_of(file.view(), 32);
  stream->set_keys(0, 1, 2);
  const auto starts = stream->build_starts(0, 2);
  const auto size = static_cast<std::size_t>(starts.back() - 1) / 32;
  std::vector<std::int64_t> draws(2 * size), samples(2 * size);
  for (std::size_t i = 0; i < 2 * size; ++i) samples[i] = draws[i] = static_cast<std::int64_t>(i);
  const ListedSamples index(std::vector<std::int32_t>(2 * size, 0), draws);
  const Streams streams = {stream};
  Buffers none(2 * size, 32);
  CHECK(read(index, streams, samples, 32, {}, none)[0].epoch == 0);
  CHECK(none.tokens[0] == 77);
  stream->use_starts(0, starts.data(), starts.size(), nullptr);
  // Others read the first epoch while the second one appears.
  std::vector<Buffers> buffers(4, Buffers(size, 32));
  const std::vector<std::int64_t> first(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(size));
  std::vector<std::thread> threads;
  for (auto& own : buffers) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) CHECK(read(index, streams, first, 32, {}, own).empty());
    });
  }
  stream->set_keys(1, 3, 4);
  const auto more = stream->build_starts(1, 2);
  stream->use_starts(1, more.data(), more.size(), nullptr);
  Buffers all(2 * size, 32);
  CHECK(read(index, streams, samples, 32, {}, all).empty());
  for (auto& thread : threads) thread.join();
  for (const auto& own : buffers) {
    CHECK(own.tokens == buffers[0].tokens);
    CHECK(std::equal(own.tokens.begin(), own.tokens.end(), all.tokens.begin()));
  }
}

void contradictions_are_refused() {
  MadeFile file({4, 6});
  const Streams streams = {stream_of(file.view(), 8)};
  Buffers buffers(1, 8);
  const std::vector<std::vector<Piece>> wrong = {
      {{-1, 0, 0, 1}}, {{1, 0, 0, 1}},  {{0, -1, 0, 1}}, {{0, 2, 0, 1}},
      {{0, 0, -1, 1}}, {{0, 0, 0, 0}},  {{0, 0, 0, -1}}, {{0, 0, 3, 2}},
      {{0, 0, 5, 1}},  {{0, 1, 0, 6}, {0, 0, 0, 4}},  // one token more than a sample
      {{0, 0, 1, std::int64_t{0x7FFFFFFFFFFFFFFF}}},
  };
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    const GivenPieces index({wrong[i]});
    CHECK_THROWS(read(index, streams, {0}, 8, {}, buffers), std::invalid_argument);
  }
  const GivenPieces index({{{0, 1, 0, 6}, {0, 0, 0, 3}}});
  CHECK(read(index, streams, {0}, 8, {}, buffers).empty());
  CHECK_THROWS(read(index, streams, {1}, 8, {}, buffers), std::out_of_range);
  CHECK_THROWS(read(index, streams, {-1}, 8, {}, buffers), std::out_of_range);
  CHECK_THROWS(read(index, streams, {0}, 0, {}, buffers), std::invalid_argument);
  CHECK_THROWS(read(index, Streams(32768, streams[0]), {0}, 8, {}, buffers), std::invalid_argument);
  CHECK_THROWS(ListedSamples({0}, {}), std::invalid_argument);
  CHECK_THROWS(ListedSamples({0}, {-1}), std::invalid_argument);
  CHECK_THROWS(read(ListedSamples({1}, {0}), streams, {0}, 8, {}, buffers), std::invalid_argument);
}

void every_kind_of_number_is_read() {
  const auto check = [](auto zero, xalign::TokenType type, bool is_signed) {
    using Token = decltype(zero);
    const Token tokens[] = {5, 120, 0, 7};
    const std::int64_t pointers[] = {0};
    xalign::TokenFileView file;
    file.name = "numbers";
    file.tokens = tokens;
    file.type = type;
    file.num_tokens = 4;
    file.num_documents = 1;
    file.pointers = pointers;
    file.run_language = {0};
    const GivenPieces index({{{0, 0, 0, 4}}});
    Buffers buffers(1, 4);
    CHECK(read(index, {stream_of(file, 4)}, {0}, 4, {}, buffers).empty());
    CHECK(buffers.tokens == (V<std::int64_t>{5, 120, 0, 7}));
    file.vocab_size = 121;
    CHECK(read(index, {stream_of(file, 4)}, {0}, 4, {}, buffers).empty());
    file.vocab_size = 120;
    CHECK_THROWS(read(index, {stream_of(file, 4)}, {0}, 4, {}, buffers), xalign::damaged_file);
    if (is_signed) {
      const Token negative[] = {5, static_cast<Token>(-1), 0, 7};
      file.tokens = negative;
      file.vocab_size = 0;
      CHECK_THROWS(read(index, {stream_of(file, 4)}, {0}, 4, {}, buffers), xalign::damaged_file);
    }
  };
  check(std::uint8_t{0}, xalign::TokenType::uint8, false);
  check(std::int8_t{0}, xalign::TokenType::int8, true);
  check(std::int16_t{0}, xalign::TokenType::int16, true);
  check(std::uint16_t{0}, xalign::TokenType::uint16, false);
  check(std::int32_t{0}, xalign::TokenType::int32, true);
  check(std::int64_t{0}, xalign::TokenType::int64, true);
}

int main() {
  a_sample_of_pieces_is_written_as_stated();
  positions_in_the_sample_need_no_place();
  many_threads_read_the_same();
  contradictions_are_refused();
  every_kind_of_number_is_read();
}
