// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What every launcher does around a launch. A .cu holds kernels and launchers and exports, per kernel function,
// `<fn>_cuda`: TVM_FFI_DLL_EXPORT_TYPED_FUNC(blur_fwd_cuda, mf::blur_fwd_cuda), taking TensorViews.
//
//   void scale_cuda(TensorView x, TensorView y, double factor) {
//     const DType type = check_on_device(x, "x");
//     check_on_device_of(x, y, "y", type);
//     DeviceGuard guard(x);
//     with_type(type, [&](auto t) {
//       using T = decltype(t);
//       MF_LAUNCH(scale_kernel<T>, blocks(x.numel(), 256), 256, 0, current_stream(x),
//                 data<const T>(x), data<T>(y), x.numel(), factor);
//     });
//   }
//
// The same file is compiled by g++ with -DMF_EMULATE and tests/cuda_emulator on the include path: MF_LAUNCH then runs
// the kernel on the CPU, one fiber per CUDA thread, and the tensors are CPU tensors. Nothing else differs.
// csrc/cuda/device.cuh says what kernels may use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "common.h"

#ifdef MF_EMULATE
#define MF_CUDA_ARCHS "the CPU (emulated)"
#endif

// MF_LAUNCH(kernel<T>, grid, block, dynamic shared bytes, stream, arguments...); MF_LAUNCH((kernel<T, 4>), ...) where
// the name holds a comma. An empty grid launches nothing; a launch that fails raises RuntimeError with the kernel's name.
#define MF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::mf::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)

namespace mf {

#ifdef MF_EMULATE
constexpr DLDeviceType kKernelDevice = kDLCPU;
#else
constexpr DLDeviceType kKernelDevice = kDLCUDA;
#endif

// Without this a launch that never ran (no driver, no code for this GPU, a bad configuration) raises nothing.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    TVM_FFI_THROW(RuntimeError) << what << " failed: " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status)
                                << "); this library holds code for " << MF_CUDA_ARCHS;
}

inline cudaStream_t current_stream(const TensorView& t) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(t.device().device_type, t.device().device_id));
}

// Makes the tensor's device current for one scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(const TensorView& t) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != t.device().device_id) check_cuda(cudaSetDevice(t.device().device_id), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// ---- checks ------------------------------------------------------------------------------------------------------

// Contiguous, on a GPU, of one of the three element types, which is returned.
inline DType check_on_device(const TensorView& t, const char* name) {
  if (t.device().device_type != kKernelDevice)
    TVM_FFI_THROW(ValueError) << name << " must be on " << (kKernelDevice == kDLCUDA ? "a GPU" : "the CPU")
                              << "; got DLPack device type " << static_cast<int>(t.device().device_type);
  check_contiguous(t, name);
  return dtype_of(t, name);
}

// Contiguous and on the device of `first`; the element type is the caller's business.
inline void check_beside(const TensorView& first, const TensorView& t, const char* name) {
  if (t.device().device_type != kKernelDevice || t.device().device_id != first.device().device_id)
    TVM_FFI_THROW(ValueError) << name << " must be on device " << first.device().device_id << " like the first tensor";
  check_contiguous(t, name);
}

// ... and of this element type.
inline void check_beside(const TensorView& first, const TensorView& t, const char* name, DType type) {
  check_beside(first, t, name);
  check_dtype(t, name, type, "");
}

// ---- launches ----------------------------------------------------------------------------------------------------

// Calls f with a value of the C++ type of `type` (take its decltype).
template <class F>
inline void with_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  else if (type == DType::bf16) f(__nv_bfloat16{});
  else f(__half{});
}

// Blocks of a one-dimensional grid over `items`, `per_block` each; at most `most` (kernels then stride over the grid).
inline unsigned int blocks(int64_t items, int64_t per_block, int64_t most = 0x7fffffff) {
  const int64_t n = (items + per_block - 1) / per_block;
  return static_cast<unsigned int>(n < most ? n : most);
}

template <class... P, class... A>
inline void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "MF_LAUNCH: the kernel takes another number of arguments");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef MF_EMULATE
  (void)stream;
  ::emulator::launch(name, grid, block, shared, [&] { kernel(static_cast<P>(args)...); });
#else
  if (shared > 48 * 1024)  // more than every GPU grants unasked
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)), name);
  kernel<<<grid, block, shared, stream>>>(static_cast<P>(args)...);
#endif
  check_cuda(cudaGetLastError(), name);
}

}  // namespace mf
