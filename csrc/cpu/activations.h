// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The activations of MLPs in vectors: what activation.cpp computes in passes and gemm.cpp in its epilogue.
//
//   kind 0  gelu_tanh  v s(2u), u = sqrt(2/pi) (v + 0.044715 v^3)   d = s + v s (1 - s) 2u'
//   kind 1  silu       v s(v)                                       d = s + v s (1 - s)
//   kind 2  gelu       v Phi(v) = v (1 + erf(v / sqrt 2)) / 2       d = Phi(v) + v exp(-v^2/2) / sqrt(2 pi)
//
// with s(t) = 1 / (1 + exp(-t)). exp is 2^n times a polynomial in [-1/2, 1/2]: degree 7 (LONG: below fp32's rounding), and
// degree 5 for 16-bit results (relative error 2.4e-6: 1/200 of an fp16 step, 1/800 of a bf16 step). erf is x times a
// rational function of x^2, fitted to a relative error of 2.1e-8, on |x| < 3.95 and +-1 beyond.
#pragma once

#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, left in the low bits

// 2^f for f in -1/2 .. 1/2
template <bool LONG> MF_INLINE vf exp2_within(vf f) {
  vf p = splat(1.3333558e-3f);
  if (LONG) p = fma(fma(splat(1.5252734e-5f), f, splat(1.5403530e-4f)), f, p);
  p = fma(p, f, splat(9.6181291e-3f));
  p = fma(p, f, splat(5.5504109e-2f));
  p = fma(p, f, splat(2.4022651e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  return fma(p, f, splat(1.0f));
}

// 2^t. 0 below 2^-126, infinity from 2^128 on; NaN gives some number: callers multiply by the argument.
template <bool LONG> MF_INLINE vf exp2_of(vf t) {
  const vf low = splat(-126.0f), high = splat(128.0f);
  vf c = t > high ? high : t;
  c = c < low ? low : c;
  const vf shifted = c + splat(kRound);
  const vf scaled = (vf)((vu)exp2_within<LONG>(c - (shifted - splat(kRound))) + ((vu)shifted << 23));
  return t < low ? (vf){} : scaled;
}

// exp(-t); in fp32 with what the product t log2 e lost in rounding. The cut at 90 keeps infinities out of that difference.
template <bool LONG> MF_INLINE vf exp_minus(vf t) {
  if (!LONG) return exp2_of<false>(t * splat(-1.4426950f));
  vf c = t > splat(90.0f) ? splat(90.0f) : t;
  c = c < splat(-90.0f) ? splat(-90.0f) : c;
  const vf product = c * splat(-1.44269502f);
  const vf lost = fma(c, splat(-1.44269502f), -product) + c * splat(-1.92596303e-8f);
  return exp2_of<true>(product) * (splat(1.0f) + lost * splat(0.69314718f));
}

template <bool LONG> MF_INLINE vf sigmoid(vf t) { return splat(1.0f) / (splat(1.0f) + exp_minus<LONG>(t)); }

// s(t) and 1 - s(t), the latter without cancellation.
struct Logistic { vf s, rest; };
template <bool LONG> MF_INLINE Logistic logistic(vf t) {
  vf e = exp_minus<LONG>(t);
  e = e > splat(1e30f) ? splat(1e30f) : e;
  const vf s = splat(1.0f) / (splat(1.0f) + e);
  return {s, e * s};
}

MF_INLINE vf erf_of(vf x) {
  const vf one = splat(1.0f), end = splat(3.95f), z = x * x;
  vf p = splat(2.0257564e-6f), q = splat(3.7829151e-5f);
  p = fma(p, z, splat(2.8466736e-4f));
  q = fma(q, z, splat(1.1706338e-3f));
  p = fma(p, z, splat(3.8078928e-3f));
  q = fma(q, z, splat(1.5054561e-2f));
  p = fma(p, z, splat(5.2874565e-2f));
  q = fma(q, z, splat(1.1455759e-1f));
  p = fma(p, z, splat(1.9154610e-1f));
  q = fma(q, z, splat(5.0308599e-1f));
  p = fma(p, z, splat(1.1283791f));
  q = fma(q, z, one);
  const vf inside = x * p / q;
  return x > end ? one : x < -end ? -one : inside;
}

constexpr float kTwoRootTwoOverPi = 1.5957691216f, kCubic = 0.044715f;

template <int KIND, bool LONG> MF_INLINE vf act(vf v) {
  if (KIND == 0) return v * sigmoid<LONG>(splat(kTwoRootTwoOverPi) * v * (splat(1.0f) + splat(kCubic) * v * v));
  if (KIND == 1) return v * sigmoid<LONG>(v);
  return splat(0.5f) * v * (splat(1.0f) + erf_of(v * splat(0.70710678f)));
}

template <int KIND, bool LONG> MF_INLINE vf act_slope(vf v) {
  const vf one = splat(1.0f);
  if (KIND == 2) {
    const vf density = splat(0.39894228f) * exp_minus<LONG>(splat(0.5f) * v * v);
    return splat(0.5f) * (one + erf_of(v * splat(0.70710678f))) + v * density;
  }
  const vf cubic = splat(kCubic) * v * v;
  const vf u = KIND == 0 ? splat(kTwoRootTwoOverPi) * v * (one + cubic) : v;
  const vf slope = KIND == 0 ? splat(kTwoRootTwoOverPi) * (one + splat(3.0f) * cubic) : one;
  const Logistic l = logistic<LONG>(u);
  return l.s + v * slope * l.s * l.rest;
}

template <class F> MF_INLINE void with_kind(int kind, F f) {
  struct K0 { enum { value = 0 }; };
  struct K1 { enum { value = 1 }; };
  struct K2 { enum { value = 2 }; };
  if (kind == 0) f(K0{});
  else if (kind == 1) f(K1{});
  else f(K2{});
}

}  // namespace MF_VARIANT
}  // namespace mf
