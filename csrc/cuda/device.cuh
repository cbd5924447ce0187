// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Helpers of the kernels. Kernels live in the .cu beside their launchers and may use, because the CPU emulation in
// tests/cuda_emulator knows it:
//   threadIdx, blockIdx, blockDim, gridDim; __shared__ arrays, MF_SHARED_DYNAMIC; __syncthreads, __syncthreads_{or,and,
//   count}, __syncwarp; __shfl_{,up,down,xor}_sync, __ballot_sync, __any_sync, __all_sync; atomicAdd/Max/Min/CAS/Exch/Or/
//   And, __threadfence; __ldg; <math.h> in float and double, __expf & co.; __half, __nv_bfloat16 and their conversions.
// Blocks are one-dimensional groups of whole warps (a multiple of 32) for warp_* and block_*.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// MF_SHARED_DYNAMIC(float, name): `float* name`, the dynamic shared memory of the launch, 16-byte aligned.
#ifdef MF_EMULATE
#define MF_SHARED_DYNAMIC(T, name) T* name = reinterpret_cast<T*>(::emulator::dynamic_shared())
#else
#define MF_SHARED_DYNAMIC(T, name)                               \
  extern __shared__ __align__(16) unsigned char mf_shared_dynamic[]; \
  T* name = reinterpret_cast<T*>(mf_shared_dynamic)
#endif

namespace mf {

constexpr unsigned int kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// ---- element types -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <class To> __device__ __forceinline__ To from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// ---- 16-byte accesses --------------------------------------------------------------------------------------------

// `size` elements in one 128-bit load or store: 4 fp32, 8 bf16 or fp16, 16 bytes. Addresses must be 16-byte aligned.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

template <class T> __device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}
template <class T> __device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

// Whether every address p + i * stride (in elements) may be read by load_pack.
template <class T> __host__ __device__ inline bool packs(const T* p, int64_t stride = Pack<T>::size) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Pack<T>::size == 0;
}

// ---- sums --------------------------------------------------------------------------------------------------------

// Sum over the warp, the same bits in every lane. All 32 lanes must call it.
template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
  return v;
}

// Sums of N values over the block, in place, the same bits in every thread, in an order that depends on blockDim.x only.
// scratch: N * 32 floats of shared memory, free again on return. All threads must call it.
template <int N> __device__ __forceinline__ void block_sum(float (&v)[N], float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = warp_sum(v[i]);
    if (lane == 0) scratch[i * kWarp + warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(lane < warps ? scratch[i * kWarp + lane] : 0.0f);
  __syncthreads();
}

__device__ __forceinline__ float block_sum(float v, float* scratch) {
  float values[1] = {v};
  block_sum(values, scratch);
  return values[0];
}

}  // namespace mf
