// The Python module of the emulation: the launchers of csrc/cuda/kernels.h under the names that pyfused._C gives them,
// for CPU tensors. Each call tells the checker which memory the kernels may touch, and raises what it has found.
#include <pybind11/stl.h>

#include <sstream>
#include <tuple>
#include <utility>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "internal.h"
#include "planted.h"
#include "tensor_caster.h"

namespace {

using namespace pyfused;

// "(View loss, int reduction, ...)" -> "loss", "reduction", ...
std::vector<std::string> argument_names(const char* declaration) {
  std::vector<std::string> names;
  std::istringstream text(std::string(declaration).substr(1));
  for (std::string one; std::getline(text, one, ',');) {
    one = one.substr(one.rfind(' ') + 1);
    names.push_back(one.substr(0, one.find(')')));
  }
  return names;
}

size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    default:
      return 1;
  }
}

// From the first to the last element of a tensor. A workspace holds nothing yet.
void register_view(const View& v, const std::string& name) {
  if (!v || v.numel() == 0) return;
  if (v.device.type != 1) throw py::value_error(name + ": the emulation takes CPU tensors");
  int64_t last = 0;
  for (int i = 0; i < v.ndim; ++i) last += (v.shape[i] - 1) * v.strides[i];
  const size_t item = item_size(v.dtype);
  cuda_emulation::register_memory(v.data, (last + 1) * item, item, name, name.rfind("workspace", 0) != 0);
}
template <class T>
void register_view(const T&, const std::string&) {}

void check_errors() {
  if (Status status = cuda::take_index_error(); status.code != Status::ok) raise("check_errors", status);
}

template <class... A, size_t... I>
void define(py::module_& m, const char* name, const char* declaration, Status (*kernel)(A...),
            std::index_sequence<I...>) {
  using Arguments = std::tuple<A...>;  // the last is the stream
  const auto names = argument_names(declaration);
  m.def(name, [=](std::tuple_element_t<I, Arguments>... arguments) {
    check_errors();
    cuda_emulation::clear_memory();
    cuda_emulation::clear_errors();
    (register_view(arguments, names[I]), ...);
    const Status status = kernel(arguments..., nullptr);
    cuda_emulation::clear_memory();
    std::string errors;
    for (const std::string& e : cuda_emulation::errors()) errors += "\n  " + e;
    if (!errors.empty()) throw std::runtime_error(std::string(name) + ": the emulation of CUDA found" + errors);
    if (status.code != Status::ok) raise(name, status);
  });
}
template <class... A>
void define(py::module_& m, const char* name, const char* declaration, Status (*kernel)(A...)) {
  define(m, name, declaration, kernel, std::make_index_sequence<sizeof...(A) - 1>());
}

}  // namespace

PYBIND11_MODULE(_cuda_emulation, m) {
  m.def("set_seed", &cuda_emulation::set_seed, py::arg("seed"), "Choose the order of blocks and threads.");
  m.def("cuda_check_errors", &check_errors);
  define(m, "planted", "(View data, View workspace, int bug, Stream stream)", &cuda::planted);
  define(m, "fragments", "(View d, View a, View b, int how, Stream stream)", &cuda::fragments);
  m.attr("checked") = cuda_emulation::kChecked;
#define PYFUSED_BIND(name, arguments) define(m, "cuda_" #name, #arguments, &cuda::name);
  PYFUSED_CUDA_KERNELS(PYFUSED_BIND)
#undef PYFUSED_BIND
}
