// A range cut into one piece per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace xalign {

// Calls work(piece, begin, end) for contiguous pieces 0, 1, .. of 0..size, each in a thread of its own and at least
// `least` long (but for the only one). Returns how many pieces there were. What the first piece that failed threw is
// thrown again once all are done, so that an error does not depend on timing.
template <typename Work>
std::int64_t in_pieces(std::int64_t size, std::int64_t least, int num_threads, Work work) {
  const std::int64_t pieces =
      std::clamp<std::int64_t>(size / std::max<std::int64_t>(least, 1), 1, std::clamp(num_threads, 1, 256));
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(pieces));
  const auto run = [&](std::int64_t piece) {
    const auto border = [&](std::int64_t at) { return size / pieces * at + std::min(at, size % pieces); };
    try {
      work(piece, border(piece), border(piece + 1));
    } catch (...) {
      errors[static_cast<std::size_t>(piece)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(pieces));
  std::int64_t started = 1;
  for (; started < pieces; ++started) {
    try {
      threads.emplace_back(run, started);
    } catch (const std::system_error&) {
      break;  // No more threads are to be had; this one does the rest.
    }
  }
  run(0);
  for (std::int64_t piece = started; piece < pieces; ++piece) run(piece);
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return pieces;
}

}  // namespace xalign
