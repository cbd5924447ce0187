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
//
// Tangents, of forward-mode AD: with dQ, dK, dV of Q, K, V, and W = P o dS,
//
//     dS = dQ K^T + Q dK^T = [Q dQ] [dK K]^T        dO = (W V + P dV - rowsum(W) O / rowsum(P)) / rowsum(P) = [W P] [V dV] - ...
//
// so that each is one product more of twice the depth over panels that hold both, [dK K] of which K is the second half, [W P]
// of which P is, and the exponentials of the scores serve both: six products where plain attention with its tangent writes
// five matrices of scores.

#include "cpu/rope_attention.h"

#ifdef MF_VARIANT
#include "cpu/activations.h"
#include "cpu/gemm_rows.h"

namespace mf {
namespace MF_VARIANT {
namespace {

// A thread's scratch, in floats. Lines of rows still to be transposed are whole vectors. `parts`: 2 where tangents lie beside.
struct AttentionLayout {
  int64_t line, parts, keys, values, queries, scores, sums, rows, floats;
  explicit AttentionLayout(const RopeAttentionArgs& a) : line((a.hd + W - 1) / W * W), parts(a.dqkv == nullptr ? 1 : 2) {
    const int64_t end = W;  // a transposition's last vectors
    keys = 0, values = keys + parts * a.N * a.hd + end, queries = values + parts * a.N * a.hd + end;
    scores = queries + (a.hd + line) * NR, sums = scores + parts * a.N * NR, rows = sums + parts * line * NR;
    floats = (rows + parts * W * line + 15) / 16 * 16;
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

// Scores of `keys` keys become their weights, in `weights`; slopes, in units of log 2, the weights' tangents: the sums of these.
MF_INLINE vf weigh(float* slopes, const float* weights, int64_t keys) {
  vf total = {};
  for (int64_t n = 0; n < keys; ++n) {
    const vf w = load(slopes + n * NR, Full{}) * splat(0.69314718f) * load(weights + n * NR, Full{});
    store(slopes + n * NR, w, Full{});
    total += w;
  }
  return total;
}

// Queries begin .. end - 1 of head h of image b. PARTS 2: and their tangents.
template <int NORM, int PARTS, class T> void one_head(const RopeAttentionArgs& a, const AttentionLayout& z, int64_t b, int64_t h, int64_t begin, int64_t end, float* scratch) {
  const Panels of_keys(a.N), of_channels(a.hd);
  float *const keys = scratch + z.keys, *const values = scratch + z.values, *const queries = scratch + z.queries;
  float *const sums = scratch + z.sums, *const lines = scratch + z.rows;
  float *const slopes = scratch + z.scores, *const scores = slopes + (PARTS - 1) * a.N * NR;
  RopeAttentionArgs tangents = a;
  tangents.qkv = a.dqkv;
  // rounded as if written: the backward computes with what rope_rotate.cpp writes
  const auto prepare = [&](const RopeInputs& of, int which, int64_t n, float* line, vf factor) {
    prepared_row<NORM, T>(of, which, b, n, h, [&](int64_t i, vf v, auto) { store(line + i, rounded(v, T{}) * factor, Full{}); });
  };
  for (int64_t p = 0; p < of_keys.count; ++p) {
    const int64_t first = of_keys.first(p), count = of_keys.size(p);
    float* const to = keys + PARTS * first * a.hd;
    if (PARTS == 2) pack_transposed(lines, z.line, a.hd, count, to, [&](int64_t r, float* line) { prepare(tangents, 1, first + r, line, splat(1.0f)); });
    pack_transposed(lines, z.line, a.hd, count, to + (PARTS - 1) * count * a.hd, [&](int64_t r, float* line) { prepare(a, 1, first + r, line, splat(1.0f)); });
  }
  for (int part = 0; part < PARTS; ++part) {
    const T* const all = (const T*)(part == 0 ? a.qkv : a.dqkv);
    const T* const qkv_end = all + a.B * a.N * 3 * a.H * a.hd;
    const T* v = all + ((b * a.N * 3 + 2) * a.H + h) * a.hd;
    for (int64_t p = 0; p < of_channels.count; ++p) {
      const int64_t first = of_channels.first(p), count = of_channels.size(p);
      float* to = values + (PARTS * first + part * count) * a.N;
      for (int64_t n = 0; n < a.N; ++n) {
        const T* x = v + n * 3 * a.H * a.hd + first;
        if (qkv_end - x >= count + W && n + 1 < a.N)  // whole vectors, whose surplus the next key's overwrite
          for (int64_t i = 0; i < count; i += W) store(to + n * count + i, load(x + i, Full{}), Full{});
        else each(count, [&](int64_t i, auto k) { store(to + n * count + i, load(x + i, k), k); });
      }
    }
  }
  const vf factor = splat(a.scale * 1.44269504f);
  for (int64_t m = begin; m < end; m += NR) {
    const int64_t here = end - m < NR ? end - m : NR;
    for (int part = 0; part < PARTS; ++part)
      pack_transposed(lines, z.line, a.hd, NR, queries + part * a.hd * NR, [&](int64_t r, float* line) {
        if (r < here) prepare(part == 0 ? a : tangents, 0, a.first + m + r, line, factor);
        else memset(line, 0, z.line * sizeof(float));
      });
    for (int64_t p = 0; p < of_keys.count; ++p) {
      const int64_t first = of_keys.first(p), count = of_keys.size(p);
      const float* const panel = keys + PARTS * first * a.hd;
      const Multiply multiply = multiply_of<Fma>(count);
      if (PARTS == 2) multiply(panel, queries, 2 * a.hd, slopes + first * NR, false, Soon{});
      multiply(panel + (PARTS - 1) * count * a.hd, queries, a.hd, scores + first * NR, false, Soon{});
    }
    float total[NR], most[NR], slope[NR];
    for (int64_t half = 0; half < NR; half += W) {
      const Softmax found = softmax<sizeof(T) == 4>(scores + half, a.N);
      store(total + half, found.total, Full{}), store(most + half, found.most, Full{});
      if (PARTS == 2) store(slope + half, weigh(slopes + half, scores + half, a.N), Full{});
    }
    for (int64_t p = 0; p < of_channels.count; ++p) {
      const int64_t first = of_channels.first(p), count = of_channels.size(p);
      const float* const panel = values + PARTS * first * a.N;
      const Multiply multiply = multiply_of<Fma>(count);
      multiply(panel, scores, a.N, sums + first * NR, false, Soon{});
      if (PARTS == 2) multiply(panel, slopes, 2 * a.N, sums + (z.line + first) * NR, false, Soon{});
    }
    for (int64_t half = 0; half < here; half += W) {
      const int64_t rows = here - half < W ? here - half : W;
      for (int part = 0; part < PARTS; ++part)
        for (int64_t d = 0; d < a.hd; d += W)  // queries back into rows
          transpose_out((const uint32_t*)(sums + (part * z.line + d) * NR + half), NR, W, W, (uint32_t*)(lines + part * W * z.line + d), z.line);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = ((b * a.Nq + m + half + r) * a.H + h);
        const vf inverse = splat(1.0f / total[half + r]);
        const float *const y = lines + r * z.line, *const dy = y + W * z.line;
        each(a.hd, [&](int64_t i, auto k) {
          const vf v = load(y + i, Full{}) * inverse;
          store((T*)a.out + to * a.hd + i, v, k);
          if (PARTS == 2) store((T*)a.dout + to * a.hd + i, (load(dy + i, Full{}) - v * splat(slope[half + r])) * inverse, k);
        });
        a.lse[to] = most[half + r] * 0.69314718f + __builtin_logf(total[half + r]);
      }
    }
  }
}

template <int NORM, int PARTS, class T> void all_heads(const RopeAttentionArgs& a, const AttentionLayout& z) {
  const Shares shares(a, NR, 4 * NR);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t i = 0; i < shares.count; ++i) {
    const Share queries = shares.queries(i);
    if (queries.begin < queries.end)
      one_head<NORM, PARTS, T>(a, z, shares.image(i), shares.head(i), queries.begin, queries.end, (float*)a.scratch + omp_get_thread_num() * z.floats);
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
    if (a.dqkv != nullptr) return all_heads<0, 2, T>(a, layout);
    a.norm == 0 ? all_heads<0, 1, T>(a, layout) : a.norm == 1 ? all_heads<1, 1, T>(a, layout) : all_heads<2, 1, T>(a, layout);
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

// run(a), told of its outputs and its scratch.
template <class F> void fill(RopeAttentionArgs& a, const TensorView& out, const TensorView& lse, F run) {
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

void attention(TensorView qkv, MaybeTensor rope, MaybeTensor q_weight, MaybeTensor q_bias, MaybeTensor k_weight,
               MaybeTensor k_bias, MaybeTensor index, TensorView out, TensorView lse, int64_t prefix, int64_t first,
               int64_t norm, double eps) {
  check_ndim(out, "out", 4, "(B, Nq, H, hd)");
  RopeAttentionArgs a{rope_inputs(qkv, rope, q_weight, q_bias, k_weight, k_bias, index, out.size(1), prefix, first, norm, eps)};
  fill(a, out, lse, [](const RopeAttentionArgs& args) {
    if (on_tiles(args.type)) {
      MF_CALL(attention, args);
    } else {
      MF_CALL(rope_attention, args);
    }
  });
}

void attention_jvp(TensorView qkv, TensorView dqkv, MaybeTensor rope, TensorView out, TensorView dout, TensorView lse,
                   int64_t prefix, int64_t first) {
  check_ndim(out, "out", 4, "(B, Nq, H, hd)");
  RopeAttentionArgs a{rope_inputs(qkv, rope, {}, {}, {}, {}, {}, out.size(1), prefix, first, 0, 0.0)};
  check_shape(dqkv, "dqkv", {a.B, a.N, 3, a.H, a.hd});
  check_dense(dqkv, "dqkv"), check_dtype(dqkv, "dqkv", a.type, " like qkv");
  check_shape(dout, "dout", {a.B, a.Nq, a.H, a.hd});
  check_dense(dout, "dout"), check_dtype(dout, "dout", a.type, " like qkv");
  a.dqkv = data(dqkv), a.dout = data(dout);
  fill(a, out, lse, [](const RopeAttentionArgs& args) { MF_CALL(rope_attention, args); });
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_attention, mf::attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_attention_jvp, mf::attention_jvp);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_tiles, mf::attention_tiles);
#endif
