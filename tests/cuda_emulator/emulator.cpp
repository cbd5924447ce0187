// The scheduler of the emulation: fibers, barriers, warps, and the order in which threads run.
//
//   launch ── blocks in an order drawn from the seed, one at a time
//     └─ run_block ── one fiber per thread; the first thread in the block's order that can run runs until it joins
//                     a barrier or a warp, or returns; the order is drawn again at every barrier
//
// Orders: a permutation of the warps, each running ahead to the barrier before the next starts, lanes up, down or
// mixed; or all threads mixed. Seed 0: everything in order (the kind order, for comparison).
//
// Errors (a barrier that not all threads reach, a shuffle from a lane that takes no part, ...) end the launch: the
// fibers are abandoned, and cudaGetLastError() returns cudaErrorLaunchFailure, whose string says what happened where.
#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>

#include <mutex>
#include <set>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

Current current;
Fiber* running = nullptr;
Block block;

namespace {

constexpr size_t kStack = 128 << 10;  // per thread; touched pages only
constexpr uint64_t kCanary = 0x5afe57acc0ffee00;

// ---- fibers ------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer, and continues where `to` left off.
asm(R"(
.text
.p2align 4
.type emulator_switch,@function
emulator_switch:
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
.size emulator_switch,.-emulator_switch
)");
extern "C" void emulator_switch(void** from, void* to) asm("emulator_switch");
struct Context {
  void* sp = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;  // where backtraces end; also aligns the entry's stack as a call would
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp = top;
  }
};
void switch_context(Context& from, Context& to) { emulator_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct {
  char* stacks = nullptr;
  Context scheduler, fibers[kMaxThreads];
  Fiber threads[kMaxThreads];
  int order[kMaxThreads];
  void (*call)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t seed = 1, launches = 0, random = 0;
  std::string error;  // of the running launch
  std::set<std::string> kernels;
#ifdef __SANITIZE_ADDRESS__
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void *fake_scheduler = nullptr, *fake[kMaxThreads] = {};
#endif
} self;

std::mutex one_launch;
cudaError_t last_error = cudaSuccess;
std::string last_message;

char* stack_of(int t) { return self.stacks + t * kStack; }

void to_scheduler(bool for_good) {
  const int t = running->index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake[t], self.stack_bottom, self.stack_size);
#endif
  (void)for_good;
  switch_context(self.fibers[t], self.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake[t], &self.stack_bottom, &self.stack_size);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.stack_bottom, &self.stack_size);
#endif
  self.call(self.argument);
  running->state = State::done;
  to_scheduler(true);
  abort();  // nobody resumes a finished thread
}

void resume(int t) {
  running = &self.threads[t];
  current.thread = running->at;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&self.fake_scheduler, stack_of(t), kStack);
#endif
  switch_context(self.scheduler, self.fibers[t]);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_scheduler, nullptr, nullptr);
#endif
  running = nullptr;
}

// ---- words -------------------------------------------------------------------------------------------------------

const char* name_of(Join what) {
  switch (what) {
    case Join::barrier: return "__syncthreads";
    case Join::barrier_or: return "__syncthreads_or";
    case Join::barrier_and: return "__syncthreads_and";
    case Join::barrier_count: return "__syncthreads_count";
    case Join::warp: return "__syncwarp";
    case Join::idx: return "__shfl_sync";
    case Join::up: return "__shfl_up_sync";
    case Join::down: return "__shfl_down_sync";
    case Join::exclusive_or: return "__shfl_xor_sync";
    case Join::ballot: return "__ballot_sync";
    case Join::any: return "__any_sync";
    case Join::all: return "__all_sync";
  }
  return "";
}

std::string text(unsigned int x, unsigned int y, unsigned int z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string hex(unsigned int v) {
  char out[16];
  snprintf(out, sizeof out, "0x%08x", v);
  return out;
}

std::string place_text(const Fiber& f) {
  return std::string(name_of(f.what)) + " (" + short_path(f.file) + ":" + std::to_string(f.line) + ")";
}

std::string waiting_text(const Fiber& f) {
  if (f.state == State::done) return "thread " + thread_text(f.index) + " has returned";
  return "thread " + thread_text(f.index) + " waits at " + place_text(f) +
         (f.state == State::warp ? " of mask " + hex(f.mask) : "");
}

// ---- the order ---------------------------------------------------------------------------------------------------

uint64_t random_bits() {  // splitmix64
  uint64_t z = self.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

template <class T> void shuffle_items(T* items, size_t n) {
  for (size_t i = n; i > 1; --i) {
    const size_t j = random_bits() % i;
    const T kept = items[i - 1];
    items[i - 1] = items[j];
    items[j] = kept;
  }
}

void draw_order() {
  const int n = block.threads, warps = (n + 31) / 32;
  int* order = self.order;
  if (self.seed == 0) {
    for (int i = 0; i < n; ++i) order[i] = i;
  } else if (random_bits() % 4 == 0) {
    for (int i = 0; i < n; ++i) order[i] = i;
    shuffle_items(order, n);
  } else {
    int warp_order[kMaxThreads / 32], at = 0;
    for (int w = 0; w < warps; ++w) warp_order[w] = w;
    shuffle_items(warp_order, warps);
    const uint64_t lanes = random_bits() % 3;
    for (int w = 0; w < warps; ++w) {
      const int first = warp_order[w] * 32, size = n - first < 32 ? n - first : 32;
      for (int i = 0; i < size; ++i) order[at + i] = first + (lanes == 0 ? i : size - 1 - i);
      if (lanes == 2) shuffle_items(order + at, size);
      at += size;
    }
  }
}

// ---- joining -----------------------------------------------------------------------------------------------------

void release_barrier() {
  const int n = block.threads;
  Fiber* threads = self.threads;
  int count = 0;
  for (int t = 0; t < n; ++t) {
    const Fiber &a = threads[0], &b = threads[t];
    if (a.what != b.what || a.line != b.line || strcmp(a.file, b.file) != 0)
      return fail("divergent barrier: " + waiting_text(a) + " while " + waiting_text(b));
    count += b.predicate != 0;
  }
  for (int t = 0; t < n; ++t) {
    Fiber& f = threads[t];
    f.result = f.what == Join::barrier_or ? count > 0 : f.what == Join::barrier_and ? count == n : count;
    f.state = State::ready;
  }
  ++block.epoch;
  draw_order();
}

// Releases the lanes that wait for the same as lane `t` if all of them have come; whether it did.
bool release_warp(int t) {
  const int first = t & ~31;
  Fiber* lanes = self.threads + first;
  const Fiber& f = self.threads[t];
  unsigned int present = 0;
  for (int l = 0; l < 32 && first + l < block.threads; ++l) {
    if (!(f.mask >> l & 1) || lanes[l].state == State::done) continue;
    if (lanes[l].state != State::warp || lanes[l].mask != f.mask || lanes[l].what != f.what) return false;
    present |= 1u << l;
  }
  const Join what = f.what;
  unsigned int votes = 0;
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1) votes |= static_cast<unsigned int>(lanes[l].value & 1) << l;
  for (int l = 0; l < 32; ++l) {
    if (!(present >> l & 1)) continue;
    Fiber& lane = lanes[l];
    if (what == Join::ballot) lane.result = votes;
    else if (what == Join::any) lane.result = votes != 0;
    else if (what == Join::all) lane.result = votes == present;
    else if (what != Join::warp) {
      const int base = l & ~(lane.width - 1), last = base + lane.width - 1;
      int from = l;
      if (what == Join::idx) from = base + (lane.argument & (lane.width - 1));
      if (what == Join::up && l - lane.argument >= base) from = l - lane.argument;
      if (what == Join::down && l + lane.argument <= last) from = l + lane.argument;
      if (what == Join::exclusive_or && (l ^ lane.argument) <= last) from = l ^ lane.argument;
      if (!(present >> from & 1)) {
        fail("thread " + thread_text(lane.index) + " reads lane " + std::to_string(from) + ", which takes no part, at " +
             place_text(lane) + " of mask " + hex(lane.mask));
        return false;
      }
      lane.result = lanes[from].value;
    }
  }
  if (what == Join::warp) on_warp_joined(lanes, present);  // the others order no memory accesses
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1) lanes[l].state = State::ready;
  return true;
}

void stuck() {
  const Fiber *done = nullptr, *barrier = nullptr, *warp = nullptr;
  for (int t = 0; t < block.threads; ++t) {
    const Fiber& f = self.threads[t];
    const Fiber*& kind = f.state == State::done ? done : f.state == State::barrier ? barrier : warp;
    if (kind == nullptr) kind = &f;
  }
  const Fiber* first = warp != nullptr ? warp : barrier;
  const Fiber* second = warp == nullptr ? done : nullptr;
  for (int t = 0; warp != nullptr && second == nullptr && t < block.threads; ++t) {  // a lane that `warp` waits for
    const Fiber& f = self.threads[t];
    const bool asked = t / 32 == warp->index / 32 && (warp->mask >> (t % 32) & 1);
    if (asked && (f.state != State::warp || f.mask != warp->mask || f.what != warp->what)) second = &f;
  }
  fail(std::string(warp != nullptr ? "divergent warp: " : "divergent barrier: ") + waiting_text(*first) +
       (second != nullptr ? " while " + waiting_text(*second) : ""));
}

void run_block() {
  const int n = block.threads;
  for (int t = 0; t < n; ++t) {
    Fiber& f = self.threads[t];
    f.index = t;
    f.at = {t % block.dim.x, t / block.dim.x % block.dim.y, t / block.dim.x / block.dim.y};
    f.state = State::ready;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_of(t), kStack);  // what an abandoned launch left
#endif
    memcpy(stack_of(t), &kCanary, sizeof kCanary);
    self.fibers[t].start(stack_of(t), fiber_main);
  }
  block.epoch = 0;
  on_block(self.threads);
  draw_order();
  int cursor = 0, done = 0, waiting = 0;
  while (done < n) {
    while (cursor < n && self.threads[self.order[cursor]].state != State::ready) ++cursor;
    if (cursor == n) return stuck();
    const int t = self.order[cursor];
    resume(t);
    if (!self.error.empty()) return;
    if (memcmp(stack_of(t), &kCanary, sizeof kCanary) != 0) return fail("a thread used more than 128 KB of stack");
    Fiber& f = self.threads[t];
    if (f.state == State::barrier && ++waiting == n) {
      waiting = cursor = 0;
      release_barrier();
    } else if (f.state == State::warp) {
      if (release_warp(t)) cursor = 0;
    } else if (f.state == State::done) {
      ++done;
      const int first = t & ~31;  // lanes may have waited for this one only
      for (int l = first; l < first + 32 && l < n; ++l)
        if (self.threads[l].state == State::warp && release_warp(l)) cursor = 0;
    }
    if (!self.error.empty()) return;
  }
}

}  // namespace

// ---- what the headers, races.cpp and launch.h call ---------------------------------------------------------------

std::string short_path(const char* path) {
  for (const char* top : {"csrc/", "tests/"}) {
    const char* found = strstr(path, top);
    if (found != nullptr) return found;
  }
  const char* slash = strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

std::string thread_text(int index) {
  const unsigned int t = static_cast<unsigned int>(index), x = block.dim.x, y = block.dim.y;
  return text(t % x, t / x % y, t / x / y);
}

std::string block_text(uint64_t index) {
  return text(static_cast<unsigned int>(index % block.grid.x), static_cast<unsigned int>(index / block.grid.x % block.grid.y),
              static_cast<unsigned int>(index / block.grid.x / block.grid.y));
}

void fail(const std::string& what) {
  if (self.error.empty()) self.error = "in block " + block_text(block.index) + ": " + what;
  if (running != nullptr) to_scheduler(false);  // never comes back
}

bool on_a_stack(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= self.stacks && p < self.stacks + kStack * kMaxThreads;
}

unsigned char* dynamic_shared() { return block.shared; }

int join_block(Join what, int predicate, const char* file, int line) {
  Fiber& f = *running;
  f.what = what, f.predicate = predicate, f.file = file, f.line = line, f.state = State::barrier;
  to_scheduler(false);
  return static_cast<int>(f.result);
}

uint64_t join_warp(Join what, unsigned int mask, uint64_t value, int argument, int width, const char* file, int line) {
  Fiber& f = *running;
  f.what = what, f.mask = mask, f.value = value, f.argument = argument, f.width = width, f.file = file, f.line = line;
  if (!(mask >> (f.index % 32) & 1)) {
    fail("thread " + thread_text(f.index) + " is not in its own mask " + hex(mask) + " at " + place_text(f));
  } else if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("width " + std::to_string(width) + " is no power of two up to 32 at " + place_text(f));
  }
  f.state = State::warp;
  to_scheduler(false);
  return f.result;
}

void trap(const char* file, int line) {
  fail("thread " + thread_text(running->index) + " trapped at " + short_path(file) + ":" + std::to_string(line));
}

void launch(const char* name, dim3 grid, dim3 threads, size_t shared, void (*call)(void*), void* context) {
  const std::lock_guard<std::mutex> guard(one_launch);
  std::string kernel = name;
  if (kernel.front() == '(') kernel = kernel.substr(1, kernel.size() - 2);
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads || threads.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      shared > 227 * 1024) {
    last_error = cudaErrorInvalidConfiguration;
    last_message = "no GPU takes a grid of " + text(grid.x, grid.y, grid.z) + " blocks of " +
                   text(threads.x, threads.y, threads.z) + " threads with " + std::to_string(shared) +
                   " bytes of dynamic shared memory";
    return;
  }
  if (self.stacks == nullptr) {
    void* stacks = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    self.stacks = static_cast<char*>(stacks);
  }
  self.kernels.insert(kernel);
  self.call = call;
  self.argument = context;
  self.error.clear();
  self.random = self.seed * 0x9e3779b97f4a7c15 + self.launches++;
  block.kernel = kernel;
  block.grid = grid;
  block.dim = threads;
  block.threads = static_cast<int>(count);
  block.shared_bytes = shared;
  current.grid_dim = grid;
  current.block_dim = threads;
  // Exactly as many bytes as asked for, so that ASan sees an access behind them.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared > 0 ? shared : 1) != 0) abort();
  block.shared = static_cast<unsigned char*>(memory);
  const uint64_t total = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  on_launch();
  // A seeded walk over all blocks: first + i * step, step coprime to their number.
  uint64_t first = 0, step = 1;
  if (self.seed != 0 && total > 1) {
    first = random_bits() % total;
    const auto coprime = [](uint64_t a, uint64_t b) {
      while (b != 0) {
        const uint64_t rest = a % b;
        a = b, b = rest;
      }
      return a == 1;
    };
    do step = 1 + random_bits() % (total - 1 > 0 ? total - 1 : 1);
    while (!coprime(step, total));
  }
  for (uint64_t i = 0; i < total && self.error.empty(); ++i) {
    block.index = static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + first) % total);
    current.block = {static_cast<unsigned int>(block.index % grid.x),
                     static_cast<unsigned int>(block.index / grid.x % grid.y),
                     static_cast<unsigned int>(block.index / grid.x / grid.y)};
    memset(block.shared, 0xff, shared);  // NaN
    run_block();
  }
  free(block.shared);
  block.shared = nullptr;
  if (!self.error.empty()) {
    last_error = cudaErrorLaunchFailure;
    last_message = self.error;
  }
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::last_message.c_str();
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess"
         : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorLaunchFailure";
}

// ---- for Python (tvm_ffi's calling convention, by hand: its C++ headers take seconds to compile) ------------------

// emulator_seed(int): the order of everything from here on; 0 is the kind order.
extern "C" __attribute__((visibility("default"))) int __tvm_ffi_emulator_seed(void*, const TVMFFIAny* args, int32_t n,
                                                                              TVMFFIAny* result) {
  if (n == 1) emulator::self.seed = static_cast<uint64_t>(args[0].v_int64), emulator::self.launches = 0;
  result->type_index = kTVMFFINone;
  return 0;
}
