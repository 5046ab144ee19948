// Sources as streams and batches of samples in Python.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "xalign/permutation.h"
#include "xalign/reader.h"
#include "xalign/stream.h"

namespace {

using namespace xalign_python;
using xalign::Permutation;
using xalign::SourceStream;

// Keeps Python objects for C++; may be let go of in any thread.
std::shared_ptr<void> keeper_of(py::object object) {
  return {new py::object(std::move(object)), [](void* kept) {
            const py::gil_scoped_acquire lock;
            delete static_cast<py::object*>(kept);
          }};
}

xalign::TokenType type_of(const py::array& tokens) {
  using xalign::TokenType;
  if (py::isinstance<py::array_t<std::uint16_t>>(tokens)) return TokenType::uint16;
  if (py::isinstance<py::array_t<std::int32_t>>(tokens)) return TokenType::int32;
  if (py::isinstance<py::array_t<std::int64_t>>(tokens)) return TokenType::int64;
  if (py::isinstance<py::array_t<std::uint8_t>>(tokens)) return TokenType::uint8;
  if (py::isinstance<py::array_t<std::int16_t>>(tokens)) return TokenType::int16;
  if (py::isinstance<py::array_t<std::int8_t>>(tokens)) return TokenType::int8;
  throw std::invalid_argument("tokens have dtype " + py::cast<std::string>(py::str(tokens.dtype())) +
                              "; uint8, uint16 or int8 to int64 is expected.");
}

xalign::Content content_named(const std::string& name) {
  if (name == "all") return xalign::Content::all;
  if (name == "all_but_last") return xalign::Content::all_but_last;
  if (name == "spans") return xalign::Content::spans;
  if (name == "not_eod") return xalign::Content::not_eod;
  throw std::invalid_argument("content='" + name + "' is none of all, all_but_last, spans and not_eod.");
}

void require_length(const py::array& array, std::int64_t length, const char* name) {
  if (array.shape(0) != length) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.shape(0)) + " items; " +
                                std::to_string(length) + " are expected.");
  }
}

std::shared_ptr<SourceStream> make_stream(const std::string& name, const py::array& tokens,
                                          const std::optional<py::array>& lengths, const py::array& pointers,
                                          const std::string& content, std::int64_t eod, std::int64_t vocab_size,
                                          const std::optional<py::array>& span_ends,
                                          const std::optional<py::array>& span_languages, const py::array& run_language,
                                          std::int64_t seq_length, bool whole_documents,
                                          std::optional<std::uint64_t> split_key,
                                          std::pair<std::int64_t, std::int64_t> part) {
  xalign::TokenFileView file;
  file.name = name;
  file.type = type_of(tokens);
  if (tokens.ndim() != 1 || (tokens.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument("tokens are not one contiguous row.");
  }
  file.tokens = tokens.data();
  file.num_tokens = tokens.shape(0);
  file.vocab_size = vocab_size;
  file.pointers = data_of<std::int64_t>(pointers, 1, "pointers");
  file.num_documents = pointers.shape(0);
  if (lengths) {
    file.lengths = data_of<std::int32_t>(*lengths, 1, "lengths");
    require_length(*lengths, file.num_documents, "lengths");
  }
  file.content = content_named(content);
  file.eod = eod;
  if (span_ends && span_languages) {
    file.span_ends = data_of<std::int64_t>(*span_ends, 1, "span_ends");
    file.span_languages = data_of<std::int8_t>(*span_languages, 1, "span_languages");
    file.num_spans = span_ends->shape(0);
    require_length(*span_languages, file.num_spans, "span_languages");
  }
  const auto* languages = data_of<std::int8_t>(run_language, 1, "run_language");
  file.run_language.assign(languages, languages + run_language.shape(0));
  file.keeper = keeper_of(py::make_tuple(tokens, lengths, pointers, span_ends, span_languages));
  return std::make_shared<SourceStream>(std::move(file), xalign::Cutting{seq_length, whole_documents}, split_key,
                                        part.first, part.second);
}

void use_starts(SourceStream& stream, std::int64_t epoch, const py::array& starts) {
  const auto* data = data_of<std::int64_t>(starts, 1, "starts");
  stream.use_starts(epoch, data, length_of(starts), keeper_of(starts));
}

std::tuple<py::array_t<std::int64_t>, py::array_t<std::int64_t>, std::int64_t, std::int64_t> build_packing(
    const SourceStream& stream, std::int64_t epoch) {
  xalign::Packing packing;
  {
    py::gil_scoped_release free;
    packing = stream.build_packing(epoch);
  }
  return {to_array(std::move(packing.documents)), to_array(std::move(packing.window_starts)),
          packing.left_out_documents, packing.left_out_tokens};
}

void use_packing(SourceStream& stream, std::int64_t epoch, const py::array& documents, const py::array& window_starts) {
  const auto* packed = data_of<std::int64_t>(documents, 1, "documents");
  const auto* starts = data_of<std::int64_t>(window_starts, 1, "window_starts");
  stream.use_packing(epoch, packed, length_of(documents), starts, length_of(window_starts),
                     keeper_of(py::make_tuple(documents, window_starts)));
}

// content [rows, languages of the file], tokens [rows], end-of-document tokens [rows]. Of windows that are all full
// tokens are not counted: [0].
using CountArrays = std::tuple<py::array, py::array, py::array>;

template <typename Count, typename Work>
CountArrays counted(const SourceStream& stream, std::int64_t rows, bool all_full, Work work) {
  const auto languages = static_cast<py::ssize_t>(stream.file().num_languages());
  py::array_t<Count> content({static_cast<py::ssize_t>(rows), languages});
  py::array_t<Count> tokens(all_full ? 0 : rows), eod(rows);
  const xalign::Counts<Count> counts{content.mutable_data(), all_full ? nullptr : tokens.mutable_data(),
                                     eod.mutable_data()};
  {
    py::gil_scoped_release free;
    work(counts);
  }
  return {std::move(content), std::move(tokens), std::move(eod)};
}

CountArrays count_epoch(const SourceStream& stream, std::int64_t epoch, int num_threads) {
  const std::int64_t rows = stream.num_windows(epoch);
  const auto count = [&](const auto& counts) { stream.count_epoch(epoch, counts, num_threads); };
  // Two bytes a count wherever they are enough: there is a row for every window of a run.
  const bool all_full = !stream.cutting().whole_documents;
  return stream.cutting().seq_length <= 65535 ? counted<std::uint16_t>(stream, rows, all_full, count)
                                              : counted<std::int32_t>(stream, rows, all_full, count);
}

CountArrays count_documents(const SourceStream& stream, std::int64_t begin, std::int64_t end, int num_threads) {
  if (begin < 0 || end < begin) {
    throw std::invalid_argument("documents " + std::to_string(begin) + ".." + std::to_string(end) + " are no draws.");
  }
  return counted<std::int32_t>(stream, end - begin, false, [&](const xalign::Counts<std::int32_t>& counts) {
    stream.count_documents(begin, end - begin, counts, num_threads);
  });
}

CountArrays count_stretches(const SourceStream& stream, const py::array& draws, const py::array& begins,
                            const py::array& ends, int num_threads) {
  const auto* of_draw = data_of<std::int64_t>(draws, 1, "draws");
  const auto* first = data_of<std::int64_t>(begins, 1, "begins");
  const auto* last = data_of<std::int64_t>(ends, 1, "ends");
  const std::int64_t rows = draws.shape(0);
  require_length(begins, rows, "begins");
  require_length(ends, rows, "ends");
  return counted<std::int32_t>(stream, rows, false, [&](const xalign::Counts<std::int32_t>& counts) {
    stream.count_stretches(of_draw, first, last, rows, counts, num_threads);
  });
}

py::array_t<std::int64_t> window(const SourceStream& stream, std::int64_t draw) {
  std::vector<xalign::Piece> pieces;
  stream.append_window(draw, 0, pieces);
  std::vector<std::int64_t> rows;
  for (const xalign::Piece& piece : pieces) rows.insert(rows.end(), {piece.document, piece.begin, piece.tokens});
  return to_array<std::int64_t, std::int64_t>(std::move(rows), {static_cast<py::ssize_t>(pieces.size()), 3});
}

// Streams and samples of a run, ready to be read.
class BatchReader {
 public:
  BatchReader(std::shared_ptr<const xalign::SampleIndex> index, const std::vector<std::shared_ptr<SourceStream>>& streams,
              std::int64_t seq_length, xalign::ReadOptions options)
      : index_(std::move(index)), streams_(streams.begin(), streams.end()), seq_length_(seq_length), options_(options) {
    // None of Python comes as a null pointer.
    if (!index_) throw std::invalid_argument("index is None.");
    for (const auto& stream : streams_) {
      if (!stream) throw std::invalid_argument("a stream is None.");
    }
  }

  std::vector<std::pair<std::int32_t, std::int64_t>> read(const py::array& samples, const py::dict& arrays) const {
    const auto* numbers = data_of<std::int64_t>(samples, 1, "samples");
    const std::size_t size = length_of(samples);
    xalign::BatchArrays batch{};
    take(arrays, "tokens", size, batch.tokens);
    take(arrays, "labels", size, batch.labels);
    if (options_.reset_position_ids || arrays.contains("position_ids")) {
      take(arrays, "position_ids", size, batch.position_ids);
    }
    take(arrays, "loss_mask", size, batch.loss_mask);
    take(arrays, "language_ids", size, batch.language_ids);
    take(arrays, "label_language_ids", size, batch.label_language_ids);
    take(arrays, "source_ids", size, batch.source_ids);
    take(arrays, "document_ids", size, batch.document_ids);
    std::vector<xalign::MissingEpoch> missing;
    {
      py::gil_scoped_release free;
      missing = xalign::read_batch(*index_, streams_, numbers, size, seq_length_, options_, batch);
    }
    std::vector<std::pair<std::int32_t, std::int64_t>> pairs;
    for (const auto& absent : missing) pairs.emplace_back(absent.source, absent.epoch);
    return pairs;
  }

 private:
  template <typename T>
  void take(const py::dict& arrays, const char* name, std::size_t rows, T*& data) const {
    if (!arrays.contains(name)) throw std::invalid_argument(std::string("there is no array ") + name + ".");
    auto array = py::cast<py::array>(arrays[name]);
    data_of<T>(array, 2, name);
    if (array.shape(0) != static_cast<py::ssize_t>(rows) || array.shape(1) != seq_length_) {
      throw std::invalid_argument(std::string(name) + " is [" + std::to_string(array.shape(0)) + ", " +
                                  std::to_string(array.shape(1)) + "]; [" + std::to_string(rows) + ", " +
                                  std::to_string(seq_length_) + "] is expected.");
    }
    if (!array.writeable()) throw std::invalid_argument(std::string(name) + " cannot be written.");
    data = static_cast<T*>(array.mutable_data());
  }

  std::shared_ptr<const xalign::SampleIndex> index_;
  xalign::Streams streams_;
  std::int64_t seq_length_;
  xalign::ReadOptions options_;
};

void bind_permutation(py::module_& module) {
  const auto filled = [](auto fill) {
    return [fill](const Permutation& order, std::int64_t first, std::int64_t count) {
      if (count < 0) throw std::out_of_range("count=" + std::to_string(count) + " is negative.");
      std::vector<std::int64_t> numbers;
      {
        py::gil_scoped_release free;
        if (count <= order.size()) numbers.resize(static_cast<std::size_t>(count));
        (order.*fill)(first, count, numbers.data());
      }
      return to_array(std::move(numbers));
    };
  };
  py::class_<Permutation>(module, "Permutation")
      .def(py::init<std::uint64_t, std::int64_t>(), py::arg("key"), py::arg("size"))
      .def("__len__", &Permutation::size)
      .def("__getitem__", &Permutation::at, py::arg("position"))
      .def("position_of", &Permutation::position_of, py::arg("number"))
      .def("fill", filled(&Permutation::fill), py::arg("first"), py::arg("count"))
      .def("fill_positions", filled(&Permutation::fill_positions), py::arg("first"), py::arg("count"));
}

void bind_source_stream(py::module_& module) {
  py::class_<SourceStream, std::shared_ptr<SourceStream>>(module, "SourceStream")
      .def(py::init(&make_stream), py::kw_only(), py::arg("name"), py::arg("tokens"), py::arg("lengths"),
           py::arg("pointers"), py::arg("content"), py::arg("eod"), py::arg("vocab_size"), py::arg("span_ends"),
           py::arg("span_languages"), py::arg("run_language"), py::arg("seq_length"), py::arg("whole_documents"),
           py::arg("split_key"), py::arg("part"))
      .def_property_readonly("num_documents", &SourceStream::num_documents)
      .def("set_keys", &SourceStream::set_keys, py::arg("epoch"), py::arg("documents_key"), py::arg("windows_key"))
      .def("has_keys", &SourceStream::has_keys, py::arg("epoch"))
      .def("has_windows", &SourceStream::has_windows, py::arg("epoch"))
      .def(
          "build_starts",
          [](const SourceStream& stream, std::int64_t epoch, int num_threads) {
            std::vector<std::int64_t> starts;
            {
              py::gil_scoped_release free;
              starts = stream.build_starts(epoch, num_threads);
            }
            return to_array(std::move(starts));
          },
          py::arg("epoch"), py::arg("num_threads"))
      .def("use_starts", &use_starts, py::arg("epoch"), py::arg("starts"))
      .def("build_packing", &build_packing, py::arg("epoch"))
      .def("use_packing", &use_packing, py::arg("epoch"), py::arg("documents"), py::arg("window_starts"))
      .def("num_windows", &SourceStream::num_windows, py::arg("epoch"))
      .def("count_epoch", &count_epoch, py::arg("epoch"), py::arg("num_threads"))
      .def("count_documents", &count_documents, py::arg("begin"), py::arg("end"), py::arg("num_threads"))
      .def("count_stretches", &count_stretches, py::arg("draws"), py::arg("begins"), py::arg("ends"),
           py::arg("num_threads"))
      .def(
          "documents_read",
          [](const SourceStream& stream, std::int64_t num_windows, int num_threads) {
            py::gil_scoped_release free;
            const auto read = stream.documents_read(num_windows, num_threads);
            return std::make_pair(read.begun, read.cut);
          },
          py::arg("num_windows"), py::arg("num_threads"))
      .def(
          "totals",
          [](const SourceStream& stream, int num_threads) {
            SourceStream::Totals totals;
            {
              py::gil_scoped_release free;
              totals = stream.totals(num_threads);
            }
            return std::make_pair(totals.tokens, to_array(std::move(totals.content)));
          },
          py::arg("num_threads"))
      .def("window", &window, py::arg("draw"))
      .def(
          "document",
          [](const SourceStream& stream, std::int64_t draw) {
            const auto place = stream.document(draw);
            return std::make_pair(place.document, place.length);
          },
          py::arg("draw"));
}

}  // namespace

void xalign_python::bind_streams(py::module_& module) {
  // Called with the GIL held. The module is only there once the package is.
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const xalign::damaged_file& damaged) {
      const py::object kind = py::module_::import("megatron_xalign.errors").attr("FormatError");
      PyErr_SetString(kind.ptr(), damaged.what());
    } catch (const xalign::missing_epoch& missing) {
      PyErr_SetString(PyExc_LookupError, missing.what());
    }
  });
  bind_permutation(module);
  bind_source_stream(module);
  py::class_<xalign::SampleIndex, std::shared_ptr<xalign::SampleIndex>>(module, "SampleIndex")
      .def("__len__", &xalign::SampleIndex::num_samples);
  py::class_<xalign::ListedSamples, xalign::SampleIndex, std::shared_ptr<xalign::ListedSamples>>(module, "ListedSamples")
      .def(py::init([](const py::array& sources, const py::array& draws) {
             const auto* of_source = data_of<std::int32_t>(sources, 1, "sources");
             const auto* of_draw = data_of<std::int64_t>(draws, 1, "draws");
             return std::make_shared<xalign::ListedSamples>(
                 std::vector<std::int32_t>(of_source, of_source + sources.shape(0)),
                 std::vector<std::int64_t>(of_draw, of_draw + draws.shape(0)));
           }),
           py::arg("sources"), py::arg("draws"));
  py::class_<BatchReader>(module, "BatchReader")
      .def(py::init([](std::shared_ptr<xalign::SampleIndex> index,
                       const std::vector<std::shared_ptr<SourceStream>>& streams, std::int64_t seq_length,
                       std::int64_t padding_token, bool reset_position_ids, bool eod_mask_loss) {
             return BatchReader(std::move(index), streams, seq_length,
                                {padding_token, reset_position_ids, eod_mask_loss});
           }),
           py::kw_only(), py::arg("index"), py::arg("streams"), py::arg("seq_length"), py::arg("padding_token"),
           py::arg("reset_position_ids"), py::arg("eod_mask_loss"))
      .def("read", &BatchReader::read, py::arg("samples"), py::arg("arrays"));
}
