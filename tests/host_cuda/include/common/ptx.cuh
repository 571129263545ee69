// csrc/common/ptx.cuh on the execution model of machine.h; the text there says what each does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cogvx {

inline char* shared_memory() { return host_cuda::shared_memory(); }

namespace on_host {

template <class T> HOST_CUDA_UNWATCHED T element(const uint32_t* registers, int i) {  // the i-th of those packed in registers
  T value;
  memcpy(&value, reinterpret_cast<const char*>(registers) + i * sizeof(T), sizeof(T));
  return value;
}

struct Operands {
  const uint32_t *a, *b;
};

// D += A B with A 16 x K and B K x 8, K = 32 bytes of T; d is each lane's in and out.
template <class T, class Sum> HOST_CUDA_UNWATCHED void product(const void* const* in, void* const* out, unsigned, const void*) {
  constexpr int kOf = 4 / sizeof(T), kDepth = 32 / sizeof(T);  // values of a register; K
  Sum a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& of = *static_cast<const Operands*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 * kOf; ++i)
      a[g + 8 * (i / kOf % 2)][kOf * t + i % kOf + kDepth / 2 * (i / (2 * kOf))] = static_cast<Sum>(element<T>(of.a, i));
    for (int i = 0; i < 2 * kOf; ++i)
      b[kOf * t + i % kOf + kDepth / 2 * (i / kOf)][g] = static_cast<Sum>(element<T>(of.b, i));
  }
  for (int lane = 0; lane < 32; ++lane) {
    Sum* d = static_cast<Sum*>(out[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      d[i] += sum;
    }
  }
}

template <class T, class Sum>
void multiply(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Operands operands{a, b};
  Sum sums[4] = {d[0], d[1], d[2], d[3]};
  host_cuda::collective(host_cuda::Collective::matrix_product, 0xffffffffu, &operands, sums, product<T, Sum>, nullptr);
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

struct Row {
  uint16_t values[8];
};

template <bool kTransposed> void load(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) host_cuda::fail("a row of a matrix load is not aligned to 16 bytes");
  Row own;  // read before the warp meets: nothing orders a load with what other lanes wrote without a __syncwarp
  memcpy(&own, row, sizeof own);
  uint32_t loaded[4];
  host_cuda::collective(
      host_cuda::Collective::matrix_load, 0xffffffffu, &own, loaded,
      [](const void* const* in, void* const* out, unsigned, const void*) HOST_CUDA_UNWATCHED {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int j = 0; j < 2; ++j) {
              const int major = lane / 4, minor = 2 * (lane % 4) + j;
              const Row* from = static_cast<const Row*>(in[8 * i + (kTransposed ? minor : major)]);
              pair[j] = from->values[kTransposed ? major : minor];
            }
            memcpy(static_cast<uint32_t*>(out[lane]) + i, pair, 4);
          }
        }
      },
      nullptr);
  for (int i = 0; i < 4; ++i) r[i] = loaded[i];
}

}  // namespace on_host

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  on_host::multiply<__half, float>(d, a, b);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  on_host::multiply<__nv_bfloat16, float>(d, a, b);
}
inline void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_host::multiply<int8_t, int32_t>(d, a, b);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { on_host::load<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { on_host::load<true>(r, row); }

template <int kBytes> void copy_async(void* to, const void* from, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  host_cuda::start_copy(to, from, inside ? kBytes : 0, kBytes);
}
inline void commit_copies() { host_cuda::commit_copies(); }
template <int kNewest> void wait_for_copies() { host_cuda::wait_for_copies(kNewest); }

inline void wait_at(int barrier, int count) { host_cuda::barrier(barrier, count); }

inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace cogvx
