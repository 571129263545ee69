// The CUDA device, without its headers.
#pragma once

namespace cogvx {

// Why the kernels cannot run on a CUDA device (no driver, no code for its architecture), or nullptr.
const char* why_not_cuda(int device);

}  // namespace cogvx
