// CUDA C++ on the CPU: what csrc/cuda needs of the CUDA runtime and of the device language, for g++ and clang++ with
// -DMF_EMULATE. No CUDA toolkit is read. Kernels run one fiber per CUDA thread (emulator.cpp); the order of blocks and
// threads follows a seed and is as unkind as the language allows: one warp runs ahead to the next barrier before the
// others start, lanes run apart until a shuffle joins them.
//
// Not covered: inline PTX, tensor cores, asynchronous copies, blocks that wait for each other, warp-synchronous code
// without __syncwarp (it fails here, as it may on a GPU), the memory model beyond what races.cpp checks, and speed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types ------------------------------------------------------------------------------------------------

struct uint3 { unsigned int x, y, z; };
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_VECTORS(T, name)                                                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                    \
  struct name##3 { T x, y, z; };                                                        \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };    \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                            \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(unsigned short, ushort)
#undef EMULATOR_VECTORS
struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

// ---- the emulator ------------------------------------------------------------------------------------------------

namespace emulator {

struct Current {  // of the running CUDA thread
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Current current;

void launch(const char* name, dim3 grid, dim3 block, size_t shared, void (*call)(void*), void* context);
template <class F>
inline void launch(const char* name, dim3 grid, dim3 block, size_t shared, F f) {
  launch(name, grid, block, shared, [](void* context) { (*static_cast<F*>(context))(); }, &f);
}

unsigned char* dynamic_shared();

enum class Join { barrier, barrier_or, barrier_and, barrier_count, warp, idx, up, down, exclusive_or, ballot, any, all };
int join_block(Join what, int predicate, const char* file, int line);
uint64_t join_warp(Join what, unsigned int mask, uint64_t value, int argument, int width, const char* file, int line);

void fence();
void on_atomic(void* address, size_t size);  // told to the race detector
void trap(const char* file, int line);

template <class T>
inline T shuffle(Join what, unsigned int mask, T value, int argument, int width, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = join_warp(what, mask, bits, argument, width, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (::emulator::current.thread)
#define blockIdx (::emulator::current.block)
#define blockDim (::emulator::current.block_dim)
#define gridDim (::emulator::current.grid_dim)
constexpr int warpSize = 32;

// The caller's place, so that errors name it.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_PLACE) { emulator::join_block(emulator::Join::barrier, 0, file, line); }
inline int __syncthreads_or(int p, EMULATOR_PLACE) {
  return emulator::join_block(emulator::Join::barrier_or, p, file, line);
}
inline int __syncthreads_and(int p, EMULATOR_PLACE) {
  return emulator::join_block(emulator::Join::barrier_and, p, file, line);
}
inline int __syncthreads_count(int p, EMULATOR_PLACE) {
  return emulator::join_block(emulator::Join::barrier_count, p, file, line);
}
inline void __syncwarp(unsigned int mask = 0xffffffffu, EMULATOR_PLACE) {
  emulator::join_warp(emulator::Join::warp, mask, 0, 0, 32, file, line);
}
template <class T>
inline T __shfl_sync(unsigned int mask, T v, int lane, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Join::idx, mask, v, lane, width, file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned int mask, T v, unsigned int delta, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Join::up, mask, v, static_cast<int>(delta), width, file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned int mask, T v, unsigned int delta, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Join::down, mask, v, static_cast<int>(delta), width, file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned int mask, T v, int lanes, int width = 32, EMULATOR_PLACE) {
  return emulator::shuffle(emulator::Join::exclusive_or, mask, v, lanes, width, file, line);
}
inline unsigned int __ballot_sync(unsigned int mask, int p, EMULATOR_PLACE) {
  return static_cast<unsigned int>(emulator::join_warp(emulator::Join::ballot, mask, p != 0, 0, 32, file, line));
}
inline int __any_sync(unsigned int mask, int p, EMULATOR_PLACE) {
  return static_cast<int>(emulator::join_warp(emulator::Join::any, mask, p != 0, 0, 32, file, line));
}
inline int __all_sync(unsigned int mask, int p, EMULATOR_PLACE) {
  return static_cast<int>(emulator::join_warp(emulator::Join::all, mask, p != 0, 0, 32, file, line));
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() {}
inline void __trap(EMULATOR_PLACE) { emulator::trap(file, line); }

// ---- atomics: one fiber runs at a time, so these are plain updates that the race detector is told of -------------

#define EMULATOR_ATOMIC(name, T, updated)                                                           \
  __attribute__((noinline, no_sanitize_thread)) inline T name(T* address, T value) {                \
    emulator::on_atomic(address, sizeof(T));                                                        \
    const T old = *address;                                                                         \
    *address = updated;                                                                             \
    return old;                                                                                     \
  }
#define EMULATOR_ATOMICS(T)                                                \
  EMULATOR_ATOMIC(atomicAdd, T, static_cast<T>(old + value))               \
  EMULATOR_ATOMIC(atomicExch, T, value)
#define EMULATOR_INTEGER_ATOMICS(T)                                        \
  EMULATOR_ATOMICS(T)                                                      \
  EMULATOR_ATOMIC(atomicSub, T, static_cast<T>(old - value))               \
  EMULATOR_ATOMIC(atomicMax, T, old > value ? old : value)                 \
  EMULATOR_ATOMIC(atomicMin, T, old < value ? old : value)                 \
  EMULATOR_ATOMIC(atomicAnd, T, old & value)                               \
  EMULATOR_ATOMIC(atomicOr, T, old | value)                                \
  EMULATOR_ATOMIC(atomicXor, T, old ^ value)                               \
  __attribute__((noinline, no_sanitize_thread)) inline T atomicCAS(T* address, T compare, T value) { \
    emulator::on_atomic(address, sizeof(T));                               \
    const T old = *address;                                                \
    if (old == compare) *address = value;                                  \
    return old;                                                            \
  }
EMULATOR_ATOMICS(float)
EMULATOR_ATOMICS(double)
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned int)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(atomicInc, unsigned int, old >= value ? 0 : old + 1)
#undef EMULATOR_INTEGER_ATOMICS
#undef EMULATOR_ATOMICS
#undef EMULATOR_ATOMIC

// ---- small device functions --------------------------------------------------------------------------------------

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }

namespace emulator {
template <class To, class From> inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  memcpy(&out, &v, sizeof(To));
  return out;
}
}  // namespace emulator
inline int __float_as_int(float v) { return emulator::bits<int>(v); }
inline unsigned int __float_as_uint(float v) { return emulator::bits<unsigned int>(v); }
inline float __int_as_float(int v) { return emulator::bits<float>(v); }
inline float __uint_as_float(unsigned int v) { return emulator::bits<float>(v); }
inline int __popc(unsigned int v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(v)); }
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>((static_cast<uint64_t>(a) * b) >> 32);
}

inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }

#define EMULATOR_MIN_MAX(T)                                \
  inline T min(T a, T b) { return b < a ? b : a; }         \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned int)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- the host's side ---------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
typedef struct CUstream_st* cudaStream_t;
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t = nullptr) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = 3; return cudaSuccess; }
