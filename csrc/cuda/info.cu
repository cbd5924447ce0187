// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Whether the CUDA half of this library can run here.
#include "cuda/launch.h"

namespace mf {
namespace {

[[maybe_unused]] __global__ void probe_kernel() {}

// "" when the kernels of this library can run on the current device, else why not.
tvm::ffi::String cuda_status() {
#ifdef MF_EMULATE
  return "";
#else
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, probe_kernel);
  const tvm::ffi::String text = status == cudaSuccess ? "" : cudaGetErrorString(status);
  cudaGetLastError();  // the question must not leave its error for the next launch
  return text;
#endif
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_status, mf::cuda_status);
