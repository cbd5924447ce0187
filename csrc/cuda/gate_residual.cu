// y = x + gate * branch on the device: the smallest example of a CUDA kernel here (no op dispatches to it, Triton does).
//
// x, branch, y (B, N, D) of one type; gate (D,) [kind 0], (B, D) [kind 1] or (B, N, D) [kind 2] of any of the three.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace mf {
namespace {

// One block: rows blockIdx.x, + gridDim.x, ...
template <class T, class G>
__global__ void gate_residual_fwd_kernel(const T* __restrict__ x, const G* __restrict__ gate,
                                         const T* __restrict__ branch, T* __restrict__ y, int64_t rows,
                                         int64_t rows_per_sample, int64_t D, int kind) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t gate_row = kind == 0 ? 0 : kind == 1 ? row / rows_per_sample : row;
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
      const int64_t at = row * D + i;
      y[at] = from_float<T>(to_float(x[at]) + to_float(gate[gate_row * D + i]) * to_float(branch[at]));
    }
  }
}

void gate_residual_fwd_cuda(TensorView x, TensorView gate, TensorView branch, TensorView y, int64_t kind) {
  check_ndim(x, "x", 3, "(B, N, D)");
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const DType type = check_on_device(x, "x");
  if (kind == 0) check_shape(gate, "gate", {D});
  else if (kind == 1) check_shape(gate, "gate", {B, D});
  else check_shape(gate, "gate", {B, N, D});
  check_beside(x, gate, "gate");
  check_shape(branch, "branch", {B, N, D});
  check_beside(x, branch, "branch", type);
  check_shape(y, "y", {B, N, D});
  check_beside(x, y, "y", type);
  DeviceGuard guard(x);
  with_type(type, [&](auto t) {
    with_type(dtype_of(gate, "gate"), [&](auto g) {
      using T = decltype(t);
      using G = decltype(g);
      MF_LAUNCH((gate_residual_fwd_kernel<T, G>), blocks(B * N, 1, 65535), D >= 512 ? 256 : 128, 0, current_stream(x),
                data<const T>(x), data<const G>(gate), data<const T>(branch), data<T>(y), B * N, N, D, kind);
    });
  });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual_fwd_cuda, mf::gate_residual_fwd_cuda);
