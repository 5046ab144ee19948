// Many texts as one stretch of UTF-8, a separator behind each: what an engine that reads bytes takes in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "xalign/folding.h"

namespace xalign {

// Of a table of kinds: the code point is white space. Of a text: it holds nothing else.
constexpr std::uint8_t kBlank = 0x80;

struct PackedTexts {
  std::vector<std::int64_t> ends;   // [num_texts], of each text; its separator follows
  std::vector<std::uint8_t> kinds;  // [num_texts], kinds of its code points or-ed together, and kBlank
  std::size_t size = 0;             // bytes written
};

// Both write to memory of the caller's, which has the room asked for. Both take a table of one byte for each of
// kCodePoints, and throw std::invalid_argument if an ASCII character has another kind in it than 0 or kBlank.

// Half of a UTF-16 pair becomes three bytes, which are no UTF-8: its kind has to tell.
std::size_t room_for_texts(const TextView* texts, std::size_t num_texts, std::string_view separator);
PackedTexts pack_texts(const TextView* texts, std::size_t num_texts, std::string_view separator,
                       const std::uint8_t* kinds, char* out);

// The texts under a key of the objects on the lines of some JSON; a line ends at '\n' or at the end of the data.
// Nothing, and what was written is to be thrown away, unless every line holds one object as RFC 8259 has it, in UTF-8,
// with the key once, a string there and no half of a UTF-16 pair anywhere. Nothing too for what somebody else shall look
// at more closely, though it is allowed: a key with a backslash, numbers of hundreds of digits, dozens of levels.
// Time O(size), in one pass.
std::size_t room_for_json_lines(std::string_view data, std::string_view separator);
std::optional<PackedTexts> pack_json_lines(std::string_view data, std::string_view key, std::string_view separator,
                                           const std::uint8_t* kinds, char* out);

// How often '\n' is there.
std::int64_t count_line_breaks(std::string_view data);

}  // namespace xalign
