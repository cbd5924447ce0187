// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// attention_bf16: softmax(q k^T / sqrt(D)) v on AMX tiles, for sequences short enough that a row of scores fits in cache.
//
//   per (image, head):  K -> channel pairs x keys, V -> key pairs x channels      (packed once, cpu/amx.h)
//     per 32 queries:   S = Q K^T (fp32) -> P = 2^(S log2(e)/sqrt(D) - max), bf16, unnormalised -> O = P V (fp32) / sum
//
// The whole row of scores is there before the maximum is taken, so nothing is rescaled as in streaming softmax; 32 rows
// of N fp32 scores are 49 KB at 385 tokens and 148 KB at 1153, within a core's second-level cache. Scores and sums stay
// fp32; P and the result are rounded to bf16 once each, as in torch's flash attention. log-sum-exp comes out for the
// backward (attention_bwd.cpp). A query's result depends on nothing but its own row, whatever the number of threads.
// Runs where variant() is amx (cpu/host/processor.cpp); `attention_bf16_usable` asks.
#include <cstdint>

#include "cpu/types.h"

namespace mf {

struct AttentionArgs {
  const uint16_t *q, *k, *v;               // heads and channels contiguous; token and image strides below, in elements
  uint16_t* out;                           // (B, queries, heads, D) contiguous
  float* lse;                              // (B, queries, heads) contiguous, natural logarithm
  int64_t batch, queries, keys, heads, dim;
  int64_t q_token, k_token, v_token, q_image, k_image, v_image;
  float scale;
  char* scratch;                           // AttentionScratch(keys, dim).bytes per thread
};

namespace {

constexpr int64_t kQueries = 32;  // at a time: two tiles

// A thread's scratch: offsets in bytes.
struct AttentionScratch {
  int64_t channel_steps, channel_tiles, padded, score_line, p_line;  // lines are one step longer than a power of two
  int64_t k, v, q, p, scores, o, bytes;
  AttentionScratch(int64_t keys, int64_t dim)
      : channel_steps((dim + 31) / 32), channel_tiles((dim + 15) / 16), padded((keys + 31) / 32 * 32),
        score_line(padded * 4 + 64), p_line(padded * 2 + 64),
        k(0), v(k + padded / 16 * channel_steps * 1024), q(v + padded / 32 * channel_tiles * 1024),
        p(q + 2 * channel_steps * 1024), scores(p + kQueries * p_line), o(scores + kQueries * score_line),
        bytes(o + 2 * channel_tiles * 1024) {}
};

}  // namespace
}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/amx.h"

#ifdef MF_HAS_AMX
#include <omp.h>

#include <cmath>
#include <cstring>

namespace mf::MF_VARIANT {
namespace {

// One row: P = 2^(scores * scale - max); returns the sum of P, the scaled maximum in `top`.
MF_AMX float exponentials(float* scores, uint16_t* p, int64_t keys, int64_t padded, float scale, float* top) {
  for (int64_t n = keys; n < padded; ++n) scores[n] = -INFINITY;
  __m512 most = _mm512_load_ps(scores), more = _mm512_load_ps(scores + 16);
  for (int64_t n = 32; n < padded; n += 32) {
    most = _mm512_max_ps(most, _mm512_load_ps(scores + n));
    more = _mm512_max_ps(more, _mm512_load_ps(scores + n + 16));
  }
  *top = _mm512_reduce_max_ps(_mm512_max_ps(most, more)) * scale;
  const __m512 max = _mm512_set1_ps(*top), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t n = 0; n < padded; n += 32) {
    const __m512 a = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(scores + n), factor, max));
    const __m512 b = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(scores + n + 16), factor, max));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    _mm512_store_si512(p + n, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  return _mm512_reduce_add_ps(sum);
}

// Queries begin .. end - 1 of one head.
MF_AMX void one_head(const AttentionArgs& a, const AttentionScratch& z, int64_t image, int64_t head, int64_t begin,
                     int64_t end, char* scratch) {
  const uint16_t* q = a.q + image * a.q_image + head * a.dim;
  const uint16_t* k = a.k + image * a.k_image + head * a.dim;
  const uint16_t* v = a.v + image * a.v_image + head * a.dim;
  for (int64_t n = 0; n < z.padded; n += 16)
    transpose_rows(k + n * a.k_token, a.k_token, a.keys - n, a.dim, scratch + z.k + n / 16 * z.channel_steps * TILE);
  for (int64_t n = 0; n < z.padded; n += 32)
    pair_rows(v + n * a.v_token, a.v_token, a.keys - n, a.dim, scratch + z.v + n / 32 * z.channel_tiles * TILE);
  const Matrix queries{scratch + z.q, z.channel_steps * TILE, TILE};
  const Matrix keys{scratch + z.k, TILE, z.channel_steps * TILE}, values{scratch + z.v, z.channel_tiles * TILE, TILE};
  const Matrix scores{scratch + z.scores, 16 * z.score_line, 64, z.score_line};
  const Matrix weights{scratch + z.p, 16 * z.p_line, 64, z.p_line};
  const Matrix sums{scratch + z.o, z.channel_tiles * TILE, TILE};
  const float scale = a.scale * LOG2E;
  for (int64_t m = begin; m < end; m += kQueries) {
    const int64_t rows = end - m < kQueries ? end - m : kQueries, tiles = (rows + 15) / 16;
    for (int64_t t = 0; t < tiles; ++t)
      copy_rows(q + (m + 16 * t) * a.q_token, a.q_token, rows - 16 * t, a.dim, queries.base + t * queries.row);
    stores_are_done();
    product(queries, keys, scores, tiles, z.padded / 16, z.channel_steps, false);
    float total[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      float top;
      total[r] = exponentials(reinterpret_cast<float*>(scores.base + r * z.score_line),
                              reinterpret_cast<uint16_t*>(weights.base + r * z.p_line), a.keys, z.padded, scale, &top);
      a.lse[(image * a.queries + m + r) * a.heads + head] = top * LN2 + std::log(total[r]);
    }
    stores_are_done();  // rows of P beyond `rows` hold anything: they reach only rows of O that nobody reads
    product(weights, values, sums, tiles, z.channel_tiles, z.padded / 32, false);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 factor = _mm512_set1_ps(1.f / total[r]);
      uint16_t* to = a.out + ((image * a.queries + m + r) * a.heads + head) * a.dim;
      const char* from = sums.base + r / 16 * sums.row + r % 16 * 64;
      for (int64_t d = 0; d < a.dim; d += 16, from += TILE) store_bf16(to + d, _mm512_load_ps(from), factor, a.dim - d);
    }
  }
}

MF_AMX void all_heads(const AttentionArgs& a, const AttentionScratch& z) {
  const Tiles tiles;
  char* scratch = a.scratch + omp_get_thread_num() * z.bytes;
  // Fewer heads than threads share a head's queries, 128 or more each: K and V are packed again for each share.
  const int64_t heads = a.batch * a.heads, threads = omp_get_num_threads(), most = (a.queries + 127) / 128;
  const int64_t wanted = heads > 0 ? (threads + heads - 1) / heads : 1, shares = wanted < most ? wanted : most;
  const int64_t share = ((a.queries + shares - 1) / shares + kQueries - 1) / kQueries * kQueries;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < heads * shares; ++i) {
    const int64_t head = i / shares, begin = i % shares * share, end = begin + share < a.queries ? begin + share : a.queries;
    if (begin < end) one_head(a, z, head / a.heads, head % a.heads, begin, end, scratch);
  }
}

}  // namespace

void attention(const AttentionArgs& a) {
  const AttentionScratch layout(a.keys, a.dim);
  if (a.queries == 0) return;
#pragma omp parallel
  all_heads(a, layout);
}

}  // namespace mf::MF_VARIANT

#else

namespace mf::MF_VARIANT {
void attention(const AttentionArgs&) {}
}  // namespace mf::MF_VARIANT

#endif
#endif

#ifdef MF_HOST
#include <cmath>

#include "cpu/attention.h"

MF_DECLARE(attention, AttentionArgs)

namespace mf {
namespace {

int64_t attention_bf16_usable() { return variant() == Variant::amx ? 1 : 0; }

void attention_bf16(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse) {
  const AttentionSizes s = check_attention(q, k, v, out, lse);
  const AttentionScratch layout(s.keys, s.dim);
  const Scratch scratch(omp_get_max_threads() * layout.bytes / 4);
  const AttentionArgs args{data<uint16_t>(q), data<uint16_t>(k), data<uint16_t>(v),
                           data<uint16_t>(out), data<float>(lse), s.batch, s.queries, s.keys, s.heads, s.dim,
                           q.stride(1), k.stride(1), v.stride(1), q.stride(0), k.stride(0), v.stride(0),
                           attention_scale(s), reinterpret_cast<char*>(scratch.get())};
  MF_CALL(attention, args)
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_bf16, mf::attention_bf16);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_bf16_usable, mf::attention_bf16_usable);
#endif
