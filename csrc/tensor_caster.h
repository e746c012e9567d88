// How Python's tensors become Views, and a Status an exception: what bindings.cpp, and the tests' emulation of CUDA,
// bind kernels with. Through DLPack's C exchange API a tensor takes about 0.1 us.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace py = pybind11;

namespace pyfused {

inline DType dtype_of(DLDataType dtype) {
  static constexpr struct {
    uint8_t code, bits;
    DType dtype;
  } known[] = {{2, 32, DType::f32}, {2, 64, DType::f64}, {4, 16, DType::bf16}, {2, 16, DType::f16},
               {0, 32, DType::i32}, {0, 64, DType::i64}, {1, 8, DType::u8},    {6, 8, DType::boolean}};
  for (const auto& k : known)
    if (dtype.code == k.code && dtype.bits == k.bits && dtype.lanes == 1) return k.dtype;
  return DType::other;
}

// The exchange API of the tensor type that was asked for last: in practice all arguments are torch.Tensor or
// torch.nn.Parameter, which inherits it.
inline PyTypeObject* seen_type = nullptr;
inline const DLPackExchangeAPI* seen_api = nullptr;

// The exchange API of a tensor type, or nullptr.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  if (type != seen_type) {
    py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->version.major != 1) api = api->previous;
    seen_type = type;
    seen_api = api;
  }
  return seen_api;
}

inline bool read_view(PyObject* object, View& view) {
  if (object == Py_None) return true;  // absent
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object));
  if (!api) return false;
  DLTensor tensor;
  if (api->view_from_object(object, &tensor) != 0) throw py::error_already_set();
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.shape = tensor.shape;
  view.strides = tensor.strides;
  view.ndim = tensor.ndim;
  view.dtype = dtype_of(tensor.dtype);
  view.device = tensor.device;
  return true;
}

[[noreturn]] inline void raise(const char* kernel, const Status& status) {
  std::string argument = status.argument ? status.argument : "";
  if (status.code == Status::out_of_range)
    throw py::index_error(argument + " " + std::to_string(status.value) + " is out of bounds: " + argument + "[" +
                          std::to_string(status.position) + "] must lie in [0, " + std::to_string(status.limit) + ")");
  if (status.code == Status::failed) throw std::runtime_error(std::string(kernel) + ": CUDA: " + status.problem);
  throw py::value_error(std::string(kernel) + ": " + argument + ": " + status.problem);
}

}  // namespace pyfused

namespace pybind11::detail {
template <>
struct type_caster<pyfused::View> {
  PYBIND11_TYPE_CASTER(pyfused::View, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return pyfused::read_view(source.ptr(), value); }
};
}  // namespace pybind11::detail
