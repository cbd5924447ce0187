// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// y = LeakyReLU(a (x - m) + o) per plane with its gradients, on the device; formulas in csrc/cpu/norm_act.cpp.
//
// norm_act forward: moments of every piece of every plane, then a kernel whose blocks each merge their unit's moments (a
// few numbers) and write their piece of y: x is read twice, the second time from L2 where x fits in it. A unit that fits in
// shared memory is one block: x is read once. Backward: sums per piece, then dx the same way, then the channels' gradients.
// affine_act: one pass forward; backward one pass for dx and sums, then the channels'. Partial results are merged in one
// fixed order; nothing is atomic.
#include "cuda/launch.h"
#include "cuda/planes.cuh"

namespace mf {
namespace {

constexpr int kPiece = 8192;         // elements of a plane that one block takes
constexpr int64_t kResident = 12288;  // elements of a unit that are kept in shared memory, as fp32

struct Norm {
  const float *conv_bias, *weight, *bias, *mean, *var;  // (C,) or null; mean, var: affine_act
  int64_t B, C, n, units, members;
  int pieces;
  bool batch, packed;  // batch: the planes of unit k are k, C + k, ...; packed: 16-byte accesses
  float eps, slope;
};

struct Affine { float m, a, o; };

struct Moments { float count, mean, m2; };

__device__ __forceinline__ int64_t plane_of(const Norm& s, int64_t unit, int64_t member) {
  return s.batch ? member * s.C + unit : unit * s.members + member;
}
__device__ __forceinline__ int64_t unit_of(const Norm& s, int64_t plane) {
  return s.batch ? plane % s.C : plane / s.members;
}
__device__ __forceinline__ float at(const float* v, int64_t c, float absent) { return v != nullptr ? v[c] : absent; }

__device__ __forceinline__ Affine affine_of(const Norm& s, int64_t c, float mean, float rstd) {
  return {mean - at(s.conv_bias, c, 0.0f), at(s.weight, c, 1.0f) * rstd, at(s.bias, c, 0.0f)};
}
__device__ __forceinline__ float rstd_of(float var, float eps) { return 1.0f / sqrtf(var + eps); }
__device__ __forceinline__ Affine given_affine(const Norm& s, int64_t c) {
  return affine_of(s, c, at(s.mean, c, 0.0f), s.var != nullptr ? rstd_of(s.var[c], s.eps) : 1.0f);
}

// Chan, Golub & LeVeque's merge.
__device__ __forceinline__ void merge(Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return;
  const float delta = b.mean - a.mean, share = b.count / count;
  a.mean += delta * share;
  a.m2 += b.m2 + delta * delta * a.count * share;
  a.count = count;
}

__device__ __forceinline__ void warp_merge(Moments& v) {  // into lane 0
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Moments other{__shfl_down_sync(kFullMask, v.count, offset), __shfl_down_sync(kFullMask, v.mean, offset),
                        __shfl_down_sync(kFullMask, v.m2, offset)};
    merge(v, other);
  }
}

// Into thread 0; scratch: 3 * 32 floats.
__device__ __forceinline__ void block_merge(Moments& v, float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  warp_merge(v);
  if (lane == 0) scratch[3 * warp] = v.count, scratch[3 * warp + 1] = v.mean, scratch[3 * warp + 2] = v.m2;
  __syncthreads();
  if (warp == 0) {
    v = lane < warps ? Moments{scratch[3 * lane], scratch[3 * lane + 1], scratch[3 * lane + 2]} : Moments{0, 0, 0};
    warp_merge(v);
  }
}

struct Piece { int64_t plane, begin, end; };  // begin, end: from the tensor's start
__device__ __forceinline__ Piece piece_of(const Norm& s) {
  const int64_t plane = blockIdx.x / s.pieces, first = (int64_t)(blockIdx.x % s.pieces) * kPiece;
  const int64_t last = first + kPiece < s.n ? first + kPiece : s.n;
  return {plane, plane * s.n + first, plane * s.n + last};
}

// Block: one piece. partials: 3 floats per block.
template <class T>
__global__ void __launch_bounds__(256, 4) norm_moments_kernel(const T* __restrict__ x, float* __restrict__ partials, Norm s) {
  __shared__ float scratch[3 * kWarp];
  const Piece piece = piece_of(s);
  Moments all{0, 0, 0};
  each<T>(piece.begin, piece.end, s.packed, [&](int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::count;
    float v[N];
    load(x + i, v);
    Moments here{(float)N, 0, 0};
#pragma unroll
    for (int j = 0; j < N; ++j) here.mean += v[j];
    here.mean *= 1.0f / N;
#pragma unroll
    for (int j = 0; j < N; ++j) here.m2 += (v[j] - here.mean) * (v[j] - here.mean);
    merge(all, here);
  });
  block_merge(all, scratch);
  if (threadIdx.x == 0) {
    float* out = partials + (int64_t)blockIdx.x * 3;
    out[0] = all.count, out[1] = all.mean, out[2] = all.m2;
  }
}

// Thread 0 of the unit's first block writes what the caller and the backward need.
__device__ __forceinline__ void write_stats(const Norm& s, int64_t unit, float mean, float var, float* mean_out,
                                            float* var_out, float* stats) {
  mean_out[unit] = mean;
  var_out[unit] = var;
  stats[2 * unit] = mean;
  stats[2 * unit + 1] = rstd_of(var, s.eps);
}

// x -> y for the elements [begin, end), channel values f.
template <class T>
__device__ __forceinline__ void apply(const T* x, T* y, int64_t begin, int64_t end, const Norm& s, Affine f) {
  each<T>(begin, end, s.packed, [&](int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::count;
    float v[N];
    load(x + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float pre = (v[j] - f.m) * f.a + f.o;
      v[j] = pre > 0.0f ? pre : pre * s.slope;
    }
    store(y + i, v);
  });
}

template <class T>
__global__ void __launch_bounds__(256, 4)
    norm_apply_kernel(const T* __restrict__ x, T* __restrict__ y, const float* __restrict__ partials, float* mean_out,
                      float* var_out, float* stats, Norm s) {
  __shared__ float shared[2];
  const Piece piece = piece_of(s);
  const int64_t unit = unit_of(s, piece.plane);
  if (threadIdx.x < kWarp) {
    Moments all{0, 0, 0};
    for (int64_t t = threadIdx.x; t < s.members * s.pieces; t += kWarp) {
      const int64_t plane = plane_of(s, unit, t / s.pieces);
      const float* from = partials + (plane * s.pieces + t % s.pieces) * 3;
      merge(all, {from[0], from[1] + at(s.conv_bias, plane % s.C, 0.0f), from[2]});
    }
    warp_merge(all);
    if (threadIdx.x == 0) {
      const float var = all.m2 / all.count;
      shared[0] = all.mean, shared[1] = rstd_of(var, s.eps);
      if (piece.plane == plane_of(s, unit, 0) && blockIdx.x % s.pieces == 0)
        write_stats(s, unit, all.mean, var, mean_out, var_out, stats);
    }
  }
  __syncthreads();
  apply(x, y, piece.begin, piece.end, s, affine_of(s, piece.plane % s.C, shared[0], shared[1]));
}

// Block: one unit, kept in shared memory as fp32: exact two-pass statistics, x read once.
template <class T>
__global__ void __launch_bounds__(512)
    norm_resident_kernel(const T* __restrict__ x, T* __restrict__ y, float* mean_out, float* var_out, float* stats,
                         Norm s) {
  MF_SHARED_DYNAMIC(float, kept);
  __shared__ float scratch[kWarp];
  const int64_t unit = blockIdx.x;
  float total = 0.0f;
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p), start = plane * s.n;
    const float add = at(s.conv_bias, plane % s.C, 0.0f);
    float* row = kept + p * s.n;
    each<T>(start, start + s.n, s.packed, [&](int64_t i, auto lanes) {  // every thread meets its own elements again
      constexpr int N = decltype(lanes)::count;
      float v[N];
      load(x + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        row[i - start + j] = v[j];
        total += v[j] + add;
      }
    });
  }
  const float count = (float)(s.members * s.n), mean = block_sum(total, scratch) / count;
  float squares = 0.0f;
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p), start = plane * s.n;
    const float centre = mean - at(s.conv_bias, plane % s.C, 0.0f);
    const float* row = kept + p * s.n;
    each<T>(start, start + s.n, s.packed, [&](int64_t i, auto lanes) {
#pragma unroll
      for (int j = 0; j < decltype(lanes)::count; ++j) {
        const float d = row[i - start + j] - centre;
        squares += d * d;
      }
    });
  }
  const float var = block_sum(squares, scratch) / count, rstd = rstd_of(var, s.eps);
  if (threadIdx.x == 0) write_stats(s, unit, mean, var, mean_out, var_out, stats);
  for (int64_t p = 0; p < s.members; ++p) {
    const int64_t plane = plane_of(s, unit, p), start = plane * s.n;
    const Affine f = affine_of(s, plane % s.C, mean, rstd);
    const float* row = kept + p * s.n;
    each<T>(start, start + s.n, s.packed, [&](int64_t i, auto lanes) {
      constexpr int N = decltype(lanes)::count;
      float v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float pre = (row[i - start + j] - f.m) * f.a + f.o;
        v[j] = pre > 0.0f ? pre : pre * s.slope;
      }
      store(y + i, v);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(256, 4) affine_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, Norm s) {
  const Piece piece = piece_of(s);
  apply(x, y, piece.begin, piece.end, s, given_affine(s, piece.plane % s.C));
}

// Block: one piece. partials: sum g, sum g d and sum d with d = x - m. GIVEN: affine_act, which also gets dx = a g.
template <bool GIVEN, class T>
__global__ void __launch_bounds__(256, 4)
    norm_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ stats,
                     T* __restrict__ dx, float* __restrict__ partials, Norm s) {
  __shared__ float scratch[3 * kWarp];
  const Piece piece = piece_of(s);
  const int64_t c = piece.plane % s.C, unit = GIVEN ? 0 : unit_of(s, piece.plane);
  const Affine f = GIVEN ? given_affine(s, c) : affine_of(s, c, stats[2 * unit], stats[2 * unit + 1]);
  float sums[3] = {};
  each<T>(piece.begin, piece.end, s.packed, [&](int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::count;
    float v[N], g[N];
    load(x + i, v);
    load(dy + i, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = v[j] - f.m;
      if (!(d * f.a + f.o > 0.0f)) g[j] *= s.slope;
      sums[0] += g[j];
      sums[1] += g[j] * d;
      sums[2] += d;
      g[j] *= f.a;
    }
    if (GIVEN && dx != nullptr) store(dx + i, g);
  });
  block_sum(sums, scratch);
  if (threadIdx.x < 3) partials[(int64_t)blockIdx.x * 3 + threadIdx.x] = sums[threadIdx.x];
}

// terms (units, 2): k0, k1. dx may be null: then one block per unit's first piece has anything to do.
template <class T>
__global__ void __launch_bounds__(256, 4)
    norm_dx_kernel(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ stats,
                   const float* __restrict__ partials, T* __restrict__ dx, float* __restrict__ terms, Norm s) {
  __shared__ float shared[2];
  const Piece piece = piece_of(s);
  const int64_t unit = unit_of(s, piece.plane);
  const float mean = stats[2 * unit], rstd = stats[2 * unit + 1];
  if (threadIdx.x < kWarp) {
    float g0 = 0.0f, g1 = 0.0f;
    for (int64_t t = threadIdx.x; t < s.members * s.pieces; t += kWarp) {
      const int64_t plane = plane_of(s, unit, t / s.pieces);
      const float* from = partials + (plane * s.pieces + t % s.pieces) * 3;
      const float w = at(s.weight, plane % s.C, 1.0f);
      g0 += w * from[0];
      g1 += w * from[1];
    }
    g0 = warp_sum(g0), g1 = warp_sum(g1);
    if (threadIdx.x == 0) {
      const float inverse = 1.0f / ((float)s.members * (float)s.n);
      shared[0] = -rstd * g0 * inverse;
      shared[1] = -rstd * rstd * rstd * g1 * inverse;
      if (piece.plane == plane_of(s, unit, 0) && blockIdx.x % s.pieces == 0)
        terms[2 * unit] = shared[0], terms[2 * unit + 1] = shared[1];
    }
  }
  if (dx == nullptr) return;
  __syncthreads();
  const Affine f = affine_of(s, piece.plane % s.C, mean, rstd);
  const float k0 = shared[0], k1 = shared[1];
  each<T>(piece.begin, piece.end, s.packed, [&](int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::count;
    float v[N], g[N];
    load(x + i, v);
    load(dy + i, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = v[j] - f.m;
      if (!(d * f.a + f.o > 0.0f)) g[j] *= s.slope;
      g[j] = f.a * g[j] + k1 * d + k0;
    }
    store(dx + i, g);
  });
}

struct ChannelGradients { float *conv_bias, *mean, *var, *weight, *bias; };

// One warp per channel: sums over the batch.
template <bool GIVEN>
__global__ void __launch_bounds__(256, 4)
    norm_channels_kernel(const float* __restrict__ stats, const float* __restrict__ partials,
                         const float* __restrict__ terms, ChannelGradients to, Norm s) {
  const int64_t c = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (c >= s.C) return;  // a whole warp
  const float w = at(s.weight, c, 1.0f), given = GIVEN && s.var != nullptr ? rstd_of(s.var[c], s.eps) : 1.0f;
  float bias = 0.0f, weight = 0.0f, conv = 0.0f;
  for (int64_t t = threadIdx.x % kWarp; t < s.B * s.pieces; t += kWarp) {
    const int64_t plane = t / s.pieces * s.C + c, piece = t % s.pieces;
    const int64_t unit = GIVEN ? 0 : unit_of(s, plane);
    const float* from = partials + (plane * s.pieces + piece) * 3;
    const float rstd = GIVEN ? given : stats[2 * unit + 1];
    bias += from[0];
    weight += rstd * from[1];
    if (!GIVEN && to.conv_bias != nullptr) {
      const int64_t rest = s.n - piece * kPiece, count = rest < kPiece ? rest : kPiece;
      conv += w * rstd * from[0] + (float)count * terms[2 * unit] + terms[2 * unit + 1] * from[2];
    }
  }
  bias = warp_sum(bias), weight = warp_sum(weight), conv = warp_sum(conv);
  if (threadIdx.x % kWarp != 0) return;
  if (to.bias != nullptr) to.bias[c] = bias;
  if (to.weight != nullptr) to.weight[c] = weight;
  if (GIVEN) {
    if (to.conv_bias != nullptr) to.conv_bias[c] = w * given * bias;
    if (to.mean != nullptr) to.mean[c] = -w * given * bias;
    if (to.var != nullptr) to.var[c] = -0.5f * w * given * given * weight;
  } else if (to.conv_bias != nullptr) {
    // a constant added to a whole unit leaves with its mean
    to.conv_bias[c] = s.batch || s.members == 1 ? 0.0f : conv;
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

float* vector_of(const MaybeTensor& t, const char* name, const TensorView& x) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {x.size(1)});
  check_beside(x, t.value(), name, DType::f32);
  return data<float>(t);
}

float* floats_of(const TensorView& t, const char* name, const TensorView& x, int64_t least) {
  check_beside(x, t, name, DType::f32);
  if (t.numel() < least)
    TVM_FFI_THROW(ValueError) << name << " must have at least " << least << " elements; got " << t.numel();
  return data<float>(t);
}

void check_like(const TensorView& t, const char* name, const TensorView& x) {
  check_shape(t, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_beside(x, t, name, dtype_of(x, "x"));
}

Norm norm_of(const TensorView& x, const MaybeTensor& conv_bias, const MaybeTensor& weight, const MaybeTensor& bias,
             double eps, double slope) {
  check_ndim(x, "x", 4, "(B, C, H, W)");
  check_on_device(x, "x");
  Norm s{};
  s.B = x.size(0), s.C = x.size(1), s.n = x.size(2) * x.size(3);
  s.conv_bias = vector_of(conv_bias, "conv_bias", x);
  s.weight = vector_of(weight, "weight", x);
  s.bias = vector_of(bias, "bias", x);
  s.pieces = (int)blocks(s.n, kPiece);
  s.packed = aligned(data<const char>(x));
  s.eps = (float)eps;
  s.slope = (float)slope;
  return s;
}

void set_units(Norm& s, int64_t groups) {  // 0: batch statistics
  if (groups < 0 || (groups > 0 && s.C % groups != 0))
    TVM_FFI_THROW(ValueError) << "groups must divide the " << s.C << " channels, or be 0 for batch statistics; got "
                              << groups;
  s.batch = groups == 0;
  s.units = s.batch ? s.C : s.B * groups;
  s.members = s.batch ? s.B : s.C / groups;
}

unsigned int piece_grid(const Norm& s) { return blocks(s.B * s.C * s.pieces, 1); }
int piece_threads(const Norm& s) { return s.n <= 1024 ? 128 : 256; }

void norm_act_fwd_cuda(TensorView x, MaybeTensor conv_bias, MaybeTensor weight, MaybeTensor bias, TensorView y,
                       TensorView mean, TensorView var, TensorView stats, TensorView workspace, int64_t groups,
                       double eps, double slope) {
  Norm s = norm_of(x, conv_bias, weight, bias, eps, slope);
  set_units(s, groups);
  check_like(y, "y", x);
  s.packed = s.packed && aligned(data<const char>(y));
  if (x.numel() == 0) return;
  float *to_mean = floats_of(mean, "mean", x, s.units), *to_var = floats_of(var, "var", x, s.units);
  float* kept = floats_of(stats, "stats", x, 2 * s.units);
  float* partials = floats_of(workspace, "workspace", x, s.B * s.C * s.pieces * 3);
  const int64_t unit = s.members * s.n;
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    if (unit <= kResident && s.units >= 64) {  // fewer blocks than that would leave the GPU idle
      MF_LAUNCH(norm_resident_kernel<T>, blocks(s.units, 1), unit <= 2048 ? 128 : unit <= 8192 ? 256 : 512,
                unit * sizeof(float), current_stream(x), data<const T>(x), data<T>(y), to_mean, to_var, kept, s);
      return;
    }
    MF_LAUNCH(norm_moments_kernel<T>, piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(x), partials,
              s);
    MF_LAUNCH(norm_apply_kernel<T>, piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(x), data<T>(y),
              partials, to_mean, to_var, kept, s);
  });
}

void norm_act_bwd_cuda(TensorView dy, TensorView x, MaybeTensor conv_bias, MaybeTensor weight, MaybeTensor bias,
                       TensorView stats, MaybeTensor dx, MaybeTensor dconv_bias, MaybeTensor dweight, MaybeTensor dbias,
                       TensorView workspace, int64_t groups, double slope) {
  Norm s = norm_of(x, conv_bias, weight, bias, 0.0, slope);
  set_units(s, groups);
  check_like(dy, "dy", x);
  s.packed = s.packed && aligned(data<const char>(dy));
  if (dx.has_value()) {
    check_like(dx.value(), "dx", x);
    s.packed = s.packed && aligned(data<const char>(dx.value()));
  }
  if (x.numel() == 0) return;
  const float* kept = floats_of(stats, "stats", x, 2 * s.units);
  float* partials = floats_of(workspace, "workspace", x, s.B * s.C * s.pieces * 3 + s.units * 2);
  float* terms = partials + s.B * s.C * s.pieces * 3;
  const ChannelGradients to{vector_of(dconv_bias, "dconv_bias", x), nullptr, nullptr, vector_of(dweight, "dweight", x),
                            vector_of(dbias, "dbias", x)};
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH((norm_sums_kernel<false, T>), piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(dy),
              data<const T>(x), kept, static_cast<T*>(nullptr), partials, s);
    if (dx.has_value() || to.conv_bias != nullptr)
      MF_LAUNCH(norm_dx_kernel<T>, piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(dy),
                data<const T>(x), kept, partials, data<T>(dx), terms, s);
    if (to.conv_bias != nullptr || to.weight != nullptr || to.bias != nullptr)
      MF_LAUNCH(norm_channels_kernel<false>, blocks(s.C, 8), 256, 0, current_stream(x), kept, partials, terms, to, s);
  });
}

void affine_act_fwd_cuda(TensorView x, MaybeTensor conv_bias, MaybeTensor mean, MaybeTensor var, MaybeTensor weight,
                         MaybeTensor bias, TensorView y, double eps, double slope) {
  Norm s = norm_of(x, conv_bias, weight, bias, eps, slope);
  s.mean = vector_of(mean, "mean", x);
  s.var = vector_of(var, "var", x);
  check_like(y, "y", x);
  s.packed = s.packed && aligned(data<const char>(y));
  if (x.numel() == 0) return;
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(affine_fwd_kernel<T>, piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(x), data<T>(y),
              s);
  });
}

void affine_act_bwd_cuda(TensorView dy, TensorView x, MaybeTensor conv_bias, MaybeTensor mean, MaybeTensor var,
                         MaybeTensor weight, MaybeTensor bias, MaybeTensor dx, MaybeTensor dconv_bias,
                         MaybeTensor dmean, MaybeTensor dvar, MaybeTensor dweight, MaybeTensor dbias,
                         TensorView workspace, double eps, double slope) {
  Norm s = norm_of(x, conv_bias, weight, bias, eps, slope);
  s.mean = vector_of(mean, "mean", x);
  s.var = vector_of(var, "var", x);
  check_like(dy, "dy", x);
  s.packed = s.packed && aligned(data<const char>(dy));
  if (dx.has_value()) {
    check_like(dx.value(), "dx", x);
    s.packed = s.packed && aligned(data<const char>(dx.value()));
  }
  if (x.numel() == 0) return;
  float* partials = floats_of(workspace, "workspace", x, s.B * s.C * s.pieces * 3);
  const ChannelGradients to{vector_of(dconv_bias, "dconv_bias", x), vector_of(dmean, "dmean", x),
                            vector_of(dvar, "dvar", x), vector_of(dweight, "dweight", x), vector_of(dbias, "dbias", x)};
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH((norm_sums_kernel<true, T>), piece_grid(s), piece_threads(s), 0, current_stream(x), data<const T>(dy),
              data<const T>(x), static_cast<const float*>(nullptr), data<T>(dx), partials, s);
    if (to.conv_bias || to.mean || to.var || to.weight || to.bias)
      MF_LAUNCH(norm_channels_kernel<true>, blocks(s.C, 8), 256, 0, current_stream(x),
                static_cast<const float*>(nullptr), partials, static_cast<const float*>(nullptr), to, s);
  });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_act_fwd_cuda, mf::norm_act_fwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_act_bwd_cuda, mf::norm_act_bwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(affine_act_fwd_cuda, mf::affine_act_fwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(affine_act_bwd_cuda, mf::affine_act_bwd_cuda);
