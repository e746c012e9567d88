// This instruction set's entry for isa.cpp.
#include "cpu/kernels.h"

namespace pyfused {
namespace PYFUSED_ISA {

extern const Kernels kernels = {
#define PYFUSED_ENTRY(name, arguments) name,
    PYFUSED_CPU_KERNELS(PYFUSED_ENTRY)
#undef PYFUSED_ENTRY
};

}  // namespace PYFUSED_ISA
}  // namespace pyfused
