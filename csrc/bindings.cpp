// The module pyfused._C: the only file that knows Python. Tensors arrive as Views through DLPack's C exchange API
// (about 0.1 us each), kernels run without the GIL, and a Status becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/cache.h"
#include "cpu/isa.h"
#ifdef PYFUSED_HAS_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace pyfused {
namespace {

DType dtype_of(DLDataType dtype) {
  static constexpr struct {
    uint8_t code, bits;
    DType dtype;
  } known[] = {{2, 32, DType::f32}, {2, 64, DType::f64}, {4, 16, DType::bf16}, {2, 16, DType::f16},
               {0, 32, DType::i32}, {0, 64, DType::i64}, {1, 8, DType::u8},    {6, 8, DType::boolean}};
  for (const auto& k : known)
    if (dtype.code == k.code && dtype.bits == k.bits && dtype.lanes == 1) return k.dtype;
  return DType::other;
}

// The exchange API of a tensor type, or nullptr. One entry is remembered: in practice all arguments are torch.Tensor or
// torch.nn.Parameter, which inherits it.
const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  static PyTypeObject* seen_type = nullptr;
  static const DLPackExchangeAPI* seen_api = nullptr;
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

bool read_view(PyObject* object, View& view) {
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

// A tensor like `prototype` (shape, strides, dtype) whose memory comes from the cache and goes back to it.
struct CachedTensor {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
  std::size_t bytes;
};
py::object cached_like(py::object prototype) {
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(prototype.ptr()));
  DLTensor like;
  if (!api || api->view_from_object(prototype.ptr(), &like) != 0) throw py::type_error("cached_like takes a tensor");
  auto cached = std::make_unique<CachedTensor>();
  int64_t last = 0;  // offset of the last element
  for (int i = 0; i < like.ndim; ++i) last += (like.shape[i] - 1) * like.strides[i];
  cached->shape.assign(like.shape, like.shape + like.ndim);
  cached->strides.assign(like.strides, like.strides + like.ndim);
  cached->bytes = static_cast<std::size_t>(last + 1) * like.dtype.bits / 8;
  like.data = cache_take(cached->bytes);
  like.byte_offset = 0;
  like.shape = cached->shape.data();
  like.strides = cached->strides.data();
  cached->managed = {{1, 0}, cached.get(), nullptr, 0, like};
  cached->managed.deleter = [](DLManagedTensor* self) {
    auto* owner = static_cast<CachedTensor*>(self->context);
    cache_give(self->tensor.data, owner->bytes);
    delete owner;
  };
  void* object = nullptr;
  if (api->object_from_managed(&cached.release()->managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void raise(const char* kernel, const Status& status) {
  std::string argument = status.argument ? status.argument : "";
  if (status.code == Status::out_of_range)
    throw py::index_error(argument + " " + std::to_string(status.value) + " is out of bounds: " + argument + "[" +
                          std::to_string(status.position) + "] must lie in [0, " + std::to_string(status.limit) + ")");
  throw py::value_error(std::string(kernel) + ": " + argument + ": " + status.problem);
}

// A Python function that calls the current instruction set's version of one kernel.
template <class... A>
void define_cpu(py::module_& m, const char* name, Status (*Kernels::*kernel)(A...)) {
  m.def(name, [name, kernel](A... arguments) {
    auto check_device = [&](const auto& a) {
      if constexpr (std::is_same_v<std::decay_t<decltype(a)>, View>)
        if (a && a.device.type != 1) throw py::value_error(std::string(name) + ": every tensor must be on the CPU");
    };
    (check_device(arguments), ...);
    Status status;
    {
      py::gil_scoped_release release;
      status = (current_kernels().*kernel)(arguments...);
    }
    if (status.code != Status::ok) raise(name, status);
  });
}

}  // namespace
}  // namespace pyfused

namespace pybind11::detail {
template <>
struct type_caster<pyfused::View> {
  PYBIND11_TYPE_CASTER(pyfused::View, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return pyfused::read_view(source.ptr(), value); }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  using namespace pyfused;
  m.doc() = "Compiled kernels of pyfused. Private: use pyfused.functional.";
  m.def(
      "build_info", [] { return std::map<std::string, std::string> PYFUSED_BUILD_INFO; },
      "What the build decided: version, instruction sets, OpenMP, CUDA, compiler.");
  m.def("isas", &usable_isas, "Instruction sets compiled in and supported by this CPU, slowest first.");
  m.def("isa", &current_isa, "The instruction set in use.");
  m.def("set_isa", &choose_isa, py::arg("name"), "Use another instruction set (also: environment PYFUSED_ISA).");
  if (const char* name = std::getenv("PYFUSED_ISA"); name && *name) choose_isa(name);
  m.def("cached_like", &cached_like, py::arg("prototype"), "An uninitialised tensor like this one, in cached memory.");
  m.def("cache_held", &cache_held, "Bytes in free blocks of the cache.");
  m.def("cache_empty", &cache_empty, "Give the free blocks back to the system.");
  m.def("cache_limit", &cache_limit, py::arg("bytes"), "Hold at most this many bytes.");
  m.attr("cache_smallest") = kCacheSmallest;
#ifdef PYFUSED_HAS_CUDA
  m.def("why_no_cuda", &why_no_cuda, py::arg("device"), "Why no CUDA kernel can run on this device; None if one can.");
#endif
#define PYFUSED_BIND(name, arguments) define_cpu(m, #name, &Kernels::name);
  PYFUSED_CPU_KERNELS(PYFUSED_BIND)
#undef PYFUSED_BIND
}
