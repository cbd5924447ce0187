// q and k of packed qkv, normalised over the head dimension (optional) and rotated (2-D RoPE, interleaved pairs).
//
// qkv (B, N, 3, H, hd). Tokens prefix .. prefix+M-1 are rotated by rope (2, H or 1, M, hd/2) = [cos, sin]:
//     out[2j] = n[2j] c[j] - n[2j+1] s[j],   out[2j+1] = n[2j] s[j] + n[2j+1] c[j]
// where n is x, x rsqrt(mean x^2 + eps) w (rms) or LayerNorm(x) w + b (layer). Queries are computed for tokens
// first .. first+Nq-1 only. Backward undoes the rotation on the gradients, differentiates the norm, and sums
//     dcos[h, m, j] = sum d[2j] n[2j] + d[2j+1] n[2j+1],   dsin = sum d[2j+1] n[2j] - d[2j] n[2j+1]
// over samples, q and k (and heads when they share a table).
//
// Work is split over tokens, samples inside: the table's rows of one token are read once into L1 and the sums of dcos and
// dsin belong to one thread, so they need no second pass.

#include "cpu/types.h"

namespace mf {

struct RopeArgs {
  const void* qkv;
  DType type;
  int64_t B, N, H, hd, Nq, first, M, prefix;
  const float* rope;        // null: no rotation
  int64_t rope_heads;       // 1 or H
  const float* weights[4];  // q_weight, q_bias, k_weight, k_bias; each may be null
  int norm;                 // 0 none, 1 rms, 2 layer
  float eps;
  void* out[2];             // forward: q_out, k_out
  const void* d[3];         // backward: dq, dk, dv
  int64_t stride[3][3];     // their strides over B, N, H
  void* dqkv;
  float* drope;             // null: not wanted
  float* dweights;          // (4, hd) or null
  float* sums;              // 2 * H * hd floats per thread: dcos and dsin of a token, not yet added up in pairs
  float* partials;          // token_blocks(N) * 4 * hd floats: dweights before the last sum
};

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kTokens = 8;  // tokens per item of the backward's work, whatever the number of threads

constexpr int64_t token_blocks(int64_t N) { return (N + kTokens - 1) / kTokens; }

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

struct Moments { vf mean, r; };

// mean (zero for rms) and reciprocal root of one head's row; ones when there is no norm.
template <int NORM, class T> MF_INLINE Moments moments(const T* x, int64_t n, float eps) {
  if (NORM == 0) return {(vf){}, splat(1.0f)};
  vf mean = {}, squares = {};
  if (NORM == 2) {
    vf total = {};
    each(n, [&](int64_t i, auto k) { total += load(x + i, k); });
    mean = splat(sum(total) / (float)n);
  }
  each(n, [&](int64_t i, auto k) {
    const vf c = keep(load(x + i, k) - mean, k);
    squares += c * c;
  });
  return {mean, splat(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps))};
}

template <int NORM, class K>
MF_INLINE vf affine(vf xhat, const float* weight, const float* bias, int64_t i, K k) {
  if (NORM == 0) return xhat;
  if (weight != nullptr) xhat *= load(weight + i, k);
  if (NORM == 2 && bias != nullptr) xhat += load(bias + i, k);
  return xhat;
}

template <int NORM, class T> static void forward(const RopeArgs& a) {
  const int64_t D = a.H * a.hd, half = a.hd / 2;
  const vf sign = alternating();
#pragma omp parallel for schedule(static) if (a.B * a.N * D > kSerial)
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t m = n - a.prefix;
    const bool rotated = a.rope != nullptr && m >= 0 && m < a.M;
    for (int64_t b = 0; b < a.B; ++b) {
      for (int which = 0; which < 2; ++which) {
        const int64_t rows = which ? a.N : a.Nq, row = which ? n : n - a.first;
        if (row < 0 || row >= rows) continue;
        const T* x = (const T*)a.qkv + ((b * a.N + n) * 3 + which) * D;
        T* y = (T*)a.out[which] + (b * rows + row) * D;
        if (NORM == 0 && !rotated) {
          memcpy(y, x, sizeof(T) * D);
          continue;
        }
        const float *weight = a.weights[2 * which], *bias = a.weights[2 * which + 1];
        for (int64_t h = 0; h < a.H; ++h, x += a.hd, y += a.hd) {
          const Moments s = moments<NORM>(x, a.hd, a.eps);
          if (!rotated) {
            each(a.hd, [&](int64_t i, auto k) {
              store(y + i, affine<NORM>((load(x + i, k) - s.mean) * s.r, weight, bias, i, k), k);
            });
            continue;
          }
          const float* cos = a.rope + ((a.rope_heads == 1 ? 0 : h) * a.M + m) * half;
          const float* sin = cos + a.rope_heads * a.M * half;
          each(a.hd, [&](int64_t i, auto k) {
            const vf v = affine<NORM>((load(x + i, k) - s.mean) * s.r, weight, bias, i, k);
            store(y + i, v * load_twice(cos + i / 2, k) + swap_pairs(v) * (sign * load_twice(sin + i / 2, k)), k);
          });
        }
      }
    }
  }
}

template <int NORM, class T> static void backward(const RopeArgs& a) {
  const int64_t D = a.H * a.hd, half = a.hd / 2, blocks = token_blocks(a.N);
  const vf sign = alternating();
#pragma omp parallel if (a.B * a.N * D > kSerial)
  {
    float *dcos = a.sums + omp_get_thread_num() * 2 * D, *dsin = dcos + D;
    alignas(64) float g[kMaxHeadDim];
    const Share share = my_share(blocks);
    for (int64_t block = share.begin; block < share.end; ++block) {
      float* dw = a.dweights != nullptr ? a.partials + block * 4 * a.hd : nullptr;
      if (dw != nullptr) memset(dw, 0, sizeof(float) * 4 * a.hd);
      const int64_t last = (block + 1) * kTokens < a.N ? (block + 1) * kTokens : a.N;
      for (int64_t n = block * kTokens; n < last; ++n) {
        const int64_t m = n - a.prefix;
        const bool rotated = a.rope != nullptr && m >= 0 && m < a.M;
        const bool table = rotated && a.drope != nullptr;
        if (table) memset(dcos, 0, sizeof(float) * 2 * D);
        for (int64_t b = 0; b < a.B; ++b) {
          for (int which = 0; which < 3; ++which) {
            const T* x = (const T*)a.qkv + ((b * a.N + n) * 3 + which) * D;
            T* dx = (T*)a.dqkv + ((b * a.N + n) * 3 + which) * D;
            const int64_t row = which ? n : n - a.first;
            if (which == 0 && (row < 0 || row >= a.Nq)) {
              memset(dx, 0, sizeof(T) * D);
              continue;
            }
            const T* d = (const T*)a.d[which] + b * a.stride[which][0] + row * a.stride[which][1];
            if (which == 2 || (NORM == 0 && !rotated)) {
              for (int64_t h = 0; h < a.H; ++h) memcpy(dx + h * a.hd, d + h * a.stride[which][2], sizeof(T) * a.hd);
              continue;
            }
            const float *weight = a.weights[2 * which], *bias = a.weights[2 * which + 1];
            for (int64_t h = 0; h < a.H; ++h, x += a.hd, dx += a.hd, d += a.stride[which][2]) {
              const Moments s = moments<NORM>(x, a.hd, a.eps);
              const float* cos = rotated ? a.rope + ((a.rope_heads == 1 ? 0 : h) * a.M + m) * half : nullptr;
              const float* sin = cos + a.rope_heads * a.M * half;
              vf g0 = {}, g1 = {};
              each(a.hd, [&](int64_t i, auto k) {
                vf t = load(d + i, k);
                const vf xhat = keep((load(x + i, k) - s.mean) * s.r, k);
                if (rotated) {
                  const vf swapped = swap_pairs(t);
                  if (table) {
                    const vf v = affine<NORM>(xhat, weight, bias, i, k);
                    float *pc = dcos + h * a.hd + i, *ps = dsin + h * a.hd + i;
                    store(pc, load(pc, k) + t * v, k);
                    store(ps, load(ps, k) + swapped * v, k);
                  }
                  t = t * load_twice(cos + i / 2, k) - swapped * (sign * load_twice(sin + i / 2, k));
                }
                if (NORM == 0) {
                  store(dx + i, t, k);
                  return;
                }
                if (dw != nullptr) {
                  float *pw = dw + 2 * which * a.hd + i, *pb = pw + a.hd;
                  store(pw, load(pw, k) + t * xhat, k);
                  if (NORM == 2) store(pb, load(pb, k) + t, k);
                }
                if (weight != nullptr) t *= load(weight + i, k);
                store(g + i, t, k);
                g0 += t;
                g1 += t * xhat;
              });
              if (NORM == 0) continue;
              const vf m0 = NORM == 2 ? splat(sum(g0) / (float)a.hd) : (vf){}, m1 = splat(sum(g1) / (float)a.hd);
              each(a.hd, [&](int64_t i, auto k) {
                const vf xhat = (load(x + i, k) - s.mean) * s.r;
                store(dx + i, s.r * (load(g + i, k) - m0 - xhat * m1), k);
              });
            }
          }
        }
        if (!table) continue;
        if (a.rope_heads == 1)
          for (int64_t h = 1; h < a.H; ++h)
            for (int64_t i = 0; i < a.hd; ++i) {
              dcos[i] += dcos[h * a.hd + i];
              dsin[i] += dsin[h * a.hd + i];
            }
        for (int64_t h = 0; h < a.rope_heads; ++h) {
          float* c = a.drope + (h * a.M + m) * half;
          float* s = c + a.rope_heads * a.M * half;
          const float *pc = dcos + h * a.hd, *ps = dsin + h * a.hd;
          for (int64_t j = 0; j < half; ++j) {
            c[j] = pc[2 * j] + pc[2 * j + 1];
            s[j] = ps[2 * j] - ps[2 * j + 1];
          }
        }
      }
    }
    if (a.dweights != nullptr) {
#pragma omp barrier
      const Share columns = my_share(4 * a.hd);
      for (int64_t i = columns.begin; i < columns.end; ++i) {
        float total = 0.0f;
        for (int64_t block = 0; block < blocks; ++block) total += a.partials[block * 4 * a.hd + i];
        a.dweights[i] = total;
      }
    }
  }
}

void rope_rotate(const RopeArgs& a) {
  with_type(a.type, [&](auto t) {
    using T = decltype(t);
    a.norm == 0 ? forward<0, T>(a) : a.norm == 1 ? forward<1, T>(a) : forward<2, T>(a);
  });
}

void rope_rotate_bwd(const RopeArgs& a) {
  with_type(a.type, [&](auto t) {
    using T = decltype(t);
    a.norm == 0 ? backward<0, T>(a) : a.norm == 1 ? backward<1, T>(a) : backward<2, T>(a);
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(rope_rotate, RopeArgs)
MF_DECLARE(rope_rotate_bwd, RopeArgs)

namespace mf {
namespace {

const float* weight_of(const MaybeTensor& t, const char* name, int64_t hd) {
  if (!t.has_value()) return nullptr;
  check_shape(t.value(), name, {hd});
  check_dense(t.value(), name);
  check_dtype(t.value(), name, DType::f32, "");
  return data<float>(t);
}

RopeArgs common_args(const TensorView& qkv, const MaybeTensor& rope, const MaybeTensor& q_weight, const MaybeTensor& q_bias,
                     const MaybeTensor& k_weight, const MaybeTensor& k_bias, int64_t Nq, int64_t prefix, int64_t first,
                     int64_t norm, double eps) {
  check_ndim(qkv, "qkv", 5, "(B, N, 3, H, hd)");
  RopeArgs a{};
  a.type = check_dense(qkv, "qkv");
  a.B = qkv.size(0), a.N = qkv.size(1), a.H = qkv.size(3), a.hd = qkv.size(4);
  check_shape(qkv, "qkv", {a.B, a.N, 3, a.H, a.hd});
  a.qkv = data(qkv);
  if (a.hd % 2 != 0 || a.hd > kMaxHeadDim)
    TVM_FFI_THROW(ValueError) << "qkv's head dimension must be even and at most " << kMaxHeadDim << "; got " << a.hd;
  if (norm < 0 || norm > 2) TVM_FFI_THROW(ValueError) << "norm must be 0 (none), 1 (rms) or 2 (layer); got " << norm;
  if (first < 0 || first + Nq > a.N)
    TVM_FFI_THROW(ValueError) << "queries " << first << ".." << first + Nq << " are outside the " << a.N << " tokens";
  a.Nq = Nq, a.first = first, a.prefix = prefix;
  if (rope.has_value()) {
    const TensorView& table = rope.value();
    check_ndim(table, "rope", 4, "(2, H or 1, M, hd/2)");
    a.rope_heads = table.size(1), a.M = table.size(2);
    if (a.rope_heads != 1) a.rope_heads = a.H;
    check_shape(table, "rope", {2, a.rope_heads, a.M, a.hd / 2});
    check_dense(table, "rope");
    check_dtype(table, "rope", DType::f32, "");
    if (prefix < 0 || prefix + a.M > a.N)
      TVM_FFI_THROW(ValueError) << "rope covers tokens " << prefix << ".." << prefix + a.M << ", outside the " << a.N;
    a.rope = data<float>(table);
  }
  a.weights[0] = weight_of(q_weight, "q_weight", a.hd);
  a.weights[1] = weight_of(q_bias, "q_bias", a.hd);
  a.weights[2] = weight_of(k_weight, "k_weight", a.hd);
  a.weights[3] = weight_of(k_bias, "k_bias", a.hd);
  a.norm = static_cast<int>(norm);
  a.eps = static_cast<float>(eps);
  return a;
}

void fwd(TensorView qkv, MaybeTensor rope, MaybeTensor q_weight, MaybeTensor q_bias, MaybeTensor k_weight,
         MaybeTensor k_bias, TensorView q_out, TensorView k_out, int64_t prefix, int64_t first, int64_t norm, double eps) {
  check_ndim(q_out, "q_out", 4, "(B, Nq, H, hd)");
  RopeArgs a = common_args(qkv, rope, q_weight, q_bias, k_weight, k_bias, q_out.size(1), prefix, first, norm, eps);
  check_shape(q_out, "q_out", {a.B, a.Nq, a.H, a.hd});
  check_shape(k_out, "k_out", {a.B, a.N, a.H, a.hd});
  check_dense(q_out, "q_out");
  check_dense(k_out, "k_out");
  check_dtype(q_out, "q_out", a.type, " like qkv");
  check_dtype(k_out, "k_out", a.type, " like qkv");
  a.out[0] = data(q_out), a.out[1] = data(k_out);
  MF_CALL(rope_rotate, a);
}

void bwd(TensorView qkv, MaybeTensor rope, MaybeTensor q_weight, MaybeTensor q_bias, MaybeTensor k_weight,
         MaybeTensor k_bias, TensorView dq, TensorView dk, TensorView dv, TensorView dqkv, MaybeTensor drope,
         MaybeTensor dweights, int64_t prefix, int64_t first, int64_t norm, double eps) {
  check_ndim(dq, "dq", 4, "(B, Nq, H, hd)");
  RopeArgs a = common_args(qkv, rope, q_weight, q_bias, k_weight, k_bias, dq.size(1), prefix, first, norm, eps);
  const TensorView* gradients[] = {&dq, &dk, &dv};
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; ++i) {
    const TensorView& g = *gradients[i];
    check_shape(g, names[i], {a.B, i ? a.N : a.Nq, a.H, a.hd});
    check_cpu(g, names[i]);
    check_dtype(g, names[i], a.type, " like qkv");
    if (g.stride(3) != 1 && a.hd > 1) TVM_FFI_THROW(ValueError) << names[i] << " must be contiguous in its last dimension";
    a.d[i] = data(g);
    for (int dim = 0; dim < 3; ++dim) a.stride[i][dim] = g.stride(dim);
  }
  check_shape(dqkv, "dqkv", {a.B, a.N, 3, a.H, a.hd});
  check_dense(dqkv, "dqkv");
  check_dtype(dqkv, "dqkv", a.type, " like qkv");
  a.dqkv = data(dqkv);
  if (drope.has_value()) {
    if (!rope.has_value()) TVM_FFI_THROW(ValueError) << "drope needs rope";
    check_shape(drope.value(), "drope", {2, a.rope_heads, a.M, a.hd / 2});
    check_dense(drope.value(), "drope");
    check_dtype(drope.value(), "drope", DType::f32, "");
    a.drope = data<float>(drope);
  }
  if (dweights.has_value()) {
    check_shape(dweights.value(), "dweights", {4, a.hd});
    check_dense(dweights.value(), "dweights");
    check_dtype(dweights.value(), "dweights", DType::f32, "");
    a.dweights = data<float>(dweights);
  }
  Scratch sums(omp_get_max_threads() * 2 * a.H * a.hd);
  Scratch partials(token_blocks(a.N) * 4 * a.hd);
  a.sums = sums.get();
  a.partials = partials.get();
  MF_CALL(rope_rotate_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_rotate, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_rotate_bwd, mf::bwd);
#endif
