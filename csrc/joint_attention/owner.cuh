// Which rows a block owns: it visits those of the other side, and no other block adds to what it writes.
#pragma once

#include "common/launch.cuh"
#include "joint_attention/joint_attention.h"
#include "joint_attention/tile.cuh"

namespace cogvx::joint_attention {

struct Owner {
  int64_t b, a;
  int row, start, end;  // its first row, its sample's first row and the row after its last

  __device__ const char* head(const Heads& x) const {
    return x.data + (b * x.stride_b + a * x.stride_a) * 2;  // 2 bytes a number
  }

  template <class T> __device__ T* at(const Heads& x, int r) const {
    return reinterpret_cast<T*>(x.data) + b * x.stride_b + a * x.stride_a + r * x.stride_n;
  }
};

__device__ inline Owner owner_of(const Args& args) {
  const int64_t index = blockIdx.x / static_cast<unsigned>(args.num_tiles);
  const int tile = blockIdx.x % static_cast<unsigned>(args.num_tiles);
  Owner owner{index / args.num_heads, index % args.num_heads, tile * kOwned, 0, static_cast<int>(args.num_tokens)};
  if (args.tiles) {
    owner.row = args.tiles[3 * tile];
    owner.start = args.tiles[3 * tile + 1];
    owner.end = args.tiles[3 * tile + 2];
  }
  return owner;
}

// Runs a Kernel<T, kWidth> for the arguments' dtype and the smallest width that holds theirs.
template <template <class, int> class Kernel, class SomeArgs>
const char* launch_for(const SomeArgs& args, int device, uintptr_t address) {
  const int64_t blocks = args.num_tiles * args.num_heads * args.batch;
  if (args.width < 1 || args.width > 128 || args.width % 8) return "the head width must be a multiple of 8 up to 128";
  if (args.num_tokens > 0x7fffffff - 256 || blocks > 0x7fffffff) return "there are too many tokens, heads or samples";
  if (!blocks) return nullptr;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(address);
  const auto run = [&](auto number) {
    using T = decltype(number);
    return args.width <= 64 ? Kernel<T, 64>::run(args, static_cast<unsigned>(blocks), stream)
                            : Kernel<T, 128>::run(args, static_cast<unsigned>(blocks), stream);
  };
  if (args.dtype == DType::float16) return run(__half{});
  if (args.dtype == DType::bfloat16) return run(__nv_bfloat16{});
  return "a dtype that is not compiled";
}

}  // namespace cogvx::joint_attention
