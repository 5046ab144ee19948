// Sums over tokens in Python: what capture/ calls on a CPU.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "xalign/group_sums.h"

namespace {

using namespace xalign_python;

// Rows of numbers that lie together, at any whole distance from one another: [T, F] or [G, F].
struct Rows {
  const void* data;
  std::int64_t stride;  // in items
};

template <typename T>
Rows rows_of(const py::array& array, const char* name) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 2) {
    throw std::invalid_argument(std::string(name) + " is " + py::cast<std::string>(py::str(array.dtype())) + " of " +
                                std::to_string(array.ndim()) + " axes; " +
                                py::cast<std::string>(py::str(py::dtype::of<T>())) + " of 2 is expected.");
  }
  const auto size = static_cast<py::ssize_t>(sizeof(T));
  const bool together = array.shape(1) <= 1 || array.strides(1) == size;
  if (!together || array.strides(0) % size != 0 || reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(T) != 0) {
    throw std::invalid_argument(std::string(name) + " does not have its rows together.");
  }
  return {array.data(), array.strides(0) / size};
}

template <typename T>
xalign::PerGroup<T> totals_of(const std::optional<py::array>& array, const py::array& values, py::ssize_t num_groups,
                              const char* name) {
  if (!array) return {};
  const auto rows = rows_of<T>(*array, name);
  if (array->shape(0) != num_groups || array->shape(1) != values.shape(1)) {
    throw std::invalid_argument(std::string(name) + " is [" + std::to_string(array->shape(0)) + ", " +
                                std::to_string(array->shape(1)) + "]; [" + std::to_string(num_groups) + ", " +
                                std::to_string(values.shape(1)) + "] is expected.");
  }
  if (!array->writeable()) throw std::invalid_argument(std::string(name) + " cannot be written to.");
  return {static_cast<T*>(const_cast<void*>(rows.data)), rows.stride};
}

template <typename Python, typename Native>
void add_as(const py::array& values, const std::int32_t* groups, const xalign::GroupSums& sums) {
  const auto rows = rows_of<Python>(values, "values");
  const xalign::Activations<Native> view{static_cast<const Native*>(rows.data), values.shape(0), values.shape(1),
                                         rows.stride};
  py::gil_scoped_release free;
  xalign::add_to_groups(view, groups, sums);
}

void add_to_groups(const py::array& values, const py::array& groups, py::ssize_t num_groups,
                   const std::optional<py::array>& sum, const std::optional<py::array>& sum_of_squares,
                   const std::optional<py::array>& max, const std::optional<py::array>& positive) {
  const auto* group = data_of<std::int32_t>(groups, 1, "groups");
  if (values.ndim() != 2 || values.shape(0) != groups.shape(0)) {
    throw std::invalid_argument("values are not [T, F] of the " + std::to_string(groups.shape(0)) + " tokens of groups.");
  }
  if (num_groups < 0) throw std::invalid_argument("num_groups is negative.");
  const xalign::GroupSums sums{num_groups, totals_of<double>(sum, values, num_groups, "sum"),
                               totals_of<double>(sum_of_squares, values, num_groups, "sum_of_squares"),
                               totals_of<float>(max, values, num_groups, "max"),
                               totals_of<std::int64_t>(positive, values, num_groups, "positive")};
  if (py::isinstance<py::array_t<std::uint16_t>>(values)) {
    static_assert(sizeof(xalign::BFloat16) == sizeof(std::uint16_t), "bits of a number and nothing else");
    add_as<std::uint16_t, xalign::BFloat16>(values, group, sums);
  } else {
    add_as<float, float>(values, group, sums);
  }
}

}  // namespace

namespace xalign_python {

void bind_capture(py::module_& module) {
  module.def("add_to_groups", &add_to_groups, py::arg("values"), py::arg("groups"), py::arg("num_groups"), py::kw_only(),
             py::arg("sum") = py::none(), py::arg("sum_of_squares") = py::none(), py::arg("max") = py::none(),
             py::arg("positive") = py::none());
}

}  // namespace xalign_python
