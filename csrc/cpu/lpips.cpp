// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The tail of LPIPS (kernels/lpips.py has the formula): two feature maps -> one distance per image, and its gradients.
//
// f0, f1 (B, C, S) planar or (B, S, C) channels last, S = H * W pixels. Per pixel, with r = 1 / (norm + eps) (0 for a
// norm of 0) and d = f0 r0 - f1 r1:
//     distance = sum w d^2                        stats: r0, r1, k0 = r0^2 / norm0 * sum w d f0, k1 likewise
//     df0 = u (w d r0 - f0 k0), df1 = u (f1 k1 - w d r1), dw = sum of u / 2 d^2, u = 2 dout / S
// d is formed before it is squared: the expanded square would cancel where the maps are alike. So a pixel's channels are
// needed twice, first for the norm: planar, 64 pixels of all channels are copied to a dense fp32 tile on the first visit
// (H * W is a power of two, so that the channels of a pixel share a few cache sets and would be gone by the second);
// channels last, a pixel's row lies in L1. The backward has the sums in `stats` and is one elementwise pass.

#include "cpu/types.h"

namespace mf {

struct LpipsArgs {
  const void *f0, *f1;
  const float *weight, *dout;
  float *out, *stats;  // (B,), (B, 4, S)
  void *d0, *d1;
  float* dweight;
  DType type;
  int64_t B, C, S;
  bool channels_last;
  float eps;
  float* tile;      // forward, planar: 2 * C * kTile floats per thread
  float* partials;  // forward: B * blocks(S, kTile); backward with dweight: that many (or kRun) times C
};

constexpr int64_t kTile = 64, kRun = 1024;  // pixels a block: forward and channels last; backward, planar
constexpr int64_t pixel_blocks(int64_t pixels, int64_t size) { return (pixels + size - 1) / size; }

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// x r0 - y r1, both products rounded: a fused multiply-subtract would give equal maps a distance of 1e-16.
MF_INLINE vf difference(vf x, vf r0, vf y, vf r1) { return x * r0 - y * r1; }

// 1 / (norm + eps), and 0 for a norm of 0; NaN stays.
MF_INLINE vf inverse(vf norm, float eps) {
  const vf zero = {};
  return norm == zero ? zero : 1.0f / (norm + splat(eps));
}
MF_INLINE vf coefficient(vf norm, vf r, vf projection) {
  const vf zero = {};
  return norm == zero ? zero : projection * r * r / norm;
}

// G vectors of pixels from pixel p on, all channels; the last one may be partial. Returns their distances.
template <int G, class T, class K> MF_INLINE vf planar_pixels(const LpipsArgs& a, int64_t b, int64_t p, float* tile, K k) {
  const T *f0 = (const T*)a.f0 + b * a.C * a.S + p, *f1 = (const T*)a.f1 + b * a.C * a.S + p;
  float* stats = a.stats + b * 4 * a.S + p;
  vf n0[G] = {}, n1[G] = {};
  float* t = tile;
  for (int64_t c = 0; c < a.C; ++c, f0 += a.S, f1 += a.S, t += 2 * G * W) {
    for (int g = 0; g < G; ++g) {
      const vf x = load(f0 + g * W, k), y = load(f1 + g * W, k);
      store(t + g * W, x, Full{});
      store(t + (G + g) * W, y, Full{});
      n0[g] += x * x;
      n1[g] += y * y;
    }
  }
  vf norm0[G], norm1[G], r0[G], r1[G], q[G] = {}, p0[G] = {}, p1[G] = {};
  for (int g = 0; g < G; ++g) {
    norm0[g] = root(n0[g]), norm1[g] = root(n1[g]);
    r0[g] = inverse(norm0[g], a.eps), r1[g] = inverse(norm1[g], a.eps);
  }
  t = tile;
  for (int64_t c = 0; c < a.C; ++c, t += 2 * G * W) {
    const vf w = splat(a.weight[c]);
    for (int g = 0; g < G; ++g) {
      const vf x = load(t + g * W, Full{}), y = load(t + (G + g) * W, Full{});
      const vf d = difference(x, r0[g], y, r1[g]), wd = w * d;
      q[g] += wd * d;
      p0[g] += wd * x;
      p1[g] += wd * y;
    }
  }
  vf total = {};
  for (int g = 0; g < G; ++g) {
    total += q[g];
    store(stats + g * W, r0[g], k);
    store(stats + a.S + g * W, r1[g], k);
    store(stats + 2 * a.S + g * W, coefficient(norm0[g], r0[g], p0[g]), k);
    store(stats + 3 * a.S + g * W, coefficient(norm1[g], r1[g], p1[g]), k);
  }
  return total;
}

template <class T> static float planar_block(const LpipsArgs& a, int64_t b, int64_t first, int64_t last, float* tile) {
  vf total = {};
  int64_t p = first;
  constexpr int G = W == 16 ? 4 : 2;  // as many accumulators as there are registers
  for (; p + G * W <= last; p += G * W) total += planar_pixels<G, T>(a, b, p, tile, Full{});
  for (; p + W <= last; p += W) total += planar_pixels<1, T>(a, b, p, tile, Full{});
  if (p < last) total += planar_pixels<1, T>(a, b, p, tile, Part{(int)(last - p)});  // zeros have no distance
  return sum(total);
}

template <class T> static float rows_block(const LpipsArgs& a, int64_t b, int64_t first, int64_t last) {
  float total = 0.0f;
  float* stats = a.stats + b * 4 * a.S;
  for (int64_t p = first; p < last; ++p) {
    const T *f0 = (const T*)a.f0 + (b * a.S + p) * a.C, *f1 = (const T*)a.f1 + (b * a.S + p) * a.C;
    vf n0 = {}, n1 = {};
    each(a.C, [&](int64_t c, auto k) {
      const vf x = load(f0 + c, k), y = load(f1 + c, k);
      n0 += x * x;
      n1 += y * y;
    });
    const float norm0 = __builtin_sqrtf(sum(n0)), norm1 = __builtin_sqrtf(sum(n1));
    const float r0 = norm0 == 0.0f ? 0.0f : 1.0f / (norm0 + a.eps), r1 = norm1 == 0.0f ? 0.0f : 1.0f / (norm1 + a.eps);
    vf q = {}, p0 = {}, p1 = {};
    each(a.C, [&](int64_t c, auto k) {
      const vf x = load(f0 + c, k), y = load(f1 + c, k);
      const vf d = difference(x, splat(r0), y, splat(r1)), wd = d * load(a.weight + c, k);
      q += wd * d;
      p0 += wd * x;
      p1 += wd * y;
    });
    total += sum(q);
    stats[p] = r0;
    stats[a.S + p] = r1;
    stats[2 * a.S + p] = norm0 == 0.0f ? 0.0f : sum(p0) * r0 * r0 / norm0;
    stats[3 * a.S + p] = norm1 == 0.0f ? 0.0f : sum(p1) * r1 * r1 / norm1;
  }
  return total;
}

template <class T> static void forward(const LpipsArgs& a) {
  const int64_t blocks = pixel_blocks(a.S, kTile), items = a.B * blocks;
#pragma omp parallel if (a.B * a.C * a.S > kSerial)
  {
    float* tile = a.tile + omp_get_thread_num() * 2 * a.C * kTile;
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * kTile;
      const int64_t last = first + kTile < a.S ? first + kTile : a.S;
      a.partials[item] = a.channels_last ? rows_block<T>(a, b, first, last) : planar_block<T>(a, b, first, last, tile);
    }
  }
  for (int64_t b = 0; b < a.B; ++b) {
    double total = 0.0;
    for (int64_t i = 0; i < blocks; ++i) total += a.partials[b * blocks + i];
    a.out[b] = (float)(total / (double)a.S);
  }
}

// One vector of one channel (planar) or of one pixel (channels last): writes both gradients, returns d^2.
template <class T, class K>
MF_INLINE vf gradients(const LpipsArgs& a, int64_t at, vf u, vf w, vf r0, vf r1, vf k0, vf k1, K k) {
  const vf x = load((const T*)a.f0 + at, k), y = load((const T*)a.f1 + at, k);
  const vf d = difference(x, r0, y, r1), wd = w * d;
  if (a.d0 != nullptr) store((T*)a.d0 + at, u * (wd * r0 - x * k0), k);
  if (a.d1 != nullptr) store((T*)a.d1 + at, u * (y * k1 - wd * r1), k);
  return d * d;
}

template <class T> static void backward(const LpipsArgs& a) {
  const int64_t size = a.channels_last ? kTile : kRun, blocks = pixel_blocks(a.S, size), items = a.B * blocks;
#pragma omp parallel if (a.B * a.C * a.S > kSerial)
  {
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * size, rest = a.S - first, n = rest < size ? rest : size;
      const float* stats = a.stats + b * 4 * a.S + first;
      const vf u = splat(2.0f * a.dout[b] / (float)a.S);
      float* part = a.dweight != nullptr ? a.partials + item * a.C : nullptr;
      if (a.channels_last) {
        if (part != nullptr) memset(part, 0, sizeof(float) * a.C);
        for (int64_t p = 0; p < n; ++p) {
          const vf r0 = splat(stats[p]), r1 = splat(stats[a.S + p]);
          const vf k0 = splat(stats[2 * a.S + p]), k1 = splat(stats[3 * a.S + p]);
          const int64_t row = (b * a.S + first + p) * a.C;
          each(a.C, [&](int64_t c, auto k) {
            const vf square = gradients<T>(a, row + c, u, load(a.weight + c, k), r0, r1, k0, k1, k);
            if (part != nullptr) store(part + c, load(part + c, k) + square, k);
          });
        }
        continue;
      }
      for (int64_t c = 0; c < a.C; ++c) {
        const int64_t row = (b * a.C + c) * a.S + first;
        const vf w = splat(a.weight[c]);
        vf squares = {};
        each(n, [&](int64_t p, auto k) {
          squares += gradients<T>(a, row + p, u, w, load(stats + p, k), load(stats + a.S + p, k),
                                  load(stats + 2 * a.S + p, k), load(stats + 3 * a.S + p, k), k);
        });
        if (part != nullptr) part[c] = sum(squares);
      }
    }
  }
  if (a.dweight == nullptr) return;
  each(a.C, [&](int64_t c, auto k) {
    vf total = {};
    for (int64_t b = 0; b < a.B; ++b) {
      vf squares = {};
      for (int64_t i = 0; i < blocks; ++i) squares += load(a.partials + (b * blocks + i) * a.C + c, k);
      total += squares * (a.dout[b] / (float)a.S);
    }
    store(a.dweight + c, total, k);
  });
}

void lpips_fwd(const LpipsArgs& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}
void lpips_bwd(const LpipsArgs& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(lpips_fwd, LpipsArgs)
MF_DECLARE(lpips_bwd, LpipsArgs)

namespace mf {
namespace {

void same_as(const TensorView& t, const char* name, const TensorView& f0) {
  check_shape(t, name, {f0.size(0), f0.size(1), f0.size(2), f0.size(3)});
  check_dense(t, name);
  check_dtype(t, name, dtype_of(f0, "f0"), " like f0");
}

float* floats(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(t, name, shape);
  check_dense(t, name);
  check_dtype(t, name, DType::f32, "");
  return data<float>(t);
}

LpipsArgs common_args(const TensorView& f0, const TensorView& f1, const TensorView& weight, const TensorView& stats,
                      int64_t channels_last) {
  check_ndim(f0, "f0", 4, "(B, C, H, W), channels last (B, H, W, C)");
  LpipsArgs a{};
  a.channels_last = channels_last != 0;
  a.B = f0.size(0), a.C = f0.size(a.channels_last ? 3 : 1);
  a.S = a.channels_last ? f0.size(1) * f0.size(2) : f0.size(2) * f0.size(3);
  a.type = check_dense(f0, "f0");
  same_as(f1, "f1", f0);
  a.f0 = data(f0), a.f1 = data(f1);
  a.weight = floats(weight, "weight", {a.C});
  a.stats = floats(stats, "stats", {a.B, 4, a.S});
  return a;
}

void fwd(TensorView f0, TensorView f1, TensorView weight, TensorView out, TensorView stats, int64_t channels_last,
         double eps) {
  LpipsArgs a = common_args(f0, f1, weight, stats, channels_last);
  a.out = floats(out, "out", {a.B});
  a.eps = static_cast<float>(eps);
  Scratch tile(a.channels_last ? 0 : omp_get_max_threads() * 2 * a.C * kTile);
  Scratch partials(a.B * pixel_blocks(a.S, kTile));
  a.tile = tile.get(), a.partials = partials.get();
  MF_CALL(lpips_fwd, a);
}

void bwd(TensorView dout, TensorView f0, TensorView f1, TensorView weight, TensorView stats, MaybeTensor d0,
         MaybeTensor d1, MaybeTensor dweight, int64_t channels_last) {
  LpipsArgs a = common_args(f0, f1, weight, stats, channels_last);
  a.dout = floats(dout, "dout", {a.B});
  if (d0.has_value()) same_as(d0.value(), "d0", f0);
  if (d1.has_value()) same_as(d1.value(), "d1", f0);
  a.d0 = data(d0), a.d1 = data(d1);
  if (dweight.has_value()) a.dweight = floats(dweight.value(), "dweight", {a.C});
  const int64_t blocks = pixel_blocks(a.S, a.channels_last ? kTile : kRun);
  Scratch partials(dweight.has_value() ? a.B * blocks * a.C : 0);
  a.partials = partials.get();
  MF_CALL(lpips_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(lpips_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lpips_bwd, mf::bwd);
#endif
