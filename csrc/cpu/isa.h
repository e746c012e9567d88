// The one run-time choice of the CPU backend: which compilation of the kernels to call.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pyfused {

std::vector<std::string> usable_isas();    // compiled in and supported by this CPU, slowest first
const char* current_isa();                 // "baseline", "avx2" or "avx512"
void choose_isa(const std::string& name);  // throws std::invalid_argument naming what is usable
const Kernels& current_kernels();

}  // namespace pyfused
