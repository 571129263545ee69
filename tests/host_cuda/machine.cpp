// This file is never compiled with ThreadSanitizer, which would watch the scheduler instead of the kernels; what it
// does to their memory goes through memset and memcpy, which are watched wherever they are called. Vectors that fibers
// share never grow, because growing copies.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace host_cuda {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kMaxShared = 227 << 10;

struct Copy {  // into shared memory, not landed yet
  char* to;
  const char* from;
  int bytes;  // of `size`; the rest become 0
  int size;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int warp = 0, lane = 0;
  std::vector<std::vector<Copy>> copies;  // by group, the oldest first; the last one is open
};

struct Meeting {  // lanes of one mask that wait for one another
  unsigned mask = 0;  // 0: nobody is here
  Collective kind;
  unsigned arrived = 0;
  const void* in[kWarp];
  void* out[kWarp];
};

struct Warp {
  Meeting meetings[kWarp];
  unsigned live = 0;
  char order[64][2];  // addresses that stand for __syncwarp: by mask, in turns
  int turn = 0;
};

struct Barrier {
  std::vector<Thread*> waiting;
  int count = 0;
  char order[2];  // addresses that stand for it, in turns: who is slow to leave must not be ordered with the next one
  int turn = 0;
};

struct Machine {
  Fiber scheduler;
  std::vector<std::unique_ptr<Thread>> threads;  // kept for later blocks: their stacks are
  int num_threads = 0, num_live = 0;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  dim3 block_index, block_size, grid_size;
  char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error, launches;
  bool failed = false, recording = false;
  char start = 0, end = 0;  // addresses that stand for the start and the end of a block
  uint64_t seed = 0, num_launches = 0;
  std::mt19937_64 random;
};

Machine& machine = *new Machine;  // never destroyed: at the end of a process nobody orders that with its fibers

void suspend() { switch_to(machine.current->fiber, machine.scheduler); }

void end_thread() {
  Thread& thread = *machine.current;
  Warp& warp = machine.warps[thread.warp];
  --machine.num_live;
  release(&machine.end);
  warp.live &= ~(1u << thread.lane);
  for (const Meeting& meeting : warp.meetings)
    if (meeting.mask >> thread.lane & 1) fail("a thread ended that its warp waits for (mask %08x)", meeting.mask);
  Barrier& all = machine.barriers[0];
  if (!all.waiting.empty() && all.count == 0 && static_cast<int>(all.waiting.size()) == machine.num_live) {
    for (Thread* waiting : all.waiting) machine.ready.push_back(waiting);
    all.waiting.clear();
  }
  suspend();
}

void thread_main() {
  arrived(machine.scheduler);
  acquire(&machine.start);
  (*machine.body)();
  end_thread();
  abort();
}

// Which of the ready threads runs next. A third of the seeds lets one warp run far ahead, a third keeps all in step.
Thread* choose() {
  auto& ready = machine.ready;
  const uint64_t policy = machine.seed % 3;
  size_t i = ready.size() - 1;
  if (policy == 0) i = machine.random() % ready.size();
  if (policy == 1) i = machine.random() % std::min<size_t>(ready.size(), kWarp);
  Thread* chosen = ready[i];
  if (policy == 1)
    ready.erase(ready.begin() + i);
  else {
    ready[i] = ready.back();
    ready.pop_back();
  }
  return chosen;
}

void run_block(size_t shared_bytes) {
  free(machine.shared);  // a new one of just this size, so that AddressSanitizer sees what lies beyond
  if (posix_memalign(reinterpret_cast<void**>(&machine.shared), 1024, shared_bytes ? shared_bytes : 1)) abort();
  memset(machine.shared, 0xff, shared_bytes);
  for (Barrier& barrier : machine.barriers) {
    barrier.waiting.clear();
    barrier.waiting.reserve(kMaxThreads);
  }
  machine.ready.reserve(kMaxThreads);
  machine.warps.assign((machine.num_threads + kWarp - 1) / kWarp, Warp{});
  machine.ready.clear();
  machine.num_live = machine.num_threads;
  for (int i = 0; i < machine.num_threads; ++i) {
    Thread& thread = *machine.threads[i];
    const unsigned x = machine.block_size.x, y = machine.block_size.y;
    thread.index = dim3(i % x, i / x % y, i / x / y);
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    thread.copies.assign(1, {});
    machine.warps[thread.warp].live |= 1u << thread.lane;
    prepare(thread.fiber, thread_main);
    machine.ready.push_back(&thread);
  }
  std::shuffle(machine.ready.begin(), machine.ready.end(), machine.random);
  release(&machine.start);
  while (machine.num_live && !machine.failed) {
    if (machine.ready.empty()) {
      machine.error = "the threads of a block wait for one another for ever";
      machine.failed = true;
      break;
    }
    machine.current = choose();
    switch_to(machine.scheduler, machine.current->fiber);
  }
  acquire(&machine.end);
}

}  // namespace

dim3 current_index() { return machine.current->index; }
int current_lane() { return machine.current->lane; }
dim3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block_size; }
dim3 grid_size() { return machine.grid_size; }
char* shared_memory() { return machine.shared; }

void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  machine.error = text;
  machine.failed = true;
  for (;;) suspend();  // what this fiber holds is given up
}

void barrier(int id, int count) {
  if (id < 0 || id >= kBarriers) fail("there is no barrier %d", id);
  Barrier& all = machine.barriers[id];
  if (all.waiting.empty()) all.count = count;
  if (all.count != count) fail("barrier %d is waited for with counts %d and %d", id, all.count, count);
  char* order = &all.order[all.turn];
  release(order);
  all.waiting.push_back(machine.current);
  if (static_cast<int>(all.waiting.size()) == (count ? count : machine.num_live)) {
    for (Thread* waiting : all.waiting) machine.ready.push_back(waiting);
    all.waiting.clear();
    all.turn ^= 1;
  }
  suspend();
  acquire(order);
}

void collective(Collective kind, unsigned mask, const void* in, void* out, Together together,
                          const void* more) {
  Thread& self = *machine.current;
  Warp& warp = machine.warps[self.warp];
  if (!(mask >> self.lane & 1)) fail("lane %d calls a warp collective whose mask %08x leaves it out", self.lane, mask);
  if (mask & ~warp.live) fail("a warp collective waits for lanes that have ended (%08x)", mask & ~warp.live);
  Meeting* found = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.mask == mask) found = &other;
    if (other.mask != mask && other.mask & mask)
      fail("lanes of one warp wait for one another by the masks %08x and %08x", other.mask, mask);
  }
  for (Meeting& free : warp.meetings)
    if (!found && !free.mask) found = &free;
  Meeting& meeting = *found;
  meeting.mask = mask;
  if (meeting.arrived == 0) meeting.kind = kind;
  if (meeting.kind != kind) fail("lanes of one warp are at different collectives (mask %08x)", mask);
  char* order = warp.order[mask % 64] + warp.turn;
  if (kind == Collective::sync) release(order);
  meeting.in[self.lane] = in;
  meeting.out[self.lane] = out;
  meeting.arrived |= 1u << self.lane;
  if (meeting.arrived == mask) {
    if (together) together(meeting.in, meeting.out, mask, more);
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) machine.ready.push_back(machine.threads[self.warp * kWarp + lane].get());
    meeting.mask = meeting.arrived = 0;
    if (kind == Collective::sync) warp.turn ^= 1;
  }
  suspend();
  if (kind == Collective::sync) acquire(order);
}

void start_copy(void* to, const void* from, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(to) % size || (bytes && reinterpret_cast<uintptr_t>(from) % size))
    fail("an asynchronous copy of %d bytes is not aligned to that", size);
  memset(to, 0xff, size);  // nobody may read it before it has landed, nor still need what was there
  machine.current->copies.back().push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

void commit_copies() { machine.current->copies.emplace_back(); }

void wait_for_copies(int but) {
  auto& groups = machine.current->copies;
  while (static_cast<int>(groups.size()) - 1 > but) {
    for (const Copy& copy : groups.front()) {
      if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
      memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

const char* run(const char* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  static std::string error;
  const auto refuse = [&](const std::string& why) { return (error = std::string(kernel) + ": " + why).c_str(); };
  const uint64_t count = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse("a grid that CUDA does not launch");
  if (!count || count > kMaxThreads || count % kWarp) return refuse("a block must have 32 to 1024 threads, whole warps");
  if (shared > kMaxShared) return refuse("more shared memory than a block can have");
  char line[1024];
  snprintf(line, sizeof line, "%s\t%u,%u,%u\t%u,%u,%u\t%zu\n", kernel, grid.x, grid.y, grid.z, block.x, block.y,
           block.z, shared);
  machine.launches += line;
  if (machine.recording) return nullptr;
  machine.random.seed(machine.seed + 0x9e3779b97f4a7c15u * ++machine.num_launches);
  machine.num_threads = static_cast<int>(count);
  while (machine.threads.size() < count) machine.threads.push_back(std::make_unique<Thread>());
  machine.block_size = block;
  machine.grid_size = grid;
  machine.body = &body;
  machine.failed = false;
  std::vector<uint64_t> order(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const uint64_t i : order) {
    machine.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(shared);
    if (machine.failed) return refuse(machine.error);
  }
  return nullptr;
}

}  // namespace host_cuda

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void host_cuda_seed(uint64_t seed) {
  host_cuda::machine.seed = seed;
  host_cuda::machine.num_launches = 0;
}

// While recording, launches are noted down and not run.
EXPORTED void host_cuda_record(int on) { host_cuda::machine.recording = on; }

// Kernel, grid, block and shared bytes of every launch since the last call, a line each.
EXPORTED const char* host_cuda_launches() {
  static std::string taken;
  taken.swap(host_cuda::machine.launches);
  host_cuda::machine.launches.clear();
  return taken.c_str();
}
