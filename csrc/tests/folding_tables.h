// A small folding for tests: ASCII letters lose their case, digits and all other code points are letters, white space
// and ASCII signs part words, and one code point of each other kind.
#pragma once

#include <string>
#include <vector>

#include "xalign/folding.h"

constexpr std::uint32_t kIgnoredPoint = 0x200B, kHan = 0x4E2D, kHanToo = 0x6587, kThai = 0xE01, kThaiToo = 0xE02;
constexpr std::uint32_t kAbove = 0x301, kBelow = 0x323, kLigature = 0xFB01, kAccented = 0xE9;

inline std::uint32_t entry(std::uint32_t code_point, xalign::Kind kind, std::uint32_t combining = 0) {
  return code_point | static_cast<std::uint32_t>(kind) << 21 | combining << 24;
}

inline xalign::Folding test_folding() {
  using xalign::Kind;
  std::vector<std::uint32_t> table(xalign::kCodePoints);
  for (std::uint32_t c = 0; c < table.size(); ++c) table[c] = entry(c, Kind::kLetter);
  for (std::uint32_t c = 'A'; c <= 'Z'; ++c) table[c] = entry(c + 32, Kind::kLetter);
  for (const char c : std::string(".,;:!?-+()")) table[static_cast<std::uint8_t>(c)] = entry(c, Kind::kSign);
  for (const char c : std::string(" \t\n\r")) table[static_cast<std::uint8_t>(c)] = entry(c, Kind::kSpace);
  table[0] = entry(0, Kind::kSpace);
  table[kIgnoredPoint] = entry(kIgnoredPoint, Kind::kIgnored);
  for (const std::uint32_t c : {kHan, kHanToo}) table[c] = entry(c, Kind::kIdeograph);
  for (const std::uint32_t c : {kThai, kThaiToo}) table[c] = entry(c, Kind::kUnspaced);
  table[kAbove] = entry(kAbove, Kind::kMark, 230);
  table[kBelow] = entry(kBelow, Kind::kMark, 220);
  std::vector<std::uint32_t> expansions = {2, table['f'], table['i'], 2, table['e'], table[kAbove]};
  table[kLigature] = entry(0, Kind::kExpansion);
  table[kAccented] = entry(3, Kind::kExpansion);
  return xalign::Folding(table.data(), table.size(), expansions.data(), expansions.size());
}

inline xalign::TextView view(const std::u32string& text) {
  return {text.data(), static_cast<std::int64_t>(text.size()), 4};
}

inline std::vector<xalign::TextView> views(const std::vector<std::u32string>& texts) {
  std::vector<xalign::TextView> all;
  for (const auto& text : texts) all.push_back(view(text));
  return all;
}

inline std::u32string folded(const xalign::Folding& folding, const xalign::TextView& text) {
  xalign::Buffer<std::uint32_t> buffer;
  folding.fold(text, buffer);
  return std::u32string(buffer.begin(), buffer.end());
}
