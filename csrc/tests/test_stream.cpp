#include "xalign/stream.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "check.h"
#include "made_file.h"

using xalign::Content;
using xalign::Counts;
using xalign::Permutation;
using xalign::Piece;
using xalign::SourceStream;

namespace {

using Longs = std::vector<std::int64_t>;
using Places = std::vector<std::pair<std::int64_t, std::int64_t>>;  // document and token of each token of a stream

Longs some_lengths(std::uint64_t seed, std::size_t size, std::uint64_t longest) {
  xalign::Xoshiro256 random(seed);
  Longs lengths(size);
  for (auto& length : lengths) length = static_cast<std::int64_t>(random.below(longest + 1));
  return lengths;
}

std::unique_ptr<SourceStream> indexed(const xalign::TokenFileView& file, std::int64_t seq_length, std::int64_t epochs,
                                      std::vector<Longs>& kept, int threads = 2) {
  auto stream = std::make_unique<SourceStream>(file, xalign::Cutting{seq_length, false}, std::nullopt, 0,
                                               file.num_documents);
  kept.reserve(static_cast<std::size_t>(epochs));
  for (std::int64_t epoch = 0; epoch < epochs; ++epoch) {
    stream->set_keys(epoch, static_cast<std::uint64_t>(epoch) + 10, static_cast<std::uint64_t>(epoch) + 20);
    kept.push_back(stream->build_starts(epoch, threads));
    stream->use_starts(epoch, kept.back().data(), kept.back().size(), nullptr);
  }
  return stream;
}

Places places_of(const std::vector<Piece>& pieces) {
  Places places;
  for (const Piece& piece : pieces) {
    for (std::int64_t t = 0; t < piece.tokens; ++t) places.emplace_back(piece.document, piece.begin + t);
  }
  return places;
}

}  // namespace

void windows_are_the_stream_cut_at_every_seq_length() {
  for (const bool with_lengths : {true, false}) {
    for (const std::int64_t seq_length : {1, 5, 64, 700}) {
      const Longs lengths = some_lengths(static_cast<std::uint64_t>(seq_length), 500, 12);
      MadeFile file(lengths, with_lengths);
      std::vector<Longs> kept;
      const auto stream = indexed(file.view(), seq_length, 2, kept);
      std::int64_t draw = 0;
      for (std::int64_t epoch = 0; epoch < 2; ++epoch) {
        Places all;
        const Permutation documents(static_cast<std::uint64_t>(epoch) + 10, 500);
        for (std::int64_t position = 0; position < 500; ++position) {
          const std::int64_t document = documents.at(position);
          const auto length = lengths[static_cast<std::size_t>(document)];
          for (std::int64_t t = 0; t < length; ++t) all.emplace_back(document, t);
        }
        const auto size = static_cast<std::int64_t>(all.size());
        const std::int64_t num_windows = (size - 1) / seq_length;
        CHECK(stream->num_windows(epoch) == num_windows);
        const Permutation windows(static_cast<std::uint64_t>(epoch) + 20, num_windows);
        for (std::int64_t i = 0; i < num_windows; ++i, ++draw) {
          std::vector<Piece> pieces;
          stream->append_window(draw, 7, pieces);
          const auto from = all.begin() + windows.at(i) * seq_length;
          CHECK(places_of(pieces) == Places(from, from + seq_length + 1));
          CHECK(pieces.front().source == 7);
        }
      }
      std::vector<Piece> pieces;
      CHECK_THROWS((stream->append_window(draw, 0, pieces), 0), xalign::missing_epoch);
      CHECK_THROWS((stream->append_window(-1, 0, pieces), 0), std::out_of_range);
    }
  }
}

void counting_all_windows_is_counting_each() {
  for (const Content content : {Content::all, Content::all_but_last, Content::spans, Content::not_eod}) {
    MadeFile file(some_lengths(5, 700, 20), true, content);
    std::vector<Longs> kept;
    const auto stream = indexed(file.view(), 33, 1, kept);
    const auto size = static_cast<std::size_t>(stream->num_windows(0));
    const std::size_t languages = file.view().run_language.size();
    std::vector<std::uint16_t> rows(size * languages), tokens(size), eod(size);
    stream->count_epoch(0, Counts<std::uint16_t>{rows.data(), tokens.data(), eod.data()}, 3);
    for (std::size_t draw = 0; draw < size; ++draw) {
      std::vector<Piece> pieces;
      stream->append_window(static_cast<std::int64_t>(draw), 0, pieces);
      auto places = places_of(pieces);
      places.pop_back();
      std::vector<std::int64_t> expected(languages, 0);
      std::int64_t ends = 0;
      for (const auto& place : places) {
        const std::int64_t length = file.view().length(place.first);
        const bool is_last = place.second + 1 == length;
        if (is_last && content != Content::all) {
          ++ends;
        } else {
          ++expected[content == Content::spans ? static_cast<std::size_t>(place.second / 3 % 2) : 0];
        }
      }
      for (std::size_t k = 0; k < languages; ++k) CHECK(rows[draw * languages + k] == expected[k]);
      CHECK(tokens[draw] == 33 && eod[draw] == ends);
    }
  }
}

void threads_change_nothing() {
  const Longs lengths = some_lengths(9, 150000, 3);
  MadeFile file(lengths);
  std::vector<Longs> one, many;
  const auto first = indexed(file.view(), 16, 1, one, 1);
  for (const int threads : {2, 5, 64, 100000}) {
    const auto second = indexed(file.view(), 16, 1, many, threads);
    CHECK(one.back() == many.back());
    for (const std::int64_t windows : {std::int64_t{0}, std::int64_t{100}, first->num_windows(0)}) {
      const auto a = first->documents_read(windows, 1), b = second->documents_read(windows, threads);
      CHECK(a.begun == b.begun && a.cut == b.cut);
    }
    CHECK(first->totals(1).tokens == second->totals(threads).tokens);
    CHECK(first->totals(1).content == second->totals(threads).content);
    many.clear();
  }
}

// Whether a part is most of its file decides how its index is built, not what is in it.
void starts_are_the_sums_of_the_lengths() {
  constexpr std::int64_t kDocuments = 40000;
  const Longs lengths = some_lengths(4, kDocuments, 3);
  for (const bool with_lengths : {true, false}) {
    MadeFile file(lengths, with_lengths);
    for (const bool is_split : {true, false}) {
      for (const auto& part : Places{{0, kDocuments}, {1000, kDocuments}, {30000, 39999}, {39000, 39100}, {7, 7}}) {
        const std::optional<std::uint64_t> key = is_split ? std::optional<std::uint64_t>(77) : std::nullopt;
        SourceStream stream(file.view(), {8, false}, key, part.first, part.second);
        stream.set_keys(0, 11, 12);
        const Permutation split(77, kDocuments), order(11, part.second - part.first);
        Longs expected{0};
        std::int64_t tokens = 0;
        for (std::int64_t position = 0; position < order.size(); ++position) {
          const std::int64_t in_file = part.first + order.at(position);
          tokens += lengths[static_cast<std::size_t>(is_split ? split.at(in_file) : in_file)];
          if ((position + 1) % SourceStream::kStride == 0) expected.push_back(tokens);
        }
        if (order.size() % SourceStream::kStride != 0) expected.push_back(tokens);
        for (const int threads : {1, 3}) CHECK(stream.build_starts(0, threads) == expected);
      }
    }
  }
}

void a_part_holds_the_documents_that_the_split_puts_there() {
  MadeFile file(some_lengths(2, 400, 9));
  const Permutation split(77, 400);
  SourceStream stream(file.view(), {8, false}, 77, 100, 350);
  stream.set_keys(0, 1, 2);
  stream.set_keys(1, 3, 4);
  std::vector<bool> seen(400, false);
  for (std::int64_t draw = 0; draw < 250; ++draw) {
    const auto place = stream.document(draw);
    CHECK(place.document == split.at(100 + Permutation(1, 250).at(draw)));
    CHECK(place.length == file.view().length(place.document));
    seen[static_cast<std::size_t>(place.document)] = true;
  }
  for (std::int64_t position = 0; position < 400; ++position) {
    CHECK(seen[static_cast<std::size_t>(split.at(position))] == (position >= 100 && position < 350));
  }
  CHECK(stream.document(250).document == split.at(100 + Permutation(3, 250).at(0)));
  CHECK_THROWS(stream.document(500), xalign::missing_epoch);
  CHECK_THROWS(stream.document(-1), std::out_of_range);
}

void lengths_beyond_int32_add_up_exactly() {
  // A file that nobody reads tokens of: half a million documents of two billion tokens.
  constexpr std::int64_t kLength = std::numeric_limits<std::int32_t>::max(), kDocuments = 500000;
  const std::vector<std::int32_t> lengths(kDocuments, static_cast<std::int32_t>(kLength));
  Longs pointers(kDocuments);
  for (std::size_t d = 0; d < kDocuments; ++d) pointers[d] = 2 * kLength * static_cast<std::int64_t>(d);
  xalign::TokenFileView file;
  file.name = "huge";
  file.tokens = lengths.data();  // not read
  file.num_tokens = kLength * kDocuments;
  file.num_documents = kDocuments;
  file.lengths = lengths.data();
  file.pointers = pointers.data();
  file.content = Content::all_but_last;
  file.run_language = {0};
  std::vector<Longs> kept;
  const auto stream = indexed(file, kLength, 1, kept);
  CHECK(kept[0].back() == 1073741823500000);
  CHECK(stream->num_windows(0) == kDocuments - 1);
  std::vector<Piece> pieces;
  stream->append_window(kDocuments - 2, 0, pieces);
  CHECK(pieces.size() == 2 && pieces[0].tokens == kLength && pieces[1].tokens == 1);
  std::vector<std::int32_t> content(kDocuments), tokens(kDocuments), eod(kDocuments);
  stream->count_epoch(0, Counts<std::int32_t>{content.data(), tokens.data(), eod.data()}, 2);
  CHECK(std::all_of(content.begin(), content.end() - 1, [](std::int32_t count) { return count == kLength - 1; }));
  CHECK(stream->totals(2).tokens == kLength * kDocuments);
}

void packings_are_what_was_packed() {
  const Longs lengths = some_lengths(4, 600, 30);
  MadeFile file(lengths);
  SourceStream stream(file.view(), {50, true}, std::nullopt, 0, 600);
  std::vector<xalign::Packing> kept(2);
  std::int64_t draw = 0;
  std::vector<Piece> pieces;
  CHECK_THROWS((stream.append_window(0, 0, pieces), 0), xalign::missing_epoch);
  for (std::int64_t epoch = 0; epoch < 2; ++epoch) {
    stream.set_keys(epoch, static_cast<std::uint64_t>(epoch), 5);
    auto& packing = kept[static_cast<std::size_t>(epoch)] = stream.build_packing(epoch);
    stream.use_packing(epoch, packing.documents.data(), packing.documents.size(), packing.window_starts.data(),
                       packing.window_starts.size(), nullptr);
    const std::int64_t num_windows = stream.num_windows(epoch);
    const Permutation windows(5, num_windows);
    std::vector<std::int32_t> content(static_cast<std::size_t>(num_windows)), tokens(content), eod(content);
    stream.count_epoch(epoch, Counts<std::int32_t>{content.data(), tokens.data(), eod.data()}, 2);
    for (std::int64_t i = 0; i < num_windows; ++i, ++draw) {
      pieces.clear();
      stream.append_window(draw, 0, pieces);
      const auto window = static_cast<std::size_t>(windows.at(i));
      auto at = packing.window_starts[window];
      std::int64_t held = 0;
      for (const Piece& piece : pieces) {
        CHECK(piece.document == packing.documents[static_cast<std::size_t>(at++)]);
        CHECK(piece.begin == 0 && piece.tokens == lengths[static_cast<std::size_t>(piece.document)]);
        held += piece.tokens;
      }
      CHECK(at == packing.window_starts[window + 1]);
      const auto row = static_cast<std::size_t>(i);
      const auto documents = static_cast<std::int32_t>(pieces.size());
      CHECK(tokens[row] == held && content[row] == held - documents && eod[row] == documents - 1);
    }
  }
  const auto read = stream.documents_read(draw, 1);
  CHECK(read.cut == 0 && read.begun == static_cast<std::int64_t>(kept[0].documents.size() + kept[1].documents.size()));
}

void epochs_may_be_indexed_in_any_order_and_twice() {
  MadeFile file(some_lengths(8, 100, 9));
  std::vector<Longs> kept;
  const auto stream = indexed(file.view(), 8, 1, kept);
  const std::int64_t per_epoch = stream->num_windows(0);
  stream->set_keys(5, 1, 2);
  CHECK(stream->has_keys(5) && !stream->has_windows(5) && !stream->has_keys(4) && !stream->has_keys(-1));
  const Longs starts = stream->build_starts(5, 1);
  stream->use_starts(5, starts.data(), starts.size(), nullptr);
  stream->use_starts(5, starts.data(), starts.size(), nullptr);
  std::vector<Piece> pieces;
  stream->append_window(5 * per_epoch, 0, pieces);
  CHECK_THROWS((stream->append_window(4 * per_epoch, 0, pieces), 0), xalign::missing_epoch);
  CHECK_THROWS(stream->build_starts(4, 1), xalign::missing_epoch);
  CHECK_THROWS((stream->set_keys(5, 1, 3), 0), std::invalid_argument);
  CHECK_THROWS((stream->set_keys(SourceStream::kMostEpochs, 1, 3), 0), std::invalid_argument);
}

int main() {
  windows_are_the_stream_cut_at_every_seq_length();
  counting_all_windows_is_counting_each();
  threads_change_nothing();
  starts_are_the_sums_of_the_lengths();
  a_part_holds_the_documents_that_the_split_puts_there();
  lengths_beyond_int32_add_up_exactly();
  packings_are_what_was_packed();
  epochs_may_be_indexed_in_any_order_and_twice();
}
