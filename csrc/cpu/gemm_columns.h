// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The way of w into panels (gemm.h has the layout): for gemm_pack.cpp all of it, for gemm.cpp a block at a time.
#pragma once

#include "cpu/gemm_rows.h"

namespace mf {
namespace MF_VARIANT {

// Row of w that is column c of panel p, or -1.
MF_INLINE int64_t source_row(const GemmWeight& w, int64_t p, int64_t c) {
  const int64_t half = w.N / 2, row = !w.gated ? p * NR + c : p * W + c % W;
  if (row >= (w.gated ? half : w.N)) return -1;
  return w.gated && c >= W ? half + row : row;
}

// W rows of w from `row[0 .. W - 1]`, transposed, into W columns of a panel, from dword `begin` on.
template <class T, bool PAIRS, class O> static void pack_columns(const GemmWeight& weight, const int64_t* row, int64_t begin, int64_t count, O* panel) {
  constexpr int64_t step = PAIRS ? 2 : 1;
  const T* w = (const T*)weight.data.data;
  alignas(64) uint32_t lines[W][W];
  alignas(64) uint32_t turned[W * W + W];
  for (int64_t d = 0; d < count; d += W) {
    const int64_t here = count - d < W ? count - d : W;
    for (int64_t r = 0; r < W; ++r)
      for (int64_t half = 0; half < step; ++half) {
        const int64_t at = (begin + d) * step + half * W, left = row[r] < 0 ? 0 : weight.K - at;
        const T* from = w + row[r] * weight.row + at;
        const vf v = left >= W ? load(from, Full{}) : left > 0 ? load(from, Part{(int)left}) : (vf){};
        if (PAIRS) store((bf16*)(lines[r] + half * (W / 2)), v, Full{});
        else store((float*)lines[r], v, Full{});
      }
    transpose_out(lines[0], W, W, here, turned, W);
    for (int64_t k = 0; k < here; ++k) {
      const vf v = load((const float*)turned + k * W, Full{});
      if (PAIRS) memcpy((uint32_t*)panel + (d + k) * NR, &v, sizeof v);
      else store(panel + (d + k) * NR, v, Full{});
    }
  }
}

// The same where w lies transposed: a line of it is a line of the panels. Columns n .. n + W - 1.
template <class T, bool PAIRS, class O> static void copy_columns(const GemmWeight& weight, int64_t n, int64_t begin, int64_t count, O* panel) {
  const T* w = (const T*)weight.data.data;
  const int64_t left = weight.N - n;
  const auto line = [&](int64_t k) {
    if (k >= weight.K || left <= 0) return (vf){};
    return left >= W ? load(w + k * weight.row + n, Full{}) : load(w + k * weight.row + n, Part{(int)left});
  };
  for (int64_t d = 0; d < count; ++d) {
    if (PAIRS) {
      const int64_t k = 2 * (begin + d);
      const vu pair = widen(from_float(line(k), bf16{})) | widen(from_float(line(k + 1), bf16{})) << 16;
      memcpy((uint32_t*)panel + d * NR, &pair, sizeof pair);
    } else store(panel + d * NR, line(begin + d), Full{});
  }
}

// Dwords begin .. begin + count - 1 of panel p: columns `c` .. `c` + W - 1 of its 2 W, c = 0 or W.
template <bool PAIRS, class O> static void pack_half(const GemmWeight& w, int64_t p, int64_t c, int64_t begin, int64_t count, O* panel) {
  with_type(w.data.type, [&](auto t) {
    using T = decltype(t);
    O* to = panel + c * (PAIRS ? 2 : 1);
    if (w.transposed) return copy_columns<T, PAIRS>(w, p * NR + c, begin, count, to);
    int64_t row[W];
    for (int64_t r = 0; r < W; ++r) row[r] = source_row(w, p, c + r);
    pack_columns<T, PAIRS>(w, row, begin, count, to);
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
