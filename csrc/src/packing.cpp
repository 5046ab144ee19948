#include "xalign/packing.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace xalign {

BestFitPacker::BestFitPacker(std::int64_t window_tokens) : window_tokens_(window_tokens) {
  if (window_tokens < 1) {
    throw std::invalid_argument("window_tokens=" + std::to_string(window_tokens) + " is below 1.");
  }
}

void BestFitPacker::add(std::int64_t document, std::int64_t length) {
  if (length < 0) {
    throw std::invalid_argument("document " + std::to_string(document) + " has a length of " + std::to_string(length) +
                                ".");
  }
  if (length == 0) return;
  if (length > window_tokens_) {
    if (__builtin_add_overflow(packing_.left_out_tokens, length, &packing_.left_out_tokens)) {
      throw std::overflow_error("documents that are left out add up to more tokens than int64 holds.");
    }
    ++packing_.left_out_documents;
    return;
  }
  std::size_t best = room_.size(), fullest = 0;
  for (std::size_t i = 0; i < room_.size(); ++i) {
    if (room_[i] >= length && (best == room_.size() || room_[i] < room_[best])) best = i;
    if (room_[i] < room_[fullest]) fullest = i;
  }
  if (best == room_.size()) {
    if (room_.size() == kOpenWindows) close(fullest);
    best = room_.size();
    room_.push_back(window_tokens_);
    held_.emplace_back();
    if (!spare_.empty()) {
      held_.back() = std::move(spare_.back());
      spare_.pop_back();
    }
  }
  held_[best].push_back(document);
  room_[best] -= length;
  if (room_[best] == 0) close(best);
}

void BestFitPacker::close(std::size_t place) {
  auto& documents = held_[place];
  packing_.documents.insert(packing_.documents.end(), documents.begin(), documents.end());
  packing_.window_starts.push_back(static_cast<std::int64_t>(packing_.documents.size()));
  documents.clear();
  spare_.push_back(std::move(documents));
  room_.erase(room_.begin() + static_cast<std::ptrdiff_t>(place));
  held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(place));
}

Packing BestFitPacker::finish() {
  while (!room_.empty()) close(static_cast<std::size_t>(std::min_element(room_.begin(), room_.end()) - room_.begin()));
  return std::exchange(packing_, Packing{});
}

}  // namespace xalign
