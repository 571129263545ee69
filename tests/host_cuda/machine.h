// The execution model of CUDA on one processor: the threads of a block are fibers, each of which runs until a barrier or
// a warp collective. Blocks run one after another. The order of blocks and threads comes from a seed; whatever CUDA
// leaves open is decided against the kernel: a copy lands at the wait for it and its target is unusable until then,
// shared memory starts as NaN, a shuffle orders no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "fiber.h"

// For what a warp does together: one lane reads and writes what is the others', on their behalf.
#define HOST_CUDA_UNWATCHED __attribute__((no_sanitize("thread")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace host_cuda {

// What a warp does together; lanes of one mask must do the same.
enum class Collective { sync, shuffle, vote, matrix_load, matrix_product };

dim3 current_index();  // of the thread that runs
int current_lane();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
char* shared_memory();

void barrier(int id, int count);  // count 0: every thread that has not ended

// Waits for the lanes of `mask`; the last to arrive runs `together` with each lane's `in` and `out`.
using Together = void (*)(const void* const* in, void* const* out, unsigned mask, const void* more);
void collective(Collective kind, unsigned mask, const void* in, void* out, Together together, const void* more);

void start_copy(void* to, const void* from, int bytes, int size);
void commit_copies();
void wait_for_copies(int but);  // the newest `but` groups may still be under way

[[noreturn]] void fail(const char* format, ...);  // ends the launch; its error is the message

// Runs a grid, or only notes it down while recording. Returns nullptr, or what went wrong.
const char* run(const char* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);

}  // namespace host_cuda
