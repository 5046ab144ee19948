#include "xalign/order_store.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

namespace {

__extension__ typedef unsigned __int128 uint128;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// SplitMix64's step, from a state of one's own.
std::uint64_t mixed(std::uint64_t z) {
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

// In [0, bound); a bias of bound / 2^64 is none.
std::uint64_t scaled(std::uint64_t word, std::uint64_t bound) {
  return static_cast<std::uint64_t>((static_cast<uint128>(word) * bound) >> 64);
}

template <typename Id>
std::int64_t occurrences(const Id* ids, std::int64_t begin, std::int64_t end, Id wanted) {
  std::int64_t count = 0;
  while (begin < end) {
    // Short stretches with a narrow counter, which the compiler turns into vector instructions.
    const std::int64_t stop = std::min(end, begin + 255 * static_cast<std::int64_t>(sizeof(Id)));
    Id found = 0;
    for (; begin < stop; ++begin) found = static_cast<Id>(found + (ids[begin] == wanted));
    count += found;
  }
  return count;
}

}  // namespace

std::int64_t rows_per_block(std::int32_t num_sources) {
  std::int64_t rows = 4096;
  while (rows < 4 * static_cast<std::int64_t>(num_sources)) rows *= 2;
  return rows;
}

SourceRows::SourceRows(const void* ids, int width_bytes, std::int64_t num_rows, const std::int64_t* counts_before,
                       std::int64_t num_counts, std::int32_t num_sources)
    : ids_(ids),
      width_bytes_(width_bytes),
      num_rows_(num_rows),
      counts_before_(counts_before),
      num_sources_(num_sources),
      block_rows_(rows_per_block(num_sources)) {
  require(width_bytes == 1 || width_bytes == 2, "source ids of " + std::to_string(width_bytes) + " bytes are not kept.");
  require(num_sources >= 1 && num_sources <= (width_bytes == 1 ? 256 : 65536),
          std::to_string(num_sources) + " sources do not fit ids of " + std::to_string(width_bytes) + " bytes.");
  require(num_rows >= 0, "num_rows=" + std::to_string(num_rows) + " is negative.");
  const std::int64_t blocks = num_rows / block_rows_ + (num_rows % block_rows_ > 0);
  // By division: rows that there cannot be would overflow the product.
  require(num_counts % num_sources == 0 && num_counts / num_sources == blocks + 1,
          std::to_string(num_counts) + " counts are not those of " + std::to_string(num_rows) + " rows of " +
              std::to_string(num_sources) + " sources.");
}

std::int32_t SourceRows::source(std::int64_t row) const {
  if (row < 0 || row >= num_rows_) {
    throw std::out_of_range("row " + std::to_string(row) + " is outside 0.." + std::to_string(num_rows_) + ".");
  }
  const std::int32_t id = width_bytes_ == 1 ? static_cast<const std::uint8_t*>(ids_)[row]
                                            : static_cast<const std::uint16_t*>(ids_)[row];
  if (id >= num_sources_) {
    throw std::runtime_error("row " + std::to_string(row) + " of the order names source " + std::to_string(id) +
                             " of " + std::to_string(num_sources_) + "; the file is damaged.");
  }
  return id;
}

std::int64_t SourceRows::count_before(std::int64_t row, std::int32_t source) const {
  if (row < 0 || row > num_rows_ || source < 0 || source >= num_sources_) {
    throw std::out_of_range("row " + std::to_string(row) + " or source " + std::to_string(source) + " is not there.");
  }
  const std::int64_t block = row / block_rows_, first = block * block_rows_;
  const std::int64_t end = std::min(first + block_rows_, num_rows_);
  const auto between = [&](std::int64_t from, std::int64_t to) {
    return width_bytes_ == 1 ? occurrences(static_cast<const std::uint8_t*>(ids_), from, to,
                                           static_cast<std::uint8_t>(source))
                             : occurrences(static_cast<const std::uint16_t*>(ids_), from, to,
                                           static_cast<std::uint16_t>(source));
  };
  const std::int64_t* line = counts_before_ + block * num_sources_ + source;
  if (row == first) return line[0];
  // From whichever end of the block is nearer.
  return row - first <= end - row ? line[0] + between(first, row) : line[num_sources_] - between(row, end);
}

Origin SourceRows::origin(std::int64_t row) const {
  const std::int32_t id = source(row);
  return {id, count_before(row, id)};
}

Origin RowWalk::next() {
  const std::int32_t source = rows_->source(row_);
  for (Next& known : next_) {
    if (known.source == source) {
      ++row_;
      return {source, known.draw++};
    }
  }
  const std::int64_t draw = rows_->count_before(row_, source);
  next_.push_back({source, draw + 1});
  ++row_;
  return {source, draw};
}

RowCounter::RowCounter(std::int32_t num_sources)
    : num_sources_(num_sources), block_rows_(rows_per_block(num_sources)) {
  require(num_sources >= 1 && num_sources <= 65536,
          "num_sources=" + std::to_string(num_sources) + " is outside 1..65536.");
  now_.resize(static_cast<std::size_t>(num_sources), 0);
}

template <typename Id>
void RowCounter::append(const Id* ids, std::size_t num_rows) {
  for (std::size_t done = 0; done < num_rows;) {
    if (num_rows_ % block_rows_ == 0) lines_.insert(lines_.end(), now_.begin(), now_.end());
    const auto left = static_cast<std::size_t>(block_rows_ - num_rows_ % block_rows_);
    const std::size_t end = std::min(num_rows, done + left);
    for (std::size_t i = done; i < end; ++i) {
      if (ids[i] >= num_sources_) {
        throw std::invalid_argument("row " + std::to_string(num_rows_) + " names source " + std::to_string(ids[i]) +
                                    " of " + std::to_string(num_sources_) + ".");
      }
      ++now_[ids[i]];
      ++num_rows_;
    }
    done = end;
  }
}

template void RowCounter::append(const std::uint8_t*, std::size_t);
template void RowCounter::append(const std::uint16_t*, std::size_t);

std::vector<std::int64_t> RowCounter::take_lines() { return std::exchange(lines_, {}); }

namespace {

// Where the order of a step is turned to, and what its runs are shuffled by.
struct Turn {
  std::uint64_t word;
  std::int64_t offset;
  std::int64_t batch_size;

  Turn(std::uint64_t key, std::int64_t step, std::int64_t size)
      : word(mixed(key ^ mixed(static_cast<std::uint64_t>(step)))),
        offset(static_cast<std::int64_t>(scaled(word, static_cast<std::uint64_t>(size)))),
        batch_size(size) {}

  // The places of the slots of a run; returns how many it has.
  std::int64_t places(std::int64_t run, std::int64_t* positions) const {
    const std::int64_t first = run * kSlotsOfARun, length = std::min(kSlotsOfARun, batch_size - first);
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t until_end = batch_size - (first + i);
      positions[i] = offset < until_end ? first + i + offset : offset - until_end;
    }
    // Fisher-Yates from the back.
    std::uint64_t random = mixed(word ^ mixed(~static_cast<std::uint64_t>(run)));
    for (std::int64_t left = length; left > 1; --left) {
      random = mixed(random);
      std::swap(positions[left - 1], positions[scaled(random, static_cast<std::uint64_t>(left))]);
    }
    return length;
  }
};

}  // namespace

std::int64_t batch_position(std::uint64_t key, std::int64_t step, std::int64_t slot, std::int64_t batch_size) {
  require(batch_size >= 1 && step >= 0, "batch_size is below 1 or the step is negative.");
  require(slot >= 0 && slot < batch_size, "the slot is outside the batch.");
  std::int64_t positions[kSlotsOfARun];
  Turn(key, step, batch_size).places(slot / kSlotsOfARun, positions);
  return positions[slot % kSlotsOfARun];
}

void batch_positions(std::uint64_t key, std::int64_t step, std::int64_t batch_size, std::int64_t* positions) {
  require(batch_size >= 1 && step >= 0, "batch_size is below 1 or the step is negative.");
  const Turn turn(key, step, batch_size);
  for (std::int64_t slot = 0; slot < batch_size;) slot += turn.places(slot / kSlotsOfARun, positions + slot);
}

}  // namespace xalign
