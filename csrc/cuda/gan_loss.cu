// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The adversarial losses of csrc/cpu/gan_loss.cpp on the device. A PatchGAN has 10^4 logits: one block sums them in one
// launch, in double (their mean may be close to zero), in one fixed order; the gradients of real and fake are one launch too.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace mf {
namespace {

enum Kind { kHinge, kSoftplus, kLinear };

constexpr int kSumThreads = 1024;

__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }  // a NaN stays

// The loss of v, which is to become small, and its slope.
__device__ __forceinline__ float loss_of(float v, int kind, float& slope) {
  if (kind == kLinear) {
    slope = 1.0f;
    return v;
  }
  if (kind == kHinge) {
    slope = 1.0f + v > 0.0f ? 1.0f : 0.0f;
    return relu(1.0f + v);
  }
  const float u = expf(-fabsf(v));
  slope = (v < 0.0f ? u : 1.0f) / (1.0f + u);
  return relu(v) + log1pf(u);
}

// Sums of loss, relu^2, logit and relu of one tensor, the same in every thread.
template <class T>
__device__ __forceinline__ void sums(const T* logits, int64_t count, float sign, int kind, bool lecam, float pivot,
                                     double (&s)[4], double* scratch) {
  s[0] = s[1] = s[2] = s[3] = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const float logit = to_float(logits[i]);
    float slope;
    s[0] += loss_of(sign * logit, kind, slope);
    s[2] += logit;
    if (lecam) {
      const float r = relu((pivot - logit) * sign);
      s[1] += r * r;
      s[3] += r;
    }
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    s[t] = warp_sum(s[t]);
    if (lane == 0) scratch[t * kWarp + warp] = s[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 4; ++t) s[t] = warp_sum(scratch[t * kWarp + lane]);  // kSumThreads: 32 warps
  __syncthreads();
}

// ema: (mean of real, mean of fake) or null. slopes: mean relu(r - ema_fake), mean relu(ema_real - f).
template <class T>
__global__ void __launch_bounds__(kSumThreads, 1)
    discriminator_loss_fwd_kernel(const T* __restrict__ real, const T* __restrict__ fake, const float* __restrict__ ema,
                                  float* adversarial, float* lecam, float* mean_real, float* mean_fake, float* slopes,
                                  int64_t reals, int64_t fakes, int kind) {
  __shared__ double scratch[4 * kWarp];
  const bool regular = ema != nullptr;
  double r[4], f[4];
  sums(real, reals, -1.0f, kind, regular, regular ? ema[1] : 0.0f, r, scratch);
  sums(fake, fakes, 1.0f, kind, regular, regular ? ema[0] : 0.0f, f, scratch);
  if (threadIdx.x != 0) return;
  const double nr = (double)reals, nf = (double)fakes;
  *adversarial = (float)(0.5 * (r[0] / nr + f[0] / nf));
  *lecam = (float)(r[1] / nr + f[1] / nf);
  *mean_real = (float)(r[2] / nr);
  *mean_fake = (float)(f[2] / nf);
  slopes[0] = (float)(r[3] / nr);
  slopes[1] = (float)(f[3] / nf);
}

// One thread per logit, real ones first; the first thread also writes the gradient of ema.
template <class T>
__global__ void discriminator_loss_bwd_kernel(const float* __restrict__ d_adversarial, const float* __restrict__ d_lecam,
                                              const float* __restrict__ d_mean_real,
                                              const float* __restrict__ d_mean_fake, const T* __restrict__ real,
                                              const T* __restrict__ fake, const float* __restrict__ ema,
                                              const float* __restrict__ slopes, T* dreal, T* dfake, float* dema,
                                              int64_t reals, int64_t fakes, int kind) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0 && dema != nullptr) {
    dema[0] = 2.0f * *d_lecam * slopes[1];
    dema[1] = -2.0f * *d_lecam * slopes[0];
  }
  const bool is_real = i < reals;
  const int64_t at = is_real ? i : i - reals;
  T* out = is_real ? dreal : dfake;
  if (at >= (is_real ? reals : fakes) || out == nullptr) return;
  const float sign = is_real ? -1.0f : 1.0f, share = 1.0f / (float)(is_real ? reals : fakes);
  const float logit = to_float(is_real ? real[at] : fake[at]);
  float slope;
  loss_of(sign * logit, kind, slope);
  float g = (0.5f * *d_adversarial * sign * slope + (is_real ? *d_mean_real : *d_mean_fake)) * share;
  if (ema != nullptr) g -= 2.0f * *d_lecam * share * sign * relu((ema[is_real ? 1 : 0] - logit) * sign);
  out[at] = from_float<T>(g);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads, 1)
    generator_loss_fwd_kernel(const T* __restrict__ fake, float* loss, int64_t count, int kind) {
  __shared__ double scratch[4 * kWarp];
  double s[4];
  sums(fake, count, -1.0f, kind, false, 0.0f, s, scratch);
  if (threadIdx.x == 0) *loss = (float)(s[0] / (double)count);
}

template <class T>
__global__ void generator_loss_bwd_kernel(const float* __restrict__ dloss, const T* __restrict__ fake,
                                          T* __restrict__ dfake, int64_t count, int kind) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float slope;
  loss_of(-to_float(fake[i]), kind, slope);
  dfake[i] = from_float<T>(-*dloss * slope / (float)count);
}

float* scalars(const MaybeTensor& t, const char* name, int64_t count, const TensorView& first) {
  if (!t.has_value()) return nullptr;
  check_beside(first, t.value(), name, DType::f32);
  if (t.value().numel() != count)
    TVM_FFI_THROW(ValueError) << name << " must have " << count << " elements; got " << shape_text(t.value());
  return data<float>(t);
}

template <class T> T* like(const MaybeTensor& t, const char* name, const TensorView& logits) {
  if (!t.has_value()) return nullptr;
  check_beside(logits, t.value(), name, dtype_of(logits, "the logits"));
  if (t.value().numel() != logits.numel())
    TVM_FFI_THROW(ValueError) << name << " must have " << logits.numel() << " elements; got " << shape_text(t.value());
  return data<T>(t);
}

// The element type of the logits, none of which may be missing.
DType check_logits(const TensorView& real, const TensorView& fake, int64_t kind) {
  const DType type = check_on_device(real, "real");
  check_beside(real, fake, "fake", type);
  if (real.numel() == 0 || fake.numel() == 0) TVM_FFI_THROW(ValueError) << "the logits must not be empty";
  if (kind < kHinge || kind > kLinear) TVM_FFI_THROW(ValueError) << "kind must be 0, 1 or 2; got " << kind;
  return type;
}

void discriminator_loss_fwd_cuda(TensorView real, TensorView fake, MaybeTensor ema, TensorView adversarial,
                                 TensorView lecam, TensorView mean_real, TensorView mean_fake, TensorView slopes,
                                 int64_t kind) {
  const DType type = check_logits(real, fake, kind);
  DeviceGuard guard(real);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(discriminator_loss_fwd_kernel<T>, 1, kSumThreads, 0, current_stream(real), data<const T>(real),
              data<const T>(fake), scalars(ema, "ema", 2, real), scalars(adversarial, "adversarial", 1, real),
              scalars(lecam, "lecam", 1, real), scalars(mean_real, "mean_real", 1, real),
              scalars(mean_fake, "mean_fake", 1, real), scalars(slopes, "slopes", 2, real), real.numel(), fake.numel(),
              kind);
  });
}

void discriminator_loss_bwd_cuda(TensorView d_adversarial, TensorView d_lecam, TensorView d_mean_real,
                                 TensorView d_mean_fake, TensorView real, TensorView fake, MaybeTensor ema,
                                 TensorView slopes, MaybeTensor dreal, MaybeTensor dfake, MaybeTensor dema,
                                 int64_t kind) {
  const DType type = check_logits(real, fake, kind);
  DeviceGuard guard(real);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(discriminator_loss_bwd_kernel<T>, blocks(real.numel() + fake.numel(), 256), 256, 0, current_stream(real),
              scalars(d_adversarial, "d_adversarial", 1, real), scalars(d_lecam, "d_lecam", 1, real),
              scalars(d_mean_real, "d_mean_real", 1, real), scalars(d_mean_fake, "d_mean_fake", 1, real),
              data<const T>(real), data<const T>(fake), scalars(ema, "ema", 2, real), scalars(slopes, "slopes", 2, real),
              like<T>(dreal, "dreal", real), like<T>(dfake, "dfake", fake), scalars(dema, "dema", 2, real),
              real.numel(), fake.numel(), kind);
  });
}

void generator_loss_fwd_cuda(TensorView fake, TensorView loss, int64_t kind) {
  const DType type = check_logits(fake, fake, kind);
  DeviceGuard guard(fake);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(generator_loss_fwd_kernel<T>, 1, kSumThreads, 0, current_stream(fake), data<const T>(fake),
              scalars(loss, "loss", 1, fake), fake.numel(), kind);
  });
}

void generator_loss_bwd_cuda(TensorView dloss, TensorView fake, TensorView dfake, int64_t kind) {
  const DType type = check_logits(fake, fake, kind);
  DeviceGuard guard(fake);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(generator_loss_bwd_kernel<T>, blocks(fake.numel(), 256), 256, 0, current_stream(fake),
              scalars(dloss, "dloss", 1, fake), data<const T>(fake), like<T>(dfake, "dfake", fake), fake.numel(), kind);
  });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(discriminator_loss_fwd_cuda, mf::discriminator_loss_fwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(discriminator_loss_bwd_cuda, mf::discriminator_loss_bwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(generator_loss_fwd_cuda, mf::generator_loss_fwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(generator_loss_bwd_cuda, mf::generator_loss_bwd_cuda);
