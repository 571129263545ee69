// The convolution measures each tile before it leaves the chip; then tiles are put together, in one order on any GPU.
#include "causal_conv3d_moments/causal_conv3d_moments.h"
#include "common/convolution.cuh"

namespace cogvx::causal_conv3d_moments {
namespace {

constexpr int kLanes = 32, kWays = 8;  // channels of a block, and threads that share the parts of one

// f(part) of the block's parts, summed for each channel; every thread of a channel gets the sum. One order: a thread
// takes every kWays-th part, and their sums follow one another.
template <class F> __device__ double total(int64_t first, int64_t last, F f) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  double sum = 0;
  for (int64_t part = first + threadIdx.x / kLanes; part < last; part += kWays) sum += f(part);
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int way = 0; way < kWays; ++way) sum += shared[way * kLanes + threadIdx.x % kLanes];
  __syncthreads();
  return sum;
}

// Source: T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance" (1983), for all parts at once.
__global__ void __launch_bounds__(kLanes * kWays) merge_kernel(Merge args) {
  const int channel = blockIdx.y * kLanes + threadIdx.x % kLanes;
  const bool is_inside = channel < args.channels;
  const int64_t first = blockIdx.x * args.a_group, size = 3 * static_cast<int64_t>(args.channels);
  const int64_t last = first + args.a_group < args.parts ? first + args.a_group : args.parts;
  const float* const from = args.from + blockIdx.z * args.parts * size + channel;
  const auto at = [&](int64_t part, int which) {
    return is_inside ? static_cast<double>(from[part * size + which * args.channels]) : 1.0;
  };
  const double count = total(first, last, [&](int64_t part) { return at(part, 0); });
  const double mean = total(first, last, [&](int64_t part) { return at(part, 0) * at(part, 1); }) / count;
  const double squares = total(first, last, [&](int64_t part) {
    const double away = at(part, 1) - mean;
    return at(part, 2) + at(part, 0) * away * away;
  });
  if (!is_inside || threadIdx.x >= kLanes) return;
  const bool is_last = gridDim.x == 1;
  float* to = args.to + (blockIdx.z * static_cast<int64_t>(gridDim.x) + blockIdx.x) * size + channel;
  if (is_last) to = args.to + blockIdx.z * 2 * static_cast<int64_t>(args.channels) + channel;
  if (!is_last) *to = static_cast<float>(count), to += args.channels;
  to[0] = static_cast<float>(mean);
  to[args.channels] = static_cast<float>(is_last ? squares / count : squares);
}

}  // namespace

const char* forward_cuda(const Convolution& args, int device, uintptr_t stream) {
  return convolve<Measured>(args, device, stream);
}

const char* merge_cuda(const Merge& args, int device, uintptr_t stream) {
  const int64_t groups = (args.parts + args.a_group - 1) / args.a_group;
  const int64_t blocks = (args.channels + kLanes - 1) / kLanes;
  if (groups > 0x7fffffff || blocks > 65535 || args.batch > 65535) return "too many channels or samples";
  const DeviceGuard guard(device);
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(blocks), static_cast<unsigned>(args.batch));
  constexpr int kThreads = kLanes * kWays;
  return launch<merge_kernel>(grid, kThreads, kThreads * sizeof(double), reinterpret_cast<cudaStream_t>(stream), args);
}

}  // namespace cogvx::causal_conv3d_moments
