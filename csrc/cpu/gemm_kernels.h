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

// What an engine on vectors is. step: columns of K to a dword. block: dwords of K at a time.
struct Vectors {
  static constexpr bool tiles = false, bytes = false;
  static constexpr int64_t rows = W == 16 ? 14 : 6, block = W == 16 ? 1152 : 384;
  static void begin() {}  // what a thread does before and after its products
  static void end() {}
  static inline __attribute__((always_inline)) vf join(vf a, vf b) { return a + b; }
};

// One multiply-add of every lane's dword.
struct Fma : Vectors {
  static constexpr Products products = Products::fma;
  static constexpr int64_t step = 1;
  static inline __attribute__((always_inline)) vf spread(const float* a) { return splat(*a); }
  static inline __attribute__((always_inline)) vf add(vf c, vf a, vf b) { return fma(a, b, c); }
};

MF_INLINE vf spread_dword(const float* a) {
  uint32_t dword;
  memcpy(&dword, a, sizeof dword);
  return (vf)splat_u(dword);
}

#ifdef __AVX512BF16__
struct Dot : Vectors {
  static constexpr Products products = Products::dot;
  static constexpr int64_t step = 2;
  static inline __attribute__((always_inline)) vf spread(const float* a) { return spread_dword(a); }
  static inline __attribute__((always_inline)) vf add(vf c, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if defined(MF_AVX512) || defined(MF_AVX2)
#define MF_HAS_BYTES 1
// Unsigned bytes of A by signed ones of B, sums of four to a lane of int32: AVX512_VNNI, AVX_VNNI. As text, because no
// set of instructions that a variant is compiled for has to include them: the host asks the processor.
struct Bytes : Vectors {
  static constexpr Products products = Products::bytes;
  static constexpr bool bytes = true;
  static constexpr int64_t step = 4;
  static inline __attribute__((always_inline)) vf spread(const float* a) { return spread_dword(a); }
  static inline __attribute__((always_inline)) vf add(vf c, vf a, vf b) {
#ifdef MF_AVX512
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
#endif
    return c;
  }
  static inline __attribute__((always_inline)) vf join(vf a, vf b) { return (vf)((vi)a + (vi)b); }
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
      store(to, add ? E::join(load(to, Full{}), sums[r][0]) : sums[r][0], Full{});
      store(to + W, add ? E::join(load(to + W, Full{}), sums[r][1]) : sums[r][1], Full{});
    }
  }
}

using Multiply = void (*)(const float* a, const float* b, int64_t dwords, float* c, bool more, Soon soon);

#ifdef MF_HAS_AMX
// BYTES: unsigned ones of A by signed ones of B, into int32; else pairs of bf16.
template <bool BYTES> struct TileProducts {
  static constexpr Products products = BYTES ? Products::byte_tiles : Products::tiles;
  static constexpr bool tiles = true, bytes = BYTES;
  static constexpr int64_t step = BYTES ? 4 : 2, rows = 32, block = 1152;
  MF_AMX static void begin() { Tiles::configure(); }
  MF_AMX static void end() { _tile_release(); }
};

template <bool BYTES, bool TWO_ROWS> MF_AMX static void multiply_tiles(const float* a, const float* b, int64_t dwords, float* c, bool more, Soon) {
  // A: 16 dwords of 32 (16) rows, 64 bytes to the row. B: 16 lines of two tiles side by side.
  const Matrix left{(char*)a, TILE, TWO_ROWS ? 2 * TILE : TILE}, right{(char*)b, 2 * TILE, 64, 2 * 64};
  const Matrix sums{(char*)c, 16 * 2 * 64, 64, 2 * 64};
  block<TWO_ROWS, true, BYTES>(left, right, sums, 0, 0, dwords / 16, more);
}
#endif

template <class E> static Multiply multiply_of(int64_t rows) {
#ifdef MF_HAS_AMX
  if constexpr (E::tiles) return rows > 16 ? multiply_tiles<E::bytes, true> : multiply_tiles<E::bytes, false>;
  else
#endif
  {
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
}

}  // namespace MF_VARIANT
}  // namespace mf
