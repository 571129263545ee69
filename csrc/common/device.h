// The CUDA device, without its headers.
#pragma once

namespace cogvx {

// Why kernels of this extension cannot run on a CUDA device (no driver, no code for its architecture); nullptr: they can.
const char* why_not_cuda(int device);

}  // namespace cogvx
