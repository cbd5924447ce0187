// What emulator.cpp (the scheduler) and races.cpp (the race detector) share.
#pragma once

#include <string>

#include "cuda_runtime.h"

namespace emulator {

constexpr int kMaxThreads = 1024;

enum class State : uint8_t { ready, barrier, warp, done };

struct Fiber {
  int index;
  uint3 at;
  State state;
  // what it waits for
  Join what;
  unsigned int mask;
  uint64_t value;
  int argument, width, predicate, line;
  const char* file;
  uint64_t result;
};

struct Block {  // the running one
  std::string kernel;
  dim3 grid, dim;
  int threads;
  uint64_t index;       // in the grid
  uint32_t epoch;       // barriers passed
  unsigned char* shared;
  size_t shared_bytes;
};

extern Fiber* running;  // nullptr outside kernels
extern Block block;

void fail(const std::string& what);  // ends the launch; does not return inside a kernel
std::string short_path(const char* path);
std::string thread_text(int index);
std::string block_text(uint64_t index);
bool on_a_stack(const void* address);

// Told to the race detector.
void on_launch();
void on_block(const Fiber* threads);
void on_warp_joined(const Fiber* lanes, unsigned int present);

}  // namespace emulator
