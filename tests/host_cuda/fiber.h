// A thread of a block as a fiber: a stack of its own, switched to and from by hand.
//
// HOST_CUDA_WATCHED: ThreadSanitizer is there. AddressSanitizer is told which stack is in use, ThreadSanitizer
// that each fiber is a thread: a switch orders nothing, so that what two fibers do to one address without a barrier
// between them is a race.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(HOST_CUDA_WATCHED)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_cuda {

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* top = nullptr;  // of what is saved
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if defined(HOST_CUDA_WATCHED)
  void* tsan = nullptr;
#endif
};

#if defined(__x86_64__)
extern "C" void host_cuda_switch(void** from, void* to);
asm(R"(
.text
.local host_cuda_switch
.type host_cuda_switch,@function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// `entry` never returns: it switches away for the last time.
inline void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, Fiber::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) abort();
  }
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + Fiber::kStack) - 1;
  *top = nullptr;  // where entry would return to; the stack is as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  makecontext(&fiber.context, entry, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  fiber.bottom = fiber.stack;
  fiber.size = Fiber::kStack;
#endif
#if defined(HOST_CUDA_WATCHED)
  if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);  // kept for later blocks, which are ordered after this one
#endif
}

// Where a fiber that was switched to goes on, also at its very start.
inline void arrived(Fiber& from) {
  (void)from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
}

inline void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.bottom, to.size);
#endif
#if defined(HOST_CUDA_WATCHED)
  if (!from.tsan) from.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: orders nothing
#endif
#if defined(__x86_64__)
  host_cuda_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void release(void* address) {
  (void)address;
#if defined(HOST_CUDA_WATCHED)
  __tsan_release(address);
#endif
}

inline void acquire(void* address) {
  (void)address;
#if defined(HOST_CUDA_WATCHED)
  __tsan_acquire(address);
#endif
}

}  // namespace host_cuda
