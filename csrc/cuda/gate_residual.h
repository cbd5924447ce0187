// Launchers of gate_residual.cu.
#pragma once

#include "common.h"

namespace mf {

// All tensors contiguous on one CUDA device and checked by the caller; runs on torch's current stream.
void gate_residual_cuda(TensorView x, TensorView gate, TensorView branch, TensorView y, int kind, DType type,
                        DType gate_type);

}  // namespace mf
