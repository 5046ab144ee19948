#include "xalign/packed_texts.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace xalign {

namespace {

constexpr int kDeepest = 32;
constexpr std::ptrdiff_t kLongestNumber = 200;

void check_kinds(const std::uint8_t* kinds) {
  for (std::size_t c = 0; c < 0x80; ++c) {
    if (kinds[c] & ~kBlank) throw std::invalid_argument("an ASCII character has a kind.");
  }
}

// Length of a UTF-8 sequence of two bytes or more and its code point; 0 if it is none, or goes over the end.
int decode(const unsigned char* at, const unsigned char* end, std::uint32_t& code_point) {
  const auto follows = [&](std::ptrdiff_t i) { return at + i < end && (at[i] & 0xC0U) == 0x80U; };
  const std::uint32_t first = *at;
  if (first < 0xC2U) return 0;
  if (!follows(1)) return 0;
  if (first < 0xE0U) {
    code_point = (first & 0x1FU) << 6 | (at[1] & 0x3FU);
    return 2;
  }
  if (!follows(2)) return 0;
  if (first < 0xF0U) {
    code_point = (first & 0x0FU) << 12 | (at[1] & 0x3FU) << 6 | (at[2] & 0x3FU);
    return code_point < 0x800U || (code_point >= 0xD800U && code_point < 0xE000U) ? 0 : 3;
  }
  if (!follows(3)) return 0;
  code_point = (first & 0x07U) << 18 | (at[1] & 0x3FU) << 12 | (at[2] & 0x3FU) << 6 | (at[3] & 0x3FU);
  return first > 0xF4U || code_point < 0x10000U || code_point >= kCodePoints ? 0 : 4;
}

// The same for a sequence of two or three bytes that has four bytes before the end to lie in; 0 leaves it to `decode`.
int decode_short(const unsigned char* at, std::uint32_t& code_point) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte in memory is the lowest of a number");
  std::uint32_t four = 0;
  std::memcpy(&four, at, 4);
  if ((four & 0xC0E0U) == 0x80C0U) {
    code_point = (four & 0x1FU) << 6 | (four >> 8 & 0x3FU);
    return code_point < 0x80U ? 0 : 2;
  }
  if ((four & 0xC0C0F0U) == 0x8080E0U) {
    code_point = (four & 0x0FU) << 12 | (four >> 2 & 0xFC0U) | (four >> 16 & 0x3FU);
    return code_point < 0x800U || (code_point >= 0xD800U && code_point < 0xE000U) ? 0 : 3;
  }
  return 0;
}

// Writes a code point of 0x80 or more; returns how many bytes.
int encode(std::uint32_t code_point, char* out) {
  const auto continuation = [&](int shift) { return static_cast<char>(0x80U | (code_point >> shift & 0x3FU)); };
  if (code_point < 0x800U) {
    out[0] = static_cast<char>(0xC0U | code_point >> 6);
    out[1] = continuation(0);
    return 2;
  }
  if (code_point < 0x10000U) {
    out[0] = static_cast<char>(0xE0U | code_point >> 12);
    out[1] = continuation(6);
    out[2] = continuation(0);
    return 3;
  }
  out[0] = static_cast<char>(0xF0U | code_point >> 18);
  out[1] = continuation(12);
  out[2] = continuation(6);
  out[3] = continuation(0);
  return 4;
}

constexpr std::uint64_t kOnes = 0x0101010101010101U, kTops = 0x8080808080808080U;

// Of eight bytes, a mask whose lowest bit is in the first that is below 0x20, a quote, a backslash or not ASCII.
std::uint64_t specials(std::uint64_t eight) {
  const auto zero_bytes = [](std::uint64_t word) { return (word - kOnes) & ~word; };
  const std::uint64_t below = (eight - kOnes * 0x20U) & ~eight;
  return (eight | below | zero_bytes(eight ^ kOnes * '"') | zero_bytes(eight ^ kOnes * '\\')) & kTops;
}

// How many of eight bytes come before the first that a mask marks; there is one.
int before_first(std::uint64_t mask) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte in memory is the lowest of a number");
  return __builtin_ctzll(mask) >> 3;
}

// What is written and found of a text so far; a copy of it in registers is several times as fast as one in memory, which
// every byte written might change.
struct Place {
  char* out;
  std::uint8_t found;

  void ascii(char c) { *out++ = c; }
  // Writes eight bytes, of which the first `size` count; what follows is written over.
  void some_of(std::uint64_t eight, int size) {
    std::memcpy(out, &eight, 8);
    out += size;
  }
  void code_point(std::uint32_t code_point, const std::uint8_t* kinds) {
    if (code_point < 0x80U) {
      ascii(static_cast<char>(code_point));
    } else {
      found |= kinds[code_point];
      out += encode(code_point, out);
    }
  }
};

// Notes where texts end; there is room for all that is written.
class Writer {
 public:
  Writer(PackedTexts& packed, char* out, std::string_view separator, const std::uint8_t* kinds)
      : kinds(kinds), packed_(packed), separator_(separator), begin_(out), text_(out) {}
  Place begin_text() { return {text_, 0}; }
  void end_text(Place place) {
    packed_.ends.push_back(place.out - begin_);
    packed_.kinds.push_back(static_cast<std::uint8_t>((place.found & ~kBlank) | (is_blank(place.out) ? kBlank : 0U)));
    std::memcpy(place.out, separator_.data(), separator_.size());
    text_ = place.out + separator_.size();
  }
  void finish() { packed_.size = static_cast<std::size_t>(text_ - begin_); }

  const std::uint8_t* const kinds;

 private:
  bool is_blank(const char* text_end) const {
    const auto* at = reinterpret_cast<const unsigned char*>(text_);
    const auto* end = reinterpret_cast<const unsigned char*>(text_end);
    while (at < end) {
      std::uint32_t code_point = *at;
      const int size = code_point < 0x80U ? 1 : decode(at, end, code_point);
      if (size == 0 || !(kinds[code_point] & kBlank)) return false;
      at += size;
    }
    return true;
  }

  PackedTexts& packed_;
  std::string_view separator_;
  char* begin_;
  char* text_;
};

// One object of JSON a line, read strictly: what is accepted is JSON whoever reads it.
class Lines {
 public:
  Lines(std::string_view data, std::string_view key, Writer& writer)
      : at_(reinterpret_cast<const unsigned char*>(data.data())), end_(at_ + data.size()), key_(key), writer_(writer) {}

  bool read() {
    while (at_ < end_) {
      if (!line()) return false;
    }
    return true;
  }

 private:
  bool line() {
    bool found = false;
    space();
    if (!take('{')) return false;
    space();
    if (!take('}')) {
      do {
        space();
        const unsigned char* name = at_ + 1;
        if (!string<false>()) return false;
        const std::string_view read(reinterpret_cast<const char*>(name), static_cast<std::size_t>(at_ - 1 - name));
        if (read.find('\\') != std::string_view::npos) return false;
        space();
        if (!take(':')) return false;
        space();
        if (read == key_) {
          if (found || !string<true>()) return false;
          found = true;
        } else if (!value(kDeepest)) {
          return false;
        }
        space();
      } while (take(','));
      if (!take('}')) return false;
    }
    space();
    return found && (at_ == end_ || take('\n'));
  }

  bool take(unsigned char c) {
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  // A line break parts lines here, and nothing else.
  void space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool value(int levels) {
    if (at_ == end_ || levels == 0) return false;
    switch (*at_) {
      case '"': return string<false>();
      case '{': return members(levels);
      case '[': return items(levels);
      case 't': return literal("true");
      case 'f': return literal("false");
      case 'n': return literal("null");
      default: return number();
    }
  }

  bool members(int levels) {
    ++at_;
    space();
    if (take('}')) return true;
    do {
      space();
      if (!string<false>()) return false;
      space();
      if (!take(':')) return false;
      space();
      if (!value(levels - 1)) return false;
      space();
    } while (take(','));
    return take('}');
  }

  bool items(int levels) {
    ++at_;
    space();
    if (take(']')) return true;
    do {
      space();
      if (!value(levels - 1)) return false;
      space();
    } while (take(','));
    return take(']');
  }

  bool literal(std::string_view word) {
    if (static_cast<std::size_t>(end_ - at_) < word.size() || std::memcmp(at_, word.data(), word.size()) != 0) return false;
    at_ += word.size();
    return true;
  }

  bool digits() {
    const auto* begin = at_;
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
    return at_ > begin;
  }

  bool number() {
    const auto* begin = at_;
    take('-');
    if (!take('0') && !digits()) return false;
    if (take('.') && !digits()) return false;
    if (at_ < end_ && (*at_ | 0x20) == 'e') {
      ++at_;
      if (!take('+')) take('-');
      if (!digits()) return false;
    }
    return at_ - begin <= kLongestNumber;
  }

  // From the opening quote to behind the closing one; with `kept` it is written.
  template <bool kept>
  bool string() {
    if (!take('"')) return false;
    const unsigned char* at = at_;
    Place place = kept ? writer_.begin_text() : Place{nullptr, 0};
    while (true) {
      pass_plain<kept>(at, place);
      if (at == end_ || *at < 0x20) return false;
      if (*at == '"') break;
      if (*at == '\\') {
        if (!escape<kept>(at, place)) return false;
        continue;
      }
      while (end_ - at >= 4 && *at >= 0x80) {
        std::uint32_t code_point = 0;
        const int size = decode_short(at, code_point);
        if (size == 0) break;
        if (kept) {
          place.found |= writer_.kinds[code_point];
          std::memcpy(place.out, at, 4);
          place.out += size;
        }
        at += size;
      }
      while (at < end_ && *at >= 0x80) {
        std::uint32_t code_point = 0;
        const int size = decode(at, end_, code_point);
        if (size == 0) return false;
        if (kept) {
          place.found |= writer_.kinds[code_point];
          for (int i = 0; i < size; ++i) place.ascii(static_cast<char>(at[i]));
        }
        at += size;
      }
    }
    at_ = at + 1;
    if (kept) writer_.end_text(place);
    return true;
  }

  // ASCII that stands for itself.
  template <bool kept>
  void pass_plain(const unsigned char*& at, Place& place) const {
    while (end_ - at >= 8) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, at, 8);
      const std::uint64_t mask = specials(eight);
      const int size = mask == 0 ? 8 : before_first(mask);
      if (kept) place.some_of(eight, size);
      at += size;
      if (mask != 0) return;
    }
    while (at < end_ && *at >= 0x20 && *at < 0x80 && *at != '"' && *at != '\\') {
      if (kept) place.ascii(static_cast<char>(*at));
      ++at;
    }
  }

  template <bool kept>
  bool escape(const unsigned char*& at, Place& place) const {
    ++at;
    if (at == end_) return false;
    char meant = 0;
    switch (*at++) {
      case '"': meant = '"'; break;
      case '\\': meant = '\\'; break;
      case '/': meant = '/'; break;
      case 'b': meant = '\b'; break;
      case 'f': meant = '\f'; break;
      case 'n': meant = '\n'; break;
      case 'r': meant = '\r'; break;
      case 't': meant = '\t'; break;
      case 'u': return escaped_unit<kept>(at, place);
      default: return false;
    }
    if (kept) place.ascii(meant);
    return true;
  }

  template <bool kept>
  bool escaped_unit(const unsigned char*& at, Place& place) const {
    std::uint32_t code_point = 0, second = 0;
    if (!hex(at, code_point)) return false;
    if (code_point >= 0xD800U && code_point < 0xE000U) {
      if (code_point >= 0xDC00U || end_ - at < 6 || at[0] != '\\' || at[1] != 'u') return false;
      at += 2;
      if (!hex(at, second) || second < 0xDC00U || second >= 0xE000U) return false;
      code_point = 0x10000U + ((code_point - 0xD800U) << 10) + (second - 0xDC00U);
    }
    if (kept) place.code_point(code_point, writer_.kinds);
    return true;
  }

  bool hex(const unsigned char*& at, std::uint32_t& number) const {
    if (end_ - at < 4) return false;
    for (int i = 0; i < 4; ++i, ++at) {
      const std::uint32_t c = *at, letter = c | 0x20U;
      if (c >= '0' && c <= '9') {
        number = number << 4 | (c - '0');
      } else if (letter >= 'a' && letter <= 'f') {
        number = number << 4 | (letter - 'a' + 10U);
      } else {
        return false;
      }
    }
    return true;
  }

  const unsigned char* at_;
  const unsigned char* end_;
  std::string_view key_;
  Writer& writer_;
};

template <typename Unit>
void pack(const Unit* text, std::int64_t length, Writer& writer) {
  Place place = writer.begin_text();
  std::int64_t i = 0;
  while (i < length) {
    if constexpr (sizeof(Unit) == 1) {
      const std::int64_t begin = i;
      std::uint64_t eight = 0;
      while (length - i >= 8 && (std::memcpy(&eight, text + i, 8), (eight & kTops) == 0)) i += 8;
      while (i < length && text[i] < 0x80U) ++i;
      std::memcpy(place.out, text + begin, static_cast<std::size_t>(i - begin));
      place.out += i - begin;
      if (i == length) break;
    }
    if constexpr (sizeof(Unit) > 2) {
      if (text[i] >= kCodePoints) throw std::invalid_argument("a text holds a number that is no code point.");
    }
    place.code_point(text[i++], writer.kinds);
  }
  writer.end_text(place);
}

}  // namespace

std::int64_t count_line_breaks(std::string_view data) {
  std::int64_t count = 0;
  const char *at = data.data(), *const end = at + data.size();
  while (at < end && (at = static_cast<const char*>(std::memchr(at, '\n', static_cast<std::size_t>(end - at))))) {
    ++count;
    ++at;
  }
  return count;
}

std::size_t room_for_texts(const TextView* texts, std::size_t num_texts, std::string_view separator) {
  std::size_t room = num_texts * separator.size();
  for (std::size_t i = 0; i < num_texts; ++i) {
    // A byte can become two, two bytes three, four bytes four.
    const auto per_character = static_cast<std::size_t>(std::min(texts[i].bytes_per_character + 1, 4));
    room += static_cast<std::size_t>(texts[i].length) * per_character;
  }
  return room;
}

PackedTexts pack_texts(const TextView* texts, std::size_t num_texts, std::string_view separator,
                       const std::uint8_t* kinds, char* out) {
  check_kinds(kinds);
  PackedTexts packed;
  packed.ends.reserve(num_texts);
  packed.kinds.reserve(num_texts);
  Writer writer(packed, out, separator, kinds);
  for (std::size_t i = 0; i < num_texts; ++i) {
    switch (texts[i].bytes_per_character) {
      case 1: pack(static_cast<const std::uint8_t*>(texts[i].data), texts[i].length, writer); break;
      case 2: pack(static_cast<const std::uint16_t*>(texts[i].data), texts[i].length, writer); break;
      case 4: pack(static_cast<const std::uint32_t*>(texts[i].data), texts[i].length, writer); break;
      default: throw std::invalid_argument("a text has another width of characters than 1, 2 or 4 bytes.");
    }
  }
  writer.finish();
  return packed;
}

std::size_t room_for_json_lines(std::string_view data, std::string_view separator) {
  // Nothing is longer in UTF-8 than in JSON, and a line has one text. Eight bytes are written at a time.
  return data.size() + static_cast<std::size_t>(count_line_breaks(data) + 1) * separator.size() + 8;
}

std::optional<PackedTexts> pack_json_lines(std::string_view data, std::string_view key, std::string_view separator,
                                           const std::uint8_t* kinds, char* out) {
  check_kinds(kinds);
  PackedTexts packed;
  Writer writer(packed, out, separator, kinds);
  if (!Lines(data, key, writer).read()) return std::nullopt;
  writer.finish();
  return packed;
}

}  // namespace xalign
