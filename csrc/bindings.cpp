// The module pyfused._C: with tensor_caster.h the only file that knows Python. Tensors arrive as Views, kernels run
// without the GIL, and a Status becomes an exception.
#include <pybind11/stl.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu/cache.h"
#include "cpu/isa.h"
#include "tensor_caster.h"
#ifdef PYFUSED_HAS_CUDA
#include "cuda/device.h"
#include "cuda/kernels.h"
#endif

namespace pyfused {
namespace {

// A tensor like `prototype` (shape, strides, dtype) whose memory comes from the cache and goes back to it.
struct CachedTensor {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
  std::size_t bytes;
};
py::object cached_like(py::object prototype, std::optional<std::vector<int64_t>> shape,
                       std::optional<std::vector<int64_t>> strides) {
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(prototype.ptr()));
  DLTensor like;
  if (!api || api->view_from_object(prototype.ptr(), &like) != 0) throw py::type_error("cached_like takes a tensor");
  auto cached = std::make_unique<CachedTensor>();
  cached->shape = shape ? std::move(*shape) : std::vector<int64_t>(like.shape, like.shape + like.ndim);
  cached->strides = strides ? std::move(*strides) : std::vector<int64_t>(like.strides, like.strides + like.ndim);
  if (cached->shape.size() != cached->strides.size()) throw py::value_error("cached_like: a stride for each size");
  int64_t last = 0;  // offset of the last element
  for (std::size_t i = 0; i < cached->shape.size(); ++i) last += (cached->shape[i] - 1) * cached->strides[i];
  like.ndim = static_cast<int32_t>(cached->shape.size());
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

#ifdef PYFUSED_HAS_CUDA
void check_errors() {
  if (Status status = cuda::take_index_error(); status.code != Status::ok) raise("check_errors", status);
}

// PyTorch's current stream on this device, from the exchange API of the call's tensors.
Stream current_stream(int device) {
  void* stream = nullptr;
  if (seen_api->current_stream(2, device, &stream) != 0) throw py::error_already_set();
  return static_cast<Stream>(stream);
}

// A Python function that launches one kernel on the device of its tensors, on the stream that is current there.
template <class... A, std::size_t... I>
void define_cuda(py::module_& m, const char* name, Status (*kernel)(A...), std::index_sequence<I...>) {
  using Arguments = std::tuple<A...>;  // the last is the stream
  m.def(name, [name, kernel](std::tuple_element_t<I, Arguments>... arguments) {
    check_errors();
    int device = -1;
    auto check_device = [&](const auto& a) {
      if constexpr (std::is_same_v<std::decay_t<decltype(a)>, View>) {
        if (!a) return;
        if (a.device.type != 2 || (device >= 0 && a.device.id != device))
          throw py::value_error(std::string(name) + ": every tensor must be on one CUDA device");
        device = a.device.id;
      }
    };
    (check_device(arguments), ...);
    const Stream stream = current_stream(device);
    Status status;
    {
      py::gil_scoped_release release;
      cuda::DeviceGuard guard(device);
      status = kernel(arguments..., stream);
    }
    if (status.code != Status::ok) raise(name, status);
  });
}
template <class... A>
void define_cuda(py::module_& m, const char* name, Status (*kernel)(A...)) {
  define_cuda(m, name, kernel, std::make_index_sequence<sizeof...(A) - 1>());
}
#endif

}  // namespace
}  // namespace pyfused

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
  m.def("cached_like", &cached_like, py::arg("prototype"), py::arg("shape") = py::none(),
        py::arg("strides") = py::none(),
        "An uninitialised tensor like this one, or of another shape, in cached memory.");
  m.def("cache_held", &cache_held, "Bytes in free blocks of the cache.");
  m.def("cache_empty", &cache_empty, "Give the free blocks back to the system.");
  m.def("cache_limit", &cache_limit, py::arg("bytes"), "Hold at most this many bytes.");
  m.attr("cache_smallest") = kCacheSmallest;
#ifdef PYFUSED_HAS_CUDA
  m.def("why_no_cuda", &cuda::why_not, py::arg("device"),
        "Why no CUDA kernel can run on this device; None if one can.");
  m.def("cuda_check_errors", &check_errors, "Raise for an id out of range that a finished CUDA kernel met.");
#define PYFUSED_BIND(name, arguments) define_cuda(m, "cuda_" #name, &cuda::name);
  PYFUSED_CUDA_KERNELS(PYFUSED_BIND)
#undef PYFUSED_BIND
#endif
#define PYFUSED_BIND(name, arguments) define_cpu(m, #name, &Kernels::name);
  PYFUSED_CPU_KERNELS(PYFUSED_BIND)
#undef PYFUSED_BIND
}
