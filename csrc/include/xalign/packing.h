// Whole documents packed into windows of limited size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace xalign {

// Documents of the file, window after window.
struct Packing {
  std::vector<std::int64_t> documents;
  std::vector<std::int64_t> window_starts = {0};  // where each window begins in `documents`, and last its size
  std::int64_t left_out_documents = 0;            // longer than a window
  std::int64_t left_out_tokens = 0;
};

// Bounded best fit: a document goes into the open window that it leaves the least room in, the one opened first if
// there are several; where none has room a new one is opened, and if kOpenWindows are open, the fullest of them is
// closed before. A full window is closed at once. The same documents in the same order always give the same windows.
class BestFitPacker {
 public:
  static constexpr std::size_t kOpenWindows = 64;

  // Throws std::invalid_argument if window_tokens is below 1.
  explicit BestFitPacker(std::int64_t window_tokens);
  // Documents of no tokens take no place in a window; longer ones than a window are left out and counted. Throws
  // std::invalid_argument on a negative length.
  void add(std::int64_t document, std::int64_t length);
  // Closes all windows, the fullest first. The packer is empty afterwards.
  Packing finish();

 private:
  void close(std::size_t place);

  std::int64_t window_tokens_;
  std::vector<std::int64_t> room_;  // of each open window, in the order they were opened
  std::vector<std::vector<std::int64_t>> held_;
  std::vector<std::vector<std::int64_t>> spare_;
  Packing packing_;
};

}  // namespace xalign
