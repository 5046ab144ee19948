// Orders of samples and documents in Python: how they are chosen, counted and kept.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "xalign/blend.h"
#include "xalign/blender.h"
#include "xalign/order_store.h"
#include "xalign/sample_orders.h"

namespace {

using namespace xalign_python;
using xalign::Blender;
using xalign::CutPiece;
using xalign::SampleBorder;

py::int_ to_int(xalign::int128 number) {
  const bool negative = number < 0;
  auto rest = negative ? -static_cast<unsigned __int128>(number) : static_cast<unsigned __int128>(number);
  const py::int_ high(static_cast<std::uint64_t>(rest >> 64)), low(static_cast<std::uint64_t>(rest));
  py::object whole = (high << py::int_(64)) | low;
  return py::int_(negative ? -whole : whole);
}

py::list to_ints(const std::vector<xalign::int128>& numbers) {
  py::list list;
  for (const xalign::int128 number : numbers) list.append(to_int(number));
  return list;
}

// --- open loop ------------------------------------------------------------------------------------------------------

template <typename Id>
bool fill_as(xalign::BlendOrder& blend, py::array& order) {
  if (!py::isinstance<py::array_t<Id>>(order)) return false;
  data_of<Id>(order, 1, "order");
  if (!order.writeable()) throw std::invalid_argument("order cannot be written.");
  auto* ids = static_cast<Id*>(order.mutable_data());
  const std::int64_t size = order.shape(0);
  py::gil_scoped_release free;
  blend.fill(ids, size);
  return true;
}

void bind_blend_order(py::module_& module) {
  py::class_<xalign::BlendOrder>(module, "BlendOrder")
      .def(py::init([](const py::array& weights) {
             return xalign::BlendOrder(data_of<std::int64_t>(weights, 1, "weights"), length_of(weights));
           }),
           py::arg("weights"))
      .def("__len__", &xalign::BlendOrder::num_samples)
      .def(
          "fill",
          [](xalign::BlendOrder& blend, py::array order) {
            if (!fill_as<std::uint8_t>(blend, order) && !fill_as<std::uint16_t>(blend, order) &&
                !fill_as<std::int32_t>(blend, order)) {
              throw std::invalid_argument("order has dtype " + py::cast<std::string>(py::str(order.dtype())) +
                                          "; uint8, uint16 or int32 is expected.");
            }
          },
          py::arg("order"));
}

// --- closed loop ----------------------------------------------------------------------------------------------------

std::unique_ptr<Blender> make_blender(
    std::int64_t seq_length, std::int64_t num_samples, std::int64_t denominator,
    const std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>>& phases, bool count_all_tokens,
    bool parallel_fills_languages, std::vector<std::int64_t> language_shares,
    std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> language_rates,
    std::vector<std::int32_t> group_of_source, std::vector<std::int64_t> source_weights,
    std::vector<std::vector<std::int32_t>> languages_of_source, bool documents, bool keep_pairs_whole,
    std::int64_t batch_size, std::uint64_t batch_key) {
  xalign::BlendTarget target;
  target.seq_length = seq_length;
  target.num_samples = num_samples;
  target.denominator = denominator;
  for (const auto& [until, begin, end] : phases) target.phases.push_back({until, begin, end});
  target.count_all_tokens = count_all_tokens;
  target.parallel_fills_languages = parallel_fills_languages;
  target.language_shares = std::move(language_shares);
  target.language_rates_without = std::move(language_rates.first);
  target.language_rates_with = std::move(language_rates.second);
  target.group_of_source = std::move(group_of_source);
  target.source_weights = std::move(source_weights);
  target.languages_of_source = std::move(languages_of_source);
  target.documents = documents;
  target.keep_pairs_whole = keep_pairs_whole;
  target.batch_size = batch_size;
  target.batch_key = batch_key;
  return std::make_unique<Blender>(std::move(target));
}

void require_rows(const py::array& array, py::ssize_t rows, const char* name) {
  if (array.shape(0) != rows) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.shape(0)) + " rows; " +
                                std::to_string(rows) + " are expected.");
  }
}

void feed(Blender& blender, std::int32_t source, const py::array& content, const py::array& tokens,
          const py::array& loss) {
  const auto* of_language = data_of<std::int32_t>(content, 2, "content");
  const auto* all = data_of<std::int32_t>(tokens, 1, "tokens");
  const auto* bearing = data_of<std::int32_t>(loss, 1, "loss");
  require_rows(tokens, content.shape(0), "tokens");
  require_rows(loss, content.shape(0), "loss");
  const auto& sources = blender.tally().sources();
  if (source < 0 || static_cast<std::size_t>(source) >= sources.size() ||
      content.shape(1) != static_cast<py::ssize_t>(sources[static_cast<std::size_t>(source)].content.size())) {
    throw std::invalid_argument("there is no source " + std::to_string(source) + ", or content has not a column for " +
                                "each of its languages.");
  }
  py::gil_scoped_release free;
  blender.feed(source, of_language, all, bearing, length_of(content));
}

void add_content(Blender& blender, const py::array_t<CutPiece>& pieces, const py::array& content,
                 const py::array& masked) {
  const auto* of_language = data_of<std::int32_t>(content, 2, "content");
  const auto* without_loss = data_of<std::int32_t>(masked, 1, "masked");
  require_rows(content, pieces.shape(0), "content");
  require_rows(masked, pieces.shape(0), "masked");
  const CutPiece* piece = pieces.data();
  const auto& sources = blender.tally().sources();
  for (py::ssize_t i = 0; i < pieces.shape(0); ++i) {
    if (piece[i].source < 0 || static_cast<std::size_t>(piece[i].source) >= sources.size() ||
        static_cast<py::ssize_t>(sources[static_cast<std::size_t>(piece[i].source)].content.size()) !=
            content.shape(1)) {
      throw std::invalid_argument("content has not a column for each language of the source.");
    }
  }
  py::gil_scoped_release free;
  for (std::size_t i = 0; i < length_of(pieces); ++i) {
    blender.tally().add_content(piece[i], of_language + i * static_cast<std::size_t>(content.shape(1)),
                                without_loss[i]);
  }
}

// Sums of phases or of slots as arrays: content [items, 2, languages], tokens, loss and rows [items, 2].
py::dict sums_of(const std::vector<xalign::TextSums>& items) {
  const auto count = static_cast<py::ssize_t>(items.size());
  const auto languages = static_cast<py::ssize_t>(items.empty() ? 0 : items[0].content[0].size());
  py::array_t<std::int64_t> content({count, py::ssize_t{2}, languages});
  py::array_t<std::int64_t> tokens({count, py::ssize_t{2}}), loss({count, py::ssize_t{2}}), rows({count, py::ssize_t{2}});
  for (py::ssize_t i = 0; i < count; ++i) {
    const xalign::TextSums& item = items[static_cast<std::size_t>(i)];
    for (py::ssize_t origin = 0; origin < 2; ++origin) {
      std::copy(item.content[origin].begin(), item.content[origin].end(), content.mutable_data(i, origin, 0));
      tokens.mutable_at(i, origin) = item.tokens[origin];
      loss.mutable_at(i, origin) = item.loss[origin];
      rows.mutable_at(i, origin) = item.rows[origin];
    }
  }
  py::dict sums;
  sums["content"] = content;
  sums["tokens"] = tokens;
  sums["loss"] = loss;
  sums["rows"] = rows;
  return sums;
}

py::dict tally_of(Blender& blender) {
  const xalign::BlendTally& tally = blender.tally();
  const auto sources = static_cast<py::ssize_t>(tally.sources().size());
  py::list content;
  py::array_t<std::int64_t> counts({sources, py::ssize_t{7}});
  for (py::ssize_t j = 0; j < sources; ++j) {
    const xalign::SourceSums& source = tally.sources()[static_cast<std::size_t>(j)];
    content.append(to_array(std::vector<std::int64_t>(source.content)));
    const std::int64_t row[] = {source.rows, source.tokens, source.loss, source.cut, source.left_out_rows,
                                source.left_out_tokens, blender.draws()[static_cast<std::size_t>(j)]};
    std::copy(std::begin(row), std::end(row), counts.mutable_data(j, 0));
  }
  py::dict result;
  result["source_content"] = content;
  result["source_counts"] = counts;
  result["phases"] = sums_of(tally.phases());
  result["slots"] = sums_of(tally.slots());
  result["padding_of_slots"] = to_array(std::vector<std::int64_t>(tally.padding_of_slots()));
  result["asked"] = to_ints(tally.asked());
  result["largest_row"] = blender.largest_row();
  result["worst_parallel"] = to_int(blender.worst_parallel());
  result["worst_languages"] = to_ints(blender.worst_languages());
  return result;
}

template <typename T>
py::array_t<T> records(std::vector<T>&& items) {
  py::array_t<T> array(static_cast<py::ssize_t>(items.size()));
  std::copy(items.begin(), items.end(), static_cast<T*>(array.mutable_data()));
  return array;
}

void bind_blender(py::module_& module) {
  PYBIND11_NUMPY_DTYPE(SampleBorder, row, token, padding);
  PYBIND11_NUMPY_DTYPE(CutPiece, source, draw, begin, end, sample, begun_in);
  py::class_<Blender>(module, "Blender")
      .def(py::init(&make_blender), py::kw_only(), py::arg("seq_length"), py::arg("num_samples"), py::arg("denominator"),
           py::arg("phases"), py::arg("count_all_tokens"), py::arg("parallel_fills_languages"),
           py::arg("language_shares"), py::arg("language_rates"), py::arg("group_of_source"), py::arg("source_weights"),
           py::arg("languages_of_source"), py::arg("documents"), py::arg("keep_pairs_whole"), py::arg("batch_size"),
           py::arg("batch_key"))
      .def("feed", &feed, py::arg("source"), py::arg("content"), py::arg("tokens"), py::arg("loss"))
      .def(
          "run",
          [](Blender& blender, std::size_t max_rows) {
            Blender::Status status{};
            {
              py::gil_scoped_release free;
              status = blender.run(max_rows);
            }
            std::optional<std::int32_t> hungry;
            if (status.hungry_source >= 0) hungry = status.hungry_source;
            return std::make_pair(hungry, status.done);
          },
          py::arg("max_rows"))
      .def("take_rows", [](Blender& blender) { return to_array(blender.take_rows()); })
      .def("take_borders", [](Blender& blender) { return records(blender.take_borders()); })
      .def("take_cut_pieces", [](Blender& blender) { return records(blender.take_cut_pieces()); })
      .def("add_content", &add_content, py::arg("pieces"), py::arg("content"),
           py::arg("masked"))
      .def("tally", &tally_of)
      .def_property_readonly("num_samples", &Blender::num_samples);
}

// --- the order as it is kept ------------------------------------------------------------------------------------------

xalign::SourceRows rows_of(const py::array& ids, const py::array& counts) {
  const void* data = nullptr;
  int width = 1;
  if (py::isinstance<py::array_t<std::uint8_t>>(ids)) {
    data = data_of<std::uint8_t>(ids, 1, "ids");
  } else {
    data = data_of<std::uint16_t>(ids, 1, "ids");
    width = 2;
  }
  const auto* before = data_of<std::int64_t>(counts, 2, "counts");
  if (counts.shape(1) > 65536) throw std::invalid_argument("counts are of more than 65536 sources.");
  return {data, width, ids.shape(0), before, counts.size(), static_cast<std::int32_t>(counts.shape(1))};
}

// Arrays that C++ reads from; may be let go of in any thread.
std::shared_ptr<void> holder_of(py::object arrays) {
  return {new py::object(std::move(arrays)), [](void* held) {
            const py::gil_scoped_acquire lock;
            delete static_cast<py::object*>(held);
          }};
}

std::pair<py::array_t<std::int32_t>, py::array_t<std::int64_t>> origins(const xalign::SampleOrder& order,
                                                                        const py::array& samples) {
  const auto* numbers = data_of<std::int64_t>(samples, 1, "samples");
  const std::size_t size = length_of(samples);
  std::vector<std::int32_t> sources(size);
  std::vector<std::int64_t> draws(size);
  {
    py::gil_scoped_release free;
    for (std::size_t i = 0; i < size; ++i) {
      const xalign::Origin origin = order.origin(numbers[i]);
      sources[i] = origin.source;
      draws[i] = origin.draw;
    }
  }
  return {to_array(std::move(sources)), to_array(std::move(draws))};
}

// The rows that a sample of documents is made of: source and draw of each document, from its border on.
std::vector<std::pair<std::int32_t, std::int64_t>> rows_from(const xalign::DocumentOrder& order, std::int64_t row,
                                                             std::int64_t count) {
  std::vector<std::pair<std::int32_t, std::int64_t>> rows;
  xalign::RowWalk walk(order.rows(), row);
  while (static_cast<std::int64_t>(rows.size()) < count && walk.row() < order.rows().num_rows()) {
    const xalign::Origin origin = walk.next();
    rows.emplace_back(origin.source, origin.draw);
  }
  return rows;
}

void bind_orders(py::module_& module) {
  module.def("rows_per_block", &xalign::rows_per_block, py::arg("num_sources"));
  module.def(
      "batch_positions",
      [](std::uint64_t key, std::int64_t first_step, std::int64_t num_steps, std::int64_t batch_size) {
        if (num_steps < 0 || batch_size < 1) throw std::invalid_argument("num_steps is negative or batch_size below 1.");
        if (first_step < 0 || num_steps > std::numeric_limits<std::int64_t>::max() - first_step) {
          throw std::invalid_argument("steps " + std::to_string(first_step) + " and " + std::to_string(num_steps) +
                                      " from there on are outside int64.");
        }
        py::array_t<std::int64_t> positions({num_steps, batch_size});
        std::int64_t* data = positions.mutable_data();
        {
          py::gil_scoped_release free;
          for (std::int64_t step = 0; step < num_steps; ++step) {
            xalign::batch_positions(key, first_step + step, batch_size, data + step * batch_size);
          }
        }
        return positions;
      },
      py::arg("key"), py::arg("first_step"), py::arg("num_steps"), py::arg("batch_size"));
  py::class_<xalign::RowCounter>(module, "RowCounter")
      .def(py::init<std::int32_t>(), py::arg("num_sources"))
      .def(
          "append",
          [](xalign::RowCounter& counter, const py::array& ids) {
            const bool narrow = py::isinstance<py::array_t<std::uint8_t>>(ids);
            const auto* bytes = narrow ? data_of<std::uint8_t>(ids, 1, "ids") : nullptr;
            const auto* words = narrow ? nullptr : data_of<std::uint16_t>(ids, 1, "ids");
            py::gil_scoped_release free;
            narrow ? counter.append(bytes, length_of(ids)) : counter.append(words, length_of(ids));
          },
          py::arg("ids"))
      .def("__len__", &xalign::RowCounter::num_rows)
      .def("take_lines",
           [](xalign::RowCounter& counter) {
             auto lines = counter.take_lines();
             const py::ssize_t columns = counter.num_sources();
             const auto rows = static_cast<py::ssize_t>(lines.size()) / columns;
             return to_array<std::int64_t, std::int64_t>(std::move(lines), {rows, columns});
           })
      .def("now", [](const xalign::RowCounter& counter) { return to_array(std::vector<std::int64_t>(counter.now())); });
  using xalign::DocumentOrder;
  using xalign::SampleOrder;
  py::class_<SampleOrder, xalign::SampleIndex, std::shared_ptr<SampleOrder>>(module, "SampleOrder")
      .def(py::init([](const py::array& ids, const py::array& counts, std::int64_t batch_size, std::uint64_t batch_key) {
             return std::make_shared<SampleOrder>(rows_of(ids, counts), batch_size, batch_key,
                                                  holder_of(py::make_tuple(ids, counts)));
           }),
           py::kw_only(), py::arg("ids"), py::arg("counts"), py::arg("batch_size"), py::arg("batch_key"))
      .def("origin",
           [](const SampleOrder& order, std::int64_t sample) {
             const xalign::Origin origin = order.origin(sample);
             return std::make_pair(origin.source, origin.draw);
           },
           py::arg("sample"))
      .def("origins", &origins, py::arg("samples"))
      .def("position_of", &SampleOrder::position_of, py::arg("sample"));
  py::class_<DocumentOrder, xalign::SampleIndex, std::shared_ptr<DocumentOrder>>(module, "DocumentOrder")
      .def(py::init([](const py::array& ids, const py::array& counts, const py::array_t<SampleBorder>& borders,
                       std::vector<bool> keeps_whole, std::int64_t batch_size, std::uint64_t batch_key) {
             if (borders.ndim() != 1 || (borders.flags() & py::array::c_style) == 0) {
               throw std::invalid_argument("borders are not one contiguous row.");
             }
             return std::make_shared<DocumentOrder>(rows_of(ids, counts), borders.data(), borders.shape(0),
                                                    std::move(keeps_whole), batch_size, batch_key,
                                                    holder_of(py::make_tuple(ids, counts, borders)));
           }),
           py::kw_only(), py::arg("ids"), py::arg("counts"), py::arg("borders").noconvert(), py::arg("keeps_whole"),
           py::arg("batch_size"), py::arg("batch_key"))
      .def("border",
           [](const DocumentOrder& order, std::int64_t sample) {
             const SampleBorder border = order.border(sample);
             return std::make_tuple(border.row, border.token, border.padding);
           },
           py::arg("sample"))
      .def("rows_from", &rows_from, py::arg("row"), py::arg("count"))
      .def("position_of", &DocumentOrder::position_of, py::arg("sample"));
}

}  // namespace

void xalign_python::bind_blends(py::module_& module) {
  bind_blend_order(module);
  bind_blender(module);
  bind_orders(module);
}
