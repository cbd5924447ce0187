// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// rope_attention: softmax(q k^T / sqrt(hd)) v straight from packed qkv, on vectors, in fp32 arithmetic; q and k are
// normalised and rotated (cpu/rope.h) while they are packed, so that neither is ever written. On AMX, attention.cpp.
//
// Everything is transposed, S^T = K Q^T and O^T = V^T P^T, and made of the packed GEMM's inner loop (gemm_kernels.h):
//
//   per (image, head)  K -> panels of `rows` keys, [hd][rows]     V -> panels of `rows` channels, [keys][rows]     (A)
//     per NR queries   Q -> [hd][NR] (B)     S^T -> [keys][NR], which once it is P^T is a B as it lies     O^T -> [hd][NR]
//
// A lane is a query: maximum, exponential and sum are vertical, P needs no transposition, and no channel is padded (V's
// panels share hd evenly). All scores of a block of queries are there before the maximum is taken, so nothing is rescaled:
// 49 KB at 385 tokens and 148 KB at 1153, in L2 beside K and V.
//
// Predicted at hd 64 per vector of scores: 128 multiply-adds, about 20 operations of the softmax (15 %), a block's 2 NR hd
// numbers transposed on their way in and out (2 % at 385 keys): 75 to 80 % of the peak that the GEMM reaches 85 % of.
// Measured, two cores of an Emerald Rapids (FMA peak 326 GFLOP/s), best of seven, GFLOP/s here and of torch's flash
// attention behind a pass that rotates:
//
//     images x tokens x heads x hd    fp32         bf16
//     4 x 128 x 16 x 72               148, 121     158,  90
//     4 x 385 x 12 x 64, rotated      169, 139     173, 102
//     4 x 1153 x 12 x 64, rotated     197, 156     212, 124
//     4 x 1024 x 16 x 72              211, 173     216, 122
//
// 46 to 66 % of that peak; held to AVX2 (peak 180) 93 to 114, where torch with MKL's AVX2 kernels has 79 to 113.

#include "cpu/rope_attention.h"

#ifdef MF_VARIANT
#include "cpu/activations.h"
#include "cpu/gemm_rows.h"

namespace mf {
namespace MF_VARIANT {
namespace {

// A thread's scratch, in floats. Lines of rows still to be transposed are whole vectors.
struct AttentionLayout {
  int64_t line, keys, values, queries, scores, sums, rows, floats;
  explicit AttentionLayout(const RopeInputs& a) : line((a.hd + W - 1) / W * W) {
    const int64_t end = W;  // a transposition's last vectors
    keys = 0, values = keys + a.N * a.hd + end, queries = values + a.N * a.hd + end;
    scores = queries + line * NR, sums = scores + a.N * NR, rows = sums + line * NR;
    floats = (rows + W * line + 15) / 16 * 16;
  }
};

// `count` things in panels of at most Fma::rows, the first `longer` of them one more than the others.
struct Panels {
  int64_t count, base, longer;
  explicit Panels(int64_t things) : count((things + Fma::rows - 1) / Fma::rows), base(things / count), longer(things % count) {}
  int64_t first(int64_t p) const { return p * base + (p < longer ? p : longer); }
  int64_t size(int64_t p) const { return base + (p < longer ? 1 : 0); }
};

// `count` rows (put in `lines` by make(r, line), W at a time) transposed to to[channel * count + row].
template <class F> MF_INLINE void pack_transposed(float* lines, int64_t line, int64_t hd, int64_t count, float* to, F make) {
  for (int64_t first = 0; first < count; first += W) {
    const int64_t rows = count - first < W ? count - first : W;
    for (int64_t r = 0; r < rows; ++r) make(first + r, lines + r * line);
    for (int64_t d = 0; d < hd; d += W)
      transpose_out((const uint32_t*)lines + d, line, rows, hd - d < W ? hd - d : W, (uint32_t*)to + d * count + first, count);
  }
}

// 2^t for t <= 0, 2^-126 below that; NaN gives some number.
template <bool LONG> MF_INLINE vf exp2_below(vf t) {
  const vf c = larger(t, splat(-126.0f)), shifted = c + splat(kRound), f = c - (shifted - splat(kRound));
  return (vf)((vu)exp2_within<LONG>(f) + ((vu)shifted << 23));
}

// Scores, in units of log 2, into their weights, unnormalised; the sums of these (NaN where a score is, or is infinite)
// and the largest score of each column.
struct Softmax { vf total, most; };
template <bool LONG> MF_INLINE Softmax softmax(float* scores, int64_t keys) {
  vf most = load(scores, Full{}), more = most, total = {}, rest = {}, doubt = {};
  int64_t n = 1;
  for (; n + 1 < keys; n += 2) {
    most = larger(load(scores + n * NR, Full{}), most);
    more = larger(load(scores + (n + 1) * NR, Full{}), more);
  }
  if (n < keys) most = larger(load(scores + n * NR, Full{}), most);
  most = larger(more, most);
  const auto weight = [&](int64_t at) {
    const vf t = load(scores + at * NR, Full{}) - most, e = exp2_below<LONG>(t);
    store(scores + at * NR, e, Full{});
    doubt += t;
    return e;
  };
  for (n = 0; n + 1 < keys; n += 2) {
    total += weight(n);
    rest += weight(n + 1);
  }
  if (n < keys) total += weight(n);
  return {doubt == doubt ? total + rest : doubt, most};
}

// Queries begin .. end - 1 of head h of image b.
template <int NORM, class T> void one_head(const RopeAttentionArgs& a, const AttentionLayout& z, int64_t b, int64_t h, int64_t begin, int64_t end, float* scratch) {
  const Panels of_keys(a.N), of_channels(a.hd);
  float *const keys = scratch + z.keys, *const values = scratch + z.values, *const queries = scratch + z.queries;
  float *const scores = scratch + z.scores, *const sums = scratch + z.sums, *const lines = scratch + z.rows;
  // rounded as if written: the backward computes with what rope_rotate.cpp writes
  const auto prepare = [&](int which, int64_t n, float* line, vf factor) {
    prepared_row<NORM, T>(a, which, b, n, h, [&](int64_t i, vf v, auto) { store(line + i, rounded(v, T{}) * factor, Full{}); });
  };
  for (int64_t p = 0; p < of_keys.count; ++p) {
    const int64_t first = of_keys.first(p), count = of_keys.size(p);
    pack_transposed(lines, z.line, a.hd, count, keys + first * a.hd, [&](int64_t r, float* line) { prepare(1, first + r, line, splat(1.0f)); });
  }
  const T* const qkv_end = (const T*)a.qkv + a.B * a.N * 3 * a.H * a.hd;
  const T* v = (const T*)a.qkv + ((b * a.N * 3 + 2) * a.H + h) * a.hd;
  for (int64_t p = 0; p < of_channels.count; ++p) {
    const int64_t first = of_channels.first(p), count = of_channels.size(p);
    float* to = values + first * a.N;
    for (int64_t n = 0; n < a.N; ++n) {
      const T* x = v + n * 3 * a.H * a.hd + first;
      if (qkv_end - x >= count + W && n + 1 < a.N)  // whole vectors, whose surplus the next key's overwrite
        for (int64_t i = 0; i < count; i += W) store(to + n * count + i, load(x + i, Full{}), Full{});
      else each(count, [&](int64_t i, auto k) { store(to + n * count + i, load(x + i, k), k); });
    }
  }
  const vf factor = splat(a.scale * 1.44269504f);
  for (int64_t m = begin; m < end; m += NR) {
    const int64_t here = end - m < NR ? end - m : NR;
    pack_transposed(lines, z.line, a.hd, NR, queries, [&](int64_t r, float* line) {
      if (r < here) prepare(0, a.first + m + r, line, factor);
      else memset(line, 0, z.line * sizeof(float));
    });
    for (int64_t p = 0; p < of_keys.count; ++p)
      multiply_of<Fma>(of_keys.size(p))(keys + of_keys.first(p) * a.hd, queries, a.hd, scores + of_keys.first(p) * NR, false, Soon{});
    float total[NR], most[NR];
    for (int64_t half = 0; half < NR; half += W) {
      const Softmax found = softmax<sizeof(T) == 4>(scores + half, a.N);
      store(total + half, found.total, Full{}), store(most + half, found.most, Full{});
    }
    for (int64_t p = 0; p < of_channels.count; ++p)
      multiply_of<Fma>(of_channels.size(p))(values + of_channels.first(p) * a.N, scores, a.N, sums + of_channels.first(p) * NR, false, Soon{});
    for (int64_t half = 0; half < here; half += W) {
      const int64_t rows = here - half < W ? here - half : W;
      for (int64_t d = 0; d < a.hd; d += W)  // queries back into rows
        transpose_out((const uint32_t*)sums + d * NR + half, NR, W, W, (uint32_t*)lines + d, z.line);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = ((b * a.Nq + m + half + r) * a.H + h);
        const vf inverse = splat(1.0f / total[half + r]);
        each(a.hd, [&](int64_t i, auto k) { store((T*)a.out + to * a.hd + i, load(lines + r * z.line + i, Full{}) * inverse, k); });
        a.lse[to] = most[half + r] * 0.69314718f + __builtin_logf(total[half + r]);
      }
    }
  }
}

template <int NORM, class T> void all_heads(const RopeAttentionArgs& a, const AttentionLayout& z) {
  const Shares shares(a, NR, 4 * NR);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t i = 0; i < shares.count; ++i) {
    const Share queries = shares.queries(i);
    if (queries.begin < queries.end)
      one_head<NORM, T>(a, z, shares.image(i), shares.head(i), queries.begin, queries.end, (float*)a.scratch + omp_get_thread_num() * z.floats);
  }
}

}  // namespace

void rope_attention(const RopeAttentionArgs& a) {
  const AttentionLayout layout(a);
  if (a.scratch == nullptr) {
    *a.scratch_bytes = a.threads * layout.floats * 4;
    return;
  }
  with_type(a.type, [&](auto t) {
    using T = decltype(t);
    a.norm == 0 ? all_heads<0, T>(a, layout) : a.norm == 1 ? all_heads<1, T>(a, layout) : all_heads<2, T>(a, layout);
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
MF_DECLARE(rope_attention, RopeAttentionArgs)
MF_DECLARE(attention, RopeAttentionArgs)

namespace mf {
namespace {

// Whether `type` runs on tiles here.
bool on_tiles(DType type) { return type == DType::bf16 && variant() == Variant::amx; }
bool attention_tiles() { return on_tiles(DType::bf16); }

void run(const RopeAttentionArgs& a) {
  if (on_tiles(a.type)) {
    MF_CALL(attention, a);
  } else {
    MF_CALL(rope_attention, a);
  }
}

void attention(TensorView qkv, MaybeTensor rope, MaybeTensor q_weight, MaybeTensor q_bias, MaybeTensor k_weight,
               MaybeTensor k_bias, MaybeTensor index, TensorView out, TensorView lse, int64_t prefix, int64_t first,
               int64_t norm, double eps) {
  check_ndim(out, "out", 4, "(B, Nq, H, hd)");
  RopeAttentionArgs a{rope_inputs(qkv, rope, q_weight, q_bias, k_weight, k_bias, index, out.size(1), prefix, first, norm, eps)};
  check_shape(out, "out", {a.B, a.Nq, a.H, a.hd});
  check_shape(lse, "lse", {a.B, a.Nq, a.H});
  check_dense(out, "out"), check_dtype(out, "out", a.type, " like qkv");
  check_dense(lse, "lse"), check_dtype(lse, "lse", DType::f32, "");
  if (a.B * a.Nq * a.H * a.hd == 0) return;
  a.out = data(out), a.lse = data<float>(lse);
  a.scale = attention_scale(a.hd);
  a.threads = omp_get_max_threads();
  int64_t bytes = 0;
  a.scratch_bytes = &bytes;
  run(a);
  const Scratch scratch(bytes / 4);
  a.scratch = reinterpret_cast<char*>(scratch.get());
  run(a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_attention, mf::attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_tiles, mf::attention_tiles);
#endif
