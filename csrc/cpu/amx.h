// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What the attention kernels share: AMX tiles, their packing, the blocked product, and 2^t.
//
// A tile is 16 rows of 64 bytes. One instruction adds to a C tile (16 x 16 fp32) the product of an A tile (16 rows x 32
// bf16) and a B tile (16 pairs x 16 columns: bf16 of rows 2p and 2p + 1 side by side). All operands are kept tile by
// tile, 1 KB each, so that no row stride of theirs can fall on one set of the first-level cache:
//
//     copy_rows         16 tokens -> A tiles, tokens x channels          (q, k, v, d_out as left operands)
//     transpose_rows    16 tokens -> B tiles, channel pairs x tokens     (the right operands of scores)
//     pair_rows         32 tokens -> B tiles, token pairs x channels     (the right operands of sums over tokens)
//     transpose_pairs   32 tokens -> A tiles, channels x tokens          (the left operands of sums over tokens)
//
// Rows that do not exist and channels beyond head_dim are packed as zeros.
#pragma once

#include "cpu/simd.h"

#if defined(MF_AMX_COMPILED) && defined(__AVX512BW__)
#define MF_HAS_AMX 1
#include <immintrin.h>

#include <cstdint>

#ifdef MF_EMULATED_TILES
#include "cpu/amx_emulated.h"
#define MF_AMX
#else
#define MF_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))
#endif
#define MF_AMX_INLINE static inline __attribute__((always_inline)) MF_AMX

namespace mf::MF_VARIANT {
namespace {

constexpr int64_t TILE = 1024;  // bytes of a tile
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// Sixteen rows of 64 bytes in all eight tiles; orphaned tiles are given back by the destructor.
class Tiles {
 public:
  MF_AMX Tiles() { configure(); }
  MF_AMX static void configure() {
    Config config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" ::"r"(&config) : "memory");  // GCC believes that ldtilecfg reads eight bytes
    _tile_loadconfig(&config);
  }
  MF_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// GCC does not know that tile loads read memory: stores before this stay before it.
MF_AMX_INLINE void stores_are_done() { asm volatile("" ::: "memory"); }

// 2^t for t <= 0; below -126 it runs into the denormals and to 0. Relative error 2.4e-6.
MF_AMX_INLINE __m512 exp2_short(__m512 t) {
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);  // scalef(NaN, -inf) is 0: so is the power of -inf, whose f is NaN
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// The low `count` bits, for count in 0 .. 32 (more: all 32; fewer: none).
MF_AMX_INLINE uint32_t low_bits(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// Tokens x channels: 16 rows of x (row stride in elements), `rows` of which exist -> ceil(dim / 32) tiles.
[[maybe_unused]] MF_AMX static void copy_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t dim, char* to) {
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t d = 0; d < dim; d += 32) {
      const __mmask32 mask = r < rows ? low_bits(dim - d) : 0;
      _mm512_store_si512(to + d / 32 * TILE + r * 64, _mm512_maskz_loadu_epi16(mask, x + r * stride + d));
    }
}

// Channel pairs x tokens: the same rows -> ceil(dim / 32) tiles. dim is even.
[[maybe_unused]] MF_AMX static void transpose_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t dim, char* to) {
  for (int64_t d = 0; d < dim; d += 32, to += TILE) {
    const __mmask16 mask = static_cast<__mmask16>(low_bits((dim - d) / 2));
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = _mm512_maskz_loadu_epi32(r < rows ? mask : 0, x + r * stride + d);
    transpose16(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 64, v[r]);
  }
}

// 32 rows, `rows` of which exist -> ceil(dim / 16) tiles: token pairs x channels (B), or channels x tokens (A).
template <bool CHANNELS_FIRST>
MF_AMX static void pack_pairs(const uint16_t* x, int64_t stride, int64_t rows, int64_t dim, char* to, int64_t tile_step) {
  for (int64_t d = 0; d < dim; d += 16, to += tile_step) {
    const __mmask16 mask = static_cast<__mmask16>(low_bits(dim - d));
    __m512i v[16];
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const uint16_t* pair = x + 2 * p * stride + d;
      const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(2 * p < rows ? mask : 0, pair));
      const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(2 * p + 1 < rows ? mask : 0, pair + stride));
      v[p] = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    }
    if (CHANNELS_FIRST) transpose16(v);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) _mm512_store_si512(to + p * 64, v[p]);
  }
}

MF_AMX_INLINE void pair_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t dim, char* to) {
  pack_pairs<false>(x, stride, rows, dim, to, TILE);
}
MF_AMX_INLINE void transpose_pairs(const uint16_t* x, int64_t stride, int64_t rows, int64_t dim, char* to, int64_t step) {
  pack_pairs<true>(x, stride, rows, dim, to, step);
}

// bf16 of v * factor, the first `count` of 16 lanes.
MF_AMX_INLINE void store_bf16(uint16_t* to, __m512 v, __m512 factor, int64_t count) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(v, factor));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(low_bits(count)), (__m256i)rounded);
}

// ---- product -----------------------------------------------------------------------------------------------------------

// C += A B of three tiles, whose numbers the intrinsics take as literals: bytes where BYTES, else pairs of bf16.
#define MF_MULTIPLY(c, a, b)                    \
  do {                                          \
    if constexpr (BYTES) _tile_dpbusd(c, a, b); \
    else _tile_dpbf16ps(c, a, b);               \
  } while (0)

// Where tile (i, j) of a matrix lies: base + i * row + j * column bytes; its 16 rows `line` bytes apart.
struct Matrix {
  char* base;
  int64_t row, column, line = 64;
};

// A block of 2 x 2 tiles (or 1) of C: C = A B, or C += A B, over `steps` tiles of A's columns. BYTES: unsigned ones of A by
// signed ones of B, four to a dword, and C of int32.
template <bool TWO_ROWS, bool TWO_COLUMNS, bool BYTES = false>
MF_AMX_INLINE void block(const Matrix& a, const Matrix& b, const Matrix& c, int64_t i, int64_t j, int64_t steps, bool add) {
  char* to = c.base + i * c.row + j * c.column;
  if (add) {
    _tile_loadd(0, to, c.line);
    if (TWO_COLUMNS) _tile_loadd(1, to + c.column, c.line);
    if (TWO_ROWS) _tile_loadd(2, to + c.row, c.line);
    if (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, to + c.row + c.column, c.line);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  const char *left = a.base + i * a.row, *right = b.base + j * b.column;
  for (int64_t s = 0; s < steps; ++s, left += a.column, right += b.row) {
    _tile_loadd(4, left, a.line);
    _tile_loadd(6, right, b.line);
    MF_MULTIPLY(0, 4, 6);
    if (TWO_COLUMNS) {
      _tile_loadd(7, right + b.column, b.line);
      MF_MULTIPLY(1, 4, 7);
    }
    if (TWO_ROWS) {
      _tile_loadd(5, left + a.row, a.line);
      MF_MULTIPLY(2, 5, 6);
    }
    if (TWO_ROWS && TWO_COLUMNS) MF_MULTIPLY(3, 5, 7);
  }
  _tile_stored(0, to, c.line);
  if (TWO_COLUMNS) _tile_stored(1, to + c.column, c.line);
  if (TWO_ROWS) _tile_stored(2, to + c.row, c.line);
  if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, to + c.row + c.column, c.line);
}

// C (rows x columns tiles) = A B or += A B.
[[maybe_unused]] MF_AMX static void product(const Matrix& a, const Matrix& b, const Matrix& c, int64_t rows, int64_t columns, int64_t steps, bool add) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < columns; j += 2) {
      if (i + 1 < rows) j + 1 < columns ? block<true, true>(a, b, c, i, j, steps, add) : block<true, false>(a, b, c, i, j, steps, add);
      else j + 1 < columns ? block<false, true>(a, b, c, i, j, steps, add) : block<false, false>(a, b, c, i, j, steps, add);
    }
}

}  // namespace
}  // namespace mf::MF_VARIANT
#endif
