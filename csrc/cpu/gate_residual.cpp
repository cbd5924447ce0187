// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// y = x + gate * branch, and its gradients.
//
// x, branch, y (B, N, D); gate (D,) [kind 0, LayerScale], (B, D) [kind 1, adaLN's gate] or (B, N, D) [kind 2].
// Backward: dx = dy (the caller's), dbranch = gate * dy, dgate = dy * branch summed over what gate is broadcast over.
// Memory: 3 streams forward, 3 backward; kinds 0 and 1 read gate once per sample. x and y (and dy) have one type, branch
// and gate their own: under autocast a bf16 branch is added to an fp32 residual stream as it comes.

#include "cpu/types.h"

namespace mf {

struct GateArgs {
  Column x, y, branch, gate;  // forward
  Column dy, dbranch, dgate;  // backward; the last two may be absent
  int64_t B, N, D;
  int kind;
  float* rows;      // D floats per thread
  float* partials;  // B * chunks(N) * D floats: dgate before the last sum (kinds 0 and 1)
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// The fp32 gate of a row, converted again only when another row of gate is due.
struct GateRow {
  const GateArgs& a;
  float* buffer;
  const float* gate;
  int64_t current;

  static inline GateRow make(const GateArgs& a) {
    return {a, a.rows + omp_get_thread_num() * a.D, nullptr, -1};
  }
  inline const float* of(int64_t b, int64_t row) {
    const int64_t now = a.kind == 2 ? row : a.kind == 1 ? b : 0;
    if (now != current) gate = float_row(a.gate, current = now, a.D, buffer);
    return gate;
  }
};

template <class X, class F> static void forward(const GateArgs& a) {
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    GateRow rows = GateRow::make(a);
    const Share share = my_share(a.B * a.N);
    for (int64_t row = share.begin; row < share.end; ++row) {
      const float* gate = rows.of(row / a.N, row);
      const X* x = (const X*)a.x.data + row * a.D;
      const F* branch = (const F*)a.branch.data + row * a.D;
      X* y = (X*)a.y.data + row * a.D;
      each(a.D, [&](int64_t i, auto k) {
        store(y + i, load(x + i, k) + load(gate + i, k) * load(branch + i, k), k);
      });
    }
  }
}

// R rows at a time: the running sums of dgate are read and written once for all of them.
template <int R, class X, class F>
MF_INLINE void backward_rows(const GateArgs& a, int64_t row, const float* gate, float* part) {
  const int64_t D = a.D;
  const X* dy = (const X*)a.dy.data + row * D;
  const F* branch = (const F*)a.branch.data + row * D;
  F* dbranch = a.dbranch.data == nullptr ? nullptr : (F*)a.dbranch.data + row * D;
  each(D, [&](int64_t i, auto k) {
    vf d[R];
    for (int j = 0; j < R; ++j) d[j] = load(dy + j * D + i, k);
    if (dbranch != nullptr) {
      const vf g = load(gate + i, k);
      for (int j = 0; j < R; ++j) store(dbranch + j * D + i, g * d[j], k);
    }
    if (part != nullptr) {
      vf total = load(part + i, k);
      for (int j = 0; j < R; ++j) total = fma(d[j], load(branch + j * D + i, k), total);
      store(part + i, total, k);
    }
  });
  if (a.kind == 2 && a.dgate.data != nullptr)
    each(D, [&](int64_t i, auto k) { store_row(a.dgate, row, D, i, load(dy + i, k) * load(branch + i, k), k); });
}

template <class X, class F> static void backward(const GateArgs& a) {
  const int64_t per_sample = chunks(a.N), items = a.B * per_sample;
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    GateRow rows = GateRow::make(a);
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / per_sample, first = item % per_sample * kChunk;
      const int64_t last = first + kChunk < a.N ? first + kChunk : a.N;
      float* part = a.kind != 2 && a.dgate.data != nullptr ? a.partials + item * a.D : nullptr;
      if (part != nullptr) memset(part, 0, sizeof(float) * a.D);
      int64_t n = first;
      if (a.kind != 2)
        for (; n + 4 <= last; n += 4) backward_rows<4, X, F>(a, b * a.N + n, rows.of(b, 0), part);
      for (; n < last; ++n) backward_rows<1, X, F>(a, b * a.N + n, rows.of(b, b * a.N + n), part);
    }
    if (a.kind != 2 && a.dgate.data != nullptr) {
#pragma omp barrier
      const int64_t out_rows = a.kind == 1 ? a.B : 1, parts = items / (out_rows > 0 ? out_rows : 1);
      const Share columns = my_share((a.D + W - 1) / W);
      for (int64_t block = columns.begin; block < columns.end; ++block) {
        const int64_t i = block * W, width = a.D - i < W ? a.D - i : W;
        for (int64_t out = 0; out < out_rows; ++out) {
          vf total = {};
          for (int64_t p = 0; p < parts; ++p) total += load(a.partials + (out * parts + p) * a.D + i, Part{(int)width});
          store_row(a.dgate, out, a.D, i, total, Part{(int)width});
        }
      }
    }
  }
}

void gate_residual_fwd(const GateArgs& a) {
  with_type(a.x.type, [&](auto t) {
    with_type(a.branch.type, [&](auto s) { forward<decltype(t), decltype(s)>(a); });
  });
}
void gate_residual_bwd(const GateArgs& a) {
  with_type(a.dy.type, [&](auto t) {
    with_type(a.branch.type, [&](auto s) { backward<decltype(t), decltype(s)>(a); });
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(gate_residual_fwd, GateArgs)
MF_DECLARE(gate_residual_bwd, GateArgs)

namespace mf {
namespace {

Column gate_of(const TensorView& gate, const char* name, int64_t kind, const GateArgs& a) {
  if (kind == 0) check_shape(gate, name, {a.D});
  else if (kind == 1) check_shape(gate, name, {a.B, a.D});
  else if (kind == 2) check_shape(gate, name, {a.B, a.N, a.D});
  else TVM_FFI_THROW(ValueError) << "gate_kind must be 0 (D,), 1 (B, D) or 2 (B, N, D); got " << kind;
  return {data(gate), check_dense(gate, name)};
}

Column tokens_of(const TensorView& t, const char* name, const GateArgs& a) {
  check_shape(t, name, {a.B, a.N, a.D});
  return {data(t), check_dense(t, name)};
}

GateArgs common_args(const TensorView& x, const char* name, int64_t kind) {
  check_ndim(x, name, 3, "(B, N, D)");
  GateArgs a{};
  a.B = x.size(0), a.N = x.size(1), a.D = x.size(2);
  a.kind = static_cast<int>(kind);
  return a;
}

void fwd(TensorView x, TensorView gate, TensorView branch, TensorView y, int64_t gate_kind) {
  GateArgs a = common_args(x, "x", gate_kind);
  a.x = tokens_of(x, "x", a);
  a.gate = gate_of(gate, "gate", gate_kind, a);
  a.branch = tokens_of(branch, "branch", a);
  a.y = tokens_of(y, "y", a);
  check_dtype(y, "y", a.x.type, " like x");
  if (x.numel() == 0) return;
  Scratch rows(omp_get_max_threads() * a.D);
  a.rows = rows.get();
  MF_CALL(gate_residual_fwd, a);
}

void bwd(TensorView dy, TensorView gate, TensorView branch, MaybeTensor dbranch, MaybeTensor dgate, int64_t gate_kind) {
  GateArgs a = common_args(dy, "dy", gate_kind);
  a.dy = tokens_of(dy, "dy", a);
  a.gate = gate_of(gate, "gate", gate_kind, a);
  a.branch = tokens_of(branch, "branch", a);
  if (dbranch.has_value()) {
    a.dbranch = tokens_of(dbranch.value(), "dbranch", a);
    check_dtype(dbranch.value(), "dbranch", a.branch.type, " like branch");
  }
  if (dgate.has_value()) a.dgate = gate_of(dgate.value(), "dgate", gate_kind, a);
  if (a.D == 0) return;
  Scratch rows(omp_get_max_threads() * a.D);
  Scratch partials(dgate.has_value() && gate_kind != 2 ? a.B * chunks(a.N) * a.D : 0);
  a.rows = rows.get();
  a.partials = partials.get();
  MF_CALL(gate_residual_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual_bwd, mf::bwd);
#endif
