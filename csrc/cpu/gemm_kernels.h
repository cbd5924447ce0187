// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The innermost loops of the packed GEMM: a tile of C, up to `Rows` x 2 W fp32 and 2 W to the line, = or += A B.
//
// A is a panel of `rows` rows, [dword][row] (tiles: [16 dwords][32 rows][16]); B a panel of 2 W columns (gemm.h). The tile
// stays in registers: AVX-512 14 x 2 vectors with two of B and one broadcast of A, AVX2 6 x 2, which is all that 32 and 16
// registers hold. Per dword that is 28 (12) multiply-adds for 16 (8) loads, so that the units that multiply are the limit
// as long as A comes from L1 and B from L2.
#pragma once

#include "cpu/gemm.h"
#include "cpu/simd.h"

#ifdef __AVX512BF16__
#include "cpu/amx.h"
#endif

namespace mf {
namespace MF_VARIANT {

constexpr int NR = 2 * W;

// One multiply-add of every lane's dword.
struct Fma {
  static constexpr Products products = Products::fma;
  static constexpr int64_t step = 1, rows = W == 16 ? 14 : 6, block = W == 16 ? 1152 : 384;  // block: dwords of K at a time
  static void begin() {}  // what a thread does before and after its products
  static void end() {}
  static inline __attribute__((always_inline)) vf spread(const float* a) { return splat(*a); }
  static inline __attribute__((always_inline)) vf add(vf c, vf a, vf b) { return fma(a, b, c); }
};

#ifdef __AVX512BF16__
struct Dot {
  static constexpr Products products = Products::dot;
  static constexpr int64_t step = 2, rows = 14, block = 1152;
  static void begin() {}
  static void end() {}
  static inline __attribute__((always_inline)) vf spread(const float* a) {
    int32_t pair;
    memcpy(&pair, a, sizeof pair);
    return (vf)_mm512_set1_epi32(pair);
  }
  static inline __attribute__((always_inline)) vf add(vf c, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// So many products are summed before the sum joins the others': rounding grows with the square root of the length of a
// sum, and a sum of three such sums is as good as MKL's and oneDNN's. It costs 1 % of the multiply-adds.
constexpr int64_t kSummed = 384;

// Cache lines that will be read soon, one to be asked for with every dword.
struct Soon {
  const char* first;
  int64_t lines;
};

template <class E, int ROWS>
static void multiply_rows(const float* a, const float* b, int64_t dwords, float* c, bool more, Soon soon) {
  for (int64_t begin = 0; begin < dwords; begin += kSummed) {
    vf sums[ROWS][2] = {};
    const int64_t end = begin + kSummed < dwords ? begin + kSummed : dwords;
    for (int64_t k = begin; k < end; ++k) {
      const vf b0 = load(b, Full{}), b1 = load(b + W, Full{});
      __builtin_prefetch(b + 8 * NR);
      if (NR > 16) __builtin_prefetch(b + 8 * NR + 16);
      if (k < soon.lines) __builtin_prefetch(soon.first + k * 64, 0, 2);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const vf x = E::spread(a + r);
        sums[r][0] = E::add(sums[r][0], x, b0);
        sums[r][1] = E::add(sums[r][1], x, b1);
      }
      a += ROWS;
      b += NR;
    }
    const bool add = more || begin > 0;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      float* to = c + r * NR;
      store(to, add ? load(to, Full{}) + sums[r][0] : sums[r][0], Full{});
      store(to + W, add ? load(to + W, Full{}) + sums[r][1] : sums[r][1], Full{});
    }
  }
}

using Multiply = void (*)(const float* a, const float* b, int64_t dwords, float* c, bool more, Soon soon);

template <class E> static Multiply multiply_of(int64_t rows) {
  static constexpr Multiply table[] = {
      multiply_rows<E, 1>, multiply_rows<E, 2>, multiply_rows<E, 3>, multiply_rows<E, 4>, multiply_rows<E, 5>,
      multiply_rows<E, 6>,
#ifdef MF_AVX512
      multiply_rows<E, 7>, multiply_rows<E, 8>, multiply_rows<E, 9>, multiply_rows<E, 10>, multiply_rows<E, 11>,
      multiply_rows<E, 12>, multiply_rows<E, 13>, multiply_rows<E, 14>,
#endif
  };
  return table[rows - 1];
}

#ifdef MF_HAS_AMX
struct TileProducts {
  static constexpr Products products = Products::tiles;
  static constexpr int64_t step = 2, rows = 32, block = 1152;
  MF_AMX static void begin() { Tiles::configure(); }
  MF_AMX static void end() { _tile_release(); }
};

template <bool TWO_ROWS> MF_AMX static void multiply_tiles(const float* a, const float* b, int64_t dwords, float* c, bool more, Soon) {
  // A: 16 dwords of 32 (16) rows, 64 bytes to the row. B: 16 lines of two tiles side by side.
  const Matrix left{(char*)a, TILE, TWO_ROWS ? 2 * TILE : TILE}, right{(char*)b, 2 * TILE, 64, 2 * 64};
  const Matrix sums{(char*)c, 16 * 2 * 64, 64, 2 * 64};
  block<TWO_ROWS, true>(left, right, sums, 0, 0, dwords / 16, more);
}

template <> [[maybe_unused]] Multiply multiply_of<TileProducts>(int64_t rows) {
  return rows > 16 ? multiply_tiles<true> : multiply_tiles<false>;
}
#endif

}  // namespace MF_VARIANT
}  // namespace mf
