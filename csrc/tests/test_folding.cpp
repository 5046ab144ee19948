#include "xalign/folding.h"

#include <stdexcept>

#include "check.h"
#include "folding_tables.h"

using xalign::Folding;
using xalign::Kind;

void words_are_joined_by_single_spaces() {
  const Folding folding = test_folding();
  CHECK(folded(folding, view(U"  Hello,\t(World)! ")) == U" hello world ");
  CHECK(folded(folding, view(U"")).empty());
  CHECK(folded(folding, view(U" ?!\n")).empty());
  CHECK(folded(folding, view(U"\u200B")).empty());
  CHECK(folded(folding, view(U"so\u200Bft")) == U" soft ");
  CHECK(folded(folding, view(U"a")) == U" a ");
  // Ideographs are words by themselves; beside letters without spaces, spaces and signs are nothing.
  CHECK(folded(folding, view(U"中文,abc")) == U" 中 文 abc ");
  CHECK(folded(folding, view(U"abc中")) == U" abc 中 ");
  CHECK(folded(folding, view(U"กข ก.a b")) == U" กขกa b ");
  CHECK(folded(folding, view(U"ก中ก")) == U" ก 中 ก ");
}

void marks_stay_with_their_letter_in_canonical_order() {
  const Folding folding = test_folding();
  CHECK(folded(folding, view(U"\u00E9\u0323x")) == U" e\u0323\u0301x ");
  CHECK(folded(folding, view(U"e\u0323\u0301x")) == U" e\u0323\u0301x ");
  CHECK(folded(folding, view(U"中\u0301文")) == U" 中\u0301 文 ");
  CHECK(folded(folding, view(U"a \u0301b")) == U" a \u0301b ");
  CHECK(folded(folding, view(U"\u0301")) == U" \u0301 ");
  // Something between two marks keeps them where they are.
  CHECK(folded(folding, view(U"e\u0301\u200B\u0323")) == U" e\u0301\u0323 ");
  std::u32string many(100'000, U'\u0301');
  for (std::size_t i = 1; i < many.size(); i += 2) many[i] = U'\u0323';
  const std::u32string in_order = U" a" + std::u32string(50'000, U'\u0323') + std::u32string(50'000, U'\u0301') + U" ";
  CHECK(folded(folding, view(U"a" + many)) == in_order);
}

void every_width_of_characters_gives_the_same() {
  const Folding folding = test_folding();
  const std::u32string text = U"Caf\u00E9, Bar \u00E9";
  const std::vector<std::uint8_t> narrow(text.begin(), text.end());
  const std::vector<std::uint16_t> wide(text.begin(), text.end());
  const auto length = static_cast<std::int64_t>(text.size());
  CHECK(folded(folding, {narrow.data(), length, 1}) == folded(folding, view(text)));
  CHECK(folded(folding, {wide.data(), length, 2}) == folded(folding, view(text)));
  // Expansions only: the text grows beyond what was made ready.
  CHECK(folded(folding, view(std::u32string(1000, U'\uFB01'))).size() == 2002);
  xalign::Buffer<std::uint32_t> buffer;
  CHECK_THROWS(folding.fold({text.data(), length, 3}, buffer), std::invalid_argument);
  const std::uint32_t no_code_point[] = {xalign::kCodePoints};
  CHECK_THROWS(folding.fold({no_code_point, 1, 4}, buffer), std::invalid_argument);
}

void bad_tables_are_refused() {
  const std::vector<std::uint32_t> letters(xalign::kCodePoints, entry('a', Kind::kLetter));
  const std::vector<std::uint32_t> short_of_one = {1};
  CHECK_THROWS(Folding(letters.data(), letters.size() - 1, nullptr, 0), std::invalid_argument);
  auto table = letters;
  table[7] = entry(xalign::kCodePoints, Kind::kLetter);
  CHECK_THROWS(Folding(table.data(), table.size(), nullptr, 0), std::invalid_argument);
  table[7] = entry('a', Kind::kLetter, 230);
  CHECK_THROWS(Folding(table.data(), table.size(), nullptr, 0), std::invalid_argument);
  table[7] = entry(0, Kind::kExpansion);
  CHECK_THROWS(Folding(table.data(), table.size(), nullptr, 0), std::invalid_argument);
  CHECK_THROWS(Folding(table.data(), table.size(), short_of_one.data(), 1), std::invalid_argument);
  const std::vector<std::uint32_t> nested = {1, entry(0, Kind::kExpansion)};
  CHECK_THROWS(Folding(table.data(), table.size(), nested.data(), 2), std::invalid_argument);
}

void characters_are_counted_by_kind() {
  std::vector<std::uint8_t> kinds(xalign::kCodePoints, 0);
  kinds['a'] = 1;
  kinds[0x10FFFF] = 2;
  const std::vector<std::u32string> texts = {U"abca\U0010FFFF", U"", U"a"};
  const auto all = views(texts);
  CHECK(xalign::count_characters(all.data(), all.size(), kinds.data(), 3) ==
        (std::vector<std::int64_t>{2, 2, 1, 0, 0, 0, 0, 1, 0}));
  CHECK_THROWS(xalign::count_characters(all.data(), all.size(), kinds.data(), 2), std::invalid_argument);
  CHECK_THROWS(xalign::count_characters(all.data(), all.size(), kinds.data(), 257), std::invalid_argument);
}

void kinds_and_bytes_of_texts() {
  std::vector<std::uint8_t> kinds(xalign::kCodePoints, 0);
  kinds['a'] = 1;
  kinds[0x4E00] = 2;
  kinds[0x10FFFF] = 4;
  const std::vector<std::u32string> texts = {U"bab", U"", U"b\u00e9\u4E00", U"a\U0010FFFF",
                                             U"\u007f\u0080\u07ff\u0800\uffff\U00010000"};
  const auto all = views(texts);
  CHECK(xalign::kinds_in_texts(all.data(), all.size(), kinds.data()) == (std::vector<std::uint8_t>{1, 0, 2, 5, 0}));
  CHECK(xalign::utf8_lengths(all.data(), all.size()) == (std::vector<std::int64_t>{3, 0, 6, 5, 15}));
}

int main() {
  words_are_joined_by_single_spaces();
  marks_stay_with_their_letter_in_canonical_order();
  every_width_of_characters_gives_the_same();
  bad_tables_are_refused();
  characters_are_counted_by_kind();
  kinds_and_bytes_of_texts();
}
