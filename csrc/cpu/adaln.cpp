// y = LayerNorm(x; weight, bias) * (offset + scale) + shift over the last dimension, and its gradients.
//
// x (B, N, D). Modulation per sample: shift, scale (B, 1, D), all tokens; or per token: (B, T, D), the last T tokens, the
// others get the plain norm. An absent scale multiplies by 1, an absent shift adds 0.
//
// With xhat = (x - mean) * rstd, m = offset + scale (1 where not modulated) and
//     A = weight * m,  C = bias * m + shift      (fp32, computed once per sample, or once per token)
// forward is y = xhat * A + C, and backward, with g = dy * A,
//     dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//     dshift = sum dy,  dscale = weight * sum(dy * xhat) + bias * sum(dy)
//     dweight = sum m * dy * xhat,  dbias = sum m * dy
// mean and variance in two passes over a row that lies in L1; (mean, rstd) are kept for the backward.

#include "cpu/types.h"

namespace mf {

struct AdalnArgs {
  const void *x, *dy;
  void* out;  // y or dx
  Column shift, scale, weight, bias, dshift, dscale;
  float *dweight, *dbias;  // (D,) or null
  float* mean_rstd;        // (B*N, 2)
  DType type;
  int64_t B, N, D, T;
  bool per_sample;
  float eps, offset;
  float* rows;      // kAdalnRows * D floats per thread
  float* partials;  // B * chunks(N) * 2 * D floats: sums of [m*] dy and [m*] dy * xhat
};

constexpr int64_t kAdalnRows = 7;

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// The fp32 rows A, C and m of one thread, recomputed only when the modulation changes.
struct Modulation {
  const AdalnArgs& a;
  float *A, *C, *m, *buffer;
  const float *weight, *bias;
  int64_t current;

  static inline Modulation make(const AdalnArgs& a) {
    float* rows = a.rows + omp_get_thread_num() * kAdalnRows * a.D;
    Modulation self{a, rows, rows + a.D, rows + 2 * a.D, rows + 3 * a.D, nullptr, nullptr, -2};
    self.weight = float_row(a.weight, 0, a.D, rows + 5 * a.D);
    self.bias = float_row(a.bias, 0, a.D, rows + 6 * a.D);
    return self;
  }

  // The row of shift and scale for token n of sample b, -1 for none.
  inline int64_t row_of(int64_t b, int64_t n) const {
    if (a.T == 0) return -1;
    if (a.per_sample) return b;
    return n >= a.N - a.T ? b * a.T + n - (a.N - a.T) : -1;
  }

  inline void select(int64_t row) {
    if (row == current) return;
    current = row;
    const float* scale = row < 0 ? nullptr : float_row(a.scale, row, a.D, buffer);
    const float* shift = row < 0 ? nullptr : float_row(a.shift, row, a.D, buffer + a.D);
    const vf one = splat(1.0f), offset = splat(a.offset);
    each(a.D, [&](int64_t i, auto k) {
      const vf mod = scale != nullptr ? offset + load(scale + i, k) : one;
      store(m + i, mod, k);
      store(A + i, weight != nullptr ? load(weight + i, k) * mod : mod, k);
      const vf c = bias != nullptr ? load(bias + i, k) * mod : (vf){};
      store(C + i, shift != nullptr ? c + load(shift + i, k) : c, k);
    });
  }
};

// Sum over the row of f(i, k), in four independent accumulators to hide the adder's latency.
template <class F> MF_INLINE float row_sum(int64_t n, F f) {
  vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += f(i, Full{});
    s1 += f(i + W, Full{});
    s2 += f(i + 2 * W, Full{});
    s3 += f(i + 3 * W, Full{});
  }
  for (; i + W <= n; i += W) s0 += f(i, Full{});
  if (i < n) s1 += f(i, Part{(int)(n - i)});
  return sum((s0 + s1) + (s2 + s3));
}

template <class T> static void forward(const AdalnArgs& a) {
  const float inverse = 1.0f / (float)a.D;
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    Modulation mod = Modulation::make(a);
    const Share share = my_share(a.B * a.N);
    for (int64_t row = share.begin; row < share.end; ++row) {
      const T* x = (const T*)a.x + row * a.D;
      T* y = (T*)a.out + row * a.D;
      mod.select(mod.row_of(row / a.N, row % a.N));
      const float mean = row_sum(a.D, [&](int64_t i, auto k) { return load(x + i, k); }) * inverse;
      const vf centre = splat(mean);
      const float variance = inverse * row_sum(a.D, [&](int64_t i, auto k) {
        const vf d = keep(load(x + i, k) - centre, k);
        return d * d;
      });
      const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
      a.mean_rstd[2 * row] = mean;
      a.mean_rstd[2 * row + 1] = rstd;
      const float *A = mod.A, *C = mod.C;
      const vf r = splat(rstd);
      each(a.D, [&](int64_t i, auto k) {
        store(y + i, (load(x + i, k) - centre) * r * load(A + i, k) + load(C + i, k), k);
      });
    }
  }
}

template <class T> static void backward(const AdalnArgs& a) {
  const float inverse = 1.0f / (float)a.D;
  const int64_t per_sample = chunks(a.N), items = a.B * per_sample;
  const bool sums = a.dweight != nullptr || a.dbias != nullptr ||
                    (a.per_sample && (a.dshift.data != nullptr || a.dscale.data != nullptr));
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    Modulation mod = Modulation::make(a);
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / per_sample, first = item % per_sample * kChunk;
      const int64_t last = first + kChunk < a.N ? first + kChunk : a.N;
      float *p0 = a.partials + item * 2 * a.D, *p1 = p0 + a.D;
      if (sums) memset(p0, 0, sizeof(float) * 2 * a.D);
      for (int64_t n = first; n < last; ++n) {
        const int64_t row = b * a.N + n;
        const T *x = (const T*)a.x + row * a.D, *dy = (const T*)a.dy + row * a.D;
        T* dx = (T*)a.out + row * a.D;
        const int64_t token = mod.row_of(b, n);
        mod.select(token);
        const float *A = mod.A, *m = mod.m;
        const vf centre = splat(a.mean_rstd[2 * row]), r = splat(a.mean_rstd[2 * row + 1]);
        vf g0 = {}, g1 = {};
        each(a.D, [&](int64_t i, auto k) {
          const vf d = load(dy + i, k), xhat = (load(x + i, k) - centre) * r, g = d * load(A + i, k);
          g0 += g;  // the lanes past the end are zero in d
          g1 += g * xhat;
          if (sums) {
            const vf md = a.per_sample ? d : d * load(m + i, k);
            store(p0 + i, load(p0 + i, k) + md, k);
            store(p1 + i, load(p1 + i, k) + md * xhat, k);
          }
        });
        if (!a.per_sample && token >= 0) {
          each(a.D, [&](int64_t i, auto k) {
            const vf d = load(dy + i, k);
            store_row(a.dshift, token, a.D, i, d, k);
            if (a.dscale.data == nullptr) return;
            vf normed = (load(x + i, k) - centre) * r;
            if (mod.weight != nullptr) normed *= load(mod.weight + i, k);
            if (mod.bias != nullptr) normed += load(mod.bias + i, k);
            store_row(a.dscale, token, a.D, i, d * normed, k);
          });
        }
        const vf m0 = splat(sum(g0) * inverse), m1 = splat(sum(g1) * inverse);
        each(a.D, [&](int64_t i, auto k) {
          const vf xhat = (load(x + i, k) - centre) * r, g = load(dy + i, k) * load(A + i, k);
          store(dx + i, r * (g - m0 - xhat * m1), k);
        });
      }
    }
    if (sums) {
#pragma omp barrier
      const Share columns = my_share((a.D + W - 1) / W);
      for (int64_t block = columns.begin; block < columns.end; ++block) {
        const int64_t i = block * W;
        const Part k{(int)(a.D - i < W ? a.D - i : W)};
        vf dweight = {}, dbias = {};
        for (int64_t b = 0; b < a.B; ++b) {
          vf s0 = {}, s1 = {};
          for (int64_t c = 0; c < per_sample; ++c) {
            const float* p = a.partials + (b * per_sample + c) * 2 * a.D + i;
            s0 += load(p, k);
            s1 += load(p + a.D, k);
          }
          vf factor = splat(1.0f);
          if (a.per_sample) {
            vf d = s1;
            if (mod.weight != nullptr) d *= load(mod.weight + i, k);
            if (mod.bias != nullptr) d += load(mod.bias + i, k) * s0;
            store_row(a.dshift, b, a.D, i, s0, k);
            store_row(a.dscale, b, a.D, i, d, k);
            if (a.scale.data != nullptr)
              with_type(a.scale.type, [&](auto t) {
                factor = splat(a.offset) + load((const decltype(t)*)a.scale.data + b * a.D + i, k);
              });
          }
          dweight += factor * s1;
          dbias += factor * s0;
        }
        if (a.dweight != nullptr) store(a.dweight + i, dweight, k);
        if (a.dbias != nullptr) store(a.dbias + i, dbias, k);
      }
    }
  }
}

void adaln_fwd(const AdalnArgs& a) {
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}
void adaln_bwd(const AdalnArgs& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(adaln_fwd, AdalnArgs)
MF_DECLARE(adaln_bwd, AdalnArgs)

namespace mf {
namespace {

Column vector_of(const MaybeTensor& t, const char* name, int64_t D) {
  if (!t.has_value()) return {nullptr, DType::f32};
  check_shape(t.value(), name, {D});
  return {data(t), check_dense(t.value(), name)};
}

// A (B, T, D) tensor; T is taken from the first one given and then held.
Column modulation_of(const MaybeTensor& t, const char* name, AdalnArgs& a) {
  if (!t.has_value()) return {nullptr, DType::f32};
  const TensorView& v = t.value();
  check_ndim(v, name, 3, "(B, T, D)");
  if (a.T == 0) a.T = v.size(1);
  check_shape(v, name, {a.B, a.T, a.D});
  if (a.per_sample ? a.T != 1 : a.T > a.N)
    TVM_FFI_THROW(ValueError) << name << " must have T = 1 with per_sample = 1 and T <= N = " << a.N
                              << " without; got " << shape_text(v);
  return {data(t), check_dense(v, name)};
}

float* gradient_of(const MaybeTensor& t, const char* name, int64_t D) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {D});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

void same_as(const TensorView& t, const char* name, const TensorView& x) {
  check_shape(t, name, {x.size(0), x.size(1), x.size(2)});
  check_dense(t, name);
  check_dtype(t, name, dtype_of(x, "x"), " like x");
}

AdalnArgs common_args(const TensorView& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      const TensorView& mean_rstd, double offset, int64_t per_sample) {
  check_ndim(x, "x", 3, "(B, N, D)");
  AdalnArgs a{};
  a.B = x.size(0), a.N = x.size(1), a.D = x.size(2);
  a.type = check_dense(x, "x");
  a.x = data(x);
  a.weight = vector_of(weight, "weight", a.D);
  a.bias = vector_of(bias, "bias", a.D);
  check_shape(mean_rstd, "mean_rstd", {a.B * a.N, 2});
  check_dense(mean_rstd, "mean_rstd");
  check_dtype(mean_rstd, "mean_rstd", DType::f32, "");
  a.mean_rstd = data<float>(mean_rstd);
  a.offset = static_cast<float>(offset);
  a.per_sample = per_sample != 0;
  return a;
}

void fwd(TensorView x, MaybeTensor shift, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, TensorView y,
         TensorView mean_rstd, double eps, double offset, int64_t per_sample) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample);
  a.shift = modulation_of(shift, "shift", a);
  a.scale = modulation_of(scale, "scale", a);
  same_as(y, "y", x);
  a.out = data(y);
  a.eps = static_cast<float>(eps);
  if (x.numel() == 0) return;
  Scratch rows(omp_get_max_threads() * kAdalnRows * a.D);
  a.rows = rows.get();
  MF_CALL(adaln_fwd, a);
}

void bwd(TensorView dy, TensorView x, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, TensorView mean_rstd,
         TensorView dx, MaybeTensor dshift, MaybeTensor dscale, MaybeTensor dweight, MaybeTensor dbias, double offset,
         int64_t per_sample) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample);
  a.scale = modulation_of(scale, "scale", a);
  a.dshift = modulation_of(dshift, "dshift", a);
  a.dscale = modulation_of(dscale, "dscale", a);
  same_as(dy, "dy", x);
  same_as(dx, "dx", x);
  a.dy = data(dy);
  a.out = data(dx);
  a.dweight = gradient_of(dweight, "dweight", a.D);
  a.dbias = gradient_of(dbias, "dbias", a.D);
  if (a.D == 0) return;
  Scratch rows(omp_get_max_threads() * kAdalnRows * a.D);
  Scratch partials(a.B * chunks(a.N) * 2 * a.D);
  a.rows = rows.get();
  a.partials = partials.get();
  MF_CALL(adaln_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(adaln_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adaln_bwd, mf::bwd);
#endif
