// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The blur of csrc/cpu/blur.cpp on the device: down and up are gathers. One thread makes one column of kRows results; it
// filters each source row once along the row (neighbours come from L1) and keeps the last three of them.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace mf {
namespace {

struct Shape {
  int64_t planes;
  int H, W, Ho, Wo;  // the large side and the blurred one
  int stride, pad0, pad1, reflect;
  float gain;
};

constexpr int kRows = 8;
constexpr int kColumns = 64;  // threads of a block

// Where padded position p (0 is the first element) reads from, -1: zero.
__device__ __forceinline__ int source_of(int p, int size, int reflect) {
  if (p >= 0 && p < size) return p;
  if (!reflect) return -1;
  return p < 0 ? -p : 2 * (size - 1) - p;
}

// Row p of padded x, filtered for column j of the result.
template <class T> __device__ __forceinline__ float down_row(const T* x, const Shape& s, int p, int j) {
  const int r = source_of(p, s.H, s.reflect);
  if (r < 0) return 0.0f;
  const T* row = x + (int64_t)r * s.W;
  float tap[3];
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    const int c = source_of(j * s.stride + t - s.pad0, s.W, s.reflect);
    tap[t] = c < 0 ? 0.0f : to_float(row[c]);
  }
  return 0.25f * (tap[0] + tap[2]) + 0.5f * tap[1];
}

// Block: (tile of columns, tile of rows, plane) in blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kColumns) blur_down_kernel(const T* __restrict__ x, T* __restrict__ y, Shape s) {
  const int across = (s.Wo + kColumns - 1) / kColumns, tiles = across * ((s.Ho + kRows - 1) / kRows);
  const int64_t plane = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, j = tile % across * kColumns + (int)threadIdx.x, first = tile / across * kRows;
  if (j >= s.Wo) return;
  x += plane * s.H * s.W;
  y += plane * s.Ho * s.Wo;
  int next = first * s.stride - s.pad0;
  float a = 0.0f, b = 0.0f, c = down_row(x, s, next++, j);  // of the last rows read, c the newest
  if (s.stride == 1) b = c, c = down_row(x, s, next++, j);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= s.Ho) return;
    if (s.stride == 1) {
      a = b, b = c, c = down_row(x, s, next++, j);
    } else {
      a = c, b = down_row(x, s, next++, j), c = down_row(x, s, next++, j);
    }
    y[(int64_t)(first + r) * s.Wo + j] = from_float<T>(s.gain * (0.25f * (a + c) + 0.5f * b));
  }
}

// What the elements of `row` that read padded column p give it.
template <class T> __device__ __forceinline__ float up_column(const T* row, const Shape& s, int p) {
  const int at = p + s.pad0;  // in the padded row, read by results at - 2 .. at over the stride
  if (s.stride == 1) {
    const float left = at >= 2 && at - 2 < s.Wo ? to_float(row[at - 2]) : 0.0f;
    const float middle = at >= 1 && at - 1 < s.Wo ? to_float(row[at - 1]) : 0.0f;
    const float right = at < s.Wo ? to_float(row[at]) : 0.0f;
    return 0.25f * (left + right) + 0.5f * middle;
  }
  const int i = at / 2;
  const float here = i < s.Wo ? to_float(row[i]) : 0.0f;
  if (at % 2) return 0.5f * here;
  return 0.25f * (here + (i >= 1 && i - 1 < s.Wo ? to_float(row[i - 1]) : 0.0f));
}

// Row i of y (zero outside), gathered for column c of the result.
template <class T> __device__ __forceinline__ float up_row(const T* y, const Shape& s, int i, int c) {
  if (i < 0 || i >= s.Ho) return 0.0f;
  const T* row = y + (int64_t)i * s.Wo;
  float v = up_column(row, s, c);
  if (s.reflect) {
    if (c > 0 && c <= s.pad0) v += up_column(row, s, -c);
    if (c < s.W - 1 && s.W - 1 - c <= s.pad1) v += up_column(row, s, 2 * (s.W - 1) - c);
  }
  return v;
}

// The rows that a mirror image p of this row was read by.
template <class T> __device__ float mirrored(const T* y, const Shape& s, int p, int c) {
  const int at = p + s.pad0;
  if (s.stride == 1)
    return 0.25f * (up_row(y, s, at, c) + up_row(y, s, at - 2, c)) + 0.5f * up_row(y, s, at - 1, c);
  if (at % 2) return 0.5f * up_row(y, s, at / 2, c);
  return 0.25f * (up_row(y, s, at / 2, c) + up_row(y, s, at / 2 - 1, c));
}

template <class T>
__global__ void __launch_bounds__(kColumns) blur_up_kernel(const T* __restrict__ y, T* __restrict__ x, Shape s) {
  const int across = (s.W + kColumns - 1) / kColumns, tiles = across * ((s.H + kRows - 1) / kRows);
  const int64_t plane = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, j = tile % across * kColumns + (int)threadIdx.x, first = tile / across * kRows;
  if (j >= s.W) return;
  y += plane * s.Ho * s.Wo;
  x += plane * s.H * s.W;
  int newest = (first + s.pad0) / s.stride;
  float a = s.stride == 1 ? up_row(y, s, newest - 2, j) : 0.0f, b = up_row(y, s, newest - 1, j);
  float c = up_row(y, s, newest, j);
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int r = first + k, at = r + s.pad0;
    if (r >= s.H) return;
    if (at / s.stride > newest) a = b, b = c, c = up_row(y, s, ++newest, j);
    float v = s.stride == 1 ? 0.25f * (a + c) + 0.5f * b : at % 2 ? 0.5f * c : 0.25f * (b + c);
    if (s.reflect) {
      if (r > 0 && r <= s.pad0) v += mirrored(y, s, -r, j);
      if (r < s.H - 1 && s.H - 1 - r <= s.pad1) v += mirrored(y, s, 2 * (s.H - 1) - r, j);
    }
    x[(int64_t)r * s.W + j] = from_float<T>(s.gain * v);
  }
}

Shape shape_of(const TensorView& large, const TensorView& small, int64_t stride, int64_t pad0, int64_t pad1,
               int64_t reflect, double gain) {
  check_ndim(large, "the large side", 4, "(B, C, H, W)");
  const int64_t H = large.size(2), W = large.size(3), most = pad0 > pad1 ? pad0 : pad1;
  if (stride < 1 || stride > 2 || pad0 < 0 || pad1 < 0 || most > 2)
    TVM_FFI_THROW(ValueError) << "stride must be 1 or 2 and the paddings 0 to 2; got " << stride << ", " << pad0 << ", "
                              << pad1;
  if (H > 0x7ffffff || W > 0x7ffffff || H + pad0 + pad1 < 3 || W + pad0 + pad1 < 3 || (reflect && (H <= most || W <= most)))
    TVM_FFI_THROW(ValueError) << "a plane of " << H << " x " << W << " does not fit this padding";
  const int64_t Ho = (H + pad0 + pad1 - 3) / stride + 1, Wo = (W + pad0 + pad1 - 3) / stride + 1;
  check_beside(large, small, "the small side", check_on_device(large, "the large side"));
  check_shape(small, "the small side", {large.size(0), large.size(1), Ho, Wo});
  return {large.size(0) * large.size(1), (int)H, (int)W, (int)Ho, (int)Wo, (int)stride, (int)pad0, (int)pad1,
          (int)reflect, (float)gain};
}

int64_t tiles(int64_t planes, int64_t height, int64_t width) {
  return planes * ((width + kColumns - 1) / kColumns) * ((height + kRows - 1) / kRows);
}

void blur_down_cuda(TensorView x, TensorView y, int64_t stride, int64_t pad0, int64_t pad1, int64_t reflect,
                    double gain) {
  const Shape s = shape_of(x, y, stride, pad0, pad1, reflect, gain);
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(blur_down_kernel<T>, blocks(tiles(s.planes, s.Ho, s.Wo), 1), kColumns, 0, current_stream(x),
              data<const T>(x), data<T>(y), s);
  });
}

void blur_up_cuda(TensorView y, TensorView x, int64_t stride, int64_t pad0, int64_t pad1, int64_t reflect, double gain) {
  const Shape s = shape_of(x, y, stride, pad0, pad1, reflect, gain);
  DeviceGuard guard(x);
  with_type(dtype_of(x, "x"), [&](auto t) {
    using T = decltype(t);
    MF_LAUNCH(blur_up_kernel<T>, blocks(tiles(s.planes, s.H, s.W), 1), kColumns, 0, current_stream(x),
              data<const T>(y), data<T>(x), s);
  });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(blur_down_cuda, mf::blur_down_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(blur_up_cuda, mf::blur_up_cuda);
