// What every launcher does around a launch.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "common.h"

namespace mf {

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

}  // namespace mf
