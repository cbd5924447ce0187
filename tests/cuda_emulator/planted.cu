// Kernels for the tests of the emulation: known answers, and faults planted on purpose (tests/test_cuda_emulator.py
// compiles this file into a library of its own).
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace mf {
namespace {

// ---- right -------------------------------------------------------------------------------------------------------

// out[i] = the lane that lane i reads, for up, down, xor and indexed shuffles of `width` lanes; and the votes.
__global__ void shuffle_kernel(int* out, int by, int width) {
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __shfl_up_sync(kFullMask, t, by, width);
  out[n + t] = __shfl_down_sync(kFullMask, t, by, width);
  out[2 * n + t] = __shfl_xor_sync(kFullMask, t, by, width);
  out[3 * n + t] = __shfl_sync(kFullMask, t, by, width);
  out[4 * n + t] = static_cast<int>(__ballot_sync(kFullMask, t % 3 == 0));
  out[5 * n + t] = __any_sync(kFullMask, t == 7) + 2 * __all_sync(kFullMask, t < 32);
  out[6 * n + t] = __syncthreads_count(t % 5 == 0);
  // Parts of a warp apart from each other, each with its own mask.
  if (t % 32 < 8) out[7 * n + t] = __shfl_xor_sync(0x000000ffu, t, 1);
  else out[7 * n + t] = __shfl_xor_sync(0xffffff00u, t, 2);
}

// Sum, largest and mean over blockIdx.x's row of n elements.
template <class T> __global__ void reduce_kernel(const T* x, float* out, int64_t n) {
  __shared__ float scratch[2 * kWarp];
  __shared__ float best[kWarp];
  float v[2] = {0.0f, 0.0f}, most = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float value = to_float(x[blockIdx.x * n + i]);
    v[0] += value;
    v[1] += value * value;
    most = fmaxf(most, value);
  }
  block_sum(v, scratch);
  most = warp_max(most);
  if (threadIdx.x % kWarp == 0) best[threadIdx.x / kWarp] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned int w = 0; w < blockDim.x / kWarp; ++w) most = fmaxf(most, best[w]);
    out[blockIdx.x * 3] = v[0];
    out[blockIdx.x * 3 + 1] = v[1];
    out[blockIdx.x * 3 + 2] = most;
  }
}

// A transpose through a dynamic tile, in 2-D blocks.
__global__ void transpose_kernel(const float* x, float* y, int rows, int columns) {
  MF_SHARED_DYNAMIC(float, tile);
  const int n = blockDim.x, column = blockIdx.x * n + threadIdx.x, row = blockIdx.y * n + threadIdx.y;
  if (row < rows && column < columns) tile[threadIdx.y * (n + 1) + threadIdx.x] = x[row * columns + column];
  __syncthreads();
  const int to = blockIdx.y * n + threadIdx.x, from = blockIdx.x * n + threadIdx.y;
  if (to < rows && from < columns) y[from * rows + to] = tile[threadIdx.x * (n + 1) + threadIdx.y];
}

// Histogram, sum, extremes and a lock-free maximum by compare and swap.
__global__ void atomic_kernel(const int* x, int64_t n, int* counts, float* sum, int* most, int* least, int* swapped) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&counts[x[i] & 7], 1);
  atomicAdd(sum, static_cast<float>(x[i]));
  atomicMax(most, x[i]);
  atomicMin(least, x[i]);
  int seen = atomicCAS(swapped, 0, 0);
  while (x[i] > seen) {
    const int before = atomicCAS(swapped, seen, x[i]);
    if (before == seen) break;
    seen = before;
  }
}

// fp32 -> T, and T -> fp32.
template <class T> __global__ void convert_kernel(const float* x, T* narrow, const T* y, float* wide, int64_t n, int64_t m) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) narrow[i] = from_float<T>(x[i]);
  if (i < m) wide[i] = to_float(y[i]);
}

// y = 2 x, 16 bytes at a time, tail apart.
template <class T> __global__ void pack_kernel(const T* x, T* y, int64_t n) {
  const int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * Pack<T>::size;
  if (i + Pack<T>::size <= n && packs(x) && packs(y)) {
    Pack<T> p = load_pack(x + i);
    for (int k = 0; k < Pack<T>::size; ++k) p.at[k] = from_float<T>(2.0f * to_float(p.at[k]));
    store_pack(y + i, p);
  } else {
    for (int64_t k = i; k < n && k < i + Pack<T>::size; ++k) y[k] = from_float<T>(2.0f * to_float(x[k]));
  }
}

// The last block to finish adds up what the others left: fence, then atomic.
__global__ void last_block_kernel(const float* x, float* partials, unsigned int* finished, float* out, int64_t n, int fenced) {
  __shared__ float scratch[kWarp];
  __shared__ bool last;
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const float sum = block_sum(i < n ? x[i] : 0.0f, scratch);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    if (fenced) __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned int b = 0; b < gridDim.x; ++b) total += partials[b];
  *out = total;
}

// ---- wrong -------------------------------------------------------------------------------------------------------

// Reverses each block's elements through shared memory. Without the barrier a thread may read what is not yet there.
__global__ void reverse_kernel(const float* x, float* y, int barrier) {
  MF_SHARED_DYNAMIC(float, tile);
  const int t = threadIdx.x, n = blockDim.x;
  tile[t] = x[blockIdx.x * n + t];
  if (barrier) __syncthreads();
  y[blockIdx.x * n + t] = tile[n - 1 - t];
}

// The same within a warp, ordered by __syncwarp, or by nothing but a shuffle, or by nothing.
__global__ void warp_reverse_kernel(const float* x, float* y, int order) {
  __shared__ float tile[256];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (order == 2) __syncwarp();
  if (order == 1) __shfl_sync(kFullMask, t, 0);
  y[t] = tile[t ^ 31];
}

__global__ void write_kernel(float* y, int64_t at) { if (threadIdx.x == 3) y[at] = 1.0f; }

__global__ void shared_write_kernel(float* y, int at) {
  __shared__ float tile[32];
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 3) tile[at] = 2.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// kind 0: half of the threads skip the barrier; 1: they wait at another one; 2: they return early; 3: a shuffle that
// half of the lanes of its mask skip; 4: a read of a lane outside the mask; 5: a lane outside its own mask.
__global__ void divergent_kernel(float* y, int kind) {
  const int t = threadIdx.x;
  const bool odd = t % 2 != 0;
  if (kind == 0 && odd) __syncthreads();
  if (kind == 1) {
    if (odd) __syncthreads();
    else __syncthreads();
  }
  if (kind == 2) {
    if (odd) return;
    __syncthreads();
  }
  float v = 1.0f;
  if (kind == 3 && odd) v = __shfl_down_sync(kFullMask, v, 1);
  if (kind == 4 && t < 16) v = __shfl_sync(0xffffu, v, 20);
  if (kind == 5) v = __shfl_sync(0xffffu, v, 0);
  y[t] = v;
}

// Every block writes the same element; or reads what another block writes.
__global__ void between_blocks_kernel(float* y, int kind) {
  if (threadIdx.x != 0) return;
  if (kind == 0) y[0] = 1.0f;
  if (kind == 1) y[blockIdx.x + 1] = 1.0f + y[blockIdx.x == 0 ? gridDim.x : blockIdx.x];
  if (kind == 2) atomicAdd(y, 1.0f);
  if (kind == 3) { atomicAdd(y, 1.0f); y[blockIdx.x + 1] = y[0]; }
}

// Reads shared memory that only a former block wrote.
__global__ void leftover_kernel(float* y) {
  __shared__ float kept[32];
  if (blockIdx.x == 0) kept[threadIdx.x] = 1.0f;
  y[blockIdx.x * 32 + threadIdx.x] = kept[threadIdx.x];
}

// ---- launchers ---------------------------------------------------------------------------------------------------

int threads_of(const TensorView& t) { return static_cast<int>(t.size(t.ndim() - 1)); }

void shuffles(TensorView out, int64_t by, int64_t width) {
  MF_LAUNCH(shuffle_kernel, 1, threads_of(out), 0, current_stream(out), data<int>(out), by, width);
}

void reduce(TensorView x, TensorView out, int64_t threads) {
  with_type(check_on_device(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(reduce_kernel<T>, static_cast<unsigned int>(x.size(0)), static_cast<unsigned int>(threads), 0,
              current_stream(x), data<const T>(x), data<float>(out), x.size(1));
  });
}

void transpose(TensorView x, TensorView y) {
  const int rows = static_cast<int>(x.size(0)), columns = static_cast<int>(x.size(1)), n = 8;
  MF_LAUNCH(transpose_kernel, dim3(blocks(columns, n), blocks(rows, n)), dim3(n, n), n * (n + 1) * sizeof(float),
            current_stream(x), data<const float>(x), data<float>(y), rows, columns);
}

void atomics(TensorView x, TensorView counts, TensorView sum, TensorView most, TensorView least, TensorView swapped) {
  MF_LAUNCH(atomic_kernel, blocks(x.numel(), 64), 64, 0, current_stream(x), data<const int>(x), x.numel(),
            data<int>(counts), data<float>(sum), data<int>(most), data<int>(least), data<int>(swapped));
}

void convert(TensorView x, TensorView narrow, TensorView y, TensorView wide) {
  with_type(check_on_device(narrow, "narrow"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(convert_kernel<T>, blocks(x.numel() > y.numel() ? x.numel() : y.numel(), 256), 256, 0, current_stream(x),
              data<const float>(x), data<T>(narrow), data<const T>(y), data<float>(wide), x.numel(), y.numel());
  });
}

void pack(TensorView x, TensorView y) {
  with_type(check_on_device(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(pack_kernel<T>, blocks(x.numel(), 32 * Pack<T>::size), 32, 0, current_stream(x), data<const T>(x),
              data<T>(y), x.numel());
  });
}

void last_block(TensorView x, TensorView partials, TensorView finished, TensorView out, int64_t fenced) {
  MF_LAUNCH(last_block_kernel, static_cast<unsigned int>(partials.numel()), 64, 0, current_stream(x),
            data<const float>(x), data<float>(partials), data<unsigned int>(finished), data<float>(out), x.numel(), fenced);
}

void reverse(TensorView x, TensorView y, int64_t barrier) {
  MF_LAUNCH(reverse_kernel, static_cast<unsigned int>(x.size(0)), threads_of(x), x.size(1) * sizeof(float),
            current_stream(x), data<const float>(x), data<float>(y), barrier);
}

void warp_reverse(TensorView x, TensorView y, int64_t order) {
  MF_LAUNCH(warp_reverse_kernel, 1, threads_of(x), 0, current_stream(x), data<const float>(x), data<float>(y), order);
}

void write(TensorView y, int64_t at) { MF_LAUNCH(write_kernel, 2, 32, 0, current_stream(y), data<float>(y), at); }

void shared_write(TensorView y, int64_t at) {
  MF_LAUNCH(shared_write_kernel, 1, 32, 0, current_stream(y), data<float>(y), at);
}

void divergent(TensorView y, int64_t kind) {
  MF_LAUNCH(divergent_kernel, 1, threads_of(y), 0, current_stream(y), data<float>(y), kind);
}

void between_blocks(TensorView y, int64_t kind) {
  MF_LAUNCH(between_blocks_kernel, static_cast<unsigned int>(y.numel() - 1), 32, 0, current_stream(y), data<float>(y), kind);
}

void leftover(TensorView y) {
  MF_LAUNCH(leftover_kernel, static_cast<unsigned int>(y.size(0)), 32, 0, current_stream(y), data<float>(y));
}

void too_many_threads(TensorView y) { MF_LAUNCH(write_kernel, 1, 1025, 0, current_stream(y), data<float>(y), 0); }

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shuffles, mf::shuffles);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reduce, mf::reduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transpose, mf::transpose);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(atomics, mf::atomics);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(convert, mf::convert);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, mf::pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_block, mf::last_block);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reverse, mf::reverse);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(warp_reverse, mf::warp_reverse);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(write, mf::write);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shared_write, mf::shared_write);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(divergent, mf::divergent);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(between_blocks, mf::between_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(leftover, mf::leftover);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(too_many_threads, mf::too_many_threads);
