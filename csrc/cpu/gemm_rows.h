// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The way in of the packed GEMM: rows of x, normed and modulated if asked, into panels of A. Each row is read once from
// memory (the statistics read it first, and leave it in cache), so that adaLN costs no pass of its own.
#pragma once

#include "cpu/gemm_kernels.h"

namespace mf {
namespace MF_VARIANT {

// Rows `line` dwords apart, up to W of them, transposed: dword k of row r to to[k * step + r], for `count` <= W values of k.
// step >= rows; every store but the last is of a whole vector, whose surplus the next one overwrites where step == rows.
MF_INLINE void transpose_out(const uint32_t* from, int64_t line, int64_t rows, int64_t count, uint32_t* to, int64_t step) {
#if defined(MF_AVX512)
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * line);
  transpose16(r);
  const __mmask16 lanes = mask(Part{(int)rows});
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k)
    if (k < count) {
      if (k + 1 < count) _mm512_storeu_si512(to + k * step, r[k]);
      else _mm512_mask_storeu_epi32(to + k * step, lanes, r[k]);
    }
#elif defined(MF_AVX2)
  __m256 r[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps((const float*)from + i * line);
  transpose8(r);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k)
    if (k < count) {
      if (k + 1 < count) _mm256_storeu_ps((float*)to + k * step, r[k]);
      else store((float*)to + k * step, (vf)r[k], Part{(int)rows});
    }
#else
  for (int64_t k = 0; k < count; ++k)
    for (int64_t r = 0; r < rows; ++r) to[k * step + r] = from[r * line + k];
#endif
}

struct RowStatistics { float mean, scale; };

template <class T> static RowStatistics row_statistics(const T* x, int64_t n, const GemmNorm& norm) {
  const float inverse = 1.0f / (float)n;
  const float mean = norm.kind == 1 ? row_sum(n, [&](int64_t i, auto k) { return load(x + i, k); }) * inverse : 0.0f;
  const float squares = row_sum(n, [&](int64_t i, auto k) {
    const vf d = keep(load(x + i, k) - splat(mean), k);
    return d * d;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares * inverse + norm.eps)};
}

template <class K> MF_INLINE vf load_column(const Column& c, int64_t at, K k) {
  if (c.type == DType::f32) return load((const float*)c.data + at, k);
  if (c.type == DType::bf16) return load((const bf16*)c.data + at, k);
  return load((const f16*)c.data + at, k);
}

// A and C of norm(x) * A + C for columns k .. of the rows that share a modulation.
struct Affine { vf a, c; };
template <class K> MF_INLINE Affine affine_of(const GemmNorm& norm, int64_t row, int64_t at, K k) {
  vf factor = splat(1.0f), c = {};
  if (row >= 0 && norm.scale.data != nullptr)
    factor = splat(norm.offset) + load_column(norm.scale, row * norm.scale_row + at, k);
  if (norm.bias.data != nullptr) c = load_column(norm.bias, at, k) * factor;
  if (row >= 0 && norm.shift.data != nullptr) c += load_column(norm.shift, row * norm.shift_row + at, k);
  if (norm.weight.data != nullptr) factor = load_column(norm.weight, at, k) * factor;
  return {factor, c};
}

MF_INLINE vf normed(vf v, const RowStatistics& s, const Affine& affine) {
  return fma((v - splat(s.mean)) * splat(s.scale), affine.a, affine.c);
}

// The row of its modulation for row m of x, -1 for none.
MF_INLINE int64_t modulation_of(const GemmNorm& norm, int64_t m) {
  return modulation_row(m / norm.tokens, m % norm.tokens, norm.tokens, norm.modulated, norm.per_image);
}

// v as the dwords of engine E: fp32 as it is, or half a vector of bf16 pairs.
template <class E> MF_INLINE void store_dwords(uint32_t* to, vf v) {
  if (E::step == 1) store((float*)to, v, Full{});
  else store((bf16*)to, v, Full{});
}

// Rows first .. first + rows - 1 of x into a panel.
template <class E, class T> static void pack_rows(const GemmArgs& g, int64_t first, int64_t rows, int64_t dwords, float* panel) {
  const T* x = (const T*)g.x.data;
  alignas(64) uint32_t lines[W == 16 ? 32 : 8][W] = {};
  const GemmNorm& norm = g.norm;
  RowStatistics statistics[32];
  if (norm.kind != 0)
    for (int64_t r = 0; r < rows; ++r) statistics[r] = row_statistics(x + (first + r) * g.x_row, g.K, norm);
  for (int64_t d = 0; d < dwords; d += W) {
    if (g.x_transposed) {  // a line of x is a dword of every row already
      const int64_t count = dwords - d < W ? dwords - d : W;
      for (int64_t j = 0; j < count; ++j)
        for (int64_t r = 0; r < rows; r += W) {
          const Part part{(int)(rows - r < W ? rows - r : W)};
          const int64_t k = (d + j) * E::step;
          vu dword = {};
          if (E::step == 1) dword = (vu)load(x + k * g.x_row + first + r, part);
          else {
            if (k < g.K) dword = widen(from_float(load(x + k * g.x_row + first + r, part), bf16{}));
            if (k + 1 < g.K) dword |= widen(from_float(load(x + (k + 1) * g.x_row + first + r, part), bf16{})) << 16;
          }
          if (!E::tiles) store(panel + (d + j) * rows + r, (vf)dword, part);
          else
            for (int64_t i = 0; i < part.n; ++i) lines[r + i][j] = dword[i];
        }
      if (!E::tiles) continue;
    } else {
      Affine affine[2] = {};
      int64_t modulated = -2;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t m = first + r;
        const T* row = x + m * g.x_row;
        const int64_t wanted = norm.kind == 0 ? -2 : modulation_of(norm, m);
        const bool change = wanted != modulated;
        modulated = wanted;
#pragma GCC unroll 2
        for (int half = 0; half < E::step; ++half) {
          const int64_t at = d * E::step + half * W;
          const int64_t left = g.K - at;
          uint32_t* to = lines[r] + half * (W / 2);
          const auto part = [&](auto k) {
            vf v = load(row + at, k);
            if (norm.kind != 0) {
              if (change) affine[half] = affine_of(norm, wanted, at, k);
              v = normed(v, statistics[r], affine[half]);
            }
            return v;
          };
          const vf v = left >= W ? part(Full{}) : left > 0 ? keep(part(Part{(int)left}), Part{(int)left}) : (vf){};
          store_dwords<E>(to, v);
        }
      }
    }
    if (E::tiles) memcpy((char*)panel + d / 16 * (rows > 16 ? 2048 : 1024), lines, rows > 16 ? 2048 : 1024);
    else transpose_out(lines[0], W, rows, dwords - d < W ? dwords - d : W, (uint32_t*)panel + d * rows, rows);
  }
}

}  // namespace MF_VARIANT
}  // namespace mf
