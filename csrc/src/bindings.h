// What the bindings*.cpp share: arrays in and out, and what each of them adds to the module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace xalign_python {

namespace py = pybind11;

// Data of a C-contiguous array of exactly this type and rank; a silent conversion would hide a copy of the whole array.
template <typename T>
const T* data_of(const py::array& array, py::ssize_t rank, const char* name) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw std::invalid_argument(std::string(name) + " has dtype " + py::cast<std::string>(py::str(array.dtype())) +
                                "; " + py::cast<std::string>(py::str(py::dtype::of<T>())) + " is expected.");
  }
  if (array.ndim() != rank) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.ndim()) + " axes; " +
                                std::to_string(rank) + " expected.");
  }
  if ((array.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument(std::string(name) + " is not contiguous.");
  }
  return static_cast<const T*>(array.data());
}

inline std::size_t length_of(const py::array& array) { return static_cast<std::size_t>(array.shape(0)); }

// Hands a vector's memory to NumPy without copying it.
template <typename T, typename Item>
py::array_t<T> to_array(std::vector<Item>&& items, std::vector<py::ssize_t> shape) {
  auto* kept = new std::vector<Item>(std::move(items));
  py::capsule owner(kept, [](void* memory) { delete static_cast<std::vector<Item>*>(memory); });
  return py::array_t<T>(std::move(shape), reinterpret_cast<const T*>(kept->data()), owner);
}

template <typename T>
py::array_t<T> to_array(std::vector<T>&& items) {
  const auto size = static_cast<py::ssize_t>(items.size());
  return to_array<T, T>(std::move(items), {size});
}

// bindings_stream.cpp: Permutation, SourceStream, SampleIndex and the batch reader.
void bind_streams(py::module_& module);

// bindings_blend.cpp: how orders of samples and documents are chosen, counted and kept. After bind_streams.
void bind_blends(py::module_& module);

// bindings_analysis.cpp: measures that NumPy is too slow for.
void bind_analysis(py::module_& module);

// bindings_capture.cpp: sums over tokens.
void bind_capture(py::module_& module);

}  // namespace xalign_python
