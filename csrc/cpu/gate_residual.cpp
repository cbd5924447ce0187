// y = x + gate * branch, and its gradients.
//
// x, branch, y (B, N, D); gate (D,) [kind 0, LayerScale], (B, D) [kind 1, adaLN's gate] or (B, N, D) [kind 2].
// Backward: dx = dy (the caller's), dbranch = gate * dy, dgate = dy * branch summed over what gate is broadcast over.
// Memory: 3 streams forward, 3 backward; kinds 0 and 1 read gate once per sample.

#include "cpu/types.h"

namespace mf {

struct GateArgs {
  const void *x, *branch, *dy;
  void *out;  // y forward, dbranch backward (may be null)
  Column gate, dgate;
  DType type;
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

template <class T> static void forward(const GateArgs& a) {
  const T *x = (const T*)a.x, *branch = (const T*)a.branch;
  T* y = (T*)a.out;
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    float* buffer = a.rows + omp_get_thread_num() * a.D;
    const Share share = my_share(a.B * a.N);
    int64_t sample = -1;
    const float* gate = nullptr;
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t at = row * a.D;
      if (a.kind == 2) {
        const T* g = (const T*)a.gate.data + at;
        each(a.D, [&](int64_t i, auto k) {
          store(y + at + i, load(x + at + i, k) + load(g + i, k) * load(branch + at + i, k), k);
        });
        continue;
      }
      const int64_t now = a.kind == 1 ? row / a.N : 0;
      if (now != sample) gate = float_row(a.gate, sample = now, a.D, buffer);
      each(a.D, [&](int64_t i, auto k) {
        store(y + at + i, load(x + at + i, k) + load(gate + i, k) * load(branch + at + i, k), k);
      });
    }
  }
}

template <class T> static void backward(const GateArgs& a) {
  const T *dy = (const T*)a.dy, *branch = (const T*)a.branch;
  T* dbranch = (T*)a.out;
  const int64_t per_sample = chunks(a.N), items = a.B * per_sample;
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
  {
    float* buffer = a.rows + omp_get_thread_num() * a.D;
    const Share share = my_share(items);
    int64_t sample = -1;
    const float* gate = nullptr;
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / per_sample, first = item % per_sample * kChunk;
      const int64_t last = first + kChunk < a.N ? first + kChunk : a.N;
      const int64_t now = a.kind == 1 ? b : 0;
      if (a.kind != 2 && now != sample) gate = float_row(a.gate, sample = now, a.D, buffer);
      float* part = a.kind != 2 && a.dgate.data != nullptr ? a.partials + item * a.D : nullptr;
      if (part != nullptr) memset(part, 0, sizeof(float) * a.D);
      for (int64_t n = first; n < last; ++n) {
        const int64_t at = (b * a.N + n) * a.D;
        const T* g2 = (const T*)a.gate.data + at;
        T* dg2 = a.kind == 2 && a.dgate.data != nullptr ? (T*)a.dgate.data + at : nullptr;
        each(a.D, [&](int64_t i, auto k) {
          const vf d = load(dy + at + i, k);
          if (dbranch != nullptr) store(dbranch + at + i, d * (a.kind == 2 ? load(g2 + i, k) : load(gate + i, k)), k);
          if (dg2 != nullptr) store(dg2 + i, d * load(branch + at + i, k), k);
          if (part != nullptr) store(part + i, load(part + i, k) + d * load(branch + at + i, k), k);
        });
      }
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
  with_type(a.type, [&](auto t) { forward<decltype(t)>(a); });
}
void gate_residual_bwd(const GateArgs& a) {
  with_type(a.type, [&](auto t) { backward<decltype(t)>(a); });
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

void check_gate(const TensorView& gate, const char* name, int64_t kind, const TensorView& like, DType type) {
  const int64_t B = like.size(0), N = like.size(1), D = like.size(2);
  if (kind == 0) check_shape(gate, name, {D});
  else if (kind == 1) check_shape(gate, name, {B, D});
  else if (kind == 2) check_shape(gate, name, {B, N, D});
  else TVM_FFI_THROW(ValueError) << "gate_kind must be 0 (D,), 1 (B, D) or 2 (B, N, D); got " << kind;
  if (kind == 2) check_dtype(gate, name, type, " like the activations when it has a value per token");
  else dtype_of(gate, name);
}

void fwd(TensorView x, TensorView gate, TensorView branch, TensorView y, int64_t gate_kind) {
  check_ndim(x, "x", 3, "(B, N, D)");
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const DType type = check_dense(x, "x");
  check_gate(gate, "gate", gate_kind, x, type);
  check_dense(gate, "gate");
  check_shape(branch, "branch", {B, N, D});
  check_dense(branch, "branch");
  check_dtype(branch, "branch", type, " like x");
  check_shape(y, "y", {B, N, D});
  check_dense(y, "y");
  check_dtype(y, "y", type, " like x");
  if (x.numel() == 0) return;
  Scratch rows(omp_get_max_threads() * D);
  GateArgs a{data(x), data(branch), nullptr, data(y), {data(gate), dtype_of(gate, "gate")}, {nullptr, type},
             type, B, N, D, static_cast<int>(gate_kind), rows.get(), nullptr};
  MF_CALL(gate_residual_fwd, a);
}

void bwd(TensorView dy, TensorView gate, TensorView branch, MaybeTensor dbranch, MaybeTensor dgate, int64_t gate_kind) {
  check_ndim(dy, "dy", 3, "(B, N, D)");
  const int64_t B = dy.size(0), N = dy.size(1), D = dy.size(2);
  const DType type = check_dense(dy, "dy");
  check_gate(gate, "gate", gate_kind, dy, type);
  check_dense(gate, "gate");
  check_shape(branch, "branch", {B, N, D});
  check_dense(branch, "branch");
  check_dtype(branch, "branch", type, " like dy");
  if (dbranch.has_value()) {
    check_shape(dbranch.value(), "dbranch", {B, N, D});
    check_dense(dbranch.value(), "dbranch");
    check_dtype(dbranch.value(), "dbranch", type, " like dy");
  }
  Column dgate_column{nullptr, type};
  if (dgate.has_value()) {
    check_gate(dgate.value(), "dgate", gate_kind, dy, type);
    check_dense(dgate.value(), "dgate");
    dgate_column = {data(dgate), dtype_of(dgate.value(), "dgate")};
  }
  if (D == 0) return;
  Scratch rows(omp_get_max_threads() * D);
  Scratch partials(dgate.has_value() && gate_kind != 2 ? B * chunks(N) * D : 0);
  GateArgs a{nullptr, data(branch), data(dy), data(dbranch), {data(gate), dtype_of(gate, "gate")}, dgate_column,
             type, B, N, D, static_cast<int>(gate_kind), rows.get(), partials.get()};
  MF_CALL(gate_residual_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual_bwd, mf::bwd);
#endif
