// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// DiffAugment of csrc/cpu/augment.cpp on the device: a pass for the mean where the contrast needs it (its blocks return at
// once where the contrast is 1), then one thread per pixel that reads all channels once and writes them once. Backward
// likewise, with the mean of dy and, when asked, the sums for the gradient of the colour numbers.
#include "cuda/launch.h"
#include "cuda/planes.cuh"

namespace mf {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanPiece = 8192;   // elements of an image that one block sums
constexpr int kPixelPiece = 2048;  // pixels of an image whose gradients one block sums

struct Policy {
  const float* colour;         // (B, 3): brightness, saturation, contrast, or null
  const int *shift, *box;      // (B, 2), (B, 4) or null
  int64_t C;
  int H, W, pieces;            // pieces: partial sums per image
};

struct Image {
  float b, s, k;
  int th, tw;
  int64_t top, bottom, left, right;
};

__device__ __forceinline__ Image image_of(const Policy& p, int64_t i) {
  Image m{0.0f, 1.0f, 1.0f, 0, 0, 0, 0, 0, 0};
  if (p.colour != nullptr) m.b = p.colour[3 * i], m.s = p.colour[3 * i + 1], m.k = p.colour[3 * i + 2];
  if (p.shift != nullptr) m.th = p.shift[2 * i], m.tw = p.shift[2 * i + 1];
  if (p.box != nullptr) {
    const int* box = p.box + 4 * i;
    m.top = box[0], m.bottom = (int64_t)box[0] + box[2], m.left = box[1], m.right = (int64_t)box[1] + box[3];
  }
  return m;
}

// Whether pixel (h, w) of y shows pixel (h + th, w + tw) of the image rather than zero.
__device__ __forceinline__ bool shown(const Policy& p, const Image& m, int64_t h, int64_t w) {
  if (h < 0 || h >= p.H || w < 0 || w >= p.W) return false;
  if (h + m.th < 0 || h + m.th >= p.H || w + m.tw < 0 || w + m.tw >= p.W) return false;
  return !(h >= m.top && h < m.bottom && w >= m.left && w < m.right);
}

// Sum of an image's partial sums number `which` of `stride`; the same in every thread.
__device__ __forceinline__ float image_sum(const float* partials, const Policy& p, int64_t image, int which, int stride,
                                           float* scratch) {
  float v = 0.0f;
  for (int t = threadIdx.x; t < p.pieces; t += blockDim.x) v += partials[(image * p.pieces + t) * stride + which];
  return block_sum(v, scratch);
}

// Block: (piece, image). partials (B, pieces).
template <class T>
__global__ void __launch_bounds__(kThreads)
    augment_mean_kernel(const T* __restrict__ x, float* __restrict__ partials, Policy p, bool packed) {
  __shared__ float scratch[kWarp];
  const int64_t image = blockIdx.y, size = p.C * p.H * p.W;
  if (p.colour[3 * image + 2] == 1.0f) return;
  const int64_t begin = (int64_t)blockIdx.x * kMeanPiece, end = begin + kMeanPiece < size ? begin + kMeanPiece : size;
  float total = 0.0f;
  each<T>(image * size + begin, image * size + end, packed, [&](int64_t i, auto lanes) {
    float v[decltype(lanes)::count];
    load(x + i, v);
    for (float e : v) total += e;
  });
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) partials[image * p.pieces + blockIdx.x] = total;
}

// to[c] = a from[c] + b sum_c from[c] + add; `plane` between channels.
template <class T>
__device__ __forceinline__ void mix(const T* from, T* to, int64_t channels, int64_t plane, float a, float b, float add) {
  if (channels == 3) {
    const float r = to_float(from[0]), g = to_float(from[plane]), u = to_float(from[2 * plane]);
    const float rest = (r + g + u) * b + add;
    to[0] = from_float<T>(r * a + rest);
    to[plane] = from_float<T>(g * a + rest);
    to[2 * plane] = from_float<T>(u * a + rest);
    return;
  }
  float total = 0.0f;
  for (int64_t c = 0; c < channels; ++c) total += to_float(from[c * plane]);
  for (int64_t c = 0; c < channels; ++c)
    to[c * plane] = from_float<T>(to_float(from[c * plane]) * a + total * b + add);
}

// Block: (kThreads pixels, image).
template <class T>
__global__ void __launch_bounds__(kThreads)
    augment_fwd_kernel(const T* __restrict__ x, T* __restrict__ y, const float* __restrict__ partials, Policy p) {
  __shared__ float scratch[kWarp];
  const int64_t image = blockIdx.y, plane = (int64_t)p.H * p.W;
  const Image m = image_of(p, image);
  float add = m.b;
  if (m.k != 1.0f) add += (1.0f - m.k) * (image_sum(partials, p, image, 0, 1, scratch) / (float)(p.C * plane));
  const int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (at >= plane) return;
  x += image * p.C * plane;
  y += image * p.C * plane + at;
  const int h = (int)(at / p.W), w = (int)(at % p.W);
  if (shown(p, m, h, w)) {
    const T* from = x + (int64_t)(h + m.th) * p.W + w + m.tw;
    if (p.colour != nullptr) mix(from, y, p.C, plane, m.k * m.s, m.k * (1.0f - m.s) / (float)p.C, add);
    else for (int64_t c = 0; c < p.C; ++c) y[c * plane] = from[c * plane];
  } else {
    for (int64_t c = 0; c < p.C; ++c) y[c * plane] = from_float<T>(0.0f);
  }
}

// Block: (piece, image). partials (B, pieces, 4): sum g; and with COLOUR sum g x, sum g mu(x), sum x.
template <bool COLOUR, class T>
__global__ void __launch_bounds__(kThreads, 3)
    augment_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, float* __restrict__ partials, Policy p) {
  __shared__ float scratch[4 * kWarp];
  const int64_t image = blockIdx.y, plane = (int64_t)p.H * p.W;
  const Image m = image_of(p, image);
  if (!COLOUR && m.k == 1.0f) return;
  dy += image * p.C * plane;
  x += image * p.C * plane;
  const int64_t begin = (int64_t)blockIdx.x * kPixelPiece, end = begin + kPixelPiece < plane ? begin + kPixelPiece : plane;
  float s[4] = {};
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    const int h = (int)(at / p.W), w = (int)(at % p.W);
    if (COLOUR)
      for (int64_t c = 0; c < p.C; ++c) s[3] += to_float(x[c * plane + at]);
    if (!shown(p, m, h, w)) continue;
    const int64_t from = (int64_t)(h + m.th) * p.W + w + m.tw;
    float sum_g = 0.0f, sum_x = 0.0f;
    for (int64_t c = 0; c < p.C; ++c) {
      const float g = to_float(dy[c * plane + at]);
      sum_g += g;
      if (COLOUR) {
        const float v = to_float(x[c * plane + from]);
        sum_x += v;
        s[1] += g * v;
      }
    }
    s[0] += sum_g;
    if (COLOUR) s[2] += sum_g * sum_x / (float)p.C;
  }
  block_sum(s, scratch);
  if (threadIdx.x < 4) partials[(image * p.pieces + blockIdx.x) * 4 + threadIdx.x] = s[threadIdx.x];
}

// Block: (kThreads pixels of dx, image); dx may be null, then one block per image.
template <class T>
__global__ void __launch_bounds__(kThreads)
    augment_bwd_kernel(const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ dcolour,
                       const float* __restrict__ partials, Policy p) {
  __shared__ float scratch[kWarp];
  const int64_t image = blockIdx.y, plane = (int64_t)p.H * p.W;
  const Image m = image_of(p, image);
  const float size = (float)(p.C * plane);
  const bool sums = dcolour != nullptr || m.k != 1.0f;
  const float g = sums ? image_sum(partials, p, image, 0, 4, scratch) : 0.0f;
  if (dcolour != nullptr && blockIdx.x == 0) {
    const float gx = image_sum(partials, p, image, 1, 4, scratch), gmu = image_sum(partials, p, image, 2, 4, scratch);
    const float mean = image_sum(partials, p, image, 3, 4, scratch) / size;
    if (threadIdx.x == 0) {
      dcolour[3 * image] = g;
      dcolour[3 * image + 1] = m.k * (gx - gmu);
      dcolour[3 * image + 2] = m.s * gx + (1.0f - m.s) * gmu - mean * g;
    }
  }
  const int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (at >= plane || dx == nullptr) return;
  dy += image * p.C * plane;
  dx += image * p.C * plane + at;
  const float even = m.k == 1.0f ? 0.0f : (1.0f - m.k) * (g / size);
  const int64_t h = at / p.W - m.th, w = at % p.W - m.tw;
  if (shown(p, m, h, w)) {
    const T* from = dy + h * p.W + w;
    if (p.colour != nullptr) mix(from, dx, p.C, plane, m.k * m.s, m.k * (1.0f - m.s) / (float)p.C, even);
    else for (int64_t c = 0; c < p.C; ++c) dx[c * plane] = from[c * plane];
  } else {
    for (int64_t c = 0; c < p.C; ++c) dx[c * plane] = from_float<T>(even);
  }
}

const int* integers(const MaybeTensor& t, const char* name, const TensorView& x, int64_t columns) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {x.size(0), columns});
  check_beside(x, t.value(), name);
  const DLDataType d = t.value().dtype();
  if (d.code != kDLInt || d.bits != 32) TVM_FFI_THROW(TypeError) << name << " must be int32";
  return data<const int>(t);
}

float* floats(const MaybeTensor& t, const char* name, const TensorView& x) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {x.size(0), 3});
  check_beside(x, t.value(), name, DType::f32);
  return data<float>(t);
}

void check_like(const TensorView& t, const char* name, const TensorView& x) {
  check_shape(t, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_beside(x, t, name, dtype_of(x, "x"));
}

// per_image: elements of an image over which sums are taken, `piece` to a block.
Policy policy_of(const TensorView& x, const MaybeTensor& colour, const MaybeTensor& shift, const MaybeTensor& box) {
  check_ndim(x, "x", 4, "(B, C, H, W)");
  check_on_device(x, "x");
  if (x.size(0) > 65535) TVM_FFI_THROW(ValueError) << "a batch of " << x.size(0) << " exceeds a grid's second dimension";
  if (x.size(2) > 0x7ffffff || x.size(3) > 0x7ffffff) TVM_FFI_THROW(ValueError) << "an image side exceeds 2^27";
  return {floats(colour, "colour", x), integers(shift, "shift", x, 2), integers(box, "box", x, 4),
          x.size(1), (int)x.size(2), (int)x.size(3), 0};
}

float* workspace_of(const TensorView& t, const TensorView& x, int64_t floats) {
  check_beside(x, t, "workspace", DType::f32);
  if (t.numel() < floats)
    TVM_FFI_THROW(ValueError) << "workspace must have at least " << floats << " elements; got " << t.numel();
  return data<float>(t);
}

void diff_augment_fwd_cuda(TensorView x, MaybeTensor colour, MaybeTensor shift, MaybeTensor box, TensorView y,
                           TensorView workspace) {
  Policy p = policy_of(x, colour, shift, box);
  check_like(y, "y", x);
  if (x.numel() == 0) return;
  const int64_t B = x.size(0), plane = x.size(2) * x.size(3);
  p.pieces = (int)blocks(p.C * plane, kMeanPiece);
  float* partials = workspace_of(workspace, x, B * p.pieces);
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    if (p.colour != nullptr)
      MF_LAUNCH(augment_mean_kernel<T>, dim3(p.pieces, (unsigned)B), kThreads, 0, current_stream(x), data<const T>(x),
                partials, p, aligned(data<const T>(x)));
    MF_LAUNCH(augment_fwd_kernel<T>, dim3(blocks(plane, kThreads), (unsigned)B), kThreads, 0, current_stream(x),
              data<const T>(x), data<T>(y), partials, p);
  });
}

void diff_augment_bwd_cuda(TensorView dy, TensorView x, MaybeTensor colour, MaybeTensor shift, MaybeTensor box,
                           MaybeTensor dx, MaybeTensor dcolour, TensorView workspace) {
  Policy p = policy_of(x, colour, shift, box);
  check_like(dy, "dy", x);
  if (dx.has_value()) check_like(dx.value(), "dx", x);
  if (x.numel() == 0) return;
  const int64_t B = x.size(0), plane = x.size(2) * x.size(3);
  p.pieces = (int)blocks(plane, kPixelPiece);
  float *partials = workspace_of(workspace, x, B * p.pieces * 4), *colour_gradient = floats(dcolour, "dcolour", x);
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    const dim3 grid(p.pieces, (unsigned)B);
    if (colour_gradient != nullptr)
      MF_LAUNCH((augment_sums_kernel<true, T>), grid, kThreads, 0, current_stream(x), data<const T>(dy),
                data<const T>(x), partials, p);
    else if (p.colour != nullptr)
      MF_LAUNCH((augment_sums_kernel<false, T>), grid, kThreads, 0, current_stream(x), data<const T>(dy),
                data<const T>(x), partials, p);
    MF_LAUNCH(augment_bwd_kernel<T>, dim3(dx.has_value() ? blocks(plane, kThreads) : 1, (unsigned)B), kThreads, 0,
              current_stream(x), data<const T>(dy), data<T>(dx), colour_gradient, partials, p);
  });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(diff_augment_fwd_cuda, mf::diff_augment_fwd_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(diff_augment_bwd_cuda, mf::diff_augment_bwd_cuda);
