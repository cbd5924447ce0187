// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What the packed GEMM's files share: how operands are laid out, and the arguments of one product.
//
//     y (M, N) = epilogue( prologue(x) (M, K)  w^T ),  w (N, K) packed once into panels
//
// A dword of an operand is what one lane multiplies at once: an fp32 number (fma), the bf16 of columns 2k and 2k + 1 (dot,
// tiles), or the bytes of columns 4k .. 4k + 3 (bytes, byte_tiles). With W lanes to a vector (cpu/simd.h), a panel of w is
// 2 W of its rows, dword by dword:
//
//     fma, fp32 weights     [panel][K][2 W] fp32                 K dwords
//     fma, bf16 weights     [panel][K][2 W] bf16                 widened block by block on their way into the cache
//     dot, tiles            [panel][dwords][2 W] pairs of bf16   dwords = K / 2, rounded up to 16: whole tiles
//     bytes, byte_tiles     [panel][dwords][2 W][4] int8         dwords = K / 4, likewise
//
// Rows and columns that w does not have are zeros. Gated (SwiGLU, w = [a | b] with N / 2 rows each): a panel holds W rows
// of a and the same W of b, so that act(a) * b is between two registers.
//
// Bytes: w[n] = column_scale[n] q[n], q in -127 .. 127, and x[m] = its own scale times p[m], found while x is packed as
// p + 128, because the instructions multiply unsigned bytes by signed ones. Their sums are exact (K <= 65536), and
// (sum - column_offset[n]) scale[m] column_scale[n] with column_offset = 128 sum q is what goes on its way out.
#pragma once

#include "cpu/types.h"

namespace mf {

enum class Products : int { fma, dot, tiles, bytes, byte_tiles };

// w as it lies: element (n, k) at n * row + k, or transposed at k * row + n.
struct GemmWeight {
  Column data;
  int64_t row, N, K;
  bool transposed, gated;
};

// On its way in: norm(x) * (offset + scale) + shift, as csrc/cpu/adaln.cpp has it. kind 0: x as it is.
struct GemmNorm {
  int kind;                       // 1 LayerNorm, 2 RMSNorm
  float eps, offset;
  Column weight, bias;            // (K,), may be absent
  Column shift, scale;            // (B, K) or (B, T, K), may be absent
  int64_t shift_row, scale_row;   // elements from one row of theirs to the next
  int64_t tokens, modulated;      // rows of x per image; of those, the last ones that are modulated (T)
  bool per_image;                 // one row of shift and scale per image, else one per modulated token
};

// What becomes of v = act(sum + bias).
enum class Join : int { none, add, multiply, gate };

struct GemmArgs {
  int64_t M, N, K;                // N: rows of w, both halves of a gated one
  Column x;                       // element (m, k) at m * x_row + k, or transposed at k * x_row + m
  int64_t x_row;
  bool x_transposed;
  GemmNorm norm;                  // not of a transposed x
  const void* panels;             // null: w is packed block by block, in cache, for this product alone
  GemmWeight w;
  DType panel_type;
  Products products;
  const float* column_scale;      // of bytes: one per column of the panels, as the bias
  const int32_t* column_offset;
  const float* bias;              // one per column of the panels, in their order; null: none
  int act;                        // cpu/activations.h; -1: none
  bool gated;
  Join join;                      // add: other + v, multiply: other * v, gate: other + gate * v
  Column other;
  int64_t other_row;
  Column gate;
  int64_t gate_row, gate_tokens;  // row m / gate_tokens of gate; 0: its only one
  Column y, before;               // before: sum + bias, for a backward; may be absent
  int64_t y_row, before_row;
  int threads;
  char* scratch;                  // null: only say in *scratch_bytes how much it takes
  int64_t* scratch_bytes;
};

// w into panels.
struct GemmPackArgs {
  GemmWeight w;
  void* panels;
  DType panel_type;
  Products products;
};

constexpr int64_t gemm_dwords(int64_t K, Products p) {
  if (p == Products::fma) return K;
  return p == Products::dot || p == Products::tiles ? (K + 31) / 32 * 16 : (K + 63) / 64 * 16;
}

}  // namespace mf
