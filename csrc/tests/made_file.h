// A token file in memory, for tests.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "xalign/token_view.h"

// Documents of given lengths; token t of document d is (31 * d + t) % 50 + 1, the last of each 0. Arrays lie at odd
// addresses, as those behind the header of an index do.
class MadeFile {
 public:
  explicit MadeFile(const std::vector<std::int64_t>& lengths, bool with_lengths = true,
                    xalign::Content content = xalign::Content::all_but_last) {
    std::vector<std::uint16_t> tokens;
    std::vector<std::int32_t> short_lengths;
    std::vector<std::int64_t> pointers, ends;
    std::vector<std::int8_t> languages;
    for (std::size_t d = 0; d < lengths.size(); ++d) {
      pointers.push_back(2 * static_cast<std::int64_t>(tokens.size()));
      short_lengths.push_back(static_cast<std::int32_t>(lengths[d]));
      for (std::int64_t t = 0; t < lengths[d]; ++t) {
        const bool is_last = t + 1 == lengths[d];
        tokens.push_back(is_last ? 0 : static_cast<std::uint16_t>((31 * d + static_cast<std::size_t>(t)) % 50 + 1));
        // Three tokens of the one language, three of the other, and so on; the end has none.
        const auto language = static_cast<std::int8_t>(is_last ? -1 : t / 3 % 2);
        if (t > 0 && languages.back() == language) {
          ends.back() = static_cast<std::int64_t>(tokens.size());
        } else {
          ends.push_back(static_cast<std::int64_t>(tokens.size()));
          languages.push_back(language);
        }
      }
    }
    view_.name = "made";
    view_.tokens = put(tokens);
    view_.num_tokens = static_cast<std::int64_t>(tokens.size());
    view_.vocab_size = 51;
    view_.num_documents = static_cast<std::int64_t>(lengths.size());
    view_.lengths = with_lengths ? put(short_lengths) : nullptr;
    view_.pointers = put(pointers);
    view_.content = content;
    view_.eod = 0;
    view_.run_language = {3};
    if (content == xalign::Content::spans) {
      view_.span_ends = put(ends);
      view_.span_languages = put(languages);
      view_.num_spans = static_cast<std::int64_t>(ends.size());
      view_.run_language = {3, 1};
    }
  }

  xalign::TokenFileView& view() { return view_; }

  // Writes over item `index` of an array of the view.
  template <typename T>
  static void damage(const void* array, std::int64_t index, T value) {
    std::memcpy(static_cast<char*>(const_cast<void*>(array)) + index * static_cast<std::int64_t>(sizeof(T)), &value,
                sizeof(T));
  }

 private:
  template <typename T>
  const void* put(const std::vector<T>& items) {
    // Exactly as long as the array, so that the sanitizer sees a step outside.
    memory_.emplace_back(1 + items.size() * sizeof(T));
    if (!items.empty()) std::memcpy(memory_.back().data() + 1, items.data(), items.size() * sizeof(T));
    return memory_.back().data() + 1;
  }

  std::vector<std::vector<char>> memory_;
  xalign::TokenFileView view_;
};
