// Every header but those of files (fuzz_stream) is called with arguments of any kind: sensible ones and none at all,
// negative and enormous ones. What comes back is checked where a line can say what it must be; everything else must be
// refused with an exception that the header names, and no step may be taken outside the memory (the sanitizers watch).
//   fuzz_arguments [SECONDS] [SEED]

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "folding_tables.h"
#include "fuzz.h"
#include "xalign/blend.h"
#include "xalign/blend_tally.h"
#include "xalign/blender.h"
#include "xalign/fair_queue.h"
#include "xalign/fraction_schedule.h"
#include "xalign/minhash.h"
#include "xalign/packing.h"
#include "xalign/probe_index.h"
#include "xalign/sample_orders.h"
#include "xalign/windows.h"

namespace {

// Numbers that are mostly sensible; memory is made as large as the number of them, so that stays small.
template <typename T>
std::vector<T> numbers(Chance& chance, std::int64_t most, std::int64_t sensible) {
  std::vector<T> list(static_cast<std::size_t>(chance.below(most + 1)));
  const bool wild = chance.one_in(3);
  for (T& number : list) number = static_cast<T>(wild ? chance.number(sensible) : chance.below(sensible + 1));
  return list;
}

void blend_orders(Chance& chance) {
  const auto weights = numbers<std::int64_t>(chance, chance.one_in(20) ? 400 : 8, 1000);
  std::optional<xalign::BlendOrder> blend;
  attempt([&] { blend.emplace(weights.data(), weights.size()); });
  if (!blend) return;
  std::vector<std::uint8_t> bytes(3000);
  std::vector<std::int32_t> words(3000);
  attempt([&] {
    const std::int64_t count = chance.one_in(10) ? -chance.below(5) - 1 : chance.below(3000);
    chance.one_in(2) ? blend->fill(bytes.data(), count) : blend->fill(words.data(), count);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      CHECK(static_cast<std::size_t>(std::max<std::int32_t>(words[at], bytes[at])) < weights.size());
    }
  });
  attempt([&] { xalign::blend_order(weights.data(), weights.size(), -chance.below(3)); });
}

void permutations(Chance& chance) {
  attempt([&] { xalign::permutation(static_cast<std::uint64_t>(chance.number(9)), chance.below(500) - 20); });
  std::optional<xalign::Permutation> order;
  attempt([&] { order.emplace(static_cast<std::uint64_t>(chance.number(99)), chance.number(1000)); });
  if (!order) return;
  attempt([&] { CHECK(order->position_of(order->at(chance.number(order->size()))) >= 0); });
  std::vector<std::int64_t> out(600);
  const std::int64_t first = chance.number(order->size());
  attempt([&] { order->fill(first, chance.one_in(9) ? chance.number(600) % 600 : chance.below(600), out.data()); });
  attempt([&] { order->fill_positions(chance.number(1000), chance.below(600) - 5, out.data()); });
  attempt([&] {
    auto positions = numbers<std::int64_t>(chance, 50, std::min<std::int64_t>(order->size(), 1000));
    if (chance.one_in(2)) {
      order->map(positions.data(), positions.size());
    } else {
      order->map_back(positions.data(), positions.size());
    }
  });
}

void queues(Chance& chance) {
  std::optional<xalign::FairQueue> queue;
  const auto weights = numbers<std::int64_t>(chance, 6, 50);
  attempt([&] { queue.emplace(weights, chance.one_in(2) ? 0 : chance.number(100)); });
  for (int i = 0; queue && i < 60; ++i) {
    attempt([&] {
      const auto member = static_cast<std::size_t>(chance.one_in(9) ? chance.number(6) : i % (queue->num_members() + 1));
      queue->offer(member, chance.number(60));
    });
    attempt([&] { CHECK(queue->best() < queue->num_members()); });
    attempt([&] { queue->take_best(); });
  }
}

std::vector<xalign::FractionPhase> phases(Chance& chance, std::int64_t denominator) {
  std::vector<xalign::FractionPhase> list;
  std::int64_t until = 0;
  for (std::int64_t left = 1 + chance.below(3); left > 0; --left) {
    until = chance.one_in(15) ? chance.number(until) : std::min(until, std::int64_t{1} << 40) + 1 + chance.below(200);
    const auto numerator = [&] { return chance.one_in(15) ? chance.number(denominator) : chance.below(denominator + 1); };
    list.push_back({until, numerator(), numerator()});
  }
  if (chance.one_in(15)) list.clear();
  return list;
}

void schedules(Chance& chance) {
  const std::int64_t denominator = chance.one_in(4) ? chance.number(1000) : 1 + chance.below(1000);
  std::optional<xalign::FractionSchedule> schedule;
  attempt([&] {
    schedule.emplace(phases(chance, std::clamp<std::int64_t>(denominator, 0, 1 << 20)), denominator, chance.number(20));
  });
  if (!schedule) return;
  const std::int64_t sample = chance.number(100);
  if (sample < 0) return;
  CHECK(schedule->phase_of(sample) < schedule->num_phases());
  CHECK(schedule->numerator(sample) >= 0 && schedule->numerator(sample) <= schedule->denominator());
}

void packings(Chance& chance) {
  std::optional<xalign::BestFitPacker> packer;
  attempt([&] { packer.emplace(chance.number(100)); });
  for (int i = 0; packer && i < 200; ++i) {
    attempt([&] { packer->add(i, chance.number(60)); });
    if (!chance.one_in(50)) continue;
    const xalign::Packing packing = packer->finish();
    CHECK(packing.window_starts.back() == static_cast<std::int64_t>(packing.documents.size()));
  }
}

void windows(Chance& chance) {
  const auto lengths = numbers<std::int32_t>(chance, 40, 12);
  const auto long_lengths = numbers<std::int64_t>(chance, 10, 12);
  // A stream of one enormous document has as many windows, and there is no room for them.
  const std::int64_t tokens = std::accumulate(long_lengths.begin(), long_lengths.end(), std::int64_t{0},
                                              [](std::int64_t a, std::int64_t b) { return b < 1000 ? a : b; });
  attempt([&] {
    const bool huge = std::any_of(lengths.begin(), lengths.end(), [](std::int32_t length) { return length > 1 << 20; });
    xalign::sample_index(lengths.data(), lengths.size(), huge ? 1 << 20 : chance.number(9));
  });
  attempt([&] {
    xalign::sample_index(long_lengths.data(), long_lengths.size(),
                         tokens ? std::numeric_limits<std::int64_t>::max() / 16 : chance.number(9));
  });
  const auto ids = numbers<std::int8_t>(chance, 40, 2);
  const auto positions = numbers<std::int64_t>(chance, 5, 40);
  attempt([&] {
    xalign::count_languages(ids.data(), ids.size(), positions.data(), positions.size(),
                            static_cast<std::size_t>(chance.below(4)));
  });
  auto stops = positions;
  for (auto& stop : stops) stop = chance.one_in(9) ? chance.number(40) : std::min<std::int64_t>(stop, 40) + chance.below(3);
  attempt([&] { xalign::gather(ids.data(), ids.size(), positions.data(), stops.data(), positions.size()); });
}

void orders(Chance& chance) {
  const auto num_sources = static_cast<std::int32_t>(chance.one_in(9) ? chance.number(5) : 1 + chance.below(5));
  const auto ids = numbers<std::uint8_t>(chance, chance.one_in(9) ? 9000 : 60, std::max(num_sources - 1, 0));
  std::vector<std::int64_t> counts;
  attempt([&] {
    xalign::RowCounter counter(num_sources);
    counter.append(ids.data(), ids.size());
    counts = counter.take_lines();
    counts.insert(counts.end(), counter.now().begin(), counter.now().end());
  });
  if (chance.one_in(9)) counts.resize(static_cast<std::size_t>(chance.below(40)));
  for (auto& count : counts) count = chance.one_in(99) ? chance.number(99) : count;
  std::optional<xalign::SourceRows> rows;
  const auto num_rows = chance.one_in(9) ? std::min<std::int64_t>(chance.number(60), 0) : static_cast<std::int64_t>(ids.size());
  attempt([&] { xalign::SourceRows(ids.data(), static_cast<int>(chance.below(4)), chance.number(60) | 1 << 20, counts.data(),
                                   static_cast<std::int64_t>(counts.size()), num_sources); });
  attempt([&] { rows.emplace(ids.data(), 1, num_rows, counts.data(), static_cast<std::int64_t>(counts.size()), num_sources); });
  const std::int64_t batch_size = chance.one_in(4) ? chance.number(20) : 1, slot = chance.number(20);
  attempt([&] { CHECK(xalign::batch_position(3, chance.number(99), slot, batch_size) < batch_size); });
  attempt([&] {
    std::vector<std::int64_t> places(100);
    xalign::batch_positions(3, chance.number(99), std::min<std::int64_t>(batch_size, 100), places.data());
  });
  if (!rows) return;
  attempt([&] { rows->source(chance.number(60)); });
  attempt([&] { rows->count_before(chance.number(60), static_cast<std::int32_t>(chance.number(5))); });
  attempt([&] {
    for (xalign::RowWalk walk(*rows, chance.number(60)); walk.row() < rows->num_rows();) walk.next();
  });
  const xalign::Streams none;
  std::vector<xalign::Piece> pieces;
  attempt([&] {
    const xalign::SampleOrder order(*rows, batch_size, 7);
    const std::int64_t sample = chance.number(60);
    CHECK(order.position_of(sample) < order.num_samples());
    order.append_pieces(sample, none, pieces);
  });
  std::vector<xalign::SampleBorder> borders(20);
  for (auto& border : borders) border.row = chance.number(60), border.token = static_cast<std::int32_t>(chance.number(9));
  attempt([&] {
    const xalign::DocumentOrder order(*rows, borders.data(), std::min<std::int64_t>(chance.number(20), 20),
                                      std::vector<bool>(static_cast<std::size_t>(num_sources)), batch_size, 7);
    order.append_pieces(chance.number(20), none, pieces);
  });
}

void blenders(Chance& chance) {
  xalign::BlendTarget target;
  target.seq_length = chance.one_in(9) ? chance.number(30) : 1 + chance.below(30);
  target.num_samples = chance.one_in(9) ? chance.number(40) : chance.below(40);
  target.denominator = chance.one_in(9) ? chance.number(100) : 100;
  target.phases = phases(chance, 100);
  target.count_all_tokens = chance.one_in(2);
  target.parallel_fills_languages = chance.one_in(2);
  target.documents = chance.one_in(2);
  target.keep_pairs_whole = chance.one_in(2);
  target.batch_size = chance.one_in(9) ? std::min<std::int64_t>(chance.number(8), 1 << 10) : 1 + chance.below(8);
  const auto languages = static_cast<std::size_t>(chance.below(3) + !chance.one_in(20));
  const auto sources = static_cast<std::size_t>(chance.below(4) + !chance.one_in(20));
  const auto rates = [&] { return chance.one_in(9) ? chance.number(100) : chance.below(200) - 50; };
  for (std::size_t k = 0; k < languages; ++k) {
    target.language_shares.push_back(chance.one_in(9) ? chance.number(50) : chance.below(50));
    target.language_rates_without.push_back(rates());
    target.language_rates_with.push_back(rates());
  }
  for (std::size_t j = 0; j < sources; ++j) {
    const std::int64_t group = chance.one_in(20) ? chance.number(4) : chance.below(static_cast<std::int64_t>(languages) + 1) - 1;
    target.group_of_source.push_back(static_cast<std::int32_t>(group));
    target.source_weights.push_back(chance.one_in(9) ? chance.number(9) : chance.below(9));
    std::vector<std::int32_t> spoken;
    for (std::int64_t left = chance.below(3); left > 0; --left) {
      spoken.push_back(static_cast<std::int32_t>(chance.one_in(20) ? chance.number(3) : chance.below(static_cast<std::int64_t>(languages) + 1)));
    }
    target.languages_of_source.push_back(spoken);
  }
  if (chance.one_in(20)) target.languages_of_source.emplace_back();
  std::unique_ptr<xalign::Blender> blender;
  const auto columns = target.languages_of_source;
  attempt([&] { blender = std::make_unique<xalign::Blender>(std::move(target)); });
  if (!blender) return;
  std::int64_t rows = 0;
  for (int turn = 0; turn < 60; ++turn) {
    xalign::Blender::Status status{-1, false};
    attempt([&] { status = blender->run(static_cast<std::size_t>(chance.one_in(20) ? chance.number(50) : chance.below(50))); });
    rows += static_cast<std::int64_t>(blender->take_rows().size());
    blender->take_borders();
    for (auto& piece : blender->take_cut_pieces()) {
      if (chance.one_in(9)) piece.sample = chance.number(40), piece.source = static_cast<std::int32_t>(chance.number(4));
      const std::vector<std::int32_t> content(8, static_cast<std::int32_t>(chance.below(3)) - chance.one_in(9));
      attempt([&] { blender->tally().add_content(piece, content.data(), static_cast<std::int32_t>(chance.below(3)) - 1); });
    }
    if (status.done) break;
    std::int32_t source = status.hungry_source;
    if (chance.one_in(9)) source = static_cast<std::int32_t>(chance.number(static_cast<std::int64_t>(columns.size())));
    const std::size_t width = source >= 0 && static_cast<std::size_t>(source) < columns.size() ? columns[static_cast<std::size_t>(source)].size() : 0;
    const std::size_t draws = static_cast<std::size_t>(chance.below(20));
    std::vector<std::int32_t> content(draws * width), tokens(draws), loss(draws);
    for (std::size_t d = 0; d < draws; ++d) {
      tokens[d] = static_cast<std::int32_t>(chance.one_in(20) ? chance.number(50) : chance.below(31));
      loss[d] = chance.one_in(20) ? static_cast<std::int32_t>(chance.number(50)) : tokens[d];
      for (std::size_t k = 0; k < width; ++k) {
        content[d * width + k] = chance.one_in(60) ? static_cast<std::int32_t>(chance.number(9)) : tokens[d] / 4;
      }
    }
    attempt([&] { blender->feed(source, content.data(), tokens.data(), loss.data(), draws); });
  }
  const auto& drawn = blender->draws();
  CHECK(std::accumulate(drawn.begin(), drawn.end(), std::int64_t{0}) == rows);
}

void tallies(Chance& chance) {
  std::optional<xalign::BlendTally> tally;
  attempt([&] {
    const xalign::FractionSchedule schedule({{100, 0, 5}}, 10, 4);
    std::vector<std::vector<std::int32_t>> languages{numbers<std::int32_t>(chance, 2, 2), {0}};
    if (chance.one_in(9)) languages.pop_back();
    tally.emplace(schedule, std::vector<bool>{true, false}, languages, 3, chance.one_in(2), chance.below(9), 5);
  });
  for (int i = 0; tally && i < 20; ++i) {
    const auto source = static_cast<std::int32_t>(chance.number(1));
    const std::int64_t sample = chance.number(50), begun_in = chance.number(50);
    const std::vector<std::int32_t> content(4, static_cast<std::int32_t>(chance.below(5)));
    attempt([&] { tally->add(source, sample, begun_in, chance.one_in(2) ? content.data() : nullptr, 7, 5, true); });
    attempt([&] { tally->add_content({source, 0, chance.number(3), chance.number(3), sample, begun_in}, content.data(), 0); });
    attempt([&] { tally->take_back_loss(source, sample, 1); });
    attempt([&] { tally->add_padding(sample, 1); });
    attempt([&] { tally->add_cut(source); });
    attempt([&] { tally->add_left_out(source, 1); });
  }
}

struct Texts {
  std::vector<std::vector<std::uint32_t>> units;
  std::vector<xalign::TextView> views;
};

Texts texts(Chance& chance) {
  Texts made;
  for (std::int64_t left = chance.below(6); left > 0; --left) {
    std::vector<std::uint32_t> text(static_cast<std::size_t>(chance.below(40)));
    for (auto& unit : text) {
      unit = static_cast<std::uint32_t>(chance.one_in(60) ? chance.number(xalign::kCodePoints) : 32 + chance.below(90));
    }
    made.units.push_back(std::move(text));
  }
  for (const auto& text : made.units) made.views.push_back({text.data(), static_cast<std::int64_t>(text.size()), 4});
  return made;
}

void foldings(Chance& chance) {
  static const xalign::Folding folding = test_folding();
  if (chance.one_in(200)) {
    std::vector<std::uint32_t> spoiled(xalign::kCodePoints, entry('a', xalign::Kind::kLetter));
    spoiled[static_cast<std::size_t>(chance.below(static_cast<std::int64_t>(spoiled.size())))] = static_cast<std::uint32_t>(chance.number(1 << 20));
    if (chance.one_in(4)) spoiled.pop_back();
    const auto expansions = numbers<std::uint32_t>(chance, 6, 3);
    attempt([&] { xalign::Folding(spoiled.data(), spoiled.size(), expansions.data(), expansions.size()); });
  }
  const Texts first = texts(chance), second = texts(chance);
  const std::size_t count = std::min(first.views.size(), second.views.size());
  const auto* others = chance.one_in(2) ? second.views.data() : nullptr;
  attempt([&] { CHECK(xalign::document_keys(folding, first.views.data(), others, count).size() == 2 * count); });
  attempt([&] { xalign::document_sketches(folding, folding, first.views.data(), others, count); });
  attempt([&] {
    if (chance.one_in(100)) {
      const std::vector<std::uint8_t> kinds(xalign::kCodePoints, static_cast<std::uint8_t>(chance.below(3)));
      xalign::count_characters(first.views.data(), first.views.size(), kinds.data(), static_cast<std::size_t>(chance.below(300)));
    }
  });
  const auto sketches = numbers<std::uint8_t>(chance, 60, 2);
  auto starts = numbers<std::int64_t>(chance, 4, 6);
  if (chance.one_in(2)) std::sort(starts.begin(), starts.end()), starts.insert(starts.begin(), 0);
  attempt([&] {
    const std::size_t bins = static_cast<std::size_t>(chance.below(5)), documents = bins ? sketches.size() / bins : 0;
    const std::vector<std::uint8_t> asked(documents, 1);
    if (starts.empty()) return;
    if (chance.one_in(2)) starts.back() = static_cast<std::int64_t>(documents);
    xalign::near_earlier(sketches.data(), documents, bins, starts.data(), starts.size() - 1, asked.data(), chance.number(3),
                         chance.number(3));
  });
  attempt([&] {
    const double near = chance.one_in(5) ? static_cast<double>(chance.number(2)) / 3 : 0.7;
    const xalign::ProbeIndex index(folding, first.views.data(), first.views.size(), near, chance.number(9));
    CHECK(index.touch(second.views.data(), second.views.size()).size() == second.views.size());
  });
}

void once(Chance& chance) {
  for (const auto call : {blend_orders, permutations, queues, schedules, packings, windows, orders, blenders, tallies, foldings}) {
    call(chance);
  }
}

}  // namespace

int main(int count, char** arguments) { return fuzz(count, arguments, once); }
