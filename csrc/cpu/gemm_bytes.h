// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Products of bytes in the packed GEMM: rows of x, normed and modulated if asked, into unsigned bytes and a scale each on
// the way in, and sums of int32 into fp32 on the way out.
#pragma once

#include "cpu/activations.h"
#include "cpu/gemm_rows.h"

namespace mf {
namespace MF_VARIANT {

#ifdef MF_HAS_BYTES

// round(v) + 128 of v in -127 .. 127, ties to even.
MF_INLINE void store_bytes(uint8_t* to, vf v) {
  const vu bits = (vu)(v + splat(kRound + 128.0f)) & 0xffu;
#ifdef MF_AVX512
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)bits));
#else
  typedef uint8_t vb __attribute__((vector_size(W)));
  const vb bytes = __builtin_convertvector(bits, vb);
  memcpy(to, &bytes, sizeof bytes);
#endif
}

// Bytes of scratch that `quantise_rows` takes: a row in fp32, and E::rows rows of bytes, W at least to transpose.
template <class E> constexpr int64_t quantise_scratch(int64_t dwords) {
  return dwords * 4 * (4 + (E::rows > W ? E::rows : W));
}

// Rows first .. first + rows - 1 of x into a panel, and scales[0 ..]: row r is scales[r] (byte - 128). A row with a NaN or
// an infinity has NaN for a scale, hence for all of its products.
template <class E, class T>
static void quantise_rows(const GemmArgs& g, int64_t first, int64_t rows, int64_t dwords, float* panel, float* scales, char* scratch) {
  float* const row = (float*)scratch;
  uint8_t* const bytes = (uint8_t*)(row + 4 * dwords);
  const GemmNorm& norm = g.norm;
  memset(row, 0, 16 * (size_t)dwords);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = first + r;
    const T* x = (const T*)g.x.data + m * g.x_row;
    const RowStatistics statistics = norm.kind == 0 ? RowStatistics{0.0f, 1.0f} : row_statistics(x, g.K, norm);
    const int64_t modulated = norm.kind == 0 ? -1 : modulation_of(norm, m);
    vf largest = {}, none = {};  // none: zeros, or what a zero times something not finite is
    each(g.K, [&](int64_t k, auto part) {
      vf v = load(x + k, part);
      if (norm.kind != 0) v = keep(normed(v, statistics, affine_of(norm, modulated, k, part)), part);
      store(row + k, v, Full{});
      largest = larger((vf)((vu)v & 0x7fffffffu), largest);
      none = fma(v, (vf){}, none);
    });
    float most = 0.0f;
    for (int i = 0; i < W; ++i) most = largest[i] > most ? largest[i] : most;
    const vf inverse = splat(most > 0.0f ? 127.0f / most : 0.0f);
    scales[r] = most / 127.0f + sum(none);
    for (int64_t k = 0; k < 4 * dwords; k += W) store_bytes(bytes + r * 4 * dwords + k, load(row + k, Full{}) * inverse);
  }
  if (E::tiles) {
    const int64_t lead = rows > 16 ? 32 : 16;
    for (int64_t d = 0; d < dwords; d += 16)
      for (int64_t r = 0; r < lead; ++r) {
        char* to = (char*)panel + (d * lead + r * 16) * 4;
        if (r < rows) memcpy(to, bytes + (r * dwords + d) * 4, 64);
        else memset(to, 0, 64);
      }
  } else {
    for (int64_t d = 0; d < dwords; d += W)
      transpose_out((const uint32_t*)bytes + d, dwords, rows, W, (uint32_t*)panel + d * rows, rows);
  }
}

// A tile of sums, columns of panel `panel`, into what they stand for. scales: of its rows.
[[maybe_unused]] static void dequantise(const GemmArgs& g, float* tile, const float* scales, int64_t rows, int64_t panel) {
  const float* column = g.column_scale + panel * NR;
  const vi offset0 = (vi)load((const float*)g.column_offset + panel * NR, Full{});
  const vi offset1 = (vi)load((const float*)g.column_offset + panel * NR + W, Full{});
  const vf scale0 = load(column, Full{}), scale1 = load(column + W, Full{});
  for (int64_t r = 0; r < rows; ++r, tile += NR) {
    const vf scale = splat(scales[r]);
    store(tile, __builtin_convertvector((vi)load(tile, Full{}) - offset0, vf) * (scale * scale0), Full{});
    store(tile + W, __builtin_convertvector((vi)load(tile + W, Full{}) - offset1, vf) * (scale * scale1), Full{});
  }
}

#endif  // MF_HAS_BYTES

}  // namespace MF_VARIANT
}  // namespace mf
