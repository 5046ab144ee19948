#include "xalign/sample_orders.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

std::int64_t position_in(std::int64_t sample, std::int64_t num_samples, std::int64_t batch_size, std::uint64_t key) {
  if (sample < 0 || sample >= num_samples) {
    throw std::out_of_range("sample " + std::to_string(sample) + " is outside 0.." + std::to_string(num_samples) + ".");
  }
  const std::int64_t step = sample / batch_size;
  return step * batch_size + batch_position(key, step, sample % batch_size, batch_size);
}

void require_whole_batches(std::int64_t num_samples, std::int64_t batch_size) {
  if (batch_size < 1 || num_samples % batch_size != 0) {
    throw std::invalid_argument(std::to_string(num_samples) + " samples are not whole batches of " +
                                std::to_string(batch_size) + ".");
  }
}

}  // namespace

SampleOrder::SampleOrder(SourceRows rows, std::int64_t batch_size, std::uint64_t batch_key,
                         std::shared_ptr<void> keeper)
    : rows_(std::move(rows)), batch_size_(batch_size), batch_key_(batch_key), keeper_(std::move(keeper)) {
  require_whole_batches(rows_.num_rows(), batch_size);
}

std::int64_t SampleOrder::position_of(std::int64_t sample) const {
  return position_in(sample, num_samples(), batch_size_, batch_key_);
}

void SampleOrder::append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const {
  const Origin from = origin(sample);
  streams.at(static_cast<std::size_t>(from.source))->append_window(from.draw, from.source, pieces);
}

DocumentOrder::DocumentOrder(SourceRows rows, const SampleBorder* borders, std::int64_t num_samples,
                             std::vector<bool> keeps_whole, std::int64_t batch_size, std::uint64_t batch_key,
                             std::shared_ptr<void> keeper)
    : rows_(std::move(rows)),
      borders_(borders),
      num_samples_(num_samples),
      keeps_whole_(std::move(keeps_whole)),
      batch_size_(batch_size),
      batch_key_(batch_key),
      keeper_(std::move(keeper)) {
  if (num_samples < 0 || keeps_whole_.size() != static_cast<std::size_t>(rows_.num_sources())) {
    throw std::invalid_argument("num_samples is negative, or keeps_whole is not of every source.");
  }
  require_whole_batches(num_samples, batch_size);
}

std::int64_t DocumentOrder::position_of(std::int64_t sample) const {
  return position_in(sample, num_samples_, batch_size_, batch_key_);
}

void DocumentOrder::append_pieces(std::int64_t sample, const Streams& streams, std::vector<Piece>& pieces) const {
  const SampleBorder from = border(sample);
  const std::int64_t seq_length = streams.at(0)->cutting().seq_length;
  if (from.padding < 0 || from.padding >= seq_length || from.token < 0) {
    throw std::runtime_error("sample " + std::to_string(sample) + " has an impossible border; the file is damaged.");
  }
  std::int64_t left = seq_length - from.padding + (from.padding == 0);
  std::int64_t begin = from.token;
  for (RowWalk walk(rows_, from.row); left > 0; begin = 0) {
    if (walk.row() >= rows_.num_rows()) {
      throw std::runtime_error("the order ends inside sample " + std::to_string(sample) + "; the file is damaged.");
    }
    const Origin row = walk.next();
    const auto source = static_cast<std::size_t>(row.source);
    const DocumentPlace place = streams.at(source)->document(row.draw);
    if (keeps_whole_[source] && place.length > seq_length) continue;
    if (begin > 0 && begin >= place.length) {
      throw std::runtime_error("sample " + std::to_string(sample) + " begins after the end of its first document; " +
                               "the order is of another token file.");
    }
    const std::int64_t tokens = std::min(left, place.length - begin);
    if (tokens == 0) continue;
    pieces.push_back({row.source, place.document, begin, tokens});
    left -= tokens;
  }
}

}  // namespace xalign
