// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// attention_bf16_bwd: dq, dk, dv of softmax(q k^T / sqrt(D)) v on AMX tiles, from the log-sum-exp of the forward.
//
//   per (image, head):  Q, dO -> channel pairs x queries and query pairs x channels; delta = sum(O dO)   (packed once)
//     per 128 keys:     K, V -> keys x channels, K -> channels x keys
//       per 128 queries:
//         per 32 x 32:  S^T = K Q^T, dP^T = V dO^T (fp32)  ->  P^T = 2^(S^T log2(e)/sqrt(D) - lse), dS^T = P^T (dP^T - delta)
//         dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T                           (fp32; dK and dQ times 1/sqrt(D) at the end)
//
// Keys stand in the rows because then everything falls into place: lse and delta lie along the vector, P^T and dS^T leave
// the registers as left operands of dV and dK, and two neighbouring rows of dS^T are a row of the right operand of dQ^T.
// What is transposed by shuffles is of N x D, never of N x N. Scores live in 8 KB of L1; P and dS, 32 KB each, in L2.
// One thread owns an (image, head), and its sums run in the order above: results do not depend on the number of threads.
#include <cstdint>

#include "cpu/types.h"

namespace mf {

struct AttentionBwdArgs {
  const uint16_t *q, *k, *v, *out, *dout;  // heads and channels contiguous; out and dout (B, queries, heads, D) contiguous
  const float* lse;                        // (B, queries, heads) contiguous
  uint16_t *dq, *dk, *dv;
  int64_t batch, queries, keys, heads, dim;
  int64_t token[6], image[6];              // strides of q, k, v, dq, dk, dv in elements
  float scale;
  char* scratch;                           // BwdScratch(queries, dim).bytes per thread
};

namespace {

constexpr int64_t kBlock = 128;               // queries and keys of a block
constexpr int64_t kTiles = kBlock / 16, kSteps = kBlock / 32;

// A thread's scratch: offsets in bytes.
struct BwdScratch {
  int64_t channel_steps, channel_tiles, padded;
  int64_t q_t, do_t, q_pairs, do_pairs, dq, lse, delta;       // of all queries
  int64_t k, v, k_t, dk, dv, s, dp, p, ds, ds_pairs, bytes;   // of a block
  BwdScratch(int64_t queries, int64_t dim)
      : channel_steps((dim + 31) / 32), channel_tiles((dim + 15) / 16), padded((queries + 31) / 32 * 32),
        q_t(0), do_t(q_t + padded / 16 * channel_steps * 1024), q_pairs(do_t + padded / 16 * channel_steps * 1024),
        do_pairs(q_pairs + padded / 32 * channel_tiles * 1024), dq(do_pairs + padded / 32 * channel_tiles * 1024),
        lse(dq + padded / 16 * channel_tiles * 1024), delta(lse + padded * 4),
        k(delta + padded * 4), v(k + kTiles * channel_steps * 1024), k_t(v + kTiles * channel_steps * 1024),
        dk(k_t + kSteps * channel_tiles * 1024), dv(dk + kTiles * channel_tiles * 1024),
        s(dv + kTiles * channel_tiles * 1024), dp(s + 4 * 1024), p(dp + 4 * 1024), ds(p + kTiles * kSteps * 1024),
        ds_pairs(ds + kTiles * kSteps * 1024), bytes(ds_pairs + kTiles * kSteps * 1024) {}
};

}  // namespace
}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/amx.h"

#ifdef MF_HAS_AMX
#include <omp.h>

namespace mf::MF_VARIANT {
namespace {

MF_AMX float dot(const uint16_t* a, const uint16_t* b, int64_t dim) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 32) {
    const __mmask32 mask = low_bits(dim - d);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, a + d), (__m512bh)_mm512_maskz_loadu_epi16(mask, b + d));
  }
  return _mm512_reduce_add_ps(sum);
}

// 32 keys x 32 queries: from scores and dP (2 x 2 tiles each) to P and dS as left operands (a tile per 16 keys, `row`
// bytes apart) and dS as right operand (a tile per 16 queries). Of the keys `valid` exist: the others' dS is zero, lest a
// power of theirs that overflows meet the zeros of K.
MF_AMX void weights(const char* s, const char* dp, const float* lse, const float* delta, float scale, int64_t valid,
                    char* p, char* ds, int64_t row, char* pairs) {
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 lse0 = _mm512_load_ps(lse), lse1 = _mm512_load_ps(lse + 16);
  const __m512 delta0 = _mm512_load_ps(delta), delta1 = _mm512_load_ps(delta + 16);
  // (a0 .. a15, b0 .. b15) -> (a0, b0, a1, b1, ...)
  const __m512i mix = _mm512_or_si512(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t r = 0; r < 16; r += 2) {
      const __mmask16 first = 16 * i + r < valid ? 0xffff : 0, second = 16 * i + r + 1 < valid ? 0xffff : 0;
      const char *from = s + 2 * i * TILE + r * 64, *grad = dp + 2 * i * TILE + r * 64;
      const __m512 p00 = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(from), factor, lse0));
      const __m512 p01 = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(from + TILE), factor, lse1));
      const __m512 p10 = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(from + 64), factor, lse0));
      const __m512 p11 = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(from + TILE + 64), factor, lse1));
      _mm512_store_si512(p + i * row + r * 64, (__m512i)_mm512_cvtne2ps_pbh(p01, p00));
      _mm512_store_si512(p + i * row + r * 64 + 64, (__m512i)_mm512_cvtne2ps_pbh(p11, p10));
      const __m512 ds00 = _mm512_maskz_mul_ps(first, p00, _mm512_sub_ps(_mm512_load_ps(grad), delta0));
      const __m512 ds01 = _mm512_maskz_mul_ps(first, p01, _mm512_sub_ps(_mm512_load_ps(grad + TILE), delta1));
      const __m512 ds10 = _mm512_maskz_mul_ps(second, p10, _mm512_sub_ps(_mm512_load_ps(grad + 64), delta0));
      const __m512 ds11 = _mm512_maskz_mul_ps(second, p11, _mm512_sub_ps(_mm512_load_ps(grad + TILE + 64), delta1));
      _mm512_store_si512(ds + i * row + r * 64, (__m512i)_mm512_cvtne2ps_pbh(ds01, ds00));
      _mm512_store_si512(ds + i * row + r * 64 + 64, (__m512i)_mm512_cvtne2ps_pbh(ds11, ds10));
      const __m512i both0 = (__m512i)_mm512_cvtne2ps_pbh(ds10, ds00), both1 = (__m512i)_mm512_cvtne2ps_pbh(ds11, ds01);
      char* to = pairs + (8 * i + r / 2) * 64;
      _mm512_store_si512(to, _mm512_permutexvar_epi16(mix, both0));
      _mm512_store_si512(to + TILE, _mm512_permutexvar_epi16(mix, both1));
    }
}

MF_AMX void one_head(const AttentionBwdArgs& a, const BwdScratch& z, int64_t image, int64_t head, char* scratch) {
  const int64_t cs = z.channel_steps, ct = z.channel_tiles, dim = a.dim, at = head * dim;
  const uint16_t *q = a.q + image * a.image[0] + at, *k = a.k + image * a.image[1] + at, *v = a.v + image * a.image[2] + at;
  uint16_t *dq = a.dq + image * a.image[3] + at, *dk = a.dk + image * a.image[4] + at, *dv = a.dv + image * a.image[5] + at;
  const int64_t row = a.heads * dim;
  const uint16_t *out = a.out + image * a.queries * row + at, *dout = a.dout + image * a.queries * row + at;
  float *lse = reinterpret_cast<float*>(scratch + z.lse), *delta = reinterpret_cast<float*>(scratch + z.delta);
  for (int64_t m = 0; m < z.padded; m += 16) {
    transpose_rows(q + m * a.token[0], a.token[0], a.queries - m, dim, scratch + z.q_t + m / 16 * cs * TILE);
    transpose_rows(dout + m * row, row, a.queries - m, dim, scratch + z.do_t + m / 16 * cs * TILE);
  }
  for (int64_t m = 0; m < z.padded; m += 32) {
    pair_rows(q + m * a.token[0], a.token[0], a.queries - m, dim, scratch + z.q_pairs + m / 32 * ct * TILE);
    pair_rows(dout + m * row, row, a.queries - m, dim, scratch + z.do_pairs + m / 32 * ct * TILE);
  }
  for (int64_t m = 0; m < a.queries; ++m) {
    lse[m] = a.lse[(image * a.queries + m) * a.heads + head] * LOG2E;
    delta[m] = dot(out + m * row, dout + m * row, dim);
  }
  for (int64_t m = a.queries; m < z.padded; ++m) lse[m] = 3e38f, delta[m] = 0.f;  // no query: P is zero

  const Matrix keys{scratch + z.k, cs * TILE, TILE}, values{scratch + z.v, cs * TILE, TILE};
  const Matrix keys_t{scratch + z.k_t, kSteps * TILE, TILE};
  const Matrix s{scratch + z.s, 2 * TILE, TILE}, dp{scratch + z.dp, 2 * TILE, TILE};
  const Matrix p{scratch + z.p, kSteps * TILE, TILE}, ds{scratch + z.ds, kSteps * TILE, TILE};
  const Matrix ds_pairs{scratch + z.ds_pairs, kTiles * TILE, TILE};
  const Matrix key_sums{scratch + z.dk, ct * TILE, TILE}, value_sums{scratch + z.dv, ct * TILE, TILE};
  for (int64_t n = 0; n < a.keys; n += kBlock) {
    const int64_t here = a.keys - n < kBlock ? a.keys - n : kBlock, key_steps = (here + 31) / 32;
    for (int64_t t = 0; t < 2 * key_steps; ++t) {
      copy_rows(k + (n + 16 * t) * a.token[1], a.token[1], here - 16 * t, dim, keys.base + t * keys.row);
      copy_rows(v + (n + 16 * t) * a.token[2], a.token[2], here - 16 * t, dim, values.base + t * values.row);
    }
    for (int64_t t = 0; t < key_steps; ++t)
      transpose_pairs(k + (n + 32 * t) * a.token[1], a.token[1], here - 32 * t, dim, keys_t.base + t * TILE, keys_t.row);
    for (int64_t m = 0; m < z.padded; m += kBlock) {
      const int64_t query_steps = (z.padded - m < kBlock ? z.padded - m : kBlock) / 32;
      const Matrix queries_t{scratch + z.q_t + m / 16 * cs * TILE, TILE, cs * TILE};
      const Matrix douts_t{scratch + z.do_t + m / 16 * cs * TILE, TILE, cs * TILE};
      stores_are_done();
      for (int64_t i = 0; i < key_steps; ++i)
        for (int64_t j = 0; j < query_steps; ++j) {
          const Matrix k_here{keys.base + 2 * i * keys.row, keys.row, TILE}, v_here{values.base + 2 * i * values.row, values.row, TILE};
          const Matrix q_here{queries_t.base + 2 * j * queries_t.column, TILE, queries_t.column};
          const Matrix do_here{douts_t.base + 2 * j * douts_t.column, TILE, douts_t.column};
          block<true, true>(k_here, q_here, s, 0, 0, cs, false);
          block<true, true>(v_here, do_here, dp, 0, 0, cs, false);
          weights(s.base, dp.base, lse + m + 32 * j, delta + m + 32 * j, a.scale * LOG2E, here - 32 * i,
                  p.base + 2 * i * p.row + j * TILE, ds.base + 2 * i * ds.row + j * TILE, p.row,
                  ds_pairs.base + i * ds_pairs.row + 2 * j * TILE);
        }
      stores_are_done();
      const Matrix douts{scratch + z.do_pairs + m / 32 * ct * TILE, ct * TILE, TILE};
      const Matrix queries{scratch + z.q_pairs + m / 32 * ct * TILE, ct * TILE, TILE};
      const Matrix query_sums{scratch + z.dq + m / 16 * TILE, z.padded / 16 * TILE, TILE};
      product(p, douts, value_sums, 2 * key_steps, ct, query_steps, m > 0);
      product(ds, queries, key_sums, 2 * key_steps, ct, query_steps, m > 0);
      product(keys_t, ds_pairs, query_sums, ct, 2 * query_steps, key_steps, n > 0);
    }
    const __m512 scale = _mm512_set1_ps(a.scale), one = _mm512_set1_ps(1.f);
    for (int64_t r = 0; r < here; ++r)
      for (int64_t d = 0; d < dim; d += 16) {
        const int64_t from = (r / 16 * ct + d / 16) * TILE + r % 16 * 64;
        store_bf16(dk + (n + r) * a.token[4] + d, _mm512_load_ps(key_sums.base + from), scale, dim - d);
        store_bf16(dv + (n + r) * a.token[5] + d, _mm512_load_ps(value_sums.base + from), one, dim - d);
      }
  }
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int64_t m = 0; m < a.queries; m += 16)
    for (int64_t d = 0; d < dim; d += 16) {
      const char* tile = scratch + z.dq + (d / 16 * (z.padded / 16) + m / 16) * TILE;
      __m512i sums[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) sums[r] = _mm512_load_si512(tile + r * 64);
      transpose16(sums);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r)
        if (m + r < a.queries) store_bf16(dq + (m + r) * a.token[3] + d, _mm512_castsi512_ps(sums[r]), scale, dim - d);
    }
}

MF_AMX void all_heads(const AttentionBwdArgs& a, const BwdScratch& z) {
  const Tiles tiles;
  char* scratch = a.scratch + omp_get_thread_num() * z.bytes;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < a.batch * a.heads; ++i) one_head(a, z, i / a.heads, i % a.heads, scratch);
}

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
  const BwdScratch layout(a.queries, a.dim);
#pragma omp parallel
  all_heads(a, layout);
}

}  // namespace mf::MF_VARIANT

#else

namespace mf::MF_VARIANT {
void attention_bwd(const AttentionBwdArgs&) {}
}  // namespace mf::MF_VARIANT

#endif
#endif

#ifdef MF_HOST
#include "cpu/rope.h"

MF_DECLARE(attention_bwd, AttentionBwdArgs)

namespace mf {
namespace {

struct AttentionSizes {
  int64_t batch, queries, keys, heads, dim;
};

// (B, N, heads, head_dim) in bf16 with the last two dimensions contiguous, any image and token strides.
void check_heads(const TensorView& t, const char* name) {
  check_cpu(t, name);
  check_ndim(t, name, 4, "(B, N, heads, head_dim)");
  check_dtype(t, name, DType::bf16, "");
  if (t.stride(3) != 1 || (t.size(2) > 1 && t.stride(2) != t.size(3)))
    TVM_FFI_THROW(ValueError) << name << " must have contiguous heads and channels; call .contiguous() on it";
}

AttentionSizes check_attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                               const TensorView& lse) {
  check_heads(q, "q"), check_heads(k, "k"), check_heads(v, "v");
  const AttentionSizes s{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3)};
  check_shape(k, "k", {s.batch, s.keys, s.heads, s.dim});
  check_shape(v, "v", {s.batch, s.keys, s.heads, s.dim});
  check_shape(out, "out", {s.batch, s.queries, s.heads, s.dim});
  check_shape(lse, "lse", {s.batch, s.queries, s.heads});
  if (check_dense(out, "out") != DType::bf16 || check_dense(lse, "lse") != DType::f32)
    TVM_FFI_THROW(TypeError) << "out must be bfloat16 and lse float32";
  if (s.dim % 2 != 0 || s.keys == 0)
    TVM_FFI_THROW(ValueError) << "head_dim must be even and there must be keys; got " << shape_text(k);
  if (variant() != Variant::amx)
    TVM_FFI_THROW(RuntimeError) << "needs AMX tiles, the instruction set in use is " << variant_name(variant());
  return s;
}

void attention_bf16_bwd(TensorView q, TensorView k, TensorView v, TensorView out, TensorView dout, TensorView lse,
                        TensorView dq, TensorView dk, TensorView dv) {
  const AttentionSizes s = check_attention(q, k, v, out, lse);
  check_shape(dout, "dout", {s.batch, s.queries, s.heads, s.dim});
  check_dense(dout, "dout");
  check_dtype(dout, "dout", DType::bf16, "");
  check_heads(dq, "dq"), check_heads(dk, "dk"), check_heads(dv, "dv");
  check_shape(dq, "dq", {s.batch, s.queries, s.heads, s.dim});
  check_shape(dk, "dk", {s.batch, s.keys, s.heads, s.dim});
  check_shape(dv, "dv", {s.batch, s.keys, s.heads, s.dim});
  const BwdScratch layout(s.queries, s.dim);
  const Scratch scratch(omp_get_max_threads() * layout.bytes / 4);
  AttentionBwdArgs args{data<uint16_t>(q), data<uint16_t>(k), data<uint16_t>(v), data<uint16_t>(out),
                        data<uint16_t>(dout), data<float>(lse), data<uint16_t>(dq), data<uint16_t>(dk),
                        data<uint16_t>(dv), s.batch, s.queries, s.keys, s.heads, s.dim, {}, {},
                        attention_scale(s.dim), reinterpret_cast<char*>(scratch.get())};
  const TensorView* strided[] = {&q, &k, &v, &dq, &dk, &dv};
  for (int i = 0; i < 6; ++i) args.token[i] = strided[i]->stride(1), args.image[i] = strided[i]->stride(0);
  MF_CALL(attention_bwd, args)
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_bf16_bwd, mf::attention_bf16_bwd);
#endif
