// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// q and k of packed qkv, normalised over the head dimension (optional) and rotated (2-D RoPE, interleaved pairs).
//
// Formula and layouts: cpu/rope.h. Queries are written for tokens first .. first+Nq-1 only. Backward undoes the rotation on
// the gradients, differentiates the norm, and sums
//     dcos[h, r, j] = sum d[2j] n[2j] + d[2j+1] n[2j+1],   dsin = sum d[2j+1] n[2j] - d[2j] n[2j+1]
// over the tokens that row r rotated, q and k (and heads when they share a table). Its gradients may lie in dqkv already.
//
// Backward's work is split over groups of tokens: those of one table row, and those of one unrotated position. A row's
// cos and sin are read once and its sums belong to one thread, so they need no second pass and have one order.

#include "cpu/rope.h"

namespace mf {

struct RopeArgs : RopeInputs {
  const int64_t *order, *starts;  // backward with an index: entries of (B, M) sorted by row, (R + 1) where each row starts
  void* out[2];             // forward: q_out, k_out
  const void* d[3];         // backward: dq, dk, dv
  int64_t stride[3][3];     // their strides over B, N, H
  void* dqkv;
  float* drope;             // null: not wanted
  float* dweights;          // (4, hd) or null
  float* sums;              // 2 * H * hd floats per thread: dcos and dsin of a token, not yet added up in pairs
  float* partials;          // blocks(groups) * 4 * hd floats: dweights before the last sum
};

constexpr int64_t kGroups = 8;  // groups per item of the backward's work, whatever the number of threads

constexpr int64_t groups(const RopeArgs& a) { return a.index == nullptr ? a.N : a.R + a.N - a.M; }
constexpr int64_t group_blocks(const RopeArgs& a) { return (groups(a) + kGroups - 1) / kGroups; }

}  // namespace mf

#ifdef MF_VARIANT

namespace mf {
namespace MF_VARIANT {

template <int NORM, class T> static void forward(const RopeArgs& a) {
  const int64_t D = a.H * a.hd;
#pragma omp parallel for schedule(static) if (a.B * a.N * D > kSerial)
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t b = 0; b < a.B; ++b)
      for (int which = 0; which < 2; ++which) {
        const int64_t rows = which ? a.N : a.Nq, row = which ? n : n - a.first;
        if (row < 0 || row >= rows) continue;
        T* y = (T*)a.out[which] + (b * rows + row) * D;
        if (NORM == 0 && table_row(a, b, n) < 0) memcpy(y, (const T*)a.qkv + ((b * a.N + n) * 3 + which) * D, sizeof(T) * D);
        else
          for (int64_t h = 0; h < a.H; ++h, y += a.hd)
            prepared_row<NORM, T>(a, which, b, n, h, [&](int64_t i, vf v, auto k) { store(y + i, v, k); });
      }
}

// One group of tokens: `count` of them, rotated by table row `row` or (-1) not at all.
struct Group { int64_t row, count; };
struct Token { int64_t b, n; };

MF_INLINE Group group_of(const RopeArgs& a, int64_t g) {
  if (a.index == nullptr) {
    const int64_t m = g - a.prefix;
    return {a.rope != nullptr && m >= 0 && m < a.M ? m : -1, a.B};
  }
  return g < a.R ? Group{g, a.starts[g + 1] - a.starts[g]} : Group{-1, a.B};
}

MF_INLINE Token token_of(const RopeArgs& a, int64_t g, int64_t i) {
  if (a.index == nullptr) return {i, g};
  if (g < a.R) {
    const int64_t entry = a.order[a.starts[g] + i];
    return {entry / a.M, a.prefix + entry % a.M};
  }
  const int64_t n = g - a.R;
  return {i, n < a.prefix ? n : n + a.M};
}

// A token's row of q, k or v: the input, the gradient of what was made of it, and the place for the input's own.
template <class T> struct Row {
  const T *x, *d;
  T* dx;
  int64_t d_head;  // d's stride over heads
};

template <class T> MF_INLINE Row<T> row_of(const RopeArgs& a, Token t, int which) {
  const int64_t D = a.H * a.hd, at = ((t.b * a.N + t.n) * 3 + which) * D, row = which ? t.n : t.n - a.first;
  T* dx = (T*)a.dqkv + at;
  if (which == 0 && (row < 0 || row >= a.Nq)) return {nullptr, nullptr, dx, 0};  // an absent query
  const int64_t* stride = a.stride[which];
  return {(const T*)a.qkv + at, (const T*)a.d[which] + t.b * stride[0] + row * stride[1], dx, stride[2]};
}

template <class T> MF_INLINE void copy(const RopeArgs& a, const Row<T>& r) {
  if (r.d == r.dx) return;
  if (r.d == nullptr) {
    memset(r.dx, 0, sizeof(T) * a.H * a.hd);
    return;
  }
  for (int64_t h = 0; h < a.H; ++h) memcpy(r.dx + h * a.hd, r.d + h * r.d_head, sizeof(T) * a.hd);
}

// Rows that were rotated and nothing else: all of a group at once, cos, sin and their sums in registers.
template <bool TABLE, class T>
MF_INLINE void rotate_back(const RopeArgs& a, const Row<T>* rows, int count, const float* cos, float* dcos, float* dsin) {
  const vf sign = alternating();
  const int64_t half = a.hd / 2, sin = a.rope_heads * a.R * half, step = a.rope_heads == 1 ? 0 : a.R * half;
  for (int64_t h = 0; h < a.H; ++h, cos += step, dcos += a.hd, dsin += a.hd) {
    each(a.hd, [&](int64_t i, auto k) {
      const vf c = load_twice(cos + i / 2, k), s = sign * load_twice(cos + sin + i / 2, k);
      vf sum_c = {}, sum_s = {};
      if (TABLE) sum_c = load(dcos + i, k), sum_s = load(dsin + i, k);
      for (int r = 0; r < count; ++r) {
        const vf t = load(rows[r].d + h * rows[r].d_head + i, k), swapped = swap_pairs(t);
        if (TABLE) {
          const vf x = load(rows[r].x + h * a.hd + i, k);
          sum_c += t * x;
          sum_s += swapped * x;
        }
        store(rows[r].dx + h * a.hd + i, t * c - swapped * s, k);
      }
      if (TABLE) store(dcos + i, sum_c, k), store(dsin + i, sum_s, k);
    });
  }
}

// A row that was normalised and (cos not null) rotated. dcos, dsin and dw (this which's d_weight, d_bias) may be null.
template <int NORM, class T>
MF_INLINE void norm_back(const RopeArgs& a, const Row<T>& row, int which, const float* cos, float* dcos, float* dsin, float* dw) {
  const vf sign = alternating();
  const int64_t half = a.hd / 2, sin = a.rope_heads * a.R * half, step = a.rope_heads == 1 ? 0 : a.R * half;
  const float *weight = a.weights[2 * which], *bias = a.weights[2 * which + 1];
  alignas(64) float g[kMaxHeadDim];
  const T *x = row.x, *d = row.d;
  T* dx = row.dx;
  for (int64_t h = 0; h < a.H; ++h, x += a.hd, dx += a.hd, d += row.d_head) {
    const Moments s = moments<NORM>(x, a.hd, a.eps);
    vf g0 = {}, g1 = {};
    each(a.hd, [&](int64_t i, auto k) {
      vf t = load(d + i, k);
      const vf xhat = keep((load(x + i, k) - s.mean) * s.r, k);
      if (cos != nullptr) {
        const vf swapped = swap_pairs(t);
        if (dcos != nullptr) {
          const vf v = affine<NORM>(xhat, weight, bias, i, k);
          float *pc = dcos + h * a.hd + i, *ps = dsin + h * a.hd + i;
          store(pc, load(pc, k) + t * v, k);
          store(ps, load(ps, k) + swapped * v, k);
        }
        t = t * load_twice(cos + h * step + i / 2, k) - swapped * (sign * load_twice(cos + h * step + sin + i / 2, k));
      }
      if (dw != nullptr) {
        float *pw = dw + i, *pb = pw + a.hd;
        store(pw, load(pw, k) + t * xhat, k);
        if (NORM == 2) store(pb, load(pb, k) + t, k);
      }
      if (weight != nullptr) t *= load(weight + i, k);
      store(g + i, t, k);
      g0 += t;
      g1 += t * xhat;
    });
    const vf m0 = NORM == 2 ? splat(sum(g0) / (float)a.hd) : (vf){}, m1 = splat(sum(g1) / (float)a.hd);
    each(a.hd, [&](int64_t i, auto k) {
      const vf xhat = (load(x + i, k) - s.mean) * s.r;
      store(dx + i, s.r * (load(g + i, k) - m0 - xhat * m1), k);
    });
  }
}

// A row of the table's gradient from its sums, whose neighbours belong to one pair; heads are added when they share it.
MF_INLINE void write_table_row(const RopeArgs& a, int64_t row, float* dcos, float* dsin) {
  const int64_t half = a.hd / 2;
  if (a.rope_heads == 1)
    for (int64_t h = 1; h < a.H; ++h)
      each(a.hd, [&](int64_t i, auto k) {
        store(dcos + i, load(dcos + i, k) + load(dcos + h * a.hd + i, k), k);
        store(dsin + i, load(dsin + i, k) + load(dsin + h * a.hd + i, k), k);
      });
  for (int64_t h = 0; h < a.rope_heads; ++h, dcos += a.hd, dsin += a.hd) {
    float* c = a.drope + (h * a.R + row) * half;
    float* s = c + a.rope_heads * a.R * half;
    for (int64_t j = 0; j < half; ++j) {
      c[j] = dcos[2 * j] + dcos[2 * j + 1];
      s[j] = dsin[2 * j] - dsin[2 * j + 1];
    }
  }
}

template <int NORM, class T> static void one_group(const RopeArgs& a, int64_t g, float* dcos, float* dsin, float* dw) {
  const Group group = group_of(a, g);
  const bool table = group.row >= 0 && a.drope != nullptr;
  const float* cos = group.row >= 0 ? a.rope + group.row * (a.hd / 2) : nullptr;
  if (table) memset(dcos, 0, sizeof(float) * a.H * a.hd), memset(dsin, 0, sizeof(float) * a.H * a.hd);
  Row<T> rows[32];
  int count = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const Token t = token_of(a, g, i);
    copy(a, row_of<T>(a, t, 2));
    for (int which = 0; which < 2; ++which) {
      const Row<T> row = row_of<T>(a, t, which);
      if (row.d == nullptr || (NORM == 0 && cos == nullptr)) copy(a, row);
      else if (NORM == 0) rows[count++] = row;
      else norm_back<NORM>(a, row, which, cos, table ? dcos : nullptr, dsin, dw == nullptr ? nullptr : dw + 2 * which * a.hd);
    }
    if (count > 30 || (count > 0 && i + 1 == group.count)) {
      table ? rotate_back<true>(a, rows, count, cos, dcos, dsin) : rotate_back<false>(a, rows, count, cos, dcos, dsin);
      count = 0;
    }
  }
  if (table) write_table_row(a, group.row, dcos, dsin);
}

template <int NORM, class T> static void backward(const RopeArgs& a) {
  const int64_t D = a.H * a.hd, blocks = group_blocks(a);
#pragma omp parallel if (a.B * a.N * D > kSerial)
  {
    float *dcos = a.sums + omp_get_thread_num() * 2 * D, *dsin = dcos + D;
    const Share share = my_share(blocks);
    for (int64_t block = share.begin; block < share.end; ++block) {
      float* dw = a.dweights != nullptr ? a.partials + block * 4 * a.hd : nullptr;
      if (dw != nullptr) memset(dw, 0, sizeof(float) * 4 * a.hd);
      const int64_t last = (block + 1) * kGroups < groups(a) ? (block + 1) * kGroups : groups(a);
      for (int64_t g = block * kGroups; g < last; ++g) one_group<NORM, T>(a, g, dcos, dsin, dw);
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
#include <vector>

MF_DECLARE(rope_rotate, RopeArgs)
MF_DECLARE(rope_rotate_bwd, RopeArgs)

namespace mf {
namespace {

void fwd(TensorView qkv, MaybeTensor rope, MaybeTensor q_weight, MaybeTensor q_bias, MaybeTensor k_weight,
         MaybeTensor k_bias, MaybeTensor index, TensorView q_out, TensorView k_out, int64_t prefix, int64_t first,
         int64_t norm, double eps) {
  check_ndim(q_out, "q_out", 4, "(B, Nq, H, hd)");
  RopeArgs a{rope_inputs(qkv, rope, q_weight, q_bias, k_weight, k_bias, index, q_out.size(1), prefix, first, norm, eps)};
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
         MaybeTensor k_bias, MaybeTensor index, TensorView dq, TensorView dk, TensorView dv, TensorView dqkv,
         MaybeTensor drope, MaybeTensor dweights, int64_t prefix, int64_t first, int64_t norm, double eps) {
  check_ndim(dq, "dq", 4, "(B, Nq, H, hd)");
  RopeArgs a{rope_inputs(qkv, rope, q_weight, q_bias, k_weight, k_bias, index, dq.size(1), prefix, first, norm, eps)};
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
    check_shape(drope.value(), "drope", {2, a.rope_heads, a.R, a.hd / 2});
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
  Scratch partials(group_blocks(a) * 4 * a.hd);
  a.sums = sums.get();
  a.partials = partials.get();
  std::vector<int64_t> order, starts;
  if (a.index != nullptr) {  // a counting sort: the tokens of each table row, in the order of the index
    starts.assign(a.R + 1, 0), order.resize(a.B * a.M);
    for (int64_t i = 0; i < a.B * a.M; ++i) ++starts[a.index[i] + 1];
    for (int64_t r = 0; r < a.R; ++r) starts[r + 1] += starts[r];
    std::vector<int64_t> next(starts);
    for (int64_t i = 0; i < a.B * a.M; ++i) order[next[a.index[i]]++] = i;
    a.order = order.data(), a.starts = starts.data();
  }
  MF_CALL(rope_rotate_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_rotate, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_rotate_bwd, mf::bwd);
#endif
