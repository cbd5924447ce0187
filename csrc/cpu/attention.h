// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What the host sides of attention.cpp and attention_bwd.cpp check alike.
#pragma once

#include <cmath>

#include "common.h"

namespace mf {

struct AttentionSizes {
  int64_t batch, queries, keys, heads, dim;
};

inline float attention_scale(const AttentionSizes& s) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.dim)));
}

// (B, N, heads, head_dim) in bf16 with the last two dimensions contiguous, any image and token strides.
inline void check_heads(const TensorView& t, const char* name) {
  check_cpu(t, name);
  check_ndim(t, name, 4, "(B, N, heads, head_dim)");
  check_dtype(t, name, DType::bf16, "");
  if (t.stride(3) != 1 || (t.size(2) > 1 && t.stride(2) != t.size(3)))
    TVM_FFI_THROW(ValueError) << name << " must have contiguous heads and channels; call .contiguous() on it";
}

inline AttentionSizes check_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                                      const TensorView& out, const TensorView& lse) {
  check_heads(q, "q"), check_heads(k, "k"), check_heads(v, "v");
  const AttentionSizes s{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3)};
  check_shape(k, "k", {s.batch, s.keys, s.heads, s.dim});
  check_shape(v, "v", {s.batch, s.keys, s.heads, s.dim});
  check_shape(out, "out", {s.batch, s.queries, s.heads, s.dim});
  check_shape(lse, "lse", {s.batch, s.queries, s.heads});
  if (check_dense(out, "out") != DType::bf16 || check_dense(lse, "lse") != DType::f32)
    TVM_FFI_THROW(TypeError) << "out must be bfloat16 and lse float32";
  if (s.dim % 2 != 0 || s.keys == 0)
    TVM_FFI_THROW(ValueError) << "head_dim must be even and there must be keys; got " << shape_text(k);
  if (variant() != Variant::amx)
    TVM_FFI_THROW(RuntimeError) << "needs AMX tiles, the instruction set in use is " << variant_name(variant());
  return s;
}

}  // namespace mf
