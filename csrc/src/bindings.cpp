// The bindings*.cpp are the only files that know Python: they check dtype and rank, free the GIL, call, return an array.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "xalign/blend.h"
#include "xalign/ended_ids.h"
#include "xalign/folding.h"
#include "xalign/minhash.h"
#include "xalign/packed_texts.h"
#include "xalign/permutation.h"
#include "xalign/probe_index.h"
#include "xalign/windows.h"

namespace {

using namespace xalign_python;

py::array_t<std::int32_t> blend_order(const py::array& weights, std::optional<std::int64_t> num_samples) {
  const auto* data = data_of<std::int64_t>(weights, 1, "weights");
  const std::size_t size = length_of(weights);
  std::vector<std::int32_t> order;
  {
    py::gil_scoped_release free;
    std::int64_t wanted = 0;
    if (num_samples) {
      wanted = *num_samples;
    } else {
      for (std::size_t j = 0; j < size; ++j) {
        if (__builtin_add_overflow(wanted, data[j], &wanted)) {
          throw std::invalid_argument("weights add up to more than int64 holds.");
        }
        if (data[j] < 0) wanted = 0;  // The call below names the weight.
      }
    }
    order = xalign::blend_order(data, size, wanted);
  }
  return to_array(std::move(order));
}

py::array_t<std::int64_t> permutation(std::uint64_t seed, std::int64_t size) {
  std::vector<std::int64_t> order;
  {
    py::gil_scoped_release free;
    order = xalign::permutation(seed, size);
  }
  return to_array(std::move(order));
}

py::array_t<std::int64_t> sample_index(const py::array& document_lengths, std::int64_t seq_length) {
  std::vector<xalign::Border> borders;
  const auto build = [&](const auto* lengths) {
    const std::size_t size = length_of(document_lengths);
    py::gil_scoped_release free;
    borders = xalign::sample_index(lengths, size, seq_length);
  };
  if (py::isinstance<py::array_t<std::int32_t>>(document_lengths)) {
    build(data_of<std::int32_t>(document_lengths, 1, "document_lengths"));
  } else {
    build(data_of<std::int64_t>(document_lengths, 1, "document_lengths"));
  }
  static_assert(sizeof(xalign::Border) == 2 * sizeof(std::int64_t), "a border is one row of two numbers");
  const auto rows = static_cast<py::ssize_t>(borders.size());
  return to_array<std::int64_t, xalign::Border>(std::move(borders), {rows, 2});
}

py::array_t<std::int64_t> count_languages(const py::array& language_ids, const py::array& positions,
                                          std::int64_t num_languages) {
  const auto* ids = data_of<std::int8_t>(language_ids, 1, "language_ids");
  const auto* at = data_of<std::int64_t>(positions, 1, "positions");
  if (num_languages < 1 || num_languages > 127) throw std::invalid_argument("num_languages is outside 1..127.");
  const std::size_t num_tokens = length_of(language_ids), num_positions = length_of(positions);
  std::vector<std::int64_t> counts;
  {
    py::gil_scoped_release free;
    counts = xalign::count_languages(ids, num_tokens, at, num_positions, static_cast<std::size_t>(num_languages));
  }
  return to_array<std::int64_t, std::int64_t>(std::move(counts), {static_cast<py::ssize_t>(num_positions),
                                                                  static_cast<py::ssize_t>(num_languages)});
}

template <typename T>
bool gather_as(const py::array& tokens, const py::array& starts, const py::array& stops,
               std::vector<std::int64_t>& gathered) {
  if (!py::isinstance<py::array_t<T>>(tokens)) return false;
  const auto* data = data_of<T>(tokens, 1, "tokens");
  const auto* first = data_of<std::int64_t>(starts, 1, "starts");
  const auto* last = data_of<std::int64_t>(stops, 1, "stops");
  if (length_of(starts) != length_of(stops)) throw std::invalid_argument("starts and stops differ in length.");
  const std::size_t num_tokens = length_of(tokens), num_pieces = length_of(starts);
  py::gil_scoped_release free;
  gathered = xalign::gather(data, num_tokens, first, last, num_pieces);
  return true;
}

py::array_t<std::int64_t> gather(const py::array& tokens, const py::array& starts, const py::array& stops) {
  std::vector<std::int64_t> gathered;
  const bool known = gather_as<std::uint16_t>(tokens, starts, stops, gathered) ||
                     gather_as<std::int32_t>(tokens, starts, stops, gathered) ||
                     gather_as<std::int64_t>(tokens, starts, stops, gathered) ||
                     gather_as<std::uint8_t>(tokens, starts, stops, gathered) ||
                     gather_as<std::int16_t>(tokens, starts, stops, gathered) ||
                     gather_as<std::int8_t>(tokens, starts, stops, gathered);
  if (!known) {
    throw std::invalid_argument("tokens have dtype " + py::cast<std::string>(py::str(tokens.dtype())) +
                                "; uint8, uint16 or int8 to int64 is expected.");
  }
  return to_array(std::move(gathered));
}

// Looks into the strings of a list without copying a character; holds the strings, whatever becomes of the list.
class Texts {
 public:
  explicit Texts(const py::list& texts) : kept_(texts) {
    views_.reserve(kept_.size());
    for (const py::handle item : kept_) {
      PyObject* text = item.ptr();
      if (!PyUnicode_Check(text)) throw std::invalid_argument("a text is " + name_of_type(item) + ", not str.");
      views_.push_back({PyUnicode_DATA(text), static_cast<std::int64_t>(PyUnicode_GET_LENGTH(text)),
                        static_cast<std::int32_t>(PyUnicode_KIND(text))});
    }
  }
  const xalign::TextView* data() const { return views_.data(); }
  std::size_t size() const { return views_.size(); }

 private:
  static std::string name_of_type(py::handle item) {
    return py::cast<std::string>(py::type::handle_of(item).attr("__name__"));
  }
  py::tuple kept_;
  std::vector<xalign::TextView> views_;
};

const std::uint8_t* kind_table(const py::array& kinds) {
  const auto* table = data_of<std::uint8_t>(kinds, 1, "kinds");
  if (length_of(kinds) != xalign::kCodePoints) throw std::invalid_argument("kinds has not one item per code point.");
  return table;
}

py::array_t<std::int64_t> count_characters(const py::list& texts, const py::array& kinds, std::size_t num_kinds) {
  const Texts views(texts);
  const auto* table = kind_table(kinds);
  std::vector<std::int64_t> counts;
  {
    py::gil_scoped_release free;
    counts = xalign::count_characters(views.data(), views.size(), table, num_kinds);
  }
  return to_array<std::int64_t, std::int64_t>(
      std::move(counts), {static_cast<py::ssize_t>(views.size()), static_cast<py::ssize_t>(num_kinds)});
}

py::array_t<std::uint8_t> kinds_in_texts(const py::list& texts, const py::array& kinds) {
  const Texts views(texts);
  const auto* table = kind_table(kinds);
  std::vector<std::uint8_t> found;
  {
    py::gil_scoped_release free;
    found = xalign::kinds_in_texts(views.data(), views.size(), table);
  }
  return to_array(std::move(found));
}

py::array_t<std::int64_t> utf8_lengths(const py::list& texts) {
  const Texts views(texts);
  std::vector<std::int64_t> lengths;
  {
    py::gil_scoped_release free;
    lengths = xalign::utf8_lengths(views.data(), views.size());
  }
  return to_array(std::move(lengths));
}

// Python's bytes of a given size, written to before anybody sees them.
class BytesOut {
 public:
  explicit BytesOut(std::size_t room) : bytes_(PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(room))) {
    if (bytes_ == nullptr) throw py::error_already_set();
  }
  BytesOut(const BytesOut&) = delete;
  BytesOut& operator=(const BytesOut&) = delete;
  ~BytesOut() { Py_XDECREF(bytes_); }
  char* data() { return PyBytes_AS_STRING(bytes_); }
  py::bytes take(std::size_t size) {
    if (_PyBytes_Resize(&bytes_, static_cast<py::ssize_t>(size)) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(std::exchange(bytes_, nullptr));
  }

 private:
  PyObject* bytes_;
};

py::tuple pack_texts(const py::list& texts, std::string_view separator, const py::array& kinds) {
  const Texts views(texts);
  const auto* table = kind_table(kinds);
  BytesOut out(xalign::room_for_texts(views.data(), views.size(), separator));
  xalign::PackedTexts packed;
  {
    py::gil_scoped_release free;
    packed = xalign::pack_texts(views.data(), views.size(), separator, table, out.data());
  }
  return py::make_tuple(out.take(packed.size), to_array(std::move(packed.ends)), to_array(std::move(packed.kinds)));
}

std::optional<py::tuple> pack_json_lines(const py::bytes& lines, std::string_view key, std::string_view separator,
                                         const py::array& kinds) {
  const auto data = static_cast<std::string_view>(lines);
  const auto* table = kind_table(kinds);
  BytesOut out(xalign::room_for_json_lines(data, separator));
  std::optional<xalign::PackedTexts> packed;
  {
    py::gil_scoped_release free;
    packed = xalign::pack_json_lines(data, key, separator, table, out.data());
  }
  if (!packed) return std::nullopt;
  return py::make_tuple(out.take(packed->size), to_array(std::move(packed->ends)), to_array(std::move(packed->kinds)));
}

template <typename Token>
py::tuple cut_at_ends_to(const py::array& ids, std::uint32_t end, const py::array& ranges, std::uint32_t num_known) {
  const auto* data = data_of<std::uint32_t>(ids, 1, "ids");
  const auto* pairs = data_of<std::uint32_t>(ranges, 2, "ranges");
  if (ranges.shape(1) != 2) throw std::invalid_argument("ranges has rows of another length than 2.");
  static_assert(sizeof(xalign::IdRange) == 2 * sizeof(std::uint32_t), "a range is one row of two numbers");
  const std::size_t num_ids = length_of(ids), num_ranges = length_of(ranges);
  py::array_t<Token> tokens(static_cast<py::ssize_t>(num_ids));
  Token* out = tokens.mutable_data();
  xalign::EndedIds found;
  {
    py::gil_scoped_release free;
    found = xalign::cut_at_ends(data, num_ids, end, reinterpret_cast<const xalign::IdRange*>(pairs), num_ranges,
                                num_known, out);
  }
  return py::make_tuple(tokens, to_array(std::move(found.lengths)), to_array(std::move(found.marked)), found.rest);
}

py::tuple cut_at_ends(const py::array& ids, std::uint32_t end, const py::array& ranges, std::uint32_t num_known,
                      bool narrow) {
  return narrow ? cut_at_ends_to<std::uint16_t>(ids, end, ranges, num_known)
                : cut_at_ends_to<std::int32_t>(ids, end, ranges, num_known);
}

// Two lists of one length, the second of which may be left out.
struct Documents {
  Documents(const py::list& texts, const std::optional<py::list>& others) : first(texts) {
    if (!others) return;
    second.emplace(*others);
    if (second->size() != first.size()) throw std::invalid_argument("texts and others differ in length.");
  }
  const xalign::TextView* others() const { return second ? second->data() : nullptr; }
  Texts first;
  std::optional<Texts> second;
};

py::array_t<std::uint64_t> document_keys(const xalign::Folding& folding, const py::list& texts,
                                         const std::optional<py::list>& others) {
  const Documents documents(texts, others);
  std::vector<std::uint64_t> keys;
  {
    py::gil_scoped_release free;
    keys = xalign::document_keys(folding, documents.first.data(), documents.others(), documents.first.size());
  }
  return to_array<std::uint64_t, std::uint64_t>(std::move(keys),
                                                {static_cast<py::ssize_t>(documents.first.size()), 2});
}

py::array_t<std::uint8_t> document_sketches(const xalign::Folding& folding, const xalign::Folding& exact,
                                            const py::list& texts, const std::optional<py::list>& others) {
  const Documents documents(texts, others);
  std::vector<std::uint8_t> sketches;
  {
    py::gil_scoped_release free;
    sketches = xalign::document_sketches(folding, exact, documents.first.data(), documents.others(),
                                         documents.first.size());
  }
  return to_array<std::uint8_t, std::uint8_t>(std::move(sketches),
                                              {static_cast<py::ssize_t>(documents.first.size()),
                                               static_cast<py::ssize_t>(xalign::kSketchBins)});
}

py::array_t<std::uint8_t> near_earlier(const py::array& sketches, const py::array& group_starts,
                                       const py::array& asked, std::int64_t min_agreeing, std::int64_t max_earlier) {
  const auto* bytes = data_of<std::uint8_t>(sketches, 2, "sketches");
  const auto* starts = data_of<std::int64_t>(group_starts, 1, "group_starts");
  const auto* wanted = data_of<std::uint8_t>(asked, 1, "asked");
  const std::size_t num_documents = length_of(sketches), num_starts = length_of(group_starts);
  if (num_starts == 0) throw std::invalid_argument("group_starts is empty.");
  if (length_of(asked) != num_documents) throw std::invalid_argument("sketches and asked differ in length.");
  const auto num_bins = static_cast<std::size_t>(sketches.shape(1));
  std::vector<std::uint8_t> near;
  {
    py::gil_scoped_release free;
    near = xalign::near_earlier(bytes, num_documents, num_bins, starts, num_starts - 1, wanted, min_agreeing,
                                max_earlier);
  }
  return to_array(std::move(near));
}

void define_texts(py::module_& module) {
  py::class_<xalign::Folding>(module, "Folding")
      .def(py::init([](const py::array& table, const py::array& expansions) {
             return xalign::Folding(data_of<std::uint32_t>(table, 1, "table"), length_of(table),
                                    data_of<std::uint32_t>(expansions, 1, "expansions"), length_of(expansions));
           }),
           py::arg("table"), py::arg("expansions"))
      .def(
          "fold",
          [](const xalign::Folding& folding, const py::list& texts) {
            const Texts views(texts);
            py::list folded(views.size());
            xalign::Buffer<std::uint32_t> units;
            for (std::size_t i = 0; i < views.size(); ++i) {
              folding.fold(views.data()[i], units);
              folded[i] = py::reinterpret_steal<py::str>(PyUnicode_FromKindAndData(
                  PyUnicode_4BYTE_KIND, units.data(), static_cast<py::ssize_t>(units.size())));
            }
            return folded;
          },
          py::arg("texts"));
  py::class_<xalign::ProbeIndex>(module, "ProbeIndex")
      .def(py::init([](const xalign::Folding& folding, const py::list& sentences, double near,
                       std::int64_t min_contained) {
             const Texts views(sentences);
             return xalign::ProbeIndex(folding, views.data(), views.size(), near, min_contained);
           }),
           py::arg("folding"), py::arg("sentences"), py::arg("near"), py::arg("min_contained"))
      .def(
          "touch",
          [](const xalign::ProbeIndex& index, const py::list& texts) {
            const Texts views(texts);
            std::vector<std::uint8_t> touches;
            {
              py::gil_scoped_release free;
              touches = index.touch(views.data(), views.size());
            }
            return to_array(std::move(touches));
          },
          py::arg("texts"));
  module.def("count_characters", &count_characters, py::arg("texts"), py::arg("kinds"), py::arg("num_kinds"));
  module.def("kinds_in_texts", &kinds_in_texts, py::arg("texts"), py::arg("kinds"));
  module.def("utf8_lengths", &utf8_lengths, py::arg("texts"));
  module.def("count_line_breaks", [](const py::bytes& data) {
    const auto view = static_cast<std::string_view>(data);
    py::gil_scoped_release free;
    return xalign::count_line_breaks(view);
  }, py::arg("data"));
  module.def("pack_texts", &pack_texts, py::arg("texts"), py::arg("separator"), py::arg("kinds"));
  module.def("pack_json_lines", &pack_json_lines, py::arg("lines"), py::arg("key"), py::arg("separator"),
             py::arg("kinds"));
  module.def("cut_at_ends", &cut_at_ends, py::arg("ids"), py::arg("end"), py::arg("ranges"), py::arg("num_known"),
             py::arg("narrow"));
  module.def("document_keys", &document_keys, py::arg("folding"), py::arg("texts"), py::arg("others") = py::none());
  module.def("document_sketches", &document_sketches, py::arg("folding"), py::arg("exact"), py::arg("texts"),
             py::arg("others") = py::none());
  module.def("near_earlier", &near_earlier, py::arg("sketches"), py::arg("group_starts"), py::arg("asked"),
             py::arg("min_agreeing"), py::arg("max_earlier"));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  bind_streams(module);
  bind_blends(module);
  bind_analysis(module);
  bind_capture(module);
  module.doc() = "libxalign: the C++ under csrc/. Contracts stand in csrc/include/xalign/*.h, types in _native.pyi.";
  module.def("blend_order", &blend_order, py::arg("weights"), py::arg("num_samples") = py::none());
  module.def("permutation", &permutation, py::arg("seed"), py::arg("size"));
  module.def("sample_index", &sample_index, py::arg("document_lengths"), py::arg("seq_length"));
  module.def("count_languages", &count_languages, py::arg("language_ids"), py::arg("positions"),
             py::arg("num_languages"));
  module.def("gather", &gather, py::arg("tokens"), py::arg("starts"), py::arg("stops"));
  define_texts(module);
}
