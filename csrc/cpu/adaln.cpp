// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// y = norm(h; weight, bias) * (offset + scale) + shift over the last dimension, and its gradients; h is x, or the residual
// sum x + gate * branch, which is then the first output.
//
// x (B, N, D). norm: LayerNorm or RMSNorm. Modulation per sample: shift, scale (B, 1, D), all tokens; or per token:
// (B, T, D), the last T tokens, the others get the plain norm. An absent scale multiplies by 1, an absent shift adds 0.
// gate (D,) or (B, D); absent: x + branch. h is rounded to its type before it is normed, as if it came from memory.
//
// With xhat = (h - mean) * rstd (mean = 0 for RMSNorm), m = offset + scale (1 where not modulated) and
//     A = weight * m,  C = bias * m + shift      (fp32, computed once per sample, or once per token)
// forward is y = xhat * A + C, and backward, with g = dy * A,
//     dnorm = rstd * (g - mean(g) - xhat * mean(g * xhat))        (without mean(g) for RMSNorm)
//     dx = dnorm, or with a branch  dx = dnorm + dh,  dbranch = gate * dx,  dgate = sum dx * branch
//     dshift = sum dy,  dscale = weight * sum(dy * xhat) + bias * sum(dy)
//     dweight = sum m * dy * xhat,  dbias = sum m * dy
// mean and variance in two passes over a row that lies in L1; (mean, rstd) are kept for the backward. A row is converted
// to fp32 once, into L1, whatever its type: every later pass reads fp32, and each tensor may have its own type.

#include "cpu/types.h"

namespace mf {

struct AdalnArgs {
  Column x, branch, gate;    // branch and gate may be absent
  Column h, y;               // forward; h with a branch
  Column dh, dy;             // backward
  Column dx, dbranch, dgate;
  Column shift, scale, weight, bias, dshift, dscale;
  float *dweight, *dbias;    // (D,) or null
  float* mean_rstd;          // (B*N, 2)
  int64_t B, N, D, T;
  bool per_sample, gate_per_sample, rms;
  float eps, offset;
  float* rows;      // kAdalnRows * D floats per thread
  float* partials;  // B * chunks(N) * kAdalnSums * D floats: sums of [m*] dy, [m*] dy * xhat, dx * branch
};

constexpr int64_t kAdalnRows = 10, kAdalnSums = 3;

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// The fp32 rows A, C, m and gate of one thread, recomputed only when the modulation changes, and the row at work.
struct Modulation {
  const AdalnArgs& a;
  float *A, *C, *m, *buffer, *v, *g;
  const float *weight, *bias, *gate;
  int64_t current, gate_sample;

  static inline Modulation make(const AdalnArgs& a) {
    float* rows = a.rows + omp_get_thread_num() * kAdalnRows * a.D;
    const auto row = [&](int i) { return rows + i * a.D; };
    Modulation self{a, row(0), row(1), row(2), row(3), row(5), row(6), nullptr, nullptr, nullptr, -2, -2};
    self.weight = float_row(a.weight, 0, a.D, row(7));
    self.bias = float_row(a.bias, 0, a.D, row(8));
    return self;
  }

  // The row of shift and scale for token n of sample b, -1 for none.
  inline int64_t row_of(int64_t b, int64_t n) const { return modulation_row(b, n, a.N, a.T, a.per_sample); }

  inline void select(int64_t row, int64_t sample) {
    const int64_t gate_row = a.gate_per_sample ? sample : 0;
    if (gate_row != gate_sample) {
      gate_sample = gate_row;
      gate = float_row(a.gate, gate_row, a.D, a.rows + (omp_get_thread_num() * kAdalnRows + 9) * a.D);
    }
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

// Row `row` of what is normed as fp32, x's own memory or mod.v, and its sum. With a branch it is
// x + gate * branch rounded to x's type, and also written to h where there is one.
static const float* normed_row(const AdalnArgs& a, const Modulation& mod, int64_t row, float* total) {
  const float* gate = mod.gate;
  float* const buffer = mod.v;
  const float* result = buffer;
  with_type(a.x.type, [&](auto t) {
    using X = decltype(t);
    const X* x = (const X*)a.x.data + row * a.D;
    if (a.branch.data == nullptr) {
      if (sizeof(X) == sizeof(float)) {
        result = (const float*)x;
        *total = row_sum(a.D, [&](int64_t i, auto k) { return load(x + i, k); });
      } else {
        *total = row_sum(a.D, [&](int64_t i, auto k) {
          const vf v = load(x + i, k);
          store(buffer + i, v, k);
          return v;
        });
      }
      return;
    }
    with_type(a.branch.type, [&](auto s) {
      const auto* branch = (const decltype(s)*)a.branch.data + row * a.D;
      const auto residual = [&](int64_t i, auto k) {
        const vf f = load(branch + i, k);
        return load(x + i, k) + (gate != nullptr ? load(gate + i, k) * f : f);
      };
      if (a.h.data != nullptr) {
        X* h = (X*)a.h.data + row * a.D;
        *total = row_sum(a.D, [&](int64_t i, auto k) {
          const vf v = store_rounded(h + i, residual(i, k), k);
          store(buffer + i, v, k);
          return v;
        });
      } else {
        *total = row_sum(a.D, [&](int64_t i, auto k) {
          const vf v = rounded(residual(i, k), X{});
          store(buffer + i, v, k);
          return v;
        });
      }
    });
  });
  return result;
}

// Whether the passes that compute in L1 touch the lines that the next ones need. Measured: an fp32 residual stream gains
// 1.0-1.7x from it (four or six streams are more than the prefetcher follows), all else loses up to a quarter.
static inline bool touches_ahead(const AdalnArgs& a) { return a.branch.data != nullptr && a.x.type == DType::f32; }

static void forward(const AdalnArgs& a) {
  const float inverse = 1.0f / (float)a.D;
  const bool ahead = touches_ahead(a);
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    Modulation mod = Modulation::make(a);
    const Share share = my_share(a.B * a.N);
    for (int64_t row = share.begin; row < share.end; ++row) {
      mod.select(mod.row_of(row / a.N, row % a.N), row / a.N);
      float total;
      const float* v = normed_row(a, mod, row, &total);
      const float mean = a.rms ? 0.0f : total * inverse;
      const vf centre = splat(mean);
      const auto square = [&](int64_t i, auto k) {
        const vf d = keep(load(v + i, k) - centre, k);
        return d * d;
      };
      float squares;
      if (ahead) {
        const Ahead out = Ahead::of(a.y, row, a.D, &a), next_x = Ahead::of(a.x, row + 1, a.D, &a);
        const Ahead next_branch = Ahead::of(a.branch, row + 1, a.D, &a), next_h = Ahead::of(a.h, row + 1, a.D, &a);
        squares = row_sum(a.D, [&](int64_t i, auto k) {
          out.touch(i);
          next_x.touch(i);
          next_branch.touch(i);
          next_h.touch(i);
          return square(i, k);
        });
      } else {
        squares = row_sum(a.D, square);
      }
      const float rstd = 1.0f / __builtin_sqrtf(squares * inverse + a.eps);
      a.mean_rstd[2 * row] = mean;
      a.mean_rstd[2 * row + 1] = rstd;
      const float *A = mod.A, *C = mod.C;
      const vf r = splat(rstd);
      with_type(a.y.type, [&](auto t) {
        auto* y = (decltype(t)*)a.y.data + row * a.D;
        each(a.D, [&](int64_t i, auto k) {
          store(y + i, fma((load(v + i, k) - centre) * r, load(A + i, k), load(C + i, k)), k);
        });
      });
    }
  }
}

static void backward(const AdalnArgs& a) {
  const float inverse = 1.0f / (float)a.D;
  const int64_t per_sample = chunks(a.N), items = a.B * per_sample;
  const bool dgate = a.dgate.data != nullptr, ahead = touches_ahead(a);
  const bool sums = a.dweight != nullptr || a.dbias != nullptr ||
                    (a.per_sample && (a.dshift.data != nullptr || a.dscale.data != nullptr));
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    Modulation mod = Modulation::make(a);
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / per_sample, first = item % per_sample * kChunk;
      const int64_t last = first + kChunk < a.N ? first + kChunk : a.N;
      float *p0 = a.partials + item * kAdalnSums * a.D, *p1 = p0 + a.D, *p2 = p1 + a.D;
      if (sums) memset(p0, 0, sizeof(float) * 2 * a.D);
      if (dgate) memset(p2, 0, sizeof(float) * a.D);
      for (int64_t n = first; n < last; ++n) {
        const int64_t row = b * a.N + n, token = mod.row_of(b, n);
        mod.select(token, b);
        const float *A = mod.A, *m = mod.m, *gate = mod.gate;
        float total, *xhats = mod.v, *gs = mod.g;
        const float* v = normed_row(a, mod, row, &total);
        const vf centre = splat(a.mean_rstd[2 * row]), r = splat(a.mean_rstd[2 * row + 1]);
        const Ahead out = Ahead::of(a.dx, row, a.D, &a), dh_row = Ahead::of(a.dh, row, a.D, &a);
        const Ahead out_branch = Ahead::of(a.dbranch, row, a.D, &a);
        vf g0 = {}, g1 = {};
        with_type(a.dy.type, [&](auto t) {
          const auto* dy = (const decltype(t)*)a.dy.data + row * a.D;
          each(a.D, [&](int64_t i, auto k) {
            if (ahead) {
              out.touch(i);
              dh_row.touch(i);
              out_branch.touch(i);
            }
            const vf d = load(dy + i, k), xhat = (load(v + i, k) - centre) * r, g = d * load(A + i, k);
            g0 += g;  // the lanes past the end are zero in d
            g1 = fma(g, xhat, g1);
            store(xhats + i, xhat, k);
            store(gs + i, g, k);
            if (sums) {
              const vf md = a.per_sample ? d : d * load(m + i, k);
              store(p0 + i, load(p0 + i, k) + md, k);
              store(p1 + i, fma(md, xhat, load(p1 + i, k)), k);
            }
          });
          if (a.per_sample || token < 0) return;
          each(a.D, [&](int64_t i, auto k) {
            const vf d = load(dy + i, k);
            store_row(a.dshift, token, a.D, i, d, k);
            if (a.dscale.data == nullptr) return;
            vf normed = load(xhats + i, k);
            if (mod.weight != nullptr) normed *= load(mod.weight + i, k);
            if (mod.bias != nullptr) normed += load(mod.bias + i, k);
            store_row(a.dscale, token, a.D, i, d * normed, k);
          });
        });
        const vf m0 = splat(a.rms ? 0.0f : sum(g0) * inverse), m1 = splat(sum(g1) * inverse);
        with_type(a.dx.type, [&](auto t) {
          using X = decltype(t);
          X* dx = (X*)a.dx.data + row * a.D;
          const Ahead next_x = Ahead::of(a.x, row + 1, a.D, &a), next_dy = Ahead::of(a.dy, row + 1, a.D, &a);
          const Ahead next_branch = Ahead::of(a.branch, row + 1, a.D, &a);
          const auto dnorm = [&](int64_t i, auto k) {
            return r * (load(gs + i, k) - m0 - load(xhats + i, k) * m1);
          };
          if (a.branch.data == nullptr) {
            each(a.D, [&](int64_t i, auto k) { store(dx + i, dnorm(i, k), k); });
            return;
          }
          const X* dh = (const X*)a.dh.data + row * a.D;
          each(a.D, [&](int64_t i, auto k) {
            if (ahead) {
              next_x.touch(i);
              next_dy.touch(i);
              next_branch.touch(i);
            }
            const vf d = dnorm(i, k) + load(dh + i, k);
            store(dx + i, d, k);
            store(gs + i, d, k);
          });
        });
        if (a.dbranch.data == nullptr && !dgate) continue;
        with_type(a.branch.type, [&](auto t) {
          using F = decltype(t);
          const F* branch = (const F*)a.branch.data + row * a.D;
          F* dbranch = a.dbranch.data == nullptr ? nullptr : (F*)a.dbranch.data + row * a.D;
          each(a.D, [&](int64_t i, auto k) {
            const vf d = load(gs + i, k);
            if (dbranch != nullptr) store(dbranch + i, gate != nullptr ? load(gate + i, k) * d : d, k);
            if (dgate) store(p2 + i, fma(d, load(branch + i, k), load(p2 + i, k)), k);
          });
        });
      }
    }
    if (sums || dgate) {
#pragma omp barrier
      const Share columns = my_share((a.D + W - 1) / W);
      for (int64_t block = columns.begin; block < columns.end; ++block) {
        const int64_t i = block * W;
        const Part k{(int)(a.D - i < W ? a.D - i : W)};
        vf dweight = {}, dbias = {}, s2 = {};
        for (int64_t b = 0; b < a.B; ++b) {
          vf s0 = {}, s1 = {};
          if (a.gate_per_sample) s2 = (vf){};
          for (int64_t c = 0; c < per_sample; ++c) {
            const float* p = a.partials + (b * per_sample + c) * kAdalnSums * a.D + i;
            if (sums) {
              s0 += load(p, k);
              s1 += load(p + a.D, k);
            }
            if (dgate) s2 += load(p + 2 * a.D, k);
          }
          if (dgate && (a.gate_per_sample || b == a.B - 1))
            store_row(a.dgate, a.gate_per_sample ? b : 0, a.D, i, s2, k);
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

void adaln_fwd(const AdalnArgs& a) { forward(a); }
void adaln_bwd(const AdalnArgs& a) { backward(a); }

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

// A (B, N, D) tensor of any of the three types.
Column tokens_of(const TensorView& t, const char* name, const AdalnArgs& a) {
  check_shape(t, name, {a.B, a.N, a.D});
  return {data(t), check_dense(t, name)};
}

Column tokens_of(const TensorView& t, const char* name, const AdalnArgs& a, DType type, const char* like) {
  const Column column = tokens_of(t, name, a);
  check_dtype(t, name, type, like);
  return column;
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

// (D,), or (B, D) with a.gate_per_sample, which the first one given sets.
Column gate_of(const MaybeTensor& t, const char* name, AdalnArgs& a) {
  if (!t.has_value()) return {nullptr, DType::f32};
  const TensorView& v = t.value();
  if (a.gate.data == nullptr) a.gate_per_sample = v.ndim() == 2;
  if (a.gate_per_sample) check_shape(v, name, {a.B, a.D});
  else check_shape(v, name, {a.D});
  return {data(t), check_dense(v, name)};
}

float* gradient_of(const MaybeTensor& t, const char* name, int64_t D) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {D});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

AdalnArgs common_args(const TensorView& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      const TensorView& mean_rstd, double offset, int64_t per_sample, int64_t rms) {
  check_ndim(x, "x", 3, "(B, N, D)");
  AdalnArgs a{};
  a.B = x.size(0), a.N = x.size(1), a.D = x.size(2);
  a.x = {data(x), check_dense(x, "x")};
  a.weight = vector_of(weight, "weight", a.D);
  a.bias = vector_of(bias, "bias", a.D);
  check_shape(mean_rstd, "mean_rstd", {a.B * a.N, 2});
  check_dense(mean_rstd, "mean_rstd");
  check_dtype(mean_rstd, "mean_rstd", DType::f32, "");
  a.mean_rstd = data<float>(mean_rstd);
  a.offset = static_cast<float>(offset);
  a.per_sample = per_sample != 0;
  a.rms = rms != 0;
  return a;
}

void run_forward(AdalnArgs& a, const MaybeTensor& shift, const MaybeTensor& scale, const TensorView& y, double eps) {
  a.shift = modulation_of(shift, "shift", a);
  a.scale = modulation_of(scale, "scale", a);
  a.y = tokens_of(y, "y", a);
  a.eps = static_cast<float>(eps);
  if (a.B * a.N * a.D == 0) return;
  Scratch rows(omp_get_max_threads() * kAdalnRows * a.D);
  a.rows = rows.get();
  MF_CALL(adaln_fwd, a);
}

void run_backward(AdalnArgs& a, const TensorView& dy, const MaybeTensor& scale, const TensorView& dx,
                  const MaybeTensor& dshift, const MaybeTensor& dscale, const MaybeTensor& dweight,
                  const MaybeTensor& dbias) {
  a.scale = modulation_of(scale, "scale", a);
  a.dshift = modulation_of(dshift, "dshift", a);
  a.dscale = modulation_of(dscale, "dscale", a);
  a.dy = tokens_of(dy, "dy", a);
  a.dx = tokens_of(dx, "dx", a, a.x.type, " like x");
  a.dweight = gradient_of(dweight, "dweight", a.D);
  a.dbias = gradient_of(dbias, "dbias", a.D);
  if (a.D == 0) return;
  Scratch rows(omp_get_max_threads() * kAdalnRows * a.D);
  Scratch partials(a.B * chunks(a.N) * kAdalnSums * a.D);
  a.rows = rows.get();
  a.partials = partials.get();
  MF_CALL(adaln_bwd, a);
}

void fwd(TensorView x, MaybeTensor shift, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, TensorView y,
         TensorView mean_rstd, double eps, double offset, int64_t per_sample, int64_t rms) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample, rms);
  run_forward(a, shift, scale, y, eps);
}

void bwd(TensorView dy, TensorView x, MaybeTensor scale, MaybeTensor weight, MaybeTensor bias, TensorView mean_rstd,
         TensorView dx, MaybeTensor dshift, MaybeTensor dscale, MaybeTensor dweight, MaybeTensor dbias, double offset,
         int64_t per_sample, int64_t rms) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample, rms);
  run_backward(a, dy, scale, dx, dshift, dscale, dweight, dbias);
}

void residual_fwd(TensorView x, TensorView branch, MaybeTensor gate, MaybeTensor shift, MaybeTensor scale,
                  MaybeTensor weight, MaybeTensor bias, TensorView h, TensorView y, TensorView mean_rstd, double eps,
                  double offset, int64_t per_sample, int64_t rms) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample, rms);
  a.branch = tokens_of(branch, "branch", a);
  a.gate = gate_of(gate, "gate", a);
  a.h = tokens_of(h, "h", a, a.x.type, " like x");
  run_forward(a, shift, scale, y, eps);
}

void residual_bwd(TensorView dh, TensorView dy, TensorView x, TensorView branch, MaybeTensor gate, MaybeTensor scale,
                  MaybeTensor weight, MaybeTensor bias, TensorView mean_rstd, TensorView dx, MaybeTensor dbranch,
                  MaybeTensor dgate, MaybeTensor dshift, MaybeTensor dscale, MaybeTensor dweight, MaybeTensor dbias,
                  double offset, int64_t per_sample, int64_t rms) {
  AdalnArgs a = common_args(x, weight, bias, mean_rstd, offset, per_sample, rms);
  a.branch = tokens_of(branch, "branch", a);
  a.gate = gate_of(gate, "gate", a);
  a.dh = tokens_of(dh, "dh", a, a.x.type, " like x");
  if (dbranch.has_value()) a.dbranch = tokens_of(dbranch.value(), "dbranch", a, a.branch.type, " like branch");
  a.dgate = gate_of(dgate, "dgate", a);
  run_backward(a, dy, scale, dx, dshift, dscale, dweight, dbias);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(adaln_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adaln_bwd, mf::bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(residual_adaln_fwd, mf::residual_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(residual_adaln_bwd, mf::residual_bwd);
#endif
