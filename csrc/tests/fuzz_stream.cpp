// Random files, damaged in random places, read in every way there is: whatever comes out, no step is taken outside the
// memory (the sanitizers watch) and every refusal is an exception of a kind that the headers name.
//   fuzz_stream [SECONDS] [SEED]

#include <algorithm>

#include "fuzz.h"
#include "made_file.h"
#include "xalign/reader.h"

using xalign::Content;
using xalign::SourceStream;

namespace {

template <typename T>
void spoil(Chance& chance, const void* array, std::int64_t size, std::int64_t sensible) {
  if (array == nullptr || size == 0 || !chance.one_in(2)) return;
  for (std::int64_t times = 1 + chance.below(3); times > 0; --times) {
    MadeFile::damage<T>(array, chance.below(size), static_cast<T>(chance.number(sensible)));
  }
}

void once(Chance& chance) {
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(chance.one_in(4) ? 300 + chance.below(300) : chance.below(80)));
  for (auto& length : lengths) length = chance.one_in(10) ? chance.below(200) : chance.below(12);
  const auto content = static_cast<Content>(chance.below(4));
  MadeFile file(lengths, !chance.one_in(3), content);
  auto& view = file.view();
  const auto num_documents = static_cast<std::int64_t>(lengths.size());
  if (chance.one_in(3)) {
    spoil<std::int32_t>(chance, view.lengths, num_documents, 12);
    spoil<std::int64_t>(chance, view.pointers, num_documents, 2 * view.num_tokens);
    spoil<std::int64_t>(chance, view.span_ends, view.num_spans, view.num_tokens);
    spoil<std::int8_t>(chance, view.span_languages, view.num_spans, 2);
    spoil<std::uint16_t>(chance, view.tokens, view.num_tokens, 51);
  }
  if (chance.one_in(20)) view.num_documents = num_documents / 2;
  if (chance.one_in(20)) view.num_tokens /= 2;
  if (chance.one_in(20)) view.num_spans /= 2;
  const std::int64_t seq_length = chance.one_in(30) ? chance.number(20) : 1 + chance.below(40);
  const xalign::Cutting cutting{seq_length, chance.one_in(2)};
  std::optional<std::uint64_t> split;
  if (chance.one_in(2)) split = 5;
  std::int64_t begin = 0, end = view.num_documents;
  if (chance.one_in(3)) begin = chance.number(end), end = chance.number(end);
  std::shared_ptr<SourceStream> stream;
  attempt([&] { stream = std::make_shared<SourceStream>(view, cutting, split, begin, end); });
  if (!stream) return;
  std::vector<std::vector<std::int64_t>> kept;
  std::vector<xalign::Packing> packings;
  kept.reserve(8);
  packings.reserve(8);
  for (int i = 0; i < 3; ++i) {
    const std::int64_t epoch = chance.one_in(10) ? chance.number(4) % 1000 : i;
    attempt([&] { stream->set_keys(epoch, static_cast<std::uint64_t>(epoch), 7); });
    attempt([&] {
      if (cutting.whole_documents && !chance.one_in(20)) {
        packings.push_back(stream->build_packing(epoch));
        auto& packing = packings.back();
        if (chance.one_in(4) && !packing.documents.empty()) {
          packing.documents[static_cast<std::size_t>(chance.below(static_cast<std::int64_t>(packing.documents.size())))] =
              chance.number(num_documents);
          packing.window_starts[static_cast<std::size_t>(
              chance.below(static_cast<std::int64_t>(packing.window_starts.size())))] = chance.number(num_documents);
        }
        stream->use_packing(epoch, packing.documents.data(), packing.documents.size(), packing.window_starts.data(),
                            packing.window_starts.size(), nullptr);
      } else {
        kept.push_back(stream->build_starts(epoch, static_cast<int>(chance.below(4))));
        auto& starts = kept.back();
        if (chance.one_in(4)) {
          starts[static_cast<std::size_t>(chance.below(static_cast<std::int64_t>(starts.size())))] =
              chance.number(view.num_tokens);
        }
        if (chance.one_in(20)) starts.pop_back();
        stream->use_starts(epoch, starts.data(), starts.size(), nullptr);
      }
    });
  }
  attempt([&] { stream->totals(2); });
  // A damaged index may promise more windows than there are tokens to fill them; a binding would run out of memory.
  constexpr std::int64_t kMost = 1 << 16;
  std::int64_t num_windows = 0;
  attempt([&] { num_windows = stream->num_windows(0); });
  num_windows = std::min(num_windows, kMost);
  attempt([&] { stream->documents_read(chance.one_in(5) ? chance.number(20) % kMost : num_windows, 2); });
  const std::size_t languages = view.num_languages();
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    attempt([&] {
      if (stream->num_windows(epoch) > kMost) return;
      const auto rows = static_cast<std::size_t>(stream->num_windows(epoch));
      std::vector<std::int32_t> rows_of(rows * languages), tokens(rows), eod(rows);
      stream->count_epoch(epoch, xalign::Counts<std::int32_t>{rows_of.data(), tokens.data(), eod.data()}, 2);
    });
  }
  attempt([&] {
    const std::int64_t first = chance.number(100), count = chance.below(100);
    std::vector<std::int32_t> content_of(static_cast<std::size_t>(count) * languages), tokens(100), eod(100);
    stream->count_documents(first, count, xalign::Counts<std::int32_t>{content_of.data(), tokens.data(), eod.data()}, 2);
  });
  attempt([&] {
    const std::int64_t draws[] = {chance.number(100)}, begins[] = {chance.number(10)}, ends[] = {chance.number(10)};
    std::vector<std::int32_t> content_of(languages);
    stream->count_stretches(draws, begins, ends, 1, xalign::Counts<std::int32_t>{content_of.data(), nullptr, nullptr}, 1);
  });
  if (seq_length > 1000) return;
  for (int i = 0; i < 12; ++i) {
    attempt([&] {
      const auto draw = chance.one_in(4) ? chance.number(30) : chance.below(std::max<std::int64_t>(3 * num_windows, 1));
      const xalign::ListedSamples index({0}, {draw});
      const auto size = static_cast<std::size_t>(seq_length);
      std::vector<std::int64_t> tokens(size), labels(size), positions(size);
      std::vector<float> loss(size);
      std::vector<std::int8_t> of_input(size), of_label(size);
      std::vector<std::int16_t> sources(size);
      std::vector<std::int32_t> documents(size);
      const std::int64_t sample = 0;
      xalign::read_batch(index, {stream}, &sample, 1, seq_length, {99, chance.one_in(2), chance.one_in(2)},
                         {tokens.data(), labels.data(), positions.data(), loss.data(), of_input.data(), of_label.data(),
                          sources.data(), documents.data()});
    });
  }
}

}  // namespace

int main(int count, char** arguments) {
  return fuzz(count, arguments, once);
}
