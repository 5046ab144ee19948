// Measures in Python: what analysis/ calls where NumPy is too slow.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "xalign/average_precision.h"

namespace {

using namespace xalign_python;

// Scores may lie in any layout that whole items can describe, so a slice of a memory map is not copied.
template <typename T>
xalign::Scores<T> scores_of(const py::array& array) {
  if (array.ndim() != 2) {
    throw std::invalid_argument("scores has " + std::to_string(array.ndim()) + " axes; 2 expected.");
  }
  const auto size = static_cast<py::ssize_t>(sizeof(T));
  if (array.strides(0) % size != 0 || array.strides(1) % size != 0 ||
      reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(T) != 0) {
    throw std::invalid_argument("scores is not aligned.");
  }
  return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.strides(0) / size,
          array.strides(1) / size};
}

template <typename T>
std::vector<double> average_precision_as(const py::array& scores, const std::uint8_t* labels, std::size_t num_groupings,
                                         bool lowest_first, int num_threads) {
  const auto view = scores_of<T>(scores);
  py::gil_scoped_release free;
  return xalign::average_precision(view, labels, num_groupings, lowest_first, num_threads);
}

py::array_t<double> average_precision(const py::array& scores, const py::array& labels, bool lowest_first,
                                      int num_threads) {
  const auto* label = data_of<std::uint8_t>(labels, 2, "labels");
  const auto num_groupings = static_cast<std::size_t>(labels.shape(0));
  if (scores.ndim() == 2 && labels.shape(1) != scores.shape(0)) {
    throw std::invalid_argument("labels are of " + std::to_string(labels.shape(1)) + " documents and scores of " +
                                std::to_string(scores.shape(0)) + ".");
  }
  std::vector<double> precision;
  if (py::isinstance<py::array_t<float>>(scores)) {
    precision = average_precision_as<float>(scores, label, num_groupings, lowest_first, num_threads);
  } else if (py::isinstance<py::array_t<double>>(scores)) {
    precision = average_precision_as<double>(scores, label, num_groupings, lowest_first, num_threads);
  } else {
    throw std::invalid_argument("scores has dtype " + py::cast<std::string>(py::str(scores.dtype())) +
                                "; float32 or float64 is expected.");
  }
  return to_array<double, double>(std::move(precision), {labels.shape(0), scores.shape(1)});
}

}  // namespace

namespace xalign_python {

void bind_analysis(py::module_& module) {
  module.def("average_precision", &average_precision, py::arg("scores"), py::arg("labels"),
             py::arg("lowest_first") = false, py::arg("num_threads") = 1);
}

}  // namespace xalign_python
