// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// attention: softmax(q k^T / sqrt(D)) v of packed bf16 qkv on AMX tiles, for sequences short enough that a row of scores
// fits in cache. rope_attention.cpp has the host side, and the same on vectors.
//
//   per (image, head):  K -> channel pairs x keys, V -> key pairs x channels      (packed once, cpu/amx.h), K and Q normed
//                                                                                  and rotated before, 16 rows at a time
//     per 32 queries:   S = Q K^T (fp32) -> P = 2^(S log2(e)/sqrt(D) - max), bf16, unnormalised -> O = P V (fp32) / sum
//
// The whole row of scores is there before the maximum is taken, so nothing is rescaled as in streaming softmax; 32 rows
// of N fp32 scores are 49 KB at 385 tokens and 148 KB at 1153, within a core's second-level cache. Scores and sums stay
// fp32; P and the result are rounded to bf16 once each, as in torch's flash attention. log-sum-exp comes out for the
// backward (attention_bwd.cpp). A query's result depends on nothing but its own row, whatever the number of threads.
#include "cpu/rope_attention.h"

#ifdef MF_VARIANT
#include "cpu/amx.h"

#ifdef MF_HAS_AMX
#include <omp.h>

#include <cmath>
#include <cstring>

namespace mf::MF_VARIANT {
namespace {

constexpr int64_t kQueries = 32;  // at a time: two tiles

// A thread's scratch: offsets in bytes.
struct Layout {
  int64_t channel_steps, channel_tiles, padded, score_line, p_line;  // lines are one step longer than a power of two
  int64_t k, v, q, p, scores, o, rows, bytes;
  explicit Layout(const RopeInputs& a)
      : channel_steps((a.hd + 31) / 32), channel_tiles((a.hd + 15) / 16), padded((a.N + 31) / 32 * 32),
        score_line(padded * 4 + 64), p_line(padded * 2 + 64),
        k(0), v(k + padded / 16 * channel_steps * 1024), q(v + padded / 32 * channel_tiles * 1024),
        p(q + 2 * channel_steps * 1024), scores(p + kQueries * p_line), o(scores + kQueries * score_line),
        rows(o + 2 * channel_tiles * 1024), bytes((rows + 16 * a.hd * 2 + 63) / 64 * 64) {}
};

// Rows of q or k as they are multiplied: `stride` apart, where they lie in qkv or in a thread's scratch.
struct Rows { const uint16_t* first; int64_t stride; };

// Tokens n .. n + count - 1, 16 at most, of head h of image b, normed and rotated into `scratch` where they have to be.
template <int NORM> Rows prepared_rows(const RopeAttentionArgs& a, int which, int64_t b, int64_t h, int64_t n, int64_t count, uint16_t* scratch) {
  if (NORM == 0 && a.rope == nullptr)
    return {(const uint16_t*)a.qkv + (((b * a.N + n) * 3 + which) * a.H + h) * a.hd, 3 * a.H * a.hd};
  for (int64_t r = 0; r < count; ++r)
    prepared_row<NORM, bf16>(a, which, b, n + r, h, [&](int64_t i, vf v, auto k) { store((bf16*)scratch + r * a.hd + i, v, k); });
  return {scratch, a.hd};
}

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
template <int NORM> MF_AMX void one_head(const RopeAttentionArgs& a, const Layout& z, int64_t image, int64_t head, int64_t begin, int64_t end, char* scratch) {
  uint16_t* const lines = reinterpret_cast<uint16_t*>(scratch + z.rows);
  const int64_t token = 3 * a.H * a.hd;
  const uint16_t* v = (const uint16_t*)a.qkv + ((image * a.N * 3 + 2) * a.H + head) * a.hd;
  for (int64_t n = 0; n < z.padded; n += 16) {
    const int64_t here = a.N - n < 16 ? a.N - n : 16;
    const Rows k = prepared_rows<NORM>(a, 1, image, head, n, here, lines);
    transpose_rows(k.first, k.stride, here, a.hd, scratch + z.k + n / 16 * z.channel_steps * TILE);
  }
  for (int64_t n = 0; n < z.padded; n += 32)
    pair_rows(v + n * token, token, a.N - n, a.hd, scratch + z.v + n / 32 * z.channel_tiles * TILE);
  const Matrix queries{scratch + z.q, z.channel_steps * TILE, TILE};
  const Matrix keys{scratch + z.k, TILE, z.channel_steps * TILE}, values{scratch + z.v, z.channel_tiles * TILE, TILE};
  const Matrix scores{scratch + z.scores, 16 * z.score_line, 64, z.score_line};
  const Matrix weights{scratch + z.p, 16 * z.p_line, 64, z.p_line};
  const Matrix sums{scratch + z.o, z.channel_tiles * TILE, TILE};
  const float scale = a.scale * LOG2E;
  for (int64_t m = begin; m < end; m += kQueries) {
    const int64_t rows = end - m < kQueries ? end - m : kQueries, tiles = (rows + 15) / 16;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t here = rows - 16 * t < 16 ? rows - 16 * t : 16;
      const Rows q = prepared_rows<NORM>(a, 0, image, head, a.first + m + 16 * t, here, lines);
      copy_rows(q.first, q.stride, here, a.hd, queries.base + t * queries.row);
    }
    stores_are_done();
    product(queries, keys, scores, tiles, z.padded / 16, z.channel_steps, false);
    float total[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      float top;
      total[r] = exponentials(reinterpret_cast<float*>(scores.base + r * z.score_line),
                              reinterpret_cast<uint16_t*>(weights.base + r * z.p_line), a.N, z.padded, scale, &top);
      a.lse[(image * a.Nq + m + r) * a.H + head] = top * LN2 + std::log(total[r]);
    }
    stores_are_done();  // rows of P beyond `rows` hold anything: they reach only rows of O that nobody reads
    product(weights, values, sums, tiles, z.channel_tiles, z.padded / 32, false);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 factor = _mm512_set1_ps(1.f / total[r]);
      uint16_t* to = (uint16_t*)a.out + ((image * a.Nq + m + r) * a.H + head) * a.hd;
      const char* from = sums.base + r / 16 * sums.row + r % 16 * 64;
      for (int64_t d = 0; d < a.hd; d += 16, from += TILE) store_bf16(to + d, _mm512_load_ps(from), factor, a.hd - d);
    }
  }
}

template <int NORM> MF_AMX void all_heads(const RopeAttentionArgs& a, const Layout& z) {
  const Tiles tiles;
  char* scratch = a.scratch + omp_get_thread_num() * z.bytes;
  const Shares shares(a, kQueries, 128);
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < shares.count; ++i) {
    const Share queries = shares.queries(i);
    if (queries.begin < queries.end) one_head<NORM>(a, z, shares.image(i), shares.head(i), queries.begin, queries.end, scratch);
  }
}

}  // namespace

void attention(const RopeAttentionArgs& a) {
  const Layout layout(a);
  if (a.scratch == nullptr) {
    *a.scratch_bytes = a.threads * layout.bytes;
    return;
  }
#pragma omp parallel num_threads(a.threads)
  a.norm == 0 ? all_heads<0>(a, layout) : a.norm == 1 ? all_heads<1>(a, layout) : all_heads<2>(a, layout);
}

}  // namespace mf::MF_VARIANT

#else

namespace mf::MF_VARIANT {
void attention(const RopeAttentionArgs&) {}
}  // namespace mf::MF_VARIANT

#endif
#endif
