// What kernels and their callers share: element types by number.
#pragma once

namespace mf {

enum class DType : int { f32, bf16, f16 };

constexpr const char* dtype_name(DType d) {
  return d == DType::f32 ? "float32" : d == DType::bf16 ? "bfloat16" : "float16";
}

}  // namespace mf
