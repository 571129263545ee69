// Memory of one thread or call, in rows.
//
// To be included by a cpu.cpp alone: everything is in an unnamed namespace, so every instruction set gets its own copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cogvx {
namespace {

template <class A> struct Scratch {  // zeros of one thread or call: rows of a width, from the start of a cache line
  static constexpr size_t kLine = 64;
  char* memory;
  A* data;
  int64_t width;
  Scratch(int64_t count, int64_t row_width)
      : memory(new char[count * row_width * sizeof(A) + kLine]()), data(aligned(memory)), width(row_width) {}
  ~Scratch() { delete[] memory; }
  static A* aligned(char* from) {
    return reinterpret_cast<A*>(from + (kLine - reinterpret_cast<uintptr_t>(from) % kLine));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* row(int64_t i) const { return data + i * width; }
};

// Asks for values that will be read soon, where the processor does not foresee it; they need not exist.
template <class T> void fetch(const T* from, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
#else
  (void)from, (void)count;
#endif
}

template <class A> void fill(A* row, int64_t width, A value) {
  for (int64_t i = 0; i < width; ++i) row[i] = value;
}

}  // namespace
}  // namespace cogvx
