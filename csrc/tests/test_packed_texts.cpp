#include "xalign/packed_texts.h"

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "check.h"

using xalign::PackedTexts;

namespace {

std::vector<std::uint8_t> table() {
  std::vector<std::uint8_t> kinds(xalign::kCodePoints, 0);
  kinds[' '] = kinds['\n'] = kinds[0xA0] = xalign::kBlank;
  kinds[0xE9] = 1;
  kinds[0x1F600] = 4;
  return kinds;
}

// What is packed of some lines, "-" if nothing.
std::string packed(std::string_view lines, PackedTexts* facts = nullptr) {
  static const std::vector<std::uint8_t> kinds = table();
  // Memory of the very size, so that a sanitizer sees a byte too many.
  const std::size_t room = xalign::room_for_json_lines(lines, "|");
  const std::unique_ptr<char[]> out(new char[room]);
  const std::unique_ptr<char[]> copy(new char[lines.size()]);
  std::copy(lines.begin(), lines.end(), copy.get());
  const auto found = xalign::pack_json_lines({copy.get(), lines.size()}, "text", "|", kinds.data(), out.get());
  if (!found) return "-";
  if (facts != nullptr) *facts = *found;
  return {out.get(), found->size};
}

void texts_of_lines_come_one_after_the_other() {
  PackedTexts facts;
  CHECK(packed("{\"text\":\"a\"}\n{\"id\": [1, -2.5e+3, {\"text\": null}, []], \"text\" : \"b\\n\\u00e9\xF0\x9F\x98\x80\"}\r\n"
               "{\"text\":\"\",\"x\":true}\n{\"text\":\" \\u00a0\"}", &facts) ==
        "a|b\n\xC3\xA9\xF0\x9F\x98\x80|| \xC2\xA0|");
  CHECK((facts.ends == std::vector<std::int64_t>{1, 10, 11, 15}));
  CHECK((facts.kinds == std::vector<std::uint8_t>{0, 5, xalign::kBlank, xalign::kBlank}));
  CHECK(packed("{\"text\":\"\\ud83d\\ude00 12345678 \\\\ \\/\\\"\\b\\f\\r\\t\"}\n") ==
        "\xF0\x9F\x98\x80 12345678 \\ /\"\b\f\r\t|");
  CHECK(packed("").empty());
}

void what_is_not_plainly_json_is_left_alone() {
  for (const std::string_view value :
       {"\"\\ud83d\"", "\"\\ude00\"", "\"\\ud83dx\"", "\"\\ud83d\\u0041\"", "\"\\x\"", "\"\\u12\"", "\"a", "\"\t\"", "\"\xC3\"",
        "\"\xC0\x80\"", "\"\xED\xA0\x80\"", "\"\xF4\x90\x80\x80\"", "\"\xE0\x80\x80\"", "\"\xFF\"", "1", "null", "", "[\"a\"]"}) {
    CHECK(packed("{\"text\":" + std::string(value) + "}\n") == "-");
  }
  for (const std::string_view value : {"01", "1.", ".5", "+1", "1e", "-", "nul", "tru", "[1,]", "[1 2]", "{\"a\"}", "{a:1}", "{,}", "NaN",
                                       "\"\\ud800\"", "\"\xFF\"", "]"}) {
    CHECK(packed("{\"x\":" + std::string(value) + ",\"text\":\"a\"}\n") == "-");
  }
  for (const std::string_view line :
       {"{\"text\":\"a\"}{\"text\":\"b\"}", "{\"text\":\"a\"}\n\n", "\n", "{\"text\":\"a\"} x", "[{\"text\":\"a\"}]",
        "{\"text\":\"a\",}", "{\"text\":\"a\",\n\"b\":1}", "{\"text\":\"a\",\"text\":\"b\"}", "{\"te\\u0078t\":\"a\"}", "{}",
        "{\"texts\":\"a\"}", "{", "{\"text\"", "{\"text\":", "\xEF\xBB\xBF{\"text\":\"a\"}"}) {
    CHECK(packed(line) == "-");
  }
  CHECK(packed("{\"x\":" + std::string(100, '[') + std::string(100, ']') + ",\"text\":\"a\"}") == "-");
  CHECK(packed("{\"x\":" + std::string(300, '1') + ",\"text\":\"a\"}") == "-");
}

void texts_of_python_come_in_utf8() {
  const std::vector<std::uint8_t> kinds = table();
  const unsigned char bytes[] = {'a', 0xE9, 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 0xFF};
  const std::uint16_t twos[] = {0x4E00, 'x', 0xD800};
  const std::uint32_t fours[] = {0x1F600, ' '};
  const xalign::TextView texts[] = {{bytes, 11, 1}, {twos, 3, 2}, {fours, 2, 4}, {fours + 1, 1, 4}, {bytes, 0, 1}};
  const std::size_t room = xalign::room_for_texts(texts, 5, "|");
  const std::unique_ptr<char[]> out(new char[room]);
  const PackedTexts found = xalign::pack_texts(texts, 5, "|", kinds.data(), out.get());
  CHECK(std::string(out.get(), found.size) ==
        "a\xC3\xA9" "bcdefghi\xC3\xBF|\xE4\xB8\x80x\xED\xA0\x80|\xF0\x9F\x98\x80 | ||");
  CHECK((found.ends == std::vector<std::int64_t>{13, 21, 27, 29, 30}));
  CHECK((found.kinds == std::vector<std::uint8_t>{1, 0, 4, xalign::kBlank, xalign::kBlank}));
}

void bad_arguments_are_refused() {
  std::vector<std::uint8_t> kinds = table();
  const std::uint32_t beyond[] = {0x110000};
  char out[16];
  const xalign::TextView bad[] = {{beyond, 1, 4}}, odd[] = {{beyond, 1, 3}};
  CHECK_THROWS(xalign::pack_texts(bad, 1, "", kinds.data(), out), std::invalid_argument);
  CHECK_THROWS(xalign::pack_texts(odd, 1, "", kinds.data(), out), std::invalid_argument);
  kinds['a'] = 1;
  CHECK_THROWS(xalign::pack_json_lines("", "text", "|", kinds.data(), out), std::invalid_argument);
}

}  // namespace

int main() {
  texts_of_lines_come_one_after_the_other();
  what_is_not_plainly_json_is_left_alone();
  texts_of_python_come_in_utf8();
  bad_arguments_are_refused();
  CHECK(xalign::count_line_breaks("\na\n\nb") == 3);
  CHECK(xalign::count_line_breaks("") == 0);
}
