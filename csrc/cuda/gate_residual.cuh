// y = x + gate * branch on the device. One thread per element of a row, rows over the grid; kind as in cpu/gate_residual.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace mf {

template <class To> __device__ inline To from_float(float v);
template <> __device__ inline float from_float<float>(float v) { return v; }
template <> __device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <class T, class G>
__global__ void gate_residual_fwd_kernel(const T* __restrict__ x, const G* __restrict__ gate, const T* __restrict__ branch,
                                         T* __restrict__ y, int64_t rows, int64_t rows_per_sample, int64_t D, int kind) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t gate_row = kind == 0 ? 0 : kind == 1 ? row / rows_per_sample : row;
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
      const int64_t at = row * D + i;
      y[at] = from_float<T>(float(x[at]) + float(gate[gate_row * D + i]) * float(branch[at]));
    }
  }
}

}  // namespace mf
