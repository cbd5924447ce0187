// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// q and k of packed qkv as attention takes them: normalised over the head dimension (optional) and rotated (2-D RoPE,
// interleaved pairs). What rope_rotate.cpp, which writes them, and rope_attention.cpp, which does not, share.
//
// qkv (B, N, 3, H, hd). Tokens prefix .. prefix+M-1 are rotated by rows of rope (2, H or 1, R, hd/2) = [cos, sin]: token
// prefix+m of image b by row index[b, m], or by row m when there is no index (M = R):
//     out[2j] = n[2j] c[j] - n[2j+1] s[j],   out[2j+1] = n[2j] s[j] + n[2j+1] c[j]
// where n is x, x rsqrt(mean x^2 + eps) w (rms) or LayerNorm(x) w + b (layer).
#pragma once

#include "cpu/types.h"

namespace mf {

constexpr int64_t kMaxHeadDim = 512;

struct RopeInputs {
  const void* qkv;
  DType type;
  int64_t B, N, H, hd, Nq, first, M, prefix;  // queries: tokens first .. first + Nq - 1
  const float* rope;        // null: no rotation
  int64_t rope_heads, R;    // 1 or H; rows of the table
  const int64_t* index;     // (B, M) rows, or null: row m
  const float* weights[4];  // q_weight, q_bias, k_weight, k_bias; each may be null
  int norm;                 // 0 none, 1 rms, 2 layer
  float eps;
};

// The table's row for token n of image b, or -1.
constexpr int64_t table_row(const RopeInputs& a, int64_t b, int64_t n) {
  const int64_t m = n - a.prefix;
  if (a.rope == nullptr || m < 0 || m >= a.M) return -1;
  return a.index != nullptr ? a.index[b * a.M + m] : m;
}

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

struct Moments { vf mean, r; };

// mean (zero for rms) and reciprocal root of one head's row; ones when there is no norm.
template <int NORM, class T> MF_INLINE Moments moments(const T* x, int64_t n, float eps) {
  if (NORM == 0) return {(vf){}, splat(1.0f)};
  vf mean = {}, squares = {};
  if (NORM == 2) {
    vf total = {};
    each(n, [&](int64_t i, auto k) { total += load(x + i, k); });
    mean = splat(sum(total) / (float)n);
  }
  each(n, [&](int64_t i, auto k) {
    const vf c = keep(load(x + i, k) - mean, k);
    squares += c * c;
  });
  return {mean, splat(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps))};
}

template <int NORM, class K>
MF_INLINE vf affine(vf xhat, const float* weight, const float* bias, int64_t i, K k) {
  if (NORM == 0) return xhat;
  if (weight != nullptr) xhat *= load(weight + i, k);
  if (NORM == 2 && bias != nullptr) xhat += load(bias + i, k);
  return xhat;
}

// Head h of q (which = 0) or k (1) of token n of image b: put(i, v, k) for every vector of its channels.
template <int NORM, class T, class F>
MF_INLINE void prepared_row(const RopeInputs& a, int which, int64_t b, int64_t n, int64_t h, F put) {
  const T* x = (const T*)a.qkv + (((b * a.N + n) * 3 + which) * a.H + h) * a.hd;
  const int64_t row = table_row(a, b, n), half = a.hd / 2;
  const float *weight = a.weights[2 * which], *bias = a.weights[2 * which + 1];
  const Moments s = moments<NORM>(x, a.hd, a.eps);
  if (row < 0) {
    each(a.hd, [&](int64_t i, auto k) { put(i, affine<NORM>((load(x + i, k) - s.mean) * s.r, weight, bias, i, k), k); });
    return;
  }
  const float* cos = a.rope + ((a.rope_heads == 1 ? 0 : h) * a.R + row) * half;
  const float* sin = cos + a.rope_heads * a.R * half;
  const vf sign = alternating();
  each(a.hd, [&](int64_t i, auto k) {
    const vf v = affine<NORM>((load(x + i, k) - s.mean) * s.r, weight, bias, i, k);
    put(i, v * load_twice(cos + i / 2, k) + swap_pairs(v) * (sign * load_twice(sin + i / 2, k)), k);
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include <cmath>

#include "common.h"

namespace mf {

inline float attention_scale(int64_t hd) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(hd))); }

inline const float* head_weight(const MaybeTensor& t, const char* name, int64_t hd) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {hd});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

// (B, M) int64 rows of the table; sets M.
inline const int64_t* table_index(const TensorView& t, RopeInputs& a) {
  check_ndim(t, "index", 2, "(B, M)");
  a.M = t.size(1);
  check_shape(t, "index", {a.B, a.M});
  check_cpu(t, "index");
  check_contiguous(t, "index");
  const DLDataType d = t.dtype();
  if (d.code != kDLInt || d.bits != 64 || d.lanes != 1) TVM_FFI_THROW(TypeError) << "index must be int64";
  const int64_t* rows = data<int64_t>(t);
  for (int64_t i = 0; i < a.B * a.M; ++i)
    if (rows[i] < 0 || rows[i] >= a.R)
      TVM_FFI_THROW(IndexError) << "index holds " << rows[i] << ", and rope has rows 0 .. " << a.R - 1;
  return rows;
}

inline RopeInputs rope_inputs(const TensorView& qkv, const MaybeTensor& rope, const MaybeTensor& q_weight, const MaybeTensor& q_bias,
                              const MaybeTensor& k_weight, const MaybeTensor& k_bias, const MaybeTensor& index, int64_t Nq,
                              int64_t prefix, int64_t first, int64_t norm, double eps) {
  check_ndim(qkv, "qkv", 5, "(B, N, 3, H, hd)");
  RopeInputs a{};
  a.type = check_dense(qkv, "qkv");
  a.B = qkv.size(0), a.N = qkv.size(1), a.H = qkv.size(3), a.hd = qkv.size(4);
  check_shape(qkv, "qkv", {a.B, a.N, 3, a.H, a.hd});
  a.qkv = data(qkv);
  if (a.hd % 2 != 0 || a.hd > kMaxHeadDim)
    TVM_FFI_THROW(ValueError) << "qkv's head dimension must be even and at most " << kMaxHeadDim << "; got " << a.hd;
  if (norm < 0 || norm > 2) TVM_FFI_THROW(ValueError) << "norm must be 0 (none), 1 (rms) or 2 (layer); got " << norm;
  if (first < 0 || first + Nq > a.N)
    TVM_FFI_THROW(ValueError) << "queries " << first << ".." << first + Nq << " are outside the " << a.N << " tokens";
  a.Nq = Nq, a.first = first, a.prefix = prefix;
  if (rope.has_value()) {
    const TensorView& table = rope.value();
    check_ndim(table, "rope", 4, "(2, H or 1, R, hd/2)");
    a.rope_heads = table.size(1), a.M = a.R = table.size(2);
    if (a.rope_heads != 1) a.rope_heads = a.H;
    check_shape(table, "rope", {2, a.rope_heads, a.R, a.hd / 2});
    check_dense(table, "rope");
    check_dtype(table, "rope", DType::f32, "");
    a.rope = data<float>(table);
    if (index.has_value()) a.index = table_index(index.value(), a);
    if (prefix < 0 || prefix + a.M > a.N)
      TVM_FFI_THROW(ValueError) << "rope covers tokens " << prefix << ".." << prefix + a.M << ", outside the " << a.N;
  } else if (index.has_value()) {
    TVM_FFI_THROW(ValueError) << "index names rows of rope, and there is no rope";
  }
  a.weights[0] = head_weight(q_weight, "q_weight", a.hd);
  a.weights[1] = head_weight(q_bias, "q_bias", a.hd);
  a.weights[2] = head_weight(k_weight, "k_weight", a.hd);
  a.weights[3] = head_weight(k_bias, "k_bias", a.hd);
  a.norm = static_cast<int>(norm);
  a.eps = static_cast<float>(eps);
  return a;
}

}  // namespace mf
#endif
