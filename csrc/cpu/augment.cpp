// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// DiffAugment: colour, translation and cutout of (B, C, H, W) images, and its gradients.
//
// Per image: brightness b, saturation s, contrast k; translation (th, tw); a box (top, left, height, width). With mu the
// mean over a pixel's channels and m the mean over the image,
//     v = k s x + k (1 - s) mu + (1 - k) m + b          (brightness and saturation leave m + b as the image's mean)
//     y[h, w] = v[h + th, w + tw], 0 outside the image and inside the box
// Backward, with g = dy carried back to where it was read (0 where nothing was), G = sum g:
//     dx = k s g + k (1 - s) mu(g) + (1 - k) G / (C H W)
//     db = G,  ds = k sum g (x - mu),  dk = sum g (s x + (1 - s) mu - m)
// Both directions are one kernel: result = p a + q sum_c a + c inside, another constant outside; the sums (m, or G) are a
// first pass, left out where the contrast is 1. An image is done by one thread while it lies in the cache, or, with few
// images, by all threads; sums are per row block, added in order.

#include "cpu/types.h"

namespace mf {

struct AugmentArgs {
  const void *x, *dy;
  void* out;                  // y or dx, dx may be null
  const float* colour;        // (B, 3) or null
  const int32_t *shift, *box;  // (B, 2), (B, 4) or null
  float* dcolour;             // (B, 3) or null
  DType type;
  int64_t B, C, H, W;
  float* partials;  // B * blocks * 4
};

constexpr int64_t kAugmentRows = 16;  // rows of an image whose sums are taken together

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

struct Image {
  float b, s, k;
  int64_t th, tw, top, bottom, left, right;  // the box clipped to the image
};

MF_INLINE int64_t clip(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

MF_INLINE Image image_of(const AugmentArgs& a, int64_t i) {
  Image m{0.0f, 1.0f, 1.0f, 0, 0, 0, 0, 0, 0};
  if (a.colour != nullptr) m.b = a.colour[3 * i], m.s = a.colour[3 * i + 1], m.k = a.colour[3 * i + 2];
  if (a.shift != nullptr) m.th = a.shift[2 * i], m.tw = a.shift[2 * i + 1];
  if (a.box != nullptr) {
    const int32_t* box = a.box + 4 * i;
    m.top = clip(box[0], 0, a.H), m.bottom = clip((int64_t)box[0] + box[2], m.top, a.H);
    m.left = clip(box[1], 0, a.W), m.right = clip((int64_t)box[1] + box[3], m.left, a.W);
  }
  return m;
}

// The columns of y's row h that show the image: [begin[0], end[0]) and [begin[1], end[1]).
struct Spans { int64_t begin[2], end[2]; };
MF_INLINE Spans spans_of(const AugmentArgs& a, const Image& m, int64_t h) {
  Spans spans{{0, 0}, {0, 0}};
  if (h < 0 || h >= a.H || h + m.th < 0 || h + m.th >= a.H) return spans;
  const int64_t first = clip(-m.tw, 0, a.W), last = clip(a.W - m.tw, first, a.W);
  const bool cut = h >= m.top && h < m.bottom && m.left < m.right;
  spans.begin[0] = first;
  spans.end[0] = cut ? clip(m.left, first, last) : last;
  spans.begin[1] = cut ? clip(m.right, first, last) : last;
  spans.end[1] = last;
  return spans;
}

template <class T> MF_INLINE void fill(T* to, int64_t n, float value) {
  const vf v = splat(value);
  each(n, [&](int64_t i, auto k) { store(to + i, v, k); });
}

// to[c][i] = p from[c][i] + q sum_c from[c][i] + add, for the channels of one span; `plane` between channels.
template <class T>
MF_INLINE void mix(const T* from, T* to, int64_t n, int64_t channels, int64_t plane, float p, float q, float add) {
  const vf vp = splat(p), vq = splat(q), va = splat(add);
  if (channels == 3) {
    each(n, [&](int64_t i, auto k) {
      const vf r = load(from + i, k), g = load(from + plane + i, k), b = load(from + 2 * plane + i, k);
      const vf rest = ((r + g) + b) * vq + va;
      store(to + i, r * vp + rest, k);
      store(to + plane + i, g * vp + rest, k);
      store(to + 2 * plane + i, b * vp + rest, k);
    });
    return;
  }
  each(n, [&](int64_t i, auto k) {
    vf total = {};
    for (int64_t c = 0; c < channels; ++c) total += load(from + c * plane + i, k);
    const vf rest = total * vq + va;
    for (int64_t c = 0; c < channels; ++c) store(to + c * plane + i, load(from + c * plane + i, k) * vp + rest, k);
  });
}

template <class T> static float row_sum(const AugmentArgs& a, const T* rows, int64_t count) {
  vf s[4] = {};
  for (int64_t c = 0; c < a.C; ++c) {
    const T* from = rows + c * a.H * a.W;
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
      for (int j = 0; j < 4; ++j) s[j] += load(from + i + j * W, Full{});
    each(count - i, [&](int64_t r, auto k) { s[0] += load(from + i + r, k); });
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Row r of every channel: source row `from_row` shifted by `by` inside the spans (given in the result's columns), `outside`
// elsewhere.
template <class T>
MF_INLINE void result_row(const AugmentArgs& a, const Image& m, const T* from, T* to, const Spans& spans, int64_t by,
                          float add, float outside) {
  const int64_t plane = a.H * a.W;
  const float p = m.k * m.s, q = m.k * (1.0f - m.s) / (float)a.C;
  int64_t at = 0;
  for (int t = 0; t < 2; ++t) {
    if (spans.begin[t] >= spans.end[t]) continue;
    for (int64_t c = 0; c < a.C; ++c) fill(to + c * plane + at, spans.begin[t] - at, outside);
    const int64_t n = spans.end[t] - spans.begin[t];
    const T* source = from + spans.begin[t] + by;
    if (a.colour == nullptr) {
      for (int64_t c = 0; c < a.C; ++c) memcpy(to + c * plane + spans.begin[t], source + c * plane, sizeof(T) * n);
    } else {
      mix(source, to + spans.begin[t], n, a.C, plane, p, q, add);
    }
    at = spans.end[t];
  }
  for (int64_t c = 0; c < a.C; ++c) fill(to + c * plane + at, a.W - at, outside);
}

// first(image, block) for all row blocks of an image, then last(image, block): image by image, or in two phases.
template <class First, class Last> MF_INLINE void by_image(const AugmentArgs& a, First first, Last last) {
  const int64_t blocks = (a.H + kAugmentRows - 1) / kAugmentRows;
  if (a.B >= 2 * omp_get_num_threads() || omp_get_num_threads() == 1) {
    const Share images = my_share(a.B);
    for (int64_t i = images.begin; i < images.end; ++i) {
      for (int64_t block = 0; block < blocks; ++block) first(i, block);
      for (int64_t block = 0; block < blocks; ++block) last(i, block);
    }
  } else {
    const Share items = my_share(a.B * blocks);
    for (int64_t t = items.begin; t < items.end; ++t) first(t / blocks, t % blocks);
#pragma omp barrier
    for (int64_t t = items.begin; t < items.end; ++t) last(t / blocks, t % blocks);
  }
}

MF_INLINE float total(const AugmentArgs& a, int64_t image, int which) {
  const int64_t blocks = (a.H + kAugmentRows - 1) / kAugmentRows;
  float value = 0.0f;
  for (int64_t t = 0; t < blocks; ++t) value += a.partials[(image * blocks + t) * 4 + which];
  return value;
}

MF_INLINE Share rows_of(const AugmentArgs& a, int64_t block) {
  const int64_t last = (block + 1) * kAugmentRows;
  return {block * kAugmentRows, last < a.H ? last : a.H};
}

template <class T> static void forward(const AugmentArgs& a) {
  const int64_t blocks = (a.H + kAugmentRows - 1) / kAugmentRows, size = a.C * a.H * a.W;
#pragma omp parallel if (a.B * size > kSerial)
  by_image(
      a,
      [&](int64_t i, int64_t block) {
        if (a.colour == nullptr || a.colour[3 * i + 2] == 1.0f) return;
        const Share rows = rows_of(a, block);
        a.partials[(i * blocks + block) * 4] =
            row_sum(a, (const T*)a.x + i * size + rows.begin * a.W, (rows.end - rows.begin) * a.W);
      },
      [&](int64_t i, int64_t block) {
        const Image m = image_of(a, i);
        const float add = m.k == 1.0f ? m.b : (1.0f - m.k) * (total(a, i, 0) / (float)size) + m.b;
        const Share rows = rows_of(a, block);
        for (int64_t h = rows.begin; h < rows.end; ++h)
          result_row(a, m, (const T*)a.x + i * size + (h + m.th) * a.W, (T*)a.out + i * size + h * a.W,
                     spans_of(a, m, h), m.tw, add, 0.0f);
      });
}

// Over the rows of dy in one block: G, sum g x, sum g mu(x) C; and the sum of x over these rows.
template <bool COLOUR, class T> static void gradient_sums(const AugmentArgs& a, const Image& m, int64_t i, int64_t block) {
  const int64_t plane = a.H * a.W, blocks = (a.H + kAugmentRows - 1) / kAugmentRows;
  const T *x = (const T*)a.x + i * a.C * plane, *dy = (const T*)a.dy + i * a.C * plane;
  vf g0 = {}, g1 = {}, g2 = {};
  const Share rows = rows_of(a, block);
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    const Spans spans = spans_of(a, m, h);
    for (int t = 0; t < 2; ++t) {
      if (spans.begin[t] >= spans.end[t]) continue;
      const T* g = dy + h * a.W + spans.begin[t];
      const T* from = x + (h + m.th) * a.W + m.tw + spans.begin[t];
      each(spans.end[t] - spans.begin[t], [&](int64_t w, auto k) {
        vf sum_g = {}, sum_x = {};
        for (int64_t c = 0; c < a.C; ++c) {
          const vf vg = load(g + c * plane + w, k);
          sum_g += vg;
          if (COLOUR) {
            const vf vx = load(from + c * plane + w, k);
            sum_x += vx;
            g1 += vg * vx;
          }
        }
        g0 += sum_g;
        if (COLOUR) g2 += sum_g * sum_x;
      });
    }
  }
  float* out = a.partials + (i * blocks + block) * 4;
  out[0] = sum(g0);
  if (!COLOUR) return;
  out[1] = sum(g1), out[2] = sum(g2) / (float)a.C;
  out[3] = row_sum(a, x + rows.begin * a.W, (rows.end - rows.begin) * a.W);
}

template <class T> static void backward(const AugmentArgs& a) {
  const int64_t size = a.C * a.H * a.W;
#pragma omp parallel if (a.B * size > kSerial)
  by_image(
      a,
      [&](int64_t i, int64_t block) {
        const Image m = image_of(a, i);
        if (a.dcolour != nullptr) gradient_sums<true, T>(a, m, i, block);
        else if (m.k != 1.0f) gradient_sums<false, T>(a, m, i, block);
      },
      [&](int64_t i, int64_t block) {
        const Image m = image_of(a, i);
        if (a.dcolour != nullptr && block == 0) {
          const float g = total(a, i, 0), gx = total(a, i, 1), gmu = total(a, i, 2);
          a.dcolour[3 * i] = g;
          a.dcolour[3 * i + 1] = m.k * (gx - gmu);
          a.dcolour[3 * i + 2] = m.s * gx + (1.0f - m.s) * gmu - total(a, i, 3) / (float)size * g;
        }
        if (a.out == nullptr) return;
        const float even = m.k == 1.0f ? 0.0f : (1.0f - m.k) * (total(a, i, 0) / (float)size);
        const Share rows = rows_of(a, block);
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          Spans spans = spans_of(a, m, r - m.th);
          for (int t = 0; t < 2; ++t) spans.begin[t] += m.tw, spans.end[t] += m.tw;
          result_row(a, m, (const T*)a.dy + i * size + (r - m.th) * a.W, (T*)a.out + i * size + r * a.W, spans, -m.tw,
                     even, even);
        }
      });
}

void augment_fwd(const AugmentArgs& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}
void augment_bwd(const AugmentArgs& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(augment_fwd, AugmentArgs)
MF_DECLARE(augment_bwd, AugmentArgs)

namespace mf {
namespace {

int32_t* integers(const MaybeTensor& t, const char* name, int64_t B, int64_t columns) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {B, columns});
  check_cpu(t.value(), name);
  check_contiguous(t.value(), name);
  const DLDataType d = t.value().dtype();
  if (d.code != kDLInt || d.bits != 32) TVM_FFI_THROW(TypeError) << name << " must be int32";
  return data<int32_t>(t);
}

float* floats(const MaybeTensor& t, const char* name, int64_t B) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {B, 3});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

float* workspace_of(const TensorView& t, int64_t floats) {
  check_dense(t, "workspace");
  check_dtype(t, "workspace", DType::f32, "");
  if (t.numel() < floats)
    TVM_FFI_THROW(ValueError) << "workspace must have at least " << floats << " elements; got " << t.numel();
  return data<float>(t);
}

AugmentArgs augment_args(const TensorView& x, const MaybeTensor& colour, const MaybeTensor& shift,
                         const MaybeTensor& box) {
  check_ndim(x, "x", 4, "(B, C, H, W)");
  AugmentArgs a{};
  a.B = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.type = check_dense(x, "x");
  a.x = data(x);
  a.colour = floats(colour, "colour", a.B);
  a.shift = integers(shift, "shift", a.B, 2);
  a.box = integers(box, "box", a.B, 4);
  return a;
}

void* like_x(const TensorView& t, const char* name, const TensorView& x) {
  check_shape(t, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_dense(t, name);
  check_dtype(t, name, dtype_of(x, "x"), " like x");
  return data(t);
}

int64_t partial_count(const AugmentArgs& a) { return a.B * ((a.H + kAugmentRows - 1) / kAugmentRows) * 4; }

void fwd(TensorView x, MaybeTensor colour, MaybeTensor shift, MaybeTensor box, TensorView y, TensorView workspace) {
  AugmentArgs a = augment_args(x, colour, shift, box);
  a.out = like_x(y, "y", x);
  if (x.numel() == 0) return;
  a.partials = workspace_of(workspace, partial_count(a));
  MF_CALL(augment_fwd, a);
}

void bwd(TensorView dy, TensorView x, MaybeTensor colour, MaybeTensor shift, MaybeTensor box, MaybeTensor dx,
         MaybeTensor dcolour, TensorView workspace) {
  AugmentArgs a = augment_args(x, colour, shift, box);
  a.dy = like_x(dy, "dy", x);
  a.out = dx.has_value() ? like_x(dx.value(), "dx", x) : nullptr;
  a.dcolour = floats(dcolour, "dcolour", a.B);
  if (x.numel() == 0) return;
  a.partials = workspace_of(workspace, partial_count(a));
  MF_CALL(augment_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(diff_augment_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(diff_augment_bwd, mf::bwd);
#endif
