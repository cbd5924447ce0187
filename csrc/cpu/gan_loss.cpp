// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The adversarial losses of a discriminator and of a generator: sums over the logits in one pass, gradients in another.
//
//   hinge         D: relu(1 - r), relu(1 + f)          G: -f
//   vanilla       D: softplus(-r), softplus(f)         G: softplus(-f)
//   LeCAM         D: relu(r - ema_fake)^2, relu(ema_real - f)^2
//
// The logits are read again for the gradients: one map of them is less than the two that a forward would have to store
// (the adversarial and the LeCAM loss have their own factors). Sums run in double (there are few logits, and their mean may be
// close to zero), blocks of 1024 apart and then in order.
// softplus(v) = max(v, 0) + log(1 + u), u = exp(-|v|), the logarithm as the series of 2 atanh(u / (2 + u)): no overflow,
// full relative precision for small u. relu as v < 0 ? 0 : v, which hands a NaN on.

#include "cpu/types.h"

namespace mf {

struct GanTerm {  // one tensor of logits
  const void* logits;
  void* gradient;  // or null
  DType type;
  int64_t count;
  int sign;         // v = sign * logit is what the loss wants small: -1 for real logits and in the generator
  bool hinge, linear;  // hinge: relu(1 + v), linear: v, else softplus(v)
  float pivot;         // LeCAM: relu(sign * (pivot - logit))^2
  bool lecam;
  double* partials;    // blocks * 4: loss, relu^2, logit, relu
  float loss_scale, lecam_scale, mean_scale;  // of the gradient, 1 / count included
};

constexpr int64_t kLogits = 1024;

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

MF_INLINE vf relu(vf v) { return v < 0.0f ? (vf){} : v; }
MF_INLINE vf magnitude(vf v) { return (vf)((vu)v & 0x7fffffffu); }

// exp(-a) for a >= 0: 2^n p(f), relative error 2e-7; zero below the normal numbers; NaN stays.
MF_INLINE vf exp_minus(vf a) {
  const vf t = a * -1.44269504f;
  const vf cut = t < -126.0f ? splat(-126.0f) : t;
  const vf shifted = cut + 12582912.0f, n = shifted - 12582912.0f;  // rounds to an integer, kept in the low bits
  vf f = fma(n, splat(0.693145752f), a);                                   // Cody and Waite: ln 2 in two parts
  f = -fma(n, splat(1.42860677e-6f), f);
  vf p = fma(f, splat(1.0f / 720.0f), splat(1.0f / 120.0f));
  p = fma(p, f, splat(1.0f / 24.0f));
  p = fma(p, f, splat(1.0f / 6.0f));
  p = fma(p, f, splat(0.5f));
  p = fma(p, f, splat(1.0f));
  p = fma(p, f, splat(1.0f));
  const vf power = (vf)((vu)p + ((vu)shifted << 23));
  return t < -126.0f ? (vf){} : power;
}

// softplus(v) and its derivative, the logistic function.
MF_INLINE vf softplus(vf v, vf& slope) {
  const vf u = exp_minus(magnitude(v)), whole = 1.0f + u;
  slope = (v < 0.0f ? u : splat(1.0f)) / whole;
  const vf s = u / (2.0f + u), q = s * s;
  vf series = q * (1.0f / 17.0f) + (1.0f / 15.0f);
  for (int odd = 13; odd >= 1; odd -= 2) series = fma(series, q, splat(1.0f / (float)odd));
  return relu(v) + 2.0f * s * series;
}

// The loss of v = sign * logit and its slope in v.
MF_INLINE vf loss_of(const GanTerm& a, vf v, vf& slope) {
  if (a.linear) {
    slope = splat(1.0f);
    return v;
  }
  if (!a.hinge) return softplus(v, slope);
  const vf w = 1.0f + v;
  slope = w > 0.0f ? splat(1.0f) : (vf){};
  return relu(w);
}

struct DoubleSum { double lane[W]; };

MF_INLINE void add(DoubleSum& s, vf v) {
  float f[W];
  memcpy(f, &v, sizeof v);
  for (int i = 0; i < W; ++i) s.lane[i] += f[i];
}

MF_INLINE double total(const DoubleSum& s) {
  double value = 0.0;
  for (int i = 0; i < W; ++i) value += s.lane[i];
  return value;
}

template <class T> static void sums(const GanTerm& a) {
  const int64_t blocks = (a.count + kLogits - 1) / kLogits;
  const vf sign = splat((float)a.sign), pivot = splat(a.pivot);
#pragma omp parallel for if (a.count > kSerial) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kLogits, n = a.count - first < kLogits ? a.count - first : kLogits;
    const T* x = (const T*)a.logits + first;
    DoubleSum s[4] = {};
    each(n, [&](int64_t i, auto k) {
      const vf logit = load(x + i, k);
      vf slope;
      add(s[0], keep(loss_of(a, logit * sign, slope), k));
      add(s[2], logit);
      if (a.lecam) {
        const vf r = keep(relu((pivot - logit) * sign), k);
        add(s[1], r * r);
        add(s[3], r);
      }
    });
    for (int t = 0; t < 4; ++t) a.partials[block * 4 + t] = total(s[t]);
  }
}

template <class T> static void gradient(const GanTerm& a) {
  const vf sign = splat((float)a.sign), pivot = splat(a.pivot);
  const vf loss = splat(a.loss_scale * (float)a.sign), lecam = splat(-2.0f * a.lecam_scale * (float)a.sign);
  const vf mean = splat(a.mean_scale);
  const int64_t blocks = (a.count + kLogits - 1) / kLogits;
#pragma omp parallel for if (a.count > kSerial) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kLogits, n = a.count - first < kLogits ? a.count - first : kLogits;
    const T* x = (const T*)a.logits + first;
    T* out = (T*)a.gradient + first;
    each(n, [&](int64_t i, auto k) {
      const vf logit = load(x + i, k);
      vf slope;
      loss_of(a, logit * sign, slope);
      vf g = slope * loss + mean;
      if (a.lecam) g += relu((pivot - logit) * sign) * lecam;
      store(out + i, g, k);
    });
  }
}

void gan_sums(const GanTerm& a) {
  with_type(a.type, [&](auto t) { sums<decltype(t)>(a); });
}
void gan_gradient(const GanTerm& a) {
  with_type(a.type, [&](auto t) { gradient<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(gan_sums, GanTerm)
MF_DECLARE(gan_gradient, GanTerm)

namespace mf {
namespace {

enum Kind : int64_t { kHinge, kSoftplus, kLinear };

float* scalars(const MaybeTensor& t, const char* name, int64_t count) {
  if (!t.has_value()) return nullptr;
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  if (t.value().numel() != count)
    TVM_FFI_THROW(ValueError) << name << " must have " << count << " elements; got " << shape_text(t.value());
  return data<float>(t);
}

GanTerm term_of(const TensorView& logits, const char* name, int sign, int64_t kind) {
  GanTerm a{};
  a.type = check_dense(logits, name);
  a.logits = data(logits);
  a.count = logits.numel();
  a.sign = sign;
  a.hinge = kind == kHinge;
  a.linear = kind == kLinear;
  if (kind < kHinge || kind > kLinear) TVM_FFI_THROW(ValueError) << "kind must be 0, 1 or 2; got " << kind;
  if (a.count == 0) TVM_FFI_THROW(ValueError) << name << " must not be empty";
  return a;
}

void set_pivot(GanTerm& a, const float* ema, int which) {
  a.lecam = ema != nullptr;
  a.pivot = a.lecam ? ema[which] : 0.0f;
}

// Means over the tensor: loss, relu^2, logit, relu.
void means(GanTerm& a, float* out) {
  const int64_t blocks = (a.count + kLogits - 1) / kLogits;
  Scratch partials(blocks * 8);
  a.partials = reinterpret_cast<double*>(partials.get());
  MF_CALL(gan_sums, a);
  for (int t = 0; t < 4; ++t) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) total += a.partials[block * 4 + t];
    out[t] = static_cast<float>(total / static_cast<double>(a.count));
  }
}

void gradient_into(GanTerm& a, const MaybeTensor& t, const char* name) {
  if (!t.has_value()) return;
  check_dense(t.value(), name);
  check_dtype(t.value(), name, a.type, " like the logits");
  if (t.value().numel() != a.count)
    TVM_FFI_THROW(ValueError) << name << " must have " << a.count << " elements; got " << shape_text(t.value());
  a.gradient = data(t);
  MF_CALL(gan_gradient, a);
}

void discriminator_fwd(TensorView real, TensorView fake, MaybeTensor ema, TensorView adversarial, TensorView lecam,
                       TensorView mean_real, TensorView mean_fake, TensorView slopes, int64_t kind) {
  const float* pivots = scalars(ema, "ema", 2);
  GanTerm r = term_of(real, "real", -1, kind), f = term_of(fake, "fake", 1, kind);
  set_pivot(r, pivots, 1);
  set_pivot(f, pivots, 0);
  float of_real[4], of_fake[4];
  means(r, of_real);
  means(f, of_fake);
  *scalars(adversarial, "adversarial", 1) = 0.5f * (of_real[0] + of_fake[0]);
  *scalars(lecam, "lecam", 1) = of_real[1] + of_fake[1];
  *scalars(mean_real, "mean_real", 1) = of_real[2];
  *scalars(mean_fake, "mean_fake", 1) = of_fake[2];
  float* kept = scalars(slopes, "slopes", 2);
  kept[0] = of_real[3], kept[1] = of_fake[3];
}

void discriminator_bwd(TensorView d_adversarial, TensorView d_lecam, TensorView d_mean_real, TensorView d_mean_fake,
                       TensorView real, TensorView fake, MaybeTensor ema, TensorView slopes, MaybeTensor dreal,
                       MaybeTensor dfake, MaybeTensor dema, int64_t kind) {
  const float* pivots = scalars(ema, "ema", 2);
  const float adversarial = *scalars(d_adversarial, "d_adversarial", 1), lecam = *scalars(d_lecam, "d_lecam", 1);
  GanTerm r = term_of(real, "real", -1, kind), f = term_of(fake, "fake", 1, kind);
  set_pivot(r, pivots, 1);
  set_pivot(f, pivots, 0);
  for (GanTerm* t : {&r, &f}) {
    const TensorView& mean = t == &r ? d_mean_real : d_mean_fake;
    const float share = 1.0f / static_cast<float>(t->count);
    t->loss_scale = 0.5f * adversarial * share;
    t->lecam_scale = lecam * share;
    t->mean_scale = *scalars(mean, "d_mean", 1) * share;
  }
  gradient_into(r, dreal, "dreal");
  gradient_into(f, dfake, "dfake");
  if (float* out = scalars(dema, "dema", 2)) {
    const float* kept = scalars(slopes, "slopes", 2);
    out[0] = 2.0f * lecam * kept[1];
    out[1] = -2.0f * lecam * kept[0];
  }
}

void generator_fwd(TensorView fake, TensorView loss, int64_t kind) {
  GanTerm f = term_of(fake, "fake", -1, kind);
  float found[4];
  means(f, found);
  *scalars(loss, "loss", 1) = found[0];
}

void generator_bwd(TensorView dloss, TensorView fake, TensorView dfake, int64_t kind) {
  GanTerm f = term_of(fake, "fake", -1, kind);
  f.loss_scale = *scalars(dloss, "dloss", 1) / static_cast<float>(f.count);
  gradient_into(f, dfake, "dfake");
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(discriminator_loss_fwd, mf::discriminator_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(discriminator_loss_bwd, mf::discriminator_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(generator_loss_fwd, mf::generator_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(generator_loss_bwd, mf::generator_bwd);
#endif
