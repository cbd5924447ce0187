// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// y = LeakyReLU(a * (x - m) + o) on planes (B, C, H * W), with m, a, o per plane, and its gradients.
//
//   norm_act:   statistics of z = x + conv_bias over a unit: the P planes that share mean and variance (batch: the
//               channel's B planes; group: the image's C / G planes; instance: one plane)
//                   m = mean - conv_bias,  a = weight * rstd,  o = bias,  rstd = 1 / sqrt(var + eps)
//   affine_act: mean and var given (or absent: 0 and no division)
//
// With g = dy * (pre > 0 ? 1 : slope), d = x - m and per-plane sums S0 = sum g, S1 = sum g d, S2 = sum d, a unit of N
// elements has G0 = sum weight S0, G1 = sum weight S1 and
//     dx = a g + k1 d + k0,   k0 = -rstd G0 / N,   k1 = -rstd^3 G1 / N        (affine_act: k0 = k1 = 0)
//     dweight = sum rstd S1,  dbias = sum S0,  dconv_bias = sum a S0 + n k0 + k1 S2 (0 for batch and instance)
// The pre-activation is computed again from x: nothing of x's size is kept.
//
// A unit is read for its statistics and at once again for y (or dx) while it lies in the cache; where units are fewer
// than threads all planes are taken apart. Statistics: two passes over 4096 elements that lie in L1, merged by Chan's
// formula, so a mean far from zero costs nothing. Everything is summed in an order that does not depend on the threads.

#include "cpu/types.h"

namespace mf {

struct NormActArgs {
  const void *x, *dy;
  void* out;  // y or dx; dx may be null
  const float *conv_bias, *weight, *bias, *mean, *var;             // (C,) or null; mean and var: affine_act
  float *mean_out, *var_out;                                       // (units,)
  float* stats;                                                    // (units, 2): mean, rstd
  float *dconv_bias, *dmean, *dvar, *dweight, *dbias;              // (C,) or null
  DType type;
  int64_t B, C, n;
  int64_t units, members;  // members: planes of one unit
  bool batch;              // the planes of unit k are k, C + k, 2 C + k, ...; else members * k + 0, 1, 2, ...
  float eps, slope;
  float* planes;      // scratch, B * C * 3: (mean, M2) or (S0, S1, S2)
  float* unit_terms;  // scratch, units * 2: k0, k1
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

constexpr int64_t kBlock = 4096;  // elements whose second pass finds them in L1

constexpr int64_t kFlush = 1024;  // elements whose sums of gradients stay in fp32 lanes

struct Affine { float m, a, o; };

MF_INLINE int64_t plane_of(const NormActArgs& s, int64_t unit, int64_t member) {
  return s.batch ? member * s.C + unit : unit * s.members + member;
}
MF_INLINE int64_t unit_of(const NormActArgs& s, int64_t plane) {
  return s.batch ? plane % s.C : plane / s.members;
}
MF_INLINE float at(const float* v, int64_t c, float absent) { return v != nullptr ? v[c] : absent; }

MF_INLINE Affine affine_of(const NormActArgs& s, int64_t c, float mean, float rstd) {
  return {mean - at(s.conv_bias, c, 0.0f), at(s.weight, c, 1.0f) * rstd, at(s.bias, c, 0.0f)};
}
MF_INLINE float rstd_of(float var, float eps) { return 1.0f / __builtin_sqrtf(var + eps); }
MF_INLINE Affine given_affine(const NormActArgs& s, int64_t c) {
  return affine_of(s, c, at(s.mean, c, 0.0f), s.var != nullptr ? rstd_of(s.var[c], s.eps) : 1.0f);
}

// The four sums hide the adder's latency.
template <class T> static void plane_stats(const T* x, int64_t n, float* mean_m2) {
  float mean = 0.0f, m2 = 0.0f;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    const T* block = x + first;
    vf s[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
      for (int j = 0; j < 4; ++j) s[j] += load(block + i + j * W, Full{});
    each(count - i, [&](int64_t r, auto k) { s[0] += load(block + i + r, k); });
    const float block_mean = sum((s[0] + s[1]) + (s[2] + s[3])) / (float)count;
    const vf centre = splat(block_mean);
    vf q[4] = {};
    i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
      for (int j = 0; j < 4; ++j) {
        const vf d = load(block + i + j * W, Full{}) - centre;
        q[j] = fma(d, d, q[j]);
      }
    each(count - i, [&](int64_t r, auto k) {
      const vf d = keep(load(block + i + r, k) - centre, k);
      q[0] = fma(d, d, q[0]);
    });
    const float block_m2 = sum((q[0] + q[1]) + (q[2] + q[3]));
    if (first == 0) {
      mean = block_mean, m2 = block_m2;
    } else {
      const float delta = block_mean - mean, share = (float)count / (float)(first + count);
      mean += delta * share;
      m2 += block_m2 + delta * delta * share * (float)first;
    }
  }
  mean_m2[0] = mean, mean_m2[1] = m2;
}

// All planes of a unit have n elements: its mean is the mean of theirs.
MF_INLINE void unit_stats(const NormActArgs& s, int64_t unit) {
  float mean = 0.0f, m2 = 0.0f, spread = 0.0f;
  const float origin = s.planes[plane_of(s, unit, 0) * 3];
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p);
    mean += s.planes[plane * 3] - origin + at(s.conv_bias, plane % s.C, 0.0f);
  }
  mean = origin + mean / (float)s.members;
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p);
    const float delta = s.planes[plane * 3] + at(s.conv_bias, plane % s.C, 0.0f) - mean;
    spread += delta * delta;
    m2 += s.planes[plane * 3 + 1];
  }
  const float var = (m2 / (float)s.n + spread) / (float)s.members;
  s.mean_out[unit] = s.stats[unit * 2] = mean;
  s.var_out[unit] = var;
  s.stats[unit * 2 + 1] = rstd_of(var, s.eps);
}

template <class T> static void apply(const NormActArgs& s, int64_t plane, Affine f) {
  const T* x = (const T*)s.x + plane * s.n;
  T* y = (T*)s.out + plane * s.n;
  const vf m = splat(f.m), a = splat(f.a), o = splat(f.o), slope = splat(s.slope);
  each(s.n, [&](int64_t i, auto k) {
    const vf pre = fma(load(x + i, k) - m, a, o);
    store(y + i, pre > 0.0f ? pre : pre * slope, k);
  });
}

MF_INLINE Affine plane_affine(const NormActArgs& s, int64_t plane) {
  const float* st = s.stats + unit_of(s, plane) * 2;
  return affine_of(s, plane % s.C, st[0], st[1]);
}

// f(unit) for every unit with its planes by one thread, or plane by plane by all threads in three phases.
template <class First, class Middle, class Last>
MF_INLINE void by_unit(const NormActArgs& s, First first, Middle middle, Last last) {
  if (s.units >= 2 * omp_get_num_threads() || omp_get_num_threads() == 1) {
    const Share share = my_share(s.units);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      for (int64_t p = 0; p < s.members; ++p) first(plane_of(s, unit, p));
      middle(unit);
      for (int64_t p = s.members - 1; p >= 0; --p) last(plane_of(s, unit, p));  // the last planes are the hottest
    }
  } else {
    const Share planes = my_share(s.B * s.C), units = my_share(s.units);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) first(plane);
#pragma omp barrier
    for (int64_t unit = units.begin; unit < units.end; ++unit) middle(unit);
#pragma omp barrier
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) last(plane);
  }
}

template <class T> static void norm_forward(const NormActArgs& s) {
#pragma omp parallel if (s.B * s.C * s.n > kSerial)
  by_unit(
      s, [&](int64_t plane) { plane_stats((const T*)s.x + plane * s.n, s.n, s.planes + plane * 3); },
      [&](int64_t unit) { unit_stats(s, unit); }, [&](int64_t plane) { apply<T>(s, plane, plane_affine(s, plane)); });
}

// S0, S1 and (MOMENT) S2 of one plane; with DX also dx = a g, all that affine_act needs.
template <bool MOMENT, bool DX, class T> static void plane_sums(const NormActArgs& s, int64_t plane, Affine f) {
  const T *x = (const T*)s.x + plane * s.n, *dy = (const T*)s.dy + plane * s.n;
  T* dx = (T*)s.out + plane * s.n;
  const vf m = splat(f.m), a = splat(f.a), o = splat(f.o), slope = splat(s.slope);
  float* out = s.planes + plane * 3;
  double total[3] = {};
  for (int64_t first = 0; first < s.n; first += kFlush) {
    const int64_t last = s.n - first < kFlush ? s.n : first + kFlush;
    vf s0[2] = {}, s1[2] = {}, s2[2] = {};
    const auto step = [&](int64_t i, int j, auto k) {
      const vf d = load(x + i, k) - m, grad = load(dy + i, k);  // past the end grad is zero
      const vf g = fma(d, a, o) > 0.0f ? grad : grad * slope;  // as forward has it
      s0[j] += g;
      s1[j] = fma(g, d, s1[j]);
      if (MOMENT) s2[j] += keep(d, k);
      if (DX) store(dx + i, g * a, k);
    };
    int64_t i = first;
    for (; i + 2 * W <= last; i += 2 * W) {
      step(i, 0, Full{});
      step(i + W, 1, Full{});
    }
    each(last - i, [&](int64_t r, auto k) { step(i + r, 0, k); });
    total[0] += sum(s0[0] + s0[1]), total[1] += sum(s1[0] + s1[1]);
    if (MOMENT) total[2] += sum(s2[0] + s2[1]);
  }
  for (int t = 0; t < 3; ++t) out[t] = (float)total[t];
}

MF_INLINE void unit_gradients(const NormActArgs& s, int64_t unit) {
  float g0 = 0.0f, g1 = 0.0f;
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p);
    const float w = at(s.weight, plane % s.C, 1.0f);
    g0 += w * s.planes[plane * 3];
    g1 += w * s.planes[plane * 3 + 1];
  }
  const float rstd = s.stats[unit * 2 + 1], inverse = 1.0f / ((float)s.members * (float)s.n);
  s.unit_terms[unit * 2] = -rstd * g0 * inverse;
  s.unit_terms[unit * 2 + 1] = -rstd * rstd * rstd * g1 * inverse;
}

template <class T> static void norm_dx(const NormActArgs& s, int64_t plane) {
  if (s.out == nullptr) return;
  const T *x = (const T*)s.x + plane * s.n, *dy = (const T*)s.dy + plane * s.n;
  T* dx = (T*)s.out + plane * s.n;
  const Affine f = plane_affine(s, plane);
  const float* terms = s.unit_terms + unit_of(s, plane) * 2;
  const vf m = splat(f.m), a = splat(f.a), o = splat(f.o), slope = splat(s.slope);
  const vf k0 = splat(terms[0]), k1 = splat(terms[1]);
  each(s.n, [&](int64_t i, auto k) {
    const vf d = load(x + i, k) - m, grad = load(dy + i, k);
    const vf g = fma(d, a, o) > 0.0f ? grad : grad * slope;  // as forward has it
    store(dx + i, fma(a, g, fma(k1, d, k0)), k);
  });
}

// A constant added to a whole unit leaves with its mean: only where channels share a unit does conv_bias matter.
MF_INLINE bool has_conv_gradient(const NormActArgs& s) {
  return s.dconv_bias != nullptr && !s.batch && s.members > 1;
}

template <class T> static void norm_backward(const NormActArgs& s) {
#pragma omp parallel if (s.B * s.C * s.n > kSerial)
  {
    const auto last = [&](int64_t plane) { norm_dx<T>(s, plane); };
    const auto middle = [&](int64_t unit) { unit_gradients(s, unit); };
    const bool moment = has_conv_gradient(s);
    if (moment)
      by_unit(s, [&](int64_t p) { plane_sums<true, false, T>(s, p, plane_affine(s, p)); }, middle, last);
    else
      by_unit(s, [&](int64_t p) { plane_sums<false, false, T>(s, p, plane_affine(s, p)); }, middle, last);
#pragma omp barrier
    const Share channels = my_share(s.C);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double dweight = 0.0, dbias = 0.0, dconv = 0.0;
      for (int64_t b = 0; b < s.B; ++b) {
        const int64_t plane = b * s.C + c, unit = unit_of(s, plane);
        const float *S = s.planes + plane * 3, *terms = s.unit_terms + unit * 2, rstd = s.stats[unit * 2 + 1];
        dweight += rstd * S[1];
        dbias += S[0];
        if (moment) dconv += at(s.weight, c, 1.0f) * rstd * S[0] + (float)s.n * terms[0] + terms[1] * S[2];
      }
      if (s.dweight != nullptr) s.dweight[c] = (float)dweight;
      if (s.dbias != nullptr) s.dbias[c] = (float)dbias;
      if (s.dconv_bias != nullptr) s.dconv_bias[c] = (float)dconv;
    }
  }
}

template <class T> static void affine_forward(const NormActArgs& s) {
#pragma omp parallel if (s.B * s.C * s.n > kSerial)
  {
    const Share share = my_share(s.B * s.C);
    for (int64_t plane = share.begin; plane < share.end; ++plane) apply<T>(s, plane, given_affine(s, plane % s.C));
  }
}

template <class T> static void affine_backward(const NormActArgs& s) {
#pragma omp parallel if (s.B * s.C * s.n > kSerial)
  {
    const Share share = my_share(s.B * s.C);
    for (int64_t plane = share.begin; plane < share.end; ++plane) {
      if (s.out != nullptr) plane_sums<false, true, T>(s, plane, given_affine(s, plane % s.C));
      else plane_sums<false, false, T>(s, plane, given_affine(s, plane % s.C));
    }
#pragma omp barrier
    const Share channels = my_share(s.C);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double t0 = 0.0, t1 = 0.0;
      for (int64_t b = 0; b < s.B; ++b) t0 += s.planes[(b * s.C + c) * 3], t1 += s.planes[(b * s.C + c) * 3 + 1];
      const float s0 = (float)t0, s1 = (float)t1;
      const float w = at(s.weight, c, 1.0f), rstd = s.var != nullptr ? rstd_of(s.var[c], s.eps) : 1.0f;
      if (s.dweight != nullptr) s.dweight[c] = rstd * s1;
      if (s.dbias != nullptr) s.dbias[c] = s0;
      if (s.dconv_bias != nullptr) s.dconv_bias[c] = w * rstd * s0;
      if (s.dmean != nullptr) s.dmean[c] = -w * rstd * s0;
      if (s.dvar != nullptr) s.dvar[c] = -0.5f * w * rstd * rstd * rstd * s1;
    }
  }
}

void norm_act_fwd(const NormActArgs& s) {
  with_type(s.type, [&](auto t) { norm_forward<decltype(t)>(s); });
}
void norm_act_bwd(const NormActArgs& s) {
  with_type(s.type, [&](auto t) { norm_backward<decltype(t)>(s); });
}
void affine_act_fwd(const NormActArgs& s) {
  with_type(s.type, [&](auto t) { affine_forward<decltype(t)>(s); });
}
void affine_act_bwd(const NormActArgs& s) {
  with_type(s.type, [&](auto t) { affine_backward<decltype(t)>(s); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(norm_act_fwd, NormActArgs)
MF_DECLARE(norm_act_bwd, NormActArgs)
MF_DECLARE(affine_act_fwd, NormActArgs)
MF_DECLARE(affine_act_bwd, NormActArgs)

namespace mf {
namespace {

float* vector_of(const MaybeTensor& t, const char* name, int64_t size) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {size});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

void* like_x(const TensorView& t, const char* name, const TensorView& x) {
  check_shape(t, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_dense(t, name);
  check_dtype(t, name, dtype_of(x, "x"), " like x");
  return data(t);
}

float* workspace_of(const TensorView& t, int64_t floats) {
  check_dense(t, "workspace");
  check_dtype(t, "workspace", DType::f32, "");
  if (t.numel() < floats)
    TVM_FFI_THROW(ValueError) << "workspace must have at least " << floats << " elements; got " << t.numel();
  return data<float>(t);
}

NormActArgs common_args(const TensorView& x, const MaybeTensor& conv_bias, const MaybeTensor& weight,
                        const MaybeTensor& bias, double eps, double slope) {
  check_ndim(x, "x", 4, "(B, C, H, W)");
  NormActArgs s{};
  s.B = x.size(0), s.C = x.size(1), s.n = x.size(2) * x.size(3);
  s.type = check_dense(x, "x");
  s.x = data(x);
  s.conv_bias = vector_of(conv_bias, "conv_bias", s.C);
  s.weight = vector_of(weight, "weight", s.C);
  s.bias = vector_of(bias, "bias", s.C);
  s.eps = static_cast<float>(eps);
  s.slope = static_cast<float>(slope);
  return s;
}

// groups 0: batch statistics.
void set_units(NormActArgs& s, int64_t groups, const TensorView& stats) {
  if (groups < 0 || (groups > 0 && s.C % groups != 0))
    TVM_FFI_THROW(ValueError) << "groups must divide the " << s.C << " channels, or be 0 for batch statistics; got "
                              << groups;
  s.batch = groups == 0;
  s.units = s.batch ? s.C : s.B * groups;
  s.members = s.batch ? s.B : s.C / groups;
  check_shape(stats, "stats", {s.units, 2});
  check_dense(stats, "stats");
  check_dtype(stats, "stats", DType::f32, "");
  s.stats = data<float>(stats);
}

void norm_fwd(TensorView x, MaybeTensor conv_bias, MaybeTensor weight, MaybeTensor bias, TensorView y, TensorView mean,
              TensorView var, TensorView stats, TensorView workspace, int64_t groups, double eps, double slope) {
  NormActArgs s = common_args(x, conv_bias, weight, bias, eps, slope);
  set_units(s, groups, stats);
  s.out = like_x(y, "y", x);
  for (const auto& [t, name] : {std::pair(mean, "mean"), std::pair(var, "var")}) {
    check_dense(t, name);
    check_dtype(t, name, DType::f32, "");
    if (t.numel() != s.units)
      TVM_FFI_THROW(ValueError) << name << " must have " << s.units << " elements; got " << shape_text(t);
  }
  s.mean_out = data<float>(mean);
  s.var_out = data<float>(var);
  if (x.numel() == 0) return;
  s.planes = workspace_of(workspace, s.B * s.C * 3);
  MF_CALL(norm_act_fwd, s);
}

void norm_bwd(TensorView dy, TensorView x, MaybeTensor conv_bias, MaybeTensor weight, MaybeTensor bias,
              TensorView stats, MaybeTensor dx, MaybeTensor dconv_bias, MaybeTensor dweight, MaybeTensor dbias,
              TensorView workspace, int64_t groups, double slope) {
  NormActArgs s = common_args(x, conv_bias, weight, bias, 0.0, slope);
  set_units(s, groups, stats);
  s.dy = like_x(dy, "dy", x);
  s.out = dx.has_value() ? like_x(dx.value(), "dx", x) : nullptr;
  s.dconv_bias = vector_of(dconv_bias, "dconv_bias", s.C);
  s.dweight = vector_of(dweight, "dweight", s.C);
  s.dbias = vector_of(dbias, "dbias", s.C);
  if (x.numel() == 0) return;
  s.planes = workspace_of(workspace, s.B * s.C * 3 + s.units * 2);
  s.unit_terms = s.planes + s.B * s.C * 3;
  MF_CALL(norm_act_bwd, s);
}

void affine_fwd(TensorView x, MaybeTensor conv_bias, MaybeTensor mean, MaybeTensor var, MaybeTensor weight,
                MaybeTensor bias, TensorView y, double eps, double slope) {
  NormActArgs s = common_args(x, conv_bias, weight, bias, eps, slope);
  s.mean = vector_of(mean, "mean", s.C);
  s.var = vector_of(var, "var", s.C);
  s.out = like_x(y, "y", x);
  if (x.numel() == 0) return;
  MF_CALL(affine_act_fwd, s);
}

void affine_bwd(TensorView dy, TensorView x, MaybeTensor conv_bias, MaybeTensor mean, MaybeTensor var,
                MaybeTensor weight, MaybeTensor bias, MaybeTensor dx, MaybeTensor dconv_bias, MaybeTensor dmean,
                MaybeTensor dvar, MaybeTensor dweight, MaybeTensor dbias, TensorView workspace, double eps,
                double slope) {
  NormActArgs s = common_args(x, conv_bias, weight, bias, eps, slope);
  s.mean = vector_of(mean, "mean", s.C);
  s.var = vector_of(var, "var", s.C);
  s.dy = like_x(dy, "dy", x);
  s.out = dx.has_value() ? like_x(dx.value(), "dx", x) : nullptr;
  s.dconv_bias = vector_of(dconv_bias, "dconv_bias", s.C);
  s.dmean = vector_of(dmean, "dmean", s.C);
  s.dvar = vector_of(dvar, "dvar", s.C);
  s.dweight = vector_of(dweight, "dweight", s.C);
  s.dbias = vector_of(dbias, "dbias", s.C);
  if (x.numel() == 0) return;
  s.planes = workspace_of(workspace, s.B * s.C * 3);
  MF_CALL(affine_act_bwd, s);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_act_fwd, mf::norm_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_act_bwd, mf::norm_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(affine_act_fwd, mf::affine_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(affine_act_bwd, mf::affine_bwd);
#endif
