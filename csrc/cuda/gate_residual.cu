// Launcher of y = x + gate * branch.
#include "cuda/gate_residual.cuh"
#include "cuda/gate_residual.h"
#include "cuda/launch.h"

namespace mf {
namespace {

template <class T, class G>
void launch(const TensorView& x, const TensorView& gate, const TensorView& branch, const TensorView& y, int kind) {
  const int64_t rows = x.size(0) * x.size(1), D = x.size(2);
  const int threads = D >= 512 ? 256 : 128;
  const int blocks = static_cast<int>(rows < 65535 ? rows : 65535);
  gate_residual_fwd_kernel<<<blocks, threads, 0, current_stream(x)>>>(
      data<const T>(x), data<const G>(gate), data<const T>(branch), data<T>(y), rows, x.size(1), D, kind);
  check_cuda(cudaGetLastError(), "gate_residual_fwd_kernel");
}

template <class T>
void launch(const TensorView& x, const TensorView& gate, const TensorView& branch, const TensorView& y, int kind,
            DType gate_type) {
  if (gate_type == DType::f32) launch<T, float>(x, gate, branch, y, kind);
  else if (gate_type == DType::bf16) launch<T, __nv_bfloat16>(x, gate, branch, y, kind);
  else launch<T, __half>(x, gate, branch, y, kind);
}

// "" when the kernels of this library can run on the current device, else why not.
tvm::ffi::String cuda_status() {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, gate_residual_fwd_kernel<float, float>);
  const tvm::ffi::String text = status == cudaSuccess ? "" : cudaGetErrorString(status);
  cudaGetLastError();  // the question must not leave its error for the next launch
  return text;
}

}  // namespace

void gate_residual_cuda(TensorView x, TensorView gate, TensorView branch, TensorView y, int kind, DType type,
                        DType gate_type) {
  DeviceGuard guard(x);
  if (type == DType::f32) launch<float>(x, gate, branch, y, kind, gate_type);
  else if (type == DType::bf16) launch<__nv_bfloat16>(x, gate, branch, y, kind, gate_type);
  else launch<__half>(x, gate, branch, y, kind, gate_type);
}

}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_status, mf::cuda_status);
