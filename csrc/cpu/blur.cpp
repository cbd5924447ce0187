// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Blur of every plane by gain * [1, 2, 1]^T [1, 2, 1] / 16 with stride 1 or 2, and the transpose of that map.
//
//   down:  y[i, j] = gain sum_kl w_k w_l xp[i s + k, j s + l]      xp: x padded by (pad0, pad1) on both axes, zero or reflect
//   up:    x[r, c] = the transpose: every y[i, j] goes back to where it was read (the backward of down, and the other way)
//
// Both are separable: the rows of a source are combined into one fp32 row that lies in L1, the margins are filled in, and
// one horizontal pass makes the result. Down combines 3 rows; up those that the row went to (at most 3 with zero padding,
// more beside a reflecting border). Items are result rows: nothing depends on the threads.

#include "cpu/types.h"

namespace mf {

struct BlurArgs {
  const void* source;
  void* result;
  DType type;
  int64_t planes, H, W, Ho, Wo;  // H, W of the large side, Ho, Wo of the blurred one
  int64_t stride, pad0, pad1;
  bool reflect;
  float gain;
  float* rows;  // scratch per thread: 2 rows of `width` floats
  int64_t width;
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

constexpr float kTap[3] = {0.25f, 0.5f, 0.25f};

// Where padded position p (0 is x's first element) reads from, -1: zero.
MF_INLINE int64_t source_of(int64_t p, int64_t size, bool reflect) {
  if (p >= 0 && p < size) return p;
  if (!reflect) return -1;
  return p < 0 ? -p : 2 * (size - 1) - p;
}

// (even, odd) elements of the 2 W floats at p.
MF_INLINE void load_pairs(const float* p, vf& even, vf& odd) {
  const vf a = load(p, Full{}), b = load(p + W, Full{});
#if defined(MF_AVX512)
  const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = (vf)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  odd = (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), (__m512)b);
#elif defined(MF_AVX2)
  const __m256 e = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88), o = _mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  even = (vf)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  odd = (vf)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
#else
  even = (vf){a[0], a[2], b[0], b[2]};
  odd = (vf){a[1], a[3], b[1], b[3]};
#endif
}

// The inverse of load_pairs.
MF_INLINE void store_pairs(float* p, vf even, vf odd) {
#if defined(MF_AVX512)
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store(p, (vf)_mm512_permutex2var_ps((__m512)even, low, (__m512)odd), Full{});
  store(p + W, (vf)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), (__m512)odd),
        Full{});
#elif defined(MF_AVX2)
  const __m256 lo = _mm256_unpacklo_ps((__m256)even, (__m256)odd), hi = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  store(p, (vf)_mm256_permute2f128_ps(lo, hi, 0x20), Full{});
  store(p + W, (vf)_mm256_permute2f128_ps(lo, hi, 0x31), Full{});
#else
  store(p, (vf){even[0], odd[0], even[1], odd[1]}, Full{});
  store(p + W, (vf){even[2], odd[2], even[3], odd[3]}, Full{});
#endif
}

// row[i] = sum of weight[t] * line[t][i]; no lines: zero.
template <class T>
MF_INLINE void combine(const T* const* line, const float* weight, int count, float* row, int64_t n) {
  if (count == 3) {  // the usual number, held in registers
    const vf w0 = splat(weight[0]), w1 = splat(weight[1]), w2 = splat(weight[2]);
    each(n, [&](int64_t i, auto k) {
      store(row + i, load(line[0] + i, k) * w0 + load(line[1] + i, k) * w1 + load(line[2] + i, k) * w2, k);
    });
    return;
  }
  each(n, [&](int64_t i, auto k) {
    vf v = {};
    for (int t = 0; t < count; ++t) v += load(line[t] + i, k) * splat(weight[t]);
    store(row + i, v, k);
  });
}

template <class T> static void down(const BlurArgs& a) {
#pragma omp parallel if (a.planes * a.H * a.W > kSerial)
  {
    float* row = a.rows + omp_get_thread_num() * 2 * a.width;
    memset(row, 0, sizeof(float) * a.width);
    float* body = row + a.pad0;
    const Share share = my_share(a.planes * a.Ho);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const T* x = (const T*)a.source + item / a.Ho * a.H * a.W;
      T* y = (T*)a.result + item * a.Wo;
      const T* line[3];
      float weight[3];
      int count = 0;
      for (int t = 0; t < 3; ++t) {
        const int64_t r = source_of(item % a.Ho * a.stride + t - a.pad0, a.H, a.reflect);
        if (r < 0) continue;
        line[count] = x + r * a.W;
        weight[count++] = kTap[t] * a.gain;
      }
      combine(line, weight, count, body, a.W);
      if (a.reflect) {
        for (int64_t p = 1; p <= a.pad0; ++p) body[-p] = body[p];
        for (int64_t p = 0; p < a.pad1; ++p) body[a.W + p] = body[a.W - 2 - p];
      }
      const vf quarter = splat(kTap[0]), half = splat(kTap[1]);
      if (a.stride == 1) {
        each(a.Wo, [&](int64_t i, auto k) {
          store(y + i, (load(row + i, k) + load(row + i + 2, k)) * quarter + load(row + i + 1, k) * half, k);
        });
      } else {
        each(a.Wo, [&](int64_t i, auto k) {
          vf first, middle, last, unused;
          load_pairs(row + 2 * i, first, middle);  // past the end lies scratch
          load_pairs(row + 2 * i + 2, last, unused);
          store(y + i, (first + last) * quarter + middle * half, k);
        });
      }
    }
  }
}

template <class T> static void up(const BlurArgs& a) {
#pragma omp parallel if (a.planes * a.H * a.W > kSerial)
  {
    // y's combined row from index 2 on, between zeros; then the padded result
    float *row = a.rows + omp_get_thread_num() * 2 * a.width, *padded = row + a.width;
    memset(row, 0, sizeof(float) * 2 * a.width);
    float* body = row + 2;
    const Share share = my_share(a.planes * a.H);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const T* y = (const T*)a.source + item / a.H * a.Ho * a.Wo;
      T* x = (T*)a.result + item * a.W;
      const int64_t r = item % a.H;
      const T* line[9];
      float weight[9];
      int count = 0;
      // the padded rows that read this one: itself and, beside a reflecting border, its mirror images
      const auto from = [&](int64_t p) {
        for (int t = 2; t >= 0; --t) {
          const int64_t at = p + a.pad0 - t;
          if (at < 0 || at % a.stride != 0 || at / a.stride >= a.Ho) continue;
          line[count] = y + at / a.stride * a.Wo;
          weight[count++] = kTap[t] * a.gain;
        }
      };
      from(r);
      if (a.reflect) {
        if (r > 0 && r <= a.pad0) from(-r);
        if (r < a.H - 1 && a.H - 1 - r <= a.pad1) from(2 * (a.H - 1) - r);
      }
      combine(line, weight, count, body, a.Wo);
      const vf quarter = splat(kTap[0]), half = splat(kTap[1]);
      if (a.stride == 1) {
        const float* start = body + a.pad0;  // padded[p] = (row[p] + row[p - 2]) / 4 + row[p - 1] / 2
        if (!a.reflect) {
          each(a.W, [&](int64_t i, auto k) {
            store(x + i, (load(start + i, k) + load(start + i - 2, k)) * quarter + load(start + i - 1, k) * half, k);
          });
          continue;
        }
        each(a.W + a.pad0 + a.pad1, [&](int64_t i, auto k) {
          store(padded + i, (load(body + i, k) + load(body + i - 2, k)) * quarter + load(body + i - 1, k) * half, k);
        });
      } else {
        for (int64_t i = 0; 2 * i < a.W + a.pad0 + a.pad1; i += W) {
          const vf here = load(body + i, Full{}), before = load(body + i - 1, Full{});
          store_pairs(padded + 2 * i, (here + before) * quarter, here * half);
        }
      }
      float* inner = padded + a.pad0;
      if (a.reflect) {
        for (int64_t p = 1; p <= a.pad0; ++p) inner[p] += inner[-p];
        for (int64_t p = 0; p < a.pad1; ++p) inner[a.W - 2 - p] += inner[a.W + p];
      }
      each(a.W, [&](int64_t i, auto k) { store(x + i, load(inner + i, k), k); });
    }
  }
}

void blur_down(const BlurArgs& a) {
  with_type(a.type, [&](auto t) { down<decltype(t)>(a); });
}
void blur_up(const BlurArgs& a) {
  with_type(a.type, [&](auto t) { up<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(blur_down, BlurArgs)
MF_DECLARE(blur_up, BlurArgs)

namespace mf {
namespace {

// large (B, C, H, W) and its blurred small (B, C, Ho, Wo).
BlurArgs blur_args(const TensorView& large, const TensorView& small, int64_t stride, int64_t pad0, int64_t pad1,
                   int64_t reflect, double gain) {
  check_ndim(large, "the large side", 4, "(B, C, H, W)");
  BlurArgs a{};
  a.planes = large.size(0) * large.size(1);
  a.H = large.size(2), a.W = large.size(3);
  if (stride < 1 || stride > 2 || pad0 < 0 || pad1 < 0 || pad0 > 2 || pad1 > 2)
    TVM_FFI_THROW(ValueError) << "stride must be 1 or 2 and the paddings 0 to 2; got " << stride << ", " << pad0 << ", "
                              << pad1;
  const int64_t least = reflect ? (pad0 > pad1 ? pad0 : pad1) + 1 : 1;
  if (a.H < least || a.W < least || a.H + pad0 + pad1 < 3 || a.W + pad0 + pad1 < 3)
    TVM_FFI_THROW(ValueError) << "a plane of " << a.H << " x " << a.W << " is too small for this padding";
  a.Ho = (a.H + pad0 + pad1 - 3) / stride + 1, a.Wo = (a.W + pad0 + pad1 - 3) / stride + 1;
  a.stride = stride, a.pad0 = pad0, a.pad1 = pad1, a.reflect = reflect != 0;
  a.gain = static_cast<float>(gain);
  a.type = check_dense(large, "the large side");
  check_dense(small, "the small side");
  check_dtype(small, "the small side", a.type, " like the large one");
  check_shape(small, "the small side", {large.size(0), large.size(1), a.Ho, a.Wo});
  a.width = (a.W + 4 + 2 * 16 + 15) / 16 * 16 + 4 * 16;  // a vector may start in the row and end behind it
  return a;
}

void down(TensorView x, TensorView y, int64_t stride, int64_t pad0, int64_t pad1, int64_t reflect, double gain) {
  BlurArgs a = blur_args(x, y, stride, pad0, pad1, reflect, gain);
  a.source = data(x), a.result = data(y);
  if (y.numel() == 0) return;
  Scratch rows(omp_get_max_threads() * 2 * a.width);
  a.rows = rows.get();
  MF_CALL(blur_down, a);
}

void up(TensorView y, TensorView x, int64_t stride, int64_t pad0, int64_t pad1, int64_t reflect, double gain) {
  BlurArgs a = blur_args(x, y, stride, pad0, pad1, reflect, gain);
  a.source = data(y), a.result = data(x);
  if (x.numel() == 0) return;
  Scratch rows(omp_get_max_threads() * 2 * a.width);
  a.rows = rows.get();
  MF_CALL(blur_up, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(blur_down, mf::down);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(blur_up, mf::up);
#endif
