#include "xalign/stream.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "parallel.h"

namespace xalign {

namespace {

constexpr std::int64_t kLongestSequence = std::numeric_limits<std::int32_t>::max();
// Documents that one thread takes at least, and that are looked up together.
constexpr std::int64_t kLeastDocuments = 1 << 14;
constexpr std::int64_t kAtOnce = 512;
// Sums that the threads which build an index may hold besides the index: 256 MiB.
constexpr std::int64_t kMostOwnSums = std::int64_t{1} << 25;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// A row of counts under way.
class Row {
 public:
  explicit Row(const TokenFileView& file) : file_(file), content_(file.num_languages(), 0) {}

  void add(std::int64_t document, std::int64_t length, std::int64_t begin, std::int64_t end) {
    file_.count(document, length, begin, end, content_.data(), &eod_);
    tokens_ += end - begin;
  }

  // A token without a label.
  void add_unlabelled(std::int64_t document, std::int64_t length, std::int64_t token) {
    std::int64_t no_matter = 0;
    file_.count(document, length, token, token + 1, content_.data(), &no_matter);
    ++tokens_;
  }

  template <typename Count>
  void write(const Counts<Count>& counts, std::int64_t row) {
    Count* content = counts.content + row * static_cast<std::int64_t>(content_.size());
    for (std::size_t k = 0; k < content_.size(); ++k) {
      content[k] = static_cast<Count>(content_[k]);
      content_[k] = 0;
    }
    if (counts.tokens != nullptr) counts.tokens[row] = static_cast<Count>(tokens_);
    if (counts.eod != nullptr) counts.eod[row] = static_cast<Count>(eod_);
    tokens_ = eod_ = 0;
  }

 private:
  const TokenFileView& file_;
  std::vector<std::int64_t> content_;
  std::int64_t tokens_ = 0, eod_ = 0;
};

// The draws of consecutive windows, looked up many at once.
class Draws {
 public:
  explicit Draws(const Permutation& windows) : windows_(windows) {}

  std::int64_t of(std::int64_t window) {
    if (window < first_ || window >= first_ + count_) {
      first_ = window;
      count_ = std::min(kAtOnce, windows_.size() - window);
      windows_.fill_positions(first_, count_, draws_);
    }
    return draws_[window - first_];
  }

 private:
  const Permutation& windows_;
  std::int64_t first_ = 0, count_ = 0;
  std::int64_t draws_[kAtOnce];
};

}  // namespace

missing_epoch::missing_epoch(const SourceStream* of, std::int64_t number)
    : std::runtime_error("epoch " + std::to_string(number) + " of " + of->file().name + " is not indexed."),
      stream(of),
      epoch(number) {}

struct SourceStream::Epoch {
  std::uint64_t documents_key = 0, windows_key = 0;
  Permutation documents;  // of the part
  Permutation windows;
  bool is_indexed = false;
  // Cut at every seq_length tokens: where every kStride-th document begins, and the tokens of the stream.
  const std::int64_t* starts = nullptr;
  std::size_t num_starts = 0;
  // Packed.
  const std::int64_t* packed = nullptr;
  std::size_t num_packed = 0;
  const std::int64_t* window_starts = nullptr;
  std::shared_ptr<void> keeper;
};

// The documents of an epoch from a position on.
class SourceStream::Walk {
 public:
  Walk(const SourceStream& stream, const Epoch& epoch, std::int64_t position, std::int64_t end)
      : stream_(stream), epoch_(epoch), position_(position), end_(end) {}

  // False after the last one.
  bool next(DocumentPlace& place) {
    if (at_ == count_ && !look_up()) return false;
    place = {documents_[at_], lengths_[at_]};
    ++at_;
    return true;
  }

 private:
  bool look_up() {
    count_ = std::min(kAtOnce, end_ - position_);
    if (count_ <= 0) return false;
    stream_.fill_documents(epoch_.documents, position_, count_, documents_);
    for (std::int64_t i = 0; i < count_; ++i) lengths_[i] = stream_.file_.length(documents_[i]);
    position_ += count_;
    at_ = 0;
    return true;
  }

  const SourceStream& stream_;
  const Epoch& epoch_;
  std::int64_t position_, end_;
  std::int64_t at_ = 0, count_ = 0;
  std::int64_t documents_[kAtOnce], lengths_[kAtOnce];
};

SourceStream::SourceStream(TokenFileView file, Cutting cutting, std::optional<std::uint64_t> split_key,
                           std::int64_t part_begin, std::int64_t part_end)
    : file_(std::move(file)), cutting_(cutting), part_begin_(part_begin), part_end_(part_end) {
  file_.check();
  require(cutting.seq_length >= 1 && cutting.seq_length <= kLongestSequence,
          "seq_length=" + std::to_string(cutting.seq_length) + " is outside 1.." + std::to_string(kLongestSequence) + ".");
  require(0 <= part_begin && part_begin <= part_end && part_end <= file_.num_documents,
          "documents " + std::to_string(part_begin) + ".." + std::to_string(part_end) + " are not all in " + file_.name +
              ", which has " + std::to_string(file_.num_documents) + ".");
  if (split_key) split_.emplace(*split_key, file_.num_documents);
}

void SourceStream::fill_documents(const Permutation& order, std::int64_t first, std::int64_t count,
                                  std::int64_t* documents) const {
  order.fill(first, count, documents);
  if (part_begin_ > 0) {
    for (std::int64_t i = 0; i < count; ++i) documents[i] += part_begin_;
  }
  if (split_) split_->map(documents, static_cast<std::size_t>(count));
}

void SourceStream::stale(const char* what) const {
  throw damaged_file(file_.name + ": " + what + " in the index of an epoch does not fit the file; it changed since, or " +
                     "the index cache is damaged.");
}

void SourceStream::set_keys(std::int64_t number, std::uint64_t documents_key, std::uint64_t windows_key) {
  require(number >= 0 && number < kMostEpochs, "epoch=" + std::to_string(number) + " is outside 0.." +
                                                   std::to_string(kMostEpochs - 1) + ".");
  auto epoch = std::make_shared<Epoch>();
  epoch->documents_key = documents_key;
  epoch->windows_key = windows_key;
  epoch->documents = Permutation(documents_key, num_documents());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (static_cast<std::size_t>(number) >= epochs_.size()) epochs_.resize(static_cast<std::size_t>(number) + 1);
  auto& place = epochs_[static_cast<std::size_t>(number)];
  if (!place) {
    place = std::move(epoch);
  } else {
    require(place->documents_key == documents_key && place->windows_key == windows_key,
            "epoch " + std::to_string(number) + " has other keys.");
  }
}

bool SourceStream::has_keys(std::int64_t number) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return number >= 0 && static_cast<std::size_t>(number) < epochs_.size() && epochs_[static_cast<std::size_t>(number)];
}

bool SourceStream::has_windows(std::int64_t number) const {
  if (!has_keys(number)) return false;
  return keyed(number)->is_indexed;
}

std::shared_ptr<const SourceStream::Epoch> SourceStream::keyed(std::int64_t number) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (number < 0) throw std::out_of_range("epoch " + std::to_string(number) + " is negative.");
  if (static_cast<std::size_t>(number) >= epochs_.size() || !epochs_[static_cast<std::size_t>(number)]) {
    throw missing_epoch(this, number);
  }
  return epochs_[static_cast<std::size_t>(number)];
}

std::shared_ptr<const SourceStream::Epoch> SourceStream::indexed(std::int64_t number) const {
  auto epoch = keyed(number);
  if (!epoch->is_indexed) throw missing_epoch(this, number);
  return epoch;
}

void SourceStream::put(std::int64_t number, const Epoch& epoch) {
  auto indexed = std::make_shared<Epoch>(epoch);
  indexed->is_indexed = true;
  const std::lock_guard<std::mutex> lock(mutex_);
  epochs_[static_cast<std::size_t>(number)] = std::move(indexed);
  while (windows_until_.size() < epochs_.size()) {
    const auto& next = epochs_[windows_until_.size()];
    if (!next || !next->is_indexed) break;
    windows_until_.push_back((windows_until_.empty() ? 0 : windows_until_.back()) + next->windows.size());
  }
}

// Adds to tokens[block] the lengths of the documents that the stream has there. Lengths are read one after the other and
// sums, of which there are few, in any order: several times faster than the other way round.
void SourceStream::add_in_file_order(const Epoch& epoch, int num_threads, std::vector<std::int64_t>& tokens) const {
  // Of the first piece it is the result itself.
  std::vector<std::vector<std::int64_t>> of_piece(256);
  const std::int64_t size = split_ ? file_.num_documents : num_documents();
  in_pieces(size, kLeastDocuments, num_threads, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
    auto& own = of_piece[static_cast<std::size_t>(piece)];
    if (piece > 0) own.resize(tokens.size());
    std::int64_t* const sums = piece > 0 ? own.data() : tokens.data();
    std::int64_t positions[kAtOnce], lengths[kAtOnce];
    for (std::int64_t at = begin; at < end; at += kAtOnce) {
      std::int64_t count = std::min(kAtOnce, end - at);
      if (split_) {
        // Only those of the part.
        split_->fill_positions(at, count, positions);
        std::int64_t kept = 0;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t position = positions[i];
          if (position < part_begin_ || position >= part_end_) continue;
          positions[kept] = position - part_begin_;
          lengths[kept] = file_.length(at + i);
          ++kept;
        }
        count = kept;
        epoch.documents.map_back(positions, static_cast<std::size_t>(count));
      } else {
        epoch.documents.fill_positions(at, count, positions);
        for (std::int64_t i = 0; i < count; ++i) lengths[i] = file_.length(part_begin_ + at + i);
      }
      // No overflow: kStride lengths of 31 bits.
      for (std::int64_t i = 0; i < count; ++i) sums[positions[i] / kStride] += lengths[i];
    }
  });
  for (const auto& own : of_piece) {
    for (std::size_t block = 0; block < own.size(); ++block) tokens[block] += own[block];
  }
}

// The same where few documents of the file are in the part, or there is no memory for a set of sums per thread.
void SourceStream::add_in_stream_order(const Epoch& epoch, int num_threads, std::vector<std::int64_t>& tokens) const {
  const auto num_blocks = static_cast<std::int64_t>(tokens.size()) - 1;
  in_pieces(num_blocks, kLeastDocuments / kStride, num_threads,
            [&](std::int64_t, std::int64_t begin, std::int64_t end) {
              Walk walk(*this, epoch, begin * kStride, std::min(end * kStride, num_documents()));
              DocumentPlace place{};
              for (std::int64_t block = begin; block < end; ++block) {
                for (std::int64_t i = 0; i < kStride && walk.next(place); ++i) {
                  tokens[static_cast<std::size_t>(block)] += place.length;
                }
              }
            });
}

std::vector<std::int64_t> SourceStream::build_starts(std::int64_t number, int num_threads) const {
  const auto epoch = keyed(number);
  const std::int64_t num_blocks = (num_documents() + kStride - 1) / kStride;
  std::vector<std::int64_t> starts(static_cast<std::size_t>(num_blocks) + 1);
  const bool is_most = !split_ || num_documents() >= file_.num_documents / 4;
  if (is_most && (std::clamp(num_threads, 1, 256) - 1) * num_blocks <= kMostOwnSums) {
    add_in_file_order(*epoch, num_threads, starts);
  } else {
    add_in_stream_order(*epoch, num_threads, starts);
  }
  // From the tokens of each block, and 0 at the end, to where it begins.
  std::int64_t before = 0;
  for (auto& start : starts) {
    const std::int64_t tokens = start;
    start = before;
    if (__builtin_add_overflow(before, tokens, &before)) stale("the number of tokens");
  }
  if (part_begin_ == 0 && part_end_ == file_.num_documents && before != file_.num_tokens) {
    throw damaged_file(file_.name + ": its documents have " + std::to_string(before) + " tokens together and the file " +
                       std::to_string(file_.num_tokens) + "; the index is damaged or of another file.");
  }
  return starts;
}

void SourceStream::use_starts(std::int64_t number, const std::int64_t* starts, std::size_t size,
                              std::shared_ptr<void> keeper) {
  const auto before = keyed(number);
  require(!cutting_.whole_documents, "windows of whole documents have no starts.");
  const auto expected = static_cast<std::size_t>((num_documents() + kStride - 1) / kStride) + 1;
  require(size == expected, "starts have " + std::to_string(size) + " numbers; " + std::to_string(expected) +
                                " are expected.");
  const std::int64_t tokens = starts[size - 1];
  require(starts[0] == 0 && tokens >= 0 && tokens <= (std::int64_t{1} << 61),
          "starts do not go from 0 to a number of tokens.");
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& other : epochs_) {
      require(!other || !other->is_indexed || other->starts[other->num_starts - 1] == tokens,
              "starts end at another number of tokens than those of other epochs.");
    }
  }
  Epoch epoch = *before;
  epoch.starts = starts;
  epoch.num_starts = size;
  epoch.windows = Permutation(epoch.windows_key, tokens > 1 ? (tokens - 1) / cutting_.seq_length : 0);
  epoch.keeper = std::move(keeper);
  put(number, epoch);
}

Packing SourceStream::build_packing(std::int64_t number) const {
  const auto epoch = keyed(number);
  BestFitPacker packer(cutting_.seq_length);
  Walk walk(*this, *epoch, 0, num_documents());
  for (DocumentPlace place{}; walk.next(place);) packer.add(place.document, place.length);
  return packer.finish();
}

void SourceStream::use_packing(std::int64_t number, const std::int64_t* documents, std::size_t num_packed,
                               const std::int64_t* window_starts, std::size_t num_starts, std::shared_ptr<void> keeper) {
  const auto before = keyed(number);
  require(cutting_.whole_documents, "windows that cut documents have no packing.");
  require(num_starts >= 1 && window_starts[0] == 0 &&
              window_starts[num_starts - 1] == static_cast<std::int64_t>(num_packed),
          "window_starts do not go from 0 to the number of packed documents.");
  Epoch epoch = *before;
  epoch.packed = documents;
  epoch.num_packed = num_packed;
  epoch.window_starts = window_starts;
  epoch.windows = Permutation(epoch.windows_key, static_cast<std::int64_t>(num_starts) - 1);
  epoch.keeper = std::move(keeper);
  put(number, epoch);
}

std::int64_t SourceStream::num_windows(std::int64_t number) const { return indexed(number)->windows.size(); }

SourceStream::Window SourceStream::window_of(std::int64_t draw) const {
  if (draw < 0) throw std::out_of_range("draw " + std::to_string(draw) + " is negative.");
  std::int64_t number = 0, first = 0;
  if (cutting_.whole_documents) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::upper_bound(windows_until_.begin(), windows_until_.end(), draw);
    number = found - windows_until_.begin();
    if (found != windows_until_.begin()) first = *(found - 1);
    if (!windows_until_.empty() && windows_until_[0] == 0) throw std::out_of_range(file_.name + " has no window.");
  } else {
    std::int64_t per_epoch = -1;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& epoch : epochs_) {
        if (epoch && epoch->is_indexed) {
          per_epoch = epoch->windows.size();
          break;
        }
      }
    }
    if (per_epoch < 0) throw missing_epoch(this, 0);
    if (per_epoch == 0) throw std::out_of_range(file_.name + " has no window.");
    number = draw / per_epoch;
    first = number * per_epoch;
  }
  auto epoch = indexed(number);
  const std::int64_t window = epoch->windows.at(draw - first);
  return {std::move(epoch), window};
}

void SourceStream::append_window(std::int64_t draw, std::int32_t source, std::vector<Piece>& pieces) const {
  const Window window = window_of(draw);
  if (cutting_.whole_documents) {
    append_packed(*window.epoch, window.number, source, pieces);
  } else {
    append_cut(*window.epoch, window.number, source, pieces);
  }
}

// The last block that begins at a token of the stream or before it. Starts come from a file: nothing says that they rise.
std::int64_t SourceStream::block_of(const Epoch& epoch, std::int64_t token) const {
  const auto* const after = std::upper_bound(epoch.starts, epoch.starts + epoch.num_starts, token);
  const std::int64_t block = after - epoch.starts - 1;
  if (block < 0 || epoch.starts[block] < 0 || epoch.starts[block] > token) stale("a start");
  return block;
}

std::pair<std::int64_t, std::int64_t> SourceStream::packed_places(const Epoch& epoch, std::int64_t window) const {
  const std::int64_t begin = epoch.window_starts[window], end = epoch.window_starts[window + 1];
  if (begin < 0 || end < begin || end > static_cast<std::int64_t>(epoch.num_packed)) stale("a window");
  return {begin, end};
}

void SourceStream::append_cut(const Epoch& epoch, std::int64_t window, std::int32_t source,
                              std::vector<Piece>& pieces) const {
  const std::int64_t from = window * cutting_.seq_length;
  const std::int64_t block = block_of(epoch, from);
  std::int64_t skip = from - epoch.starts[block], wanted = cutting_.seq_length + 1;
  std::int64_t documents[kStride], lengths[kStride];
  for (std::int64_t position = block * kStride; wanted > 0; position += kStride) {
    const std::int64_t count = std::min(kStride, num_documents() - position);
    if (count <= 0) stale("a start");
    fill_documents(epoch.documents, position, count, documents);
    for (std::int64_t i = 0; i < count; ++i) lengths[i] = file_.length(documents[i]);
    for (std::int64_t i = 0; i < count && wanted > 0; ++i) {
      if (skip >= lengths[i]) {
        skip -= lengths[i];
        continue;
      }
      const std::int64_t taken = std::min(lengths[i] - skip, wanted);
      pieces.push_back({source, documents[i], skip, taken});
      wanted -= taken;
      skip = 0;
    }
    // The next start is behind `from`.
    if (skip > 0) stale("a start");
  }
}

void SourceStream::append_packed(const Epoch& epoch, std::int64_t window, std::int32_t source,
                                 std::vector<Piece>& pieces) const {
  const auto [begin, end] = packed_places(epoch, window);
  std::int64_t room = cutting_.seq_length;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t document = epoch.packed[i];
    if (document < 0 || document >= file_.num_documents) stale("a document");
    const std::int64_t length = file_.length(document);
    if (length < 1 || length > room) stale("a window");
    pieces.push_back({source, document, 0, length});
    room -= length;
  }
}

DocumentPlace SourceStream::document(std::int64_t draw) const {
  if (draw < 0 || num_documents() == 0) {
    throw std::out_of_range(file_.name + " has no document with draw " + std::to_string(draw) + ".");
  }
  const auto epoch = keyed(draw / num_documents());
  std::int64_t document = 0;
  fill_documents(epoch->documents, draw % num_documents(), 1, &document);
  return {document, file_.length(document)};
}

template <typename Count>
void SourceStream::count_cut(const Epoch& epoch, std::int64_t first, std::int64_t end,
                             const Counts<Count>& counts) const {
  if (first >= end) return;
  const std::int64_t from = first * cutting_.seq_length;
  const std::int64_t block = block_of(epoch, from);
  std::int64_t skip = from - epoch.starts[block], skipped = 0;
  Walk walk(*this, epoch, block * kStride, num_documents());
  Draws draws(epoch.windows);
  Row row(file_);
  std::int64_t window = first, room = cutting_.seq_length;
  for (DocumentPlace place{}; window < end;) {
    if (!walk.next(place)) stale("a start");
    if (skip >= place.length) {
      skip -= place.length;
      if (++skipped > kStride && skip > 0) stale("a start");
      continue;
    }
    for (std::int64_t begin = skip; begin < place.length && window < end;) {
      const std::int64_t stop = begin + std::min(place.length - begin, room);
      row.add(place.document, place.length, begin, stop);
      room -= stop - begin;
      begin = stop;
      if (room == 0) {
        row.write(counts, draws.of(window));
        ++window;
        room = cutting_.seq_length;
      }
    }
    skip = 0;
  }
}

template <typename Count>
void SourceStream::count_packed(const Epoch& epoch, std::int64_t first, std::int64_t end,
                                const Counts<Count>& counts) const {
  Draws draws(epoch.windows);
  Row row(file_);
  std::vector<Piece> pieces;
  for (std::int64_t window = first; window < end; ++window) {
    pieces.clear();
    append_packed(epoch, window, 0, pieces);
    for (const Piece& piece : pieces) {
      const bool is_last = &piece == &pieces.back();
      row.add(piece.document, piece.tokens, 0, piece.tokens - is_last);
      if (is_last) row.add_unlabelled(piece.document, piece.tokens, piece.tokens - 1);
    }
    row.write(counts, draws.of(window));
  }
}

template <typename Count>
void SourceStream::count_epoch(std::int64_t number, const Counts<Count>& counts, int num_threads) const {
  require(cutting_.seq_length <= static_cast<std::int64_t>(std::numeric_limits<Count>::max()),
          "seq_length=" + std::to_string(cutting_.seq_length) + " is more than 16 bits count.");
  const auto epoch = indexed(number);
  in_pieces(epoch->windows.size(), 1 << 12, num_threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    if (cutting_.whole_documents) {
      count_packed(*epoch, begin, end, counts);
    } else {
      count_cut(*epoch, begin, end, counts);
    }
  });
}

template void SourceStream::count_epoch(std::int64_t, const Counts<std::uint16_t>&, int) const;
template void SourceStream::count_epoch(std::int64_t, const Counts<std::int32_t>&, int) const;

void SourceStream::count_documents(std::int64_t first, std::int64_t count, const Counts<std::int32_t>& counts,
                                   int num_threads) const {
  require(first >= 0 && count >= 0 && count <= std::numeric_limits<std::int64_t>::max() - first,
          "draws " + std::to_string(first) + " and " + std::to_string(count) + " from there on are no draws.");
  if (count == 0) return;
  if (num_documents() == 0) throw std::out_of_range(file_.name + " has no documents.");
  in_pieces(count, 1 << 12, num_threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    Row row(file_);
    for (std::int64_t done = begin; done < end;) {
      const auto epoch = keyed((first + done) / num_documents());
      const std::int64_t position = (first + done) % num_documents();
      const std::int64_t until = position + std::min(end - done, num_documents() - position);
      Walk walk(*this, *epoch, position, until);
      for (DocumentPlace place{}; walk.next(place); ++done) {
        row.add(place.document, place.length, 0, place.length);
        row.write(counts, done);
      }
    }
  });
}

void SourceStream::count_stretches(const std::int64_t* draws, const std::int64_t* begins, const std::int64_t* ends,
                                   std::int64_t count, const Counts<std::int32_t>& counts, int num_threads) const {
  in_pieces(count, 1 << 12, num_threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    Row row(file_);
    for (std::int64_t i = first; i < last; ++i) {
      const DocumentPlace place = document(draws[i]);
      if (begins[i] < 0 || ends[i] < begins[i] || ends[i] > place.length) {
        throw std::invalid_argument("tokens " + std::to_string(begins[i]) + ".." + std::to_string(ends[i]) +
                                    " are not all in document " + std::to_string(place.document) + " of " + file_.name +
                                    ", which has " + std::to_string(place.length) + ".");
      }
      row.add(place.document, place.length, begins[i], ends[i]);
      row.write(counts, i);
    }
  });
}

SourceStream::DocumentsRead SourceStream::read_of_cut(const Epoch& epoch, std::int64_t num_drawn,
                                                      std::int64_t first_document, std::int64_t end_document) const {
  const std::int64_t num_windows = epoch.windows.size(), seq_length = cutting_.seq_length;
  Draws draws(epoch.windows);
  const auto is_drawn = [&](std::int64_t window) { return draws.of(window) < num_drawn; };
  DocumentsRead read;
  std::int64_t begin = epoch.starts[first_document / kStride];
  // Far enough from the end of int64 for all documents that follow.
  if (begin < 0 || begin > epoch.starts[epoch.num_starts - 1]) stale("a start");
  Walk walk(*this, epoch, first_document, end_document);
  for (DocumentPlace place{}; walk.next(place); begin += place.length) {
    if (place.length == 0) continue;
    const std::int64_t first = begin / seq_length;
    if (first >= num_windows) break;
    read.begun += is_drawn(first);
    // A border serves the window before it and the one after it.
    const std::int64_t last = std::min((begin + place.length - 1) / seq_length, num_windows - 1);
    if ((begin + place.length - 1) / seq_length == first) continue;
    bool is_cut = false;
    for (std::int64_t window = first; window <= last && !is_cut; ++window) is_cut = is_drawn(window);
    read.cut += is_cut;
  }
  return read;
}

SourceStream::DocumentsRead SourceStream::documents_read(std::int64_t num_windows, int num_threads) const {
  require(num_windows >= 0, "num_windows=" + std::to_string(num_windows) + " is negative.");
  DocumentsRead all;
  std::int64_t left = num_windows;
  for (std::int64_t number = 0; left > 0; ++number) {
    const auto epoch = indexed(number);
    const std::int64_t drawn = std::min(left, epoch->windows.size());
    if (drawn == 0) throw std::out_of_range(file_.name + " has no window.");
    left -= drawn;
    if (cutting_.whole_documents) {
      for (std::int64_t draw = 0; draw < drawn; ++draw) {
        const auto [begin, end] = packed_places(*epoch, epoch->windows.at(draw));
        all.begun += end - begin;
      }
      continue;
    }
    std::vector<DocumentsRead> of_piece(256);
    const std::int64_t blocks = (num_documents() + kStride - 1) / kStride;
    in_pieces(blocks, kLeastDocuments / kStride, num_threads, [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
      of_piece[static_cast<std::size_t>(piece)] =
          read_of_cut(*epoch, drawn, begin * kStride, std::min(end * kStride, num_documents()));
    });
    for (const DocumentsRead& read : of_piece) {
      all.begun += read.begun;
      all.cut += read.cut;
    }
  }
  return all;
}

SourceStream::Totals SourceStream::totals(int num_threads) const {
  std::vector<Totals> of_piece(256);
  in_pieces(num_documents(), kLeastDocuments, num_threads,
            [&](std::int64_t piece, std::int64_t begin, std::int64_t end) {
              Totals totals;
              totals.content.assign(file_.num_languages(), 0);
              std::int64_t eod = 0;
              std::int64_t documents[kAtOnce];
              for (std::int64_t at = begin; at < end; at += kAtOnce) {
                const std::int64_t count = std::min(kAtOnce, end - at);
                for (std::int64_t i = 0; i < count; ++i) documents[i] = part_begin_ + at + i;
                if (split_) split_->map(documents, static_cast<std::size_t>(count));
                for (std::int64_t i = 0; i < count; ++i) {
                  const std::int64_t length = file_.length(documents[i]);
                  if (__builtin_add_overflow(totals.tokens, length, &totals.tokens)) stale("the number of tokens");
                  file_.count(documents[i], length, 0, length, totals.content.data(), &eod);
                }
              }
              of_piece[static_cast<std::size_t>(piece)] = std::move(totals);
            });
  Totals all;
  all.content.assign(file_.num_languages(), 0);
  for (const Totals& totals : of_piece) {
    if (__builtin_add_overflow(all.tokens, totals.tokens, &all.tokens)) stale("the number of tokens");
    for (std::size_t k = 0; k < totals.content.size(); ++k) all.content[k] += totals.content[k];
  }
  return all;
}

}  // namespace xalign
