// The race detector. The kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) and the like at
// every access; TSan's own runtime is not linked, the functions are these. Without EMULATOR_RACES they are not there.
//
// Two accesses to one byte are a race when one of them writes, not both are atomic, different CUDA threads made them, and
// nothing orders them:
//   one block     a __syncthreads between them (the block's epoch), or within a warp a __syncwarp that joined both lanes,
//                 directly or through others (a vector clock per lane). Shuffles and votes order no memory accesses.
//   two blocks    (global memory only; shared memory is each block's own) nothing, but for the usual hand-over: the first
//                 block fences (__threadfence) and then updates an atomic that the second updates later.
// Also an error: reading shared memory that no thread of the block has written.
//
// Per byte the last write and two reads by different threads are kept. Accesses to the fibers' stacks are nobody else's.
// What the scheduler happens to do does not matter: an unordered pair is found in any order of execution, unless the
// reads between were by more than two threads.
#include "emulator.h"

#ifndef EMULATOR_RACES

namespace emulator {
void on_launch() {}
void on_block(const Fiber*) {}
void on_warp_joined(const Fiber*, unsigned int) {}
void on_atomic(void*, size_t) {}
void fence() {}
}  // namespace emulator

#else

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator {
namespace {

enum Kind : uint8_t { none, plain, atomic };

struct Access {
  uint64_t block;
  uintptr_t pc;
  uint32_t epoch, clock;
  uint16_t thread;
  Kind kind;
};
struct Byte {
  Access write, read[2];
};
constexpr uintptr_t kPage = 512;
struct Page {
  Byte bytes[kPage];
};

struct {
  std::unordered_map<uintptr_t, Page*> pages;
  std::vector<Page*> free_pages;
  uintptr_t last_page = 0;
  Page* last = nullptr;
  uint32_t clock[kMaxThreads][32];  // clock[t][l]: what thread t knows of lane l of its warp
  std::unordered_map<uintptr_t, std::unordered_set<uint64_t>> handed;  // atomic -> blocks that fenced before updating it
  std::unordered_set<uint64_t> known;                                  // blocks whose writes the running one may read
  bool fenced = false;
  uintptr_t data = 0, bss = 0, end = 0, base = 0;  // this library's writable segment: static __shared__ arrays
  std::string file;
} self;

void find_segment() {
  if (self.end != 0) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
          const uintptr_t mine = reinterpret_cast<uintptr_t>(&self);
          if (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) && mine >= begin && mine < end) {
            self.data = begin, self.bss = begin + segment.p_filesz, self.end = end;
            self.base = info->dlpi_addr;
            self.file = info->dlpi_name;
            return 1;
          }
        }
        return 0;
      },
      nullptr);
}

Byte& byte_of(uintptr_t address) {
  const uintptr_t page = address / kPage;
  if (page != self.last_page || self.last == nullptr) {
    Page*& found = self.pages[page];
    if (found == nullptr) {
      if (self.free_pages.empty()) {
        found = new Page;
      } else {
        found = self.free_pages.back();
        self.free_pages.pop_back();
      }
      memset(static_cast<void*>(found), 0, sizeof(Page));
    }
    self.last_page = page;
    self.last = found;
  }
  return self.last->bytes[address % kPage];
}

// "file.cu:12, called at other.cu:34" for a return address, by addr2line where there is one.
std::string source_of(uintptr_t pc) {
  char command[4200];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%lx 2>/dev/null", self.file.c_str(),
           static_cast<unsigned long>(pc - 1 - self.base));
  std::string out;
  FILE* pipe = popen(command, "r");
  if (pipe != nullptr) {
    char line[4200];
    while (fgets(line, sizeof line, pipe) != nullptr) {
      std::string place = short_path(line);
      place = place.substr(0, place.find_first_of(" \n"));
      if (place.find('?') != std::string::npos || place.find("cuda_emulator/cuda_") != std::string::npos) continue;
      if (place.find("launch.h") != std::string::npos) break;
      out += (out.empty() ? "" : ", called at ") + place;
    }
    pclose(pipe);
  }
  if (!out.empty()) return out;
  char offset[32];
  snprintf(offset, sizeof offset, "+0x%lx", static_cast<unsigned long>(pc - 1 - self.base));
  return short_path(self.file.c_str()) + offset;
}

bool is_shared(uintptr_t address) {
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(block.shared);
  return (address >= dynamic && address < dynamic + block.shared_bytes) || (address >= self.data && address < self.end);
}

bool ordered(const Access& before) {
  if (before.block != block.index) return self.known.count(before.block) != 0;
  if (before.thread == running->index || before.epoch != block.epoch) return true;
  return before.thread / 32 == running->index / 32 && self.clock[running->index][before.thread % 32] >= before.clock;
}

void report(const Access& before, bool wrote, bool writes, Kind kind, uintptr_t address, size_t size, bool shared,
            uintptr_t pc) {
  const auto verb = [](bool write, Kind k) { return k == atomic ? "updated atomically" : write ? "written" : "read"; };
  char where[32];
  snprintf(where, sizeof where, "0x%lx", static_cast<unsigned long>(address));
  const bool here = before.block == block.index;
  fail("race: " + std::to_string(size) + " bytes of " + (shared ? "shared" : "global") + " memory at " + where + " were " +
       verb(wrote, before.kind) + " by " + (here ? "" : "block " + block_text(before.block) + " ") + "thread " +
       thread_text(before.thread) + " (" + source_of(before.pc) + ") and " + verb(writes, kind) + " by thread " +
       thread_text(running->index) + " (" + source_of(pc) + ") with " +
       (here ? "no barrier" : "no fence and atomic hand-over") + " between");
}

void touch(const void* pointer, size_t size, bool write, Kind kind, void* caller) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(pointer), pc = reinterpret_cast<uintptr_t>(caller);
  if (on_a_stack(pointer)) return;
  const uintptr_t known = reinterpret_cast<uintptr_t>(&current);
  if (first >= known && first < known + sizeof current) return;
  const bool shared = is_shared(first);
  const Access now{block.index, pc, block.epoch, self.clock[running->index][running->index % 32],
                   static_cast<uint16_t>(running->index), kind};
  for (uintptr_t address = first; address < first + size; ++address) {
    Byte& b = byte_of(address);
    if (shared && b.write.block != now.block) b = {};  // left by another block in its own memory
    const Access& w = b.write;
    if (w.kind != none && !(w.kind == atomic && kind == atomic) && !ordered(w))
      return report(w, true, write, kind, address, size, shared, pc);
    if (write) {
      for (const Access& r : b.read)
        if (r.kind != none && !(shared && r.block != now.block) && !(r.kind == atomic && kind == atomic) && !ordered(r))
          return report(r, false, write, kind, address, size, shared, pc);
      b.write = now;
      b.read[0].kind = b.read[1].kind = none;
      continue;
    }
    if (shared && w.kind == none && address >= (address < self.end && address >= self.data ? self.bss : 0)) {
      return fail("thread " + thread_text(running->index) + " reads shared memory that no thread of its block has written (" +
                  source_of(pc) + ")");
    }
    Access* keep = &b.read[0];
    if (keep->kind != none && !ordered(*keep)) keep = &b.read[1];
    *keep = now;
  }
}

}  // namespace

void on_launch() {
  find_segment();
  for (auto& [_, page] : self.pages) self.free_pages.push_back(page);
  self.pages.clear();
  self.last = nullptr;
  self.handed.clear();
}

void on_block(const Fiber*) {
  self.known.clear();
  self.fenced = false;
  for (int t = 0; t < block.threads; ++t) {
    memset(self.clock[t], 0, sizeof self.clock[t]);
    self.clock[t][t % 32] = 1;
  }
}

void on_warp_joined(const Fiber* lanes, unsigned int present) {
  uint32_t joined[32] = {};
  const int first = lanes[0].index;
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1)
      for (int k = 0; k < 32; ++k)
        if (self.clock[first + l][k] > joined[k]) joined[k] = self.clock[first + l][k];
  for (int l = 0; l < 32; ++l) {
    if (!(present >> l & 1)) continue;
    memcpy(self.clock[first + l], joined, sizeof joined);
    ++self.clock[first + l][l];
  }
}

void fence() { self.fenced = true; }

void on_atomic(void* address, size_t size) {
  if (running == nullptr) return;
  touch(address, size, true, atomic, __builtin_return_address(0));
  auto& handed = self.handed[reinterpret_cast<uintptr_t>(address)];
  self.known.insert(handed.begin(), handed.end());
  if (!self.fenced) return;
  handed.insert(self.known.begin(), self.known.end());
  handed.insert(block.index);
}

}  // namespace emulator

#define EXPORT extern "C" __attribute__((visibility("hidden")))
#define ACCESS(name, size, write)                                                                       \
  EXPORT void name(void* address) {                                                                     \
    if (emulator::running != nullptr)                                                                   \
      emulator::touch(address, size, write, emulator::plain, __builtin_return_address(0));              \
  }
#define ACCESSES(size)                                \
  ACCESS(__tsan_read##size, size, false)              \
  ACCESS(__tsan_write##size, size, true)              \
  ACCESS(__tsan_unaligned_read##size, size, false)    \
  ACCESS(__tsan_unaligned_write##size, size, true)    \
  ACCESS(__tsan_volatile_read##size, size, false)     \
  ACCESS(__tsan_volatile_write##size, size, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
EXPORT void __tsan_read_range(void* address, unsigned long size) {
  if (emulator::running != nullptr)
    emulator::touch(address, size, false, emulator::plain, __builtin_return_address(0));
}
EXPORT void __tsan_write_range(void* address, unsigned long size) {
  if (emulator::running != nullptr) emulator::touch(address, size, true, emulator::plain, __builtin_return_address(0));
}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_init() {}

// Host code's own atomics (reference counts): what the compiler would have emitted without -fsanitize=thread.
#define HOST_ATOMICS(bits, T)                                                                                          \
  EXPORT T __tsan_atomic##bits##_load(const volatile T* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }      \
  EXPORT void __tsan_atomic##bits##_store(volatile T* a, T v, int) { __atomic_store_n(a, v, __ATOMIC_SEQ_CST); }      \
  EXPORT T __tsan_atomic##bits##_exchange(volatile T* a, T v, int) {                                                   \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                    \
  EXPORT T __tsan_atomic##bits##_fetch_add(volatile T* a, T v, int) {                                                  \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  EXPORT T __tsan_atomic##bits##_fetch_sub(volatile T* a, T v, int) {                                                  \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  EXPORT int __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* c, T v, int, int) {                       \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }                                                                                                                    \
  EXPORT int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* c, T v, int, int) {                         \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }
HOST_ATOMICS(8, uint8_t)
HOST_ATOMICS(32, uint32_t)
HOST_ATOMICS(64, uint64_t)
EXPORT void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#endif
