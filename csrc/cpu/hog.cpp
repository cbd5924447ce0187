// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// HOG features (kernels/hog.py has the definition): pixels -> (B, tokens, 3 * 9 * (patch / 8)^2), cells of 8 x 8 pixels.
//
// One pass. A thread takes cell rows (image, channel, 8 rows) and keeps the 10 pixel rows around one as fp32, reflected at
// both ends, in a ring that lies in L1. Along it go vectors of W columns, 8 rows down, with everything in registers: the
// three shifted vectors of three rows, hence both Sobel sums, and nine accumulators, one a bin. A pixel's magnitude goes
// to the accumulator of its bin by a masked addition; the columns' window weights and the sums over 8 columns come once
// per cell.
//
// The bin needs no arctangent. With (X, Y) = (gx, gy) or (-gx, -gy), whichever has X >= 0 (and Y >= 0 where X = 0), the
// phase lies in [0, pi) and reaches k pi / 9 where X cot(k pi / 9) >= Y: nested conditions, because a rounded product is
// still monotone in cot, and cot(pi - t) = -cot(t) leaves four products for eight edges. Every comparison with a NaN is
// false, so NaN goes to bin 0 and from there into the cell's norm.

#include "cpu/types.h"

namespace mf {

struct HogArgs {
  const void* image;  // (planes, H, W), planes = 3 B
  float* out;         // (B, H / patch * W / patch, 3 * 9 * (patch / 8)^2)
  bool is_u8;
  DType type;  // unless is_u8
  int64_t planes, H, W, patch;
  float eps;
  float* weights;  // (patch,): the window is weights[y] * weights[x]
  float* rows;     // kHogRows * hog_stride(W) floats per thread
};

constexpr int kCell = 8, kBins = 9;
constexpr int64_t kHogRows = kCell + 2, kHogPad = 16;  // 64 bytes in front of a row: pixels aligned, room for the reflection
constexpr int64_t hog_stride(int64_t width) { return (width + 2 * kHogPad + 15) / 16 * 16; }

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// cot(k pi / 9), k = 1 .. 4
constexpr float kCot1 = 2.7474774194546216f, kCot2 = 1.1917535925942100f;
constexpr float kCot3 = 0.5773502691896258f, kCot4 = 0.1763269807084650f;

#ifdef MF_AVX512
typedef __mmask16 Lanes;
MF_INLINE Lanes at_least(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
MF_INLINE Lanes is_zero(vf a) { return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_EQ_OQ); }
MF_INLINE vf add_where(vf sum, Lanes m, vf v) { return (vf)_mm512_mask_add_ps((__m512)sum, m, (__m512)sum, (__m512)v); }
MF_INLINE vf choose(Lanes m, vf yes, vf no) { return (vf)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes); }
#else
typedef vi Lanes;
MF_INLINE Lanes at_least(vf a, vf b) { return a >= b; }
MF_INLINE Lanes is_zero(vf a) { return a == (vf){}; }
MF_INLINE vf add_where(vf sum, Lanes m, vf v) { return sum + (vf)((vi)v & m); }
MF_INLINE vf choose(Lanes m, vf yes, vf no) { return (vf)(((vi)yes & m) | ((vi)no & ~m)); }
#endif

// One pixel row as fp32 with its neighbours by reflection at [-1] and [width].
template <class T> MF_INLINE void fetch(const T* source, int64_t width, float* row) {
  each(width, [&](int64_t i, auto k) { store(row + i, load(source + i, k), k); });
  row[-1] = row[1];
  row[width] = row[width - 2];
}
MF_INLINE void fetch(const uint8_t* source, int64_t width, float* row) {
  for (int64_t i = 0; i < width; ++i) row[i] = source[i];
  row[-1] = row[1];
  row[width] = row[width - 2];
}

// Adds the magnitudes of W pixels, gradients gx and gy, to the accumulators of their bins.
MF_INLINE void add_pixels(vf gx, vf gy, vf weight, vf* acc) {
  const vu sign = splat_u(0x80000000u);
  const vf magnitude = root(gx * gx + gy * gy) * weight;
  const vf X = (vf)((vu)gx & ~sign);
  const vf Y = choose(is_zero(gx), (vf)((vu)gy & ~sign), (vf)((vu)gy ^ ((vu)gx & sign)));
  const vf minus = (vf)((vu)Y ^ sign);
  const vf t1 = X * kCot1, t2 = X * kCot2, t3 = X * kCot3, t4 = X * kCot4;
  const Lanes k1 = at_least(t1, Y), k2 = at_least(t2, Y), k3 = at_least(t3, Y), k4 = at_least(t4, Y);
  const Lanes k5 = at_least(minus, t4), k6 = at_least(minus, t3), k7 = at_least(minus, t2), k8 = at_least(minus, t1);
  acc[0] = add_where(acc[0], ~k1, magnitude);
  acc[1] = add_where(acc[1], k1 & ~k2, magnitude);
  acc[2] = add_where(acc[2], k2 & ~k3, magnitude);
  acc[3] = add_where(acc[3], k3 & ~k4, magnitude);
  acc[4] = add_where(acc[4], k4 & ~k5, magnitude);
  acc[5] = add_where(acc[5], k5 & ~k6, magnitude);
  acc[6] = add_where(acc[6], k6 & ~k7, magnitude);
  acc[7] = add_where(acc[7], k7 & ~k8, magnitude);
  acc[8] = add_where(acc[8], k8, magnitude);
}

// The accumulators of W columns from x on, over the 8 rows between rows[0] and rows[9].
MF_INLINE void gather(const float* const* rows, const float* weights, int64_t x, vf* acc) {
  for (int b = 0; b < kBins; ++b) acc[b] = (vf){};
  vf l0 = load(rows[0] + x - 1, Full{}), c0 = load(rows[0] + x, Full{}), r0 = load(rows[0] + x + 1, Full{});
  vf l1 = load(rows[1] + x - 1, Full{}), c1 = load(rows[1] + x, Full{}), r1 = load(rows[1] + x + 1, Full{});
#pragma GCC unroll 8
  for (int y = 0; y < kCell; ++y) {
    const float* next = rows[y + 2] + x;
    const vf l2 = load(next - 1, Full{}), c2 = load(next, Full{}), r2 = load(next + 1, Full{});
    // Differences of pixels first: exact where neighbours are alike, so that flat directions give zeros.
    const vf gx = ((l0 - r0) + (l2 - r2)) + 2.0f * (l1 - r1);
    const vf gy = ((l0 - l2) + (r0 - r2)) + 2.0f * (c0 - c2);
    add_pixels(gx, gy, splat(weights[y]), acc);
    l0 = l1, c0 = c1, r0 = r1, l1 = l2, c1 = c2, r1 = r2;
  }
}

// A cell's nine sums, L2-normalised, to out[bin * stride]. A norm that is not finite makes all nine NaN.
MF_INLINE void finish(const float* sums, float eps, int64_t stride, float* out) {
  float squares = 0.0f;
  for (int b = 0; b < kBins; ++b) squares += sums[b] * sums[b];
  float norm = __builtin_sqrtf(squares);
  norm = norm - norm == 0.0f ? (norm > eps ? norm : eps) : __builtin_nanf("");
  for (int b = 0; b < kBins; ++b) out[b * stride] = sums[b] / norm;
}

#ifdef MF_AVX512
// (a0, .., a15), .., (d0, .., d15) -> in each 128-bit lane the lane's sums of a, b, c and d
MF_INLINE __m512 lane_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

// Two cells at a time: columns [x, x + 8) and [x + 8, x + 16).
MF_INLINE void cells(const float* const* rows, const HogArgs& a, const float* wy, int64_t x, int64_t stride, float* out0,
                     float* out1) {
  vf acc[kBins];
  gather(rows, wy, x, acc);
  const vf wx = load(a.weights + x % a.patch, Full{});
  for (int b = 0; b < kBins; ++b) acc[b] *= wx;
  const __m512 zero = _mm512_setzero_ps();
  __m512 low = lane_sums((__m512)acc[0], (__m512)acc[1], (__m512)acc[2], (__m512)acc[3]);
  __m512 high = lane_sums((__m512)acc[4], (__m512)acc[5], (__m512)acc[6], (__m512)acc[7]);
  __m512 last = lane_sums((__m512)acc[8], zero, zero, zero);
  low = _mm512_add_ps(low, _mm512_shuffle_f32x4(low, low, 0xb1));  // lanes 0 and 1: the first cell, 2 and 3: the second
  high = _mm512_add_ps(high, _mm512_shuffle_f32x4(high, high, 0xb1));
  last = _mm512_add_ps(last, _mm512_shuffle_f32x4(last, last, 0xb1));
  __m512 squares = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, _mm512_mul_ps(last, last)));
  squares = _mm512_add_ps(squares, _mm512_permute_ps(squares, 0xb1));
  squares = _mm512_add_ps(squares, _mm512_permute_ps(squares, 0x4e));
  __m512 norm = _mm512_sqrt_ps(squares);
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(norm, norm), zero, _CMP_EQ_OQ);
  norm = _mm512_mask_max_ps(_mm512_set1_ps(__builtin_nanf("")), finite, norm, _mm512_set1_ps(a.eps));
  low = _mm512_div_ps(low, norm), high = _mm512_div_ps(high, norm), last = _mm512_div_ps(last, norm);
  float sums[2][12];
  _mm_storeu_ps(sums[0], _mm512_castps512_ps128(low));
  _mm_storeu_ps(sums[0] + 4, _mm512_castps512_ps128(high));
  _mm_storeu_ps(sums[0] + 8, _mm512_castps512_ps128(last));
  _mm_storeu_ps(sums[1], _mm512_extractf32x4_ps(low, 2));
  _mm_storeu_ps(sums[1] + 4, _mm512_extractf32x4_ps(high, 2));
  _mm_storeu_ps(sums[1] + 8, _mm512_extractf32x4_ps(last, 2));
  for (int b = 0; b < kBins; ++b) out0[b * stride] = sums[0][b], out1[b * stride] = sums[1][b];
}
#else
MF_INLINE void cells(const float* const* rows, const HogArgs& a, const float* wy, int64_t x, int64_t stride, float* out0,
                     float* out1) {
  float sums[2][kBins] = {};
  for (int i = 0; i < 2 * kCell; i += W) {
    vf acc[kBins];
    gather(rows, wy, x + i, acc);
    const vf wx = load(a.weights + (x + i) % a.patch, Full{});
    for (int b = 0; b < kBins; ++b) sums[i / kCell][b] += sum(acc[b] * wx);
  }
  finish(sums[0], a.eps, stride, out0);
  finish(sums[1], a.eps, stride, out1);
}
#endif

template <class T> static void forward(const HogArgs& a) {
  const int64_t cell_rows = a.H / kCell, across = a.patch / kCell, per_row = a.W / a.patch;
  const int64_t per_bin = across * across, width = 3 * kBins * per_bin, stride = hog_stride(a.W);
#pragma omp parallel if (a.planes * a.H * a.W > kSerial)
  {
    float* ring = a.rows + omp_get_thread_num() * kHogRows * stride + kHogPad;
    const Share share = my_share(a.planes * cell_rows);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t plane = item / cell_rows, cell_row = item % cell_rows, top = cell_row * kCell - 1;
      const T* image = (const T*)a.image + plane * a.H * a.W;
      const float* rows[kHogRows];
      const bool fresh = item == share.begin || cell_row == 0;  // else the ring has the first two rows
      for (int64_t i = 0; i < kHogRows; ++i) {
        float* row = ring + (top + 1 + i) % kHogRows * stride;
        rows[i] = row;
        int64_t y = top + i;
        y = y < 0 ? 1 : y == a.H ? a.H - 2 : y;
        if (fresh || i >= 2) fetch(image + y * a.W, a.W, row);
      }
      const float* wy = a.weights + cell_row * kCell % a.patch;
      const int64_t token_row = cell_row / across;
      float* out = a.out + (plane / 3 * (a.H / a.patch) + token_row) * per_row * width +
                   plane % 3 * kBins * per_bin + cell_row % across * across;
      for (int64_t token = 0; token < per_row; ++token, out += width)
        for (int64_t dx = 0; dx < across; dx += 2)
          cells(rows, a, wy, token * a.patch + dx * kCell, per_bin, out + dx, out + dx + 1);
    }
  }
}

void hog(const HogArgs& a) {
  if (a.is_u8) forward<uint8_t>(a);
  else with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include <cmath>

#include "common.h"

MF_DECLARE(hog, HogArgs)

namespace mf {
namespace {

// One factor of the Gaussian window, standard deviation patch / 2; it sums to 1.
void fill_window(float* weights, int64_t patch) {
  double total = 0.0;
  const auto at = [&](int64_t i) {
    const double n = static_cast<double>(2 * i + 1 - patch) / static_cast<double>(patch);
    return std::exp(-0.5 * n * n);
  };
  for (int64_t i = 0; i < patch; ++i) total += at(i);
  for (int64_t i = 0; i < patch; ++i) weights[i] = static_cast<float>(at(i) / total);
}

void run_hog(TensorView image, TensorView out, int64_t patch, double eps) {
  check_ndim(image, "image", 4, "(B, 3, H, W)");
  const int64_t B = image.size(0), H = image.size(2), W = image.size(3);
  check_shape(image, "image", {B, 3, H, W});
  if (patch <= 0 || patch % (2 * kCell) != 0)
    TVM_FFI_THROW(ValueError) << "patch must be a multiple of 16 pixels; got " << patch;
  if (H % patch != 0 || W % patch != 0)
    TVM_FFI_THROW(ValueError) << "image must be divisible by the patch of " << patch << " pixels; got "
                              << shape_text(image);
  check_cpu(image, "image");
  check_contiguous(image, "image");
  const DLDataType d = image.dtype();
  HogArgs a{};
  a.is_u8 = d.code == kDLUInt && d.bits == 8 && d.lanes == 1;
  a.type = a.is_u8 ? DType::f32 : dtype_of(image, "image");
  check_shape(out, "out", {B, H / patch * (W / patch), 3 * kBins * (patch / kCell) * (patch / kCell)});
  check_dense(out, "out");
  check_dtype(out, "out", DType::f32, "");
  if (image.numel() == 0) return;
  a.image = data(image), a.out = data<float>(out);
  a.planes = 3 * B, a.H = H, a.W = W, a.patch = patch, a.eps = static_cast<float>(eps);
  Scratch window(patch), rows(omp_get_max_threads() * kHogRows * hog_stride(W));
  fill_window(window.get(), patch);
  a.weights = window.get(), a.rows = rows.get();
  MF_CALL(hog, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(hog, mf::run_hog);
#endif
