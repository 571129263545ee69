// One warp that does one thing, so that what the stand-in says of it can be compared with a table and with a GPU.
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace cogvx::probe {
namespace {

struct Args {
  const uint32_t *a, *b;  // by lane: 4 and 2 registers, or for a load the 32 rows of 4
  uint32_t* d;            // by lane: 4 registers, in and out
};

template <class Sum, class... Tag> __device__ void multiply(const Args& args, Tag... tag) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  Sum d[4];
  for (int i = 0; i < 4; ++i) a[i] = args.a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = args.b[2 * lane + i];
  memcpy(d, args.d + 4 * lane, sizeof d);
  multiply_add(d, a, b, tag...);
  memcpy(args.d + 4 * lane, d, sizeof d);
}

template <bool kTransposed> __device__ void load(const Args& args) {
  const int lane = threadIdx.x;
  uint32_t* rows = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = 0; i < 4; ++i) copy_async<4>(rows + 4 * lane + i, args.a + 4 * lane + i, true);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  uint32_t r[4];
  kTransposed ? load_matrices_transposed(r, rows + 4 * lane) : load_matrices(r, rows + 4 * lane);
  for (int i = 0; i < 4; ++i) args.d[4 * lane + i] = r[i];
}

// Each lane's value from the lane 5 after it, its neighbour's, the sum of a butterfly, and the lanes that are odd.
__device__ void exchange(const Args& args) {
  const int lane = threadIdx.x;
  const uint32_t own = args.a[4 * lane];
  uint32_t sum = own;
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  args.d[4 * lane] = __shfl_sync(0xffffffffu, own, lane + 5);
  args.d[4 * lane + 1] = __shfl_down_sync(0xffffffffu, own, 1);
  args.d[4 * lane + 2] = sum;
  args.d[4 * lane + 3] = __ballot_sync(0xffffffffu, own % 2 == 1);
}

__device__ void compare(const Args& args) {
  for (int i = 0; i < 4; ++i) {
    float a, b;
    memcpy(&a, args.a + 4 * threadIdx.x + i, sizeof a);
    memcpy(&b, args.b + 2 * threadIdx.x + i % 2, sizeof b);
    const float larger = max_or_nan(a, b);
    memcpy(args.d + 4 * threadIdx.x + i, &larger, sizeof larger);
  }
}

template <int kWhat> __global__ void kernel(Args args) {
  if constexpr (kWhat == 0) multiply<float>(args, __half{});
  if constexpr (kWhat == 1) multiply<float>(args, __nv_bfloat16{});
  if constexpr (kWhat == 2) multiply<int32_t>(args);
  if constexpr (kWhat == 3) load<false>(args);
  if constexpr (kWhat == 4) load<true>(args);
  if constexpr (kWhat == 5) exchange(args);
  if constexpr (kWhat == 6) compare(args);
}

template <int kWhat> const char* run(const Args& args) { return launch<kernel<kWhat>>(1, 32, 512, nullptr, args); }

}  // namespace
}  // namespace cogvx::probe

extern "C" __attribute__((visibility("default"))) const char* probe(int what, const uint32_t* a, const uint32_t* b,
                                                                     uint32_t* d) {
  using namespace cogvx::probe;
  const Args args{a, b, d};
  const char* (*const runs[])(const Args&) = {run<0>, run<1>, run<2>, run<3>, run<4>, run<5>, run<6>};
  return runs[what](args);
}
