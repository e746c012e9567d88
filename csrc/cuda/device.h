// What the bindings need to know about CUDA without its headers.
#pragma once

namespace pyfused {

// Why no kernel of this binary can run on CUDA device `device`; nullptr if one can.
const char* why_no_cuda(int device);

}  // namespace pyfused
