// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// gemm: y = epilogue( prologue(x) w^T ) with w packed once (gemm.h, gemm_pack.cpp), for linear layers on a CPU.
//
//   all threads   rows of x -> panels of A, normed and modulated on their way          (gemm_rows.h)      one barrier
//   per task      a few panels of w x up to `kRows` rows of x, by blocks of K that keep the task's part of w in L2;
//                 sums of several blocks wait in fp32 beside it                          (gemm_kernels.h)
//   last block    a tile of sums in L1, 2 KB: + bias, activation, residual or gate, one rounding, store
//
// Tasks are handed out dynamically; a sum's order depends on K alone, hence results neither on the threads nor on M.
//
// Predicted, per multiply-add of a vector (AVX-512, 14 x 2 of them per dword): 16 loads for 28, so that the multiplying
// units are busy in 95 % of cycles or more; 1/14 of a cache line of w from L2 each; the epilogue, about 25 operations for
// a tanh-GELU, 2 % of K = 1152 multiply-adds; packing A, about one operation per number and N / 32 panels that use it, 2 %
// at N = 1152; writing y, which the lines of a tile wait for unless they are asked for before it is multiplied.
//
// Measured on two cores of an Emerald Rapids without AMX (FMA peak 350 GFLOP/s, between the neighbours' loads):
//
//     M, K, N              share of peak    without the way out   inner loop alone, operands in cache
//     512, 1152, 4608      84 %             92 %                  93 %
//     512, 4608, 1152      87 %             90 %                  94 %
//     128, 1152, 4608      85 %             90 %                  99 %
//
// and 75, 73 and 73 % with a neighbour on the sibling hyperthreads, where the inner loop and MKL reach no more than 77 %.
// Bytes (gemm_bytes.h), predicted: four times the multiply-adds per dword and everything else as it was, so that the way
// in, now two passes over a row in L1, and the way out weigh four times as much: 70 % of the peak (VNNI here: 4.2 times the
// FMA's). Measured with a neighbour (peak 800 GOP/s; torch's own dynamic int8 in brackets): 512, 1152, 4608 with GELU 917
// (494), 512, 4608, 1152 937 (744), 128, 4608, 1152 584 (460) GOP/s, 3.7 times the fp32 products beside them.
//
// Packing A is 0.5 to 2 %. In that state F.linear and GELU reach 176, oneDNN 214 and this 224 GFLOP/s at the first shape,
// and 112, 162 and 175 at the last.

#include "cpu/gemm.h"

#ifdef MF_VARIANT
#include "cpu/activations.h"
#include "cpu/gemm_bytes.h"
#include "cpu/gemm_columns.h"

namespace mf {
namespace MF_VARIANT {

constexpr int64_t kMaxPanels = 8, kPanelBytes = 200 << 10;  // of a task's part of w: in any L2
constexpr int64_t kRows = 256, kRowsPacking = 1024;  // more of them to a task that has to pack its part of w first

// How one product is cut up. Panels of A have `base` rows, the first `longer` of them one more (tiles: 32, the last fewer).
template <class E> struct Cut {
  int64_t dwords, panels_a, base, longer, panels_b, group, groups, blocks_m, blocks_k, step_k;
  bool staged;  // panels are made in the task's scratch, from bf16 or from w itself

  static Cut of(const GemmArgs& g) {
    Cut c;
    c.dwords = gemm_dwords(g.K, E::products);
    c.panels_a = (g.M + E::rows - 1) / E::rows;
    c.base = E::tiles ? E::rows : g.M / c.panels_a;
    c.longer = E::tiles ? 0 : g.M % c.panels_a;
    c.panels_b = ((g.gated ? g.N / 2 : g.N) + (g.gated ? W : NR) - 1) / (g.gated ? W : NR);
    c.blocks_k = (c.dwords + E::block - 1) / E::block;
    c.step_k = (c.dwords + c.blocks_k - 1) / c.blocks_k;
    if (E::tiles) c.step_k = (c.step_k + 15) / 16 * 16;
    const int64_t rows = g.panels == nullptr ? kRowsPacking : kRows;
    c.blocks_m = (g.M + rows - 1) / rows;
    c.staged = g.panels == nullptr || (E::products == Products::fma && g.panel_type != DType::f32);
    // As many panels of w to a task as leave no thread without work; a task costs about a tenth of a panel.
    double least = 0;
    c.group = 1;
    for (int64_t n = 1; n <= kMaxPanels && n <= c.panels_b && (n == 1 || n * c.step_k * NR * 4 <= kPanelBytes); ++n) {
      const int64_t tasks = (c.panels_b + n - 1) / n * c.blocks_m;
      const double cost = (double)((tasks + g.threads - 1) / g.threads) * ((double)n + 0.1);
      if (n == 1 || cost < least) least = cost, c.group = n;
    }
    c.groups = (c.panels_b + c.group - 1) / c.group;
    return c;
  }
  int64_t first_row(int64_t panel) const { return panel * base + (panel < longer ? panel : longer); }
  int64_t rows_of(int64_t panel, int64_t M) const {
    if (E::tiles) return M - panel * base < base ? M - panel * base : base;
    return base + (panel < longer ? 1 : 0);
  }
  // where panel `panel` of A starts, in dwords
  int64_t start(int64_t panel) const { return first_row(panel) * dwords; }
  static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  int64_t panels_bytes(int64_t M) const { return lines((E::tiles ? panels_a * E::rows : M) * dwords * 4 + 64); }
  // the panels of A, and the scales of its rows where they are of bytes
  int64_t shared_bytes(int64_t M) const { return panels_bytes(M) + (E::bytes ? lines(M * 4) : 0); }
  int64_t tiles_bytes() const {
    const int64_t rows = blocks_k > 1 ? (panels_a + blocks_m - 1) / blocks_m * E::rows * group : E::rows;
    return rows * NR * 4;
  }
  int64_t thread_bytes() const {
    const int64_t products = lines(tiles_bytes() + (staged ? group * step_k * NR * 4 : 0));
#ifdef MF_HAS_BYTES
    if (E::bytes && products < lines(quantise_scratch<E>(dwords))) return lines(quantise_scratch<E>(dwords));
#endif
    return products;
  }
};

template <class F> static void with_engine(const GemmArgs& g, F f) {
#ifdef __AVX512BF16__
  if (g.products == Products::dot) return f(Dot{});
#ifdef MF_HAS_AMX
  if (g.products == Products::tiles) return f(TileProducts<false>{});
  if (g.products == Products::byte_tiles) return f(TileProducts<true>{});
#endif
#endif
#ifdef MF_HAS_BYTES
  if (g.products == Products::bytes) return f(Bytes{});
#endif
  f(Fma{});
}

// ---- the way out -----------------------------------------------------------------------------------------------------

template <int ACT, bool LONG> MF_INLINE vf activate(vf v) {
  if constexpr (ACT == 3) return v < (vf){} ? (vf){} : v;
  else if constexpr (ACT >= 0) return act<ACT, LONG>(v);
  else return v;
}

// A tile of sums: `rows` rows from `first` on, columns of panel `panel`.
template <int ACT, class Y> static void finish(const GemmArgs& g, const float* tile, int64_t first, int64_t rows, int64_t panel) {
  constexpr bool LONG = sizeof(Y) == 4;
  const int64_t width = g.gated ? g.N / 2 : g.N, begin = panel * (g.gated ? W : NR);
  const float* bias = g.bias == nullptr ? nullptr : g.bias + panel * NR;
  const vf b0 = bias != nullptr ? load(bias, Full{}) : (vf){}, b1 = bias != nullptr ? load(bias + W, Full{}) : (vf){};
  for (int64_t r = 0; r < rows; ++r, tile += NR) {
    const int64_t m = first + r;
    const auto write = [&](vf v, int64_t n, auto k) {
      if (g.join != Join::none) {
        const vf other = load_column(g.other, m * g.other_row + n, k);
        if (g.join == Join::add) v = other + v;
        else if (g.join == Join::multiply) v = other * v;
        else v = other + load_column(g.gate, (g.gate_tokens > 0 ? m / g.gate_tokens * g.gate_row : 0) + n, k) * v;
      }
      store((Y*)g.y.data + m * g.y_row + n, v, k);
    };
    const auto one = [&](vf v, int64_t n, auto k) {
      if (g.before.data != nullptr) store((Y*)g.before.data + m * g.before_row + n, v, k);
      write(activate<ACT, LONG>(v), n, k);
    };
    const vf v0 = load(tile, Full{}) + b0, v1 = load(tile + W, Full{}) + b1;
    const auto each_part = [&](int64_t n, auto f) {
      if (n + W <= width) f(Full{});
      else if (n < width) f(Part{(int)(width - n)});
    };
    if (g.gated) {
      each_part(begin, [&](auto k) {
        if (g.before.data != nullptr) {
          store((Y*)g.before.data + m * g.before_row + begin, v0, k);
          store((Y*)g.before.data + m * g.before_row + width + begin, v1, k);
        }
        write(activate<ACT, LONG>(v0) * v1, begin, k);
      });
    } else {
      each_part(begin, [&](auto k) { one(v0, begin, k); });
      each_part(begin + W, [&](auto k) { one(v1, begin + W, k); });
    }
  }
}

using Finish = void (*)(const GemmArgs&, const float*, int64_t, int64_t, int64_t);
template <class Y> static Finish finish_of(int act) {
  static constexpr Finish table[] = {finish<-1, Y>, finish<0, Y>, finish<1, Y>, finish<2, Y>, finish<3, Y>};
  return table[act + 1];
}

MF_INLINE void prefetch_to_write(const char* p) {
#ifdef MF_X86
  asm volatile("prefetchw %0" ::"m"(*p));  // a hint since the K6; the compiler makes none of it for x86-64-v3
#else
  __builtin_prefetch(p, 1);
#endif
}

// Asks for the lines that `finish` will write and read, while the tile is multiplied.
static void expect(const GemmArgs& g, int64_t first, int64_t rows, int64_t panel) {
  const int64_t size = g.y.type == DType::f32 ? 4 : 2, n = panel * (g.gated ? W : NR), bytes = (g.gated ? W : NR) * size;
  for (int64_t m = first; m < first + rows; ++m) {
    const char* y = (const char*)g.y.data + (m * g.y_row + n) * size;
    for (int64_t at = 0; at < bytes; at += 64) prefetch_to_write(y + at);
    if (g.join != Join::none) {
      const int64_t item = g.other.type == DType::f32 ? 4 : 2;
      const char* other = (const char*)g.other.data + (m * g.other_row + n) * item;
      for (int64_t at = 0; at < (g.gated ? W : NR) * item; at += 64) __builtin_prefetch(other + at);
    }
  }
}

// ---- the product -----------------------------------------------------------------------------------------------------

// Panels of bf16 weights as fp32, for a block of K.
static void widen_panels(const GemmArgs& g, int64_t first, int64_t count, int64_t dwords, int64_t begin, int64_t steps, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    const bf16* from = (const bf16*)g.panels + ((first + j) * dwords + begin) * NR;
    for (int64_t i = 0; i < steps * NR; i += W) store(to + i, load(from + i, Full{}), Full{});
    to += steps * NR;
  }
}

// Bytes of a dword's line of a panel, and where block `begin` of panel `panel` starts in memory. Of w as it lies, rows
// after each other, that is as good a guess of what will be read.
static int64_t line_bytes(const GemmArgs& g) {
  if (g.panels == nullptr) return NR * (g.w.data.type == DType::f32 ? 4 : 2);
  return NR * (g.products == Products::fma && g.panel_type != DType::f32 ? 2 : 4);
}
template <class E> static const char* panel_at(const GemmArgs& g, const Cut<E>& c, int64_t panel, int64_t begin) {
  const void* from = g.panels == nullptr ? g.w.data.data : g.panels;
  return (const char*)from + (panel * c.dwords + begin) * line_bytes(g);
}

// Panels of w itself, for a block of K.
template <class E> static void pack_panels(const GemmArgs& g, int64_t first, int64_t count, int64_t begin, int64_t steps, float* to) {
  for (int64_t i = 0; i < 2 * count; ++i) {
    float* panel = to + i / 2 * steps * NR;
    if constexpr (E::step == 1) pack_half<false>(g.w, first + i / 2, i % 2 * W, begin, steps, panel);
    else if constexpr (E::step == 2) pack_half<true>(g.w, first + i / 2, i % 2 * W, begin, steps, (bf16*)panel);
  }
}

// Panels of w from `group * c.group` on times the rows of block `block_m`; `then`: the group that this thread is likely
// to take up next.
template <class E> static void task(const GemmArgs& g, const Cut<E>& c, const float* a, [[maybe_unused]] const float* scales, int64_t block_m, int64_t group, int64_t then, char* scratch, Finish finish) {
  const int64_t first = group * c.group, count = c.panels_b - first < c.group ? c.panels_b - first : c.group;
  const int64_t from = c.panels_a * block_m / c.blocks_m, to = c.panels_a * (block_m + 1) / c.blocks_m;
  float* const tiles = (float*)scratch;
  float* const wide = (float*)(scratch + c.tiles_bytes());
  for (int64_t begin = 0; begin < c.dwords; begin += c.step_k) {
    const auto steps_at = [&](int64_t k) { return c.dwords - k < c.step_k ? c.dwords - k : c.step_k; };
    const int64_t steps = steps_at(begin), next = begin + steps < c.dwords ? begin + steps : 0;
    const float* b = wide;
    int64_t b_step = steps * NR;
    if (g.panels == nullptr) pack_panels<E>(g, first, count, begin, steps, wide);
    else if (c.staged) widen_panels(g, first, count, c.dwords, begin, steps, wide);
    else b = (const float*)panel_at(g, c, first, begin), b_step = c.dwords * NR;
    // What is multiplied next is fetched into L2 meanwhile, a share of it with each panel of A.
    const int64_t lines = g.w.transposed ? 0 : steps_at(next) * line_bytes(g) / 64, share = (lines + to - from - 1) / (to - from);
    for (int64_t i = from; i < to; ++i) {
      const int64_t rows = c.rows_of(i, g.M), lead = E::tiles ? (rows > 16 ? 32 : 16) : rows;
      const float* panel = a + c.start(i) + begin * lead;
      const Multiply multiply = multiply_of<E>(rows);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t soon = next > 0 ? first + j : then * c.group + j, at = (i - from) * share;
        Soon lines_soon{nullptr, 0};
        if (soon < c.panels_b && at < lines) lines_soon = {panel_at(g, c, soon, next) + at * 64, lines - at < share ? lines - at : share};
        float* tile = c.blocks_k > 1 ? tiles + ((i - from) * count + j) * E::rows * NR : tiles;
        if (next == 0) expect(g, c.first_row(i), rows, first + j);
        multiply(panel, b + j * b_step, steps, tile, begin > 0, lines_soon);
        if (next > 0) continue;
#ifdef MF_HAS_BYTES
        if constexpr (E::bytes) dequantise(g, tile, scales + c.first_row(i), rows, first + j);
#endif
        finish(g, tile, c.first_row(i), rows, first + j);
      }
    }
  }
}

template <class E> static void product(const GemmArgs& g, const Cut<E>& c) {
  float* const a = (float*)g.scratch;
  float* const scales = (float*)(g.scratch + c.panels_bytes(g.M));  // of bytes
  Finish finish = nullptr;
  with_type(g.y.type, [&](auto t) { finish = finish_of<decltype(t)>(g.act); });
#pragma omp parallel num_threads(g.threads)
  {
    char* const own = g.scratch + c.shared_bytes(g.M) + omp_get_thread_num() * c.thread_bytes();
#pragma omp for
    for (int64_t i = 0; i < c.panels_a; ++i)
      with_type(g.x.type, [&](auto t) {
        const int64_t first = c.first_row(i), rows = c.rows_of(i, g.M);
        if constexpr (!E::bytes) pack_rows<E, decltype(t)>(g, first, rows, c.dwords, a + c.start(i));
#ifdef MF_HAS_BYTES
        else quantise_rows<E, decltype(t)>(g, first, rows, c.dwords, a + c.start(i), scales + first, own);
#endif
      });
    E::begin();
#pragma omp for schedule(dynamic) nowait
    for (int64_t t = 0; t < c.groups * c.blocks_m; ++t)
      task<E>(g, c, a, scales, t % c.blocks_m, t / c.blocks_m, (t + g.threads) / c.blocks_m, own, finish);
    E::end();
  }
}

void gemm(const GemmArgs& g) {
  with_engine(g, [&](auto e) {
    using E = decltype(e);
    const auto c = Cut<E>::of(g);
    if (g.scratch == nullptr) *g.scratch_bytes = c.shared_bytes(g.M) + g.threads * c.thread_bytes();
    else product<E>(g, c);
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif
