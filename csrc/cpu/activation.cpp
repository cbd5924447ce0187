// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The activations of MLPs: act(x + bias) and its gradients, and SwiGLU, silu(a) * b of a packed (a | b).
//
// The functions themselves: cpu/activations.h. x (rows, D), bias (D,) or absent, y like x or x itself; backward reads x
// again, keeps nothing else, and sums dbias over chunks of rows in a fixed order. All in fp32, rounded once. oneDNN's tanh
// epilogue evaluates a table of polynomials per element instead and costs 25-30 % of the GEMM of an MLP's first layer;
// this pass in place costs half of it.

#include "cpu/types.h"

namespace mf {

struct ActivationArgs {
  Column x, bias, y;       // forward; bias may be absent
  Column dy, dx;           // backward
  float* dbias;            // (D,) or null
  int64_t rows, D;
  int kind;                // 0 gelu_tanh, 1 silu, 2 gelu
  float* buffers;          // D floats per thread
  float* partials;         // chunks(rows) * D floats
};

struct SwigluArgs {
  Column x, y;             // (rows, 2H), (rows, H)
  Column dy, dx;
  int64_t rows, H;
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/activations.h"

namespace mf {
namespace MF_VARIANT {

template <int KIND, class T> static void forward(const ActivationArgs& a) {
  constexpr bool LONG = sizeof(T) == 4;
#pragma omp parallel if (a.rows * a.D > kSerial)
  {
    const T* x = (const T*)a.x.data;
    T* y = (T*)a.y.data;
    if (a.bias.data == nullptr) {  // by vectors, not rows: a row may be shorter than one
      const int64_t count = a.rows * a.D;
      const Share share = my_share((count + 63) / 64);
      const int64_t first = share.begin * 64, last = share.end * 64 < count ? share.end * 64 : count;
      each(last - first, [&](int64_t i, auto k) { store(y + first + i, act<KIND, LONG>(load(x + first + i, k)), k); });
    } else {
      const float* bias = float_row(a.bias, 0, a.D, a.buffers + omp_get_thread_num() * a.D);
      const Share share = my_share(a.rows);
      for (int64_t at = share.begin * a.D; at < share.end * a.D; at += a.D)
        each(a.D, [&](int64_t i, auto k) {
          store(y + at + i, act<KIND, LONG>(load(x + at + i, k) + load(bias + i, k)), k);
        });
    }
  }
}

template <int KIND, class T> static void backward(const ActivationArgs& a) {
  constexpr bool LONG = sizeof(T) == 4;
  const int64_t items = chunks(a.rows);
#pragma omp parallel if (a.rows * a.D > kSerial)
  {
    const float* bias = float_row(a.bias, 0, a.D, a.buffers + omp_get_thread_num() * a.D);
    const Share share = my_share(items);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t last = (item + 1) * kChunk < a.rows ? (item + 1) * kChunk : a.rows;
      float* part = a.dbias == nullptr ? nullptr : a.partials + item * a.D;
      if (part != nullptr) memset(part, 0, sizeof(float) * a.D);
      for (int64_t row = item * kChunk; row < last; ++row) {
        const T *x = (const T*)a.x.data + row * a.D, *dy = (const T*)a.dy.data + row * a.D;
        T* dx = (T*)a.dx.data + row * a.D;
        each(a.D, [&](int64_t i, auto k) {
          const vf v = bias != nullptr ? load(x + i, k) + load(bias + i, k) : load(x + i, k);
          const vf d = load(dy + i, k) * act_slope<KIND, LONG>(v);
          store(dx + i, d, k);
          if (part != nullptr) store(part + i, load(part + i, k) + d, k);
        });
      }
    }
    if (a.dbias != nullptr) {
#pragma omp barrier
      const Share columns = my_share((a.D + W - 1) / W);
      for (int64_t block = columns.begin; block < columns.end; ++block) {
        const int64_t i = block * W;
        const Part k{(int)(a.D - i < W ? a.D - i : W)};
        vf total = {};
        for (int64_t p = 0; p < items; ++p) total += load(a.partials + p * a.D + i, k);
        store(a.dbias + i, total, k);
      }
    }
  }
}

template <class T> static void swiglu_forward(const SwigluArgs& a) {
  constexpr bool LONG = sizeof(T) == 4;
#pragma omp parallel for if (a.rows * a.H > kSerial)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T *left = (const T*)a.x.data + 2 * row * a.H, *right = left + a.H;
    T* y = (T*)a.y.data + row * a.H;
    each(a.H, [&](int64_t i, auto k) { store(y + i, act<1, LONG>(load(left + i, k)) * load(right + i, k), k); });
  }
}

template <class T> static void swiglu_backward(const SwigluArgs& a) {
  constexpr bool LONG = sizeof(T) == 4;
#pragma omp parallel for if (a.rows * a.H > kSerial)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T *left = (const T*)a.x.data + 2 * row * a.H, *right = left + a.H, *dy = (const T*)a.dy.data + row * a.H;
    T *dleft = (T*)a.dx.data + 2 * row * a.H, *dright = dleft + a.H;
    each(a.H, [&](int64_t i, auto k) {
      const vf v = load(left + i, k), d = load(dy + i, k);
      const Logistic l = logistic<LONG>(v);
      const vf silu = v * l.s;
      store(dleft + i, d * load(right + i, k) * (l.s + silu * l.rest), k);
      store(dright + i, d * silu, k);
    });
  }
}

void bias_act_fwd(const ActivationArgs& a) {
  with_kind(a.kind, [&](auto kind) {
    with_type(a.x.type, [&](auto t) { forward<decltype(kind)::value, decltype(t)>(a); });
  });
}
void bias_act_bwd(const ActivationArgs& a) {
  with_kind(a.kind, [&](auto kind) {
    with_type(a.x.type, [&](auto t) { backward<decltype(kind)::value, decltype(t)>(a); });
  });
}
void swiglu_fwd(const SwigluArgs& a) {
  with_type(a.x.type, [&](auto t) { swiglu_forward<decltype(t)>(a); });
}
void swiglu_bwd(const SwigluArgs& a) {
  with_type(a.x.type, [&](auto t) { swiglu_backward<decltype(t)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(bias_act_fwd, ActivationArgs)
MF_DECLARE(bias_act_bwd, ActivationArgs)
MF_DECLARE(swiglu_fwd, SwigluArgs)
MF_DECLARE(swiglu_bwd, SwigluArgs)

namespace mf {
namespace {

Column like(const TensorView& t, const char* name, const TensorView& x) {
  const Column column{data(t), check_dense(t, name)};
  check_dtype(t, name, dtype_of(x, "x"), " like x");
  if (t.numel() != x.numel())
    TVM_FFI_THROW(ValueError) << name << " must have x's shape " << shape_text(x) << "; got " << shape_text(t);
  return column;
}

int64_t last_size(const TensorView& t, const char* name) {
  if (t.ndim() == 0) TVM_FFI_THROW(ValueError) << name << " must have at least one dimension";
  return t.size(t.ndim() - 1);
}

ActivationArgs common_args(const TensorView& x, const MaybeTensor& bias, int64_t kind) {
  if (kind < 0 || kind > 2)
    TVM_FFI_THROW(ValueError) << "kind must be 0 (gelu_tanh), 1 (silu) or 2 (gelu); got " << kind;
  ActivationArgs a{};
  a.x = {data(x), check_dense(x, "x")};
  a.D = last_size(x, "x");
  a.rows = a.D == 0 ? 0 : x.numel() / a.D;
  a.kind = static_cast<int>(kind);
  if (bias.has_value()) {
    check_shape(bias.value(), "bias", {a.D});
    a.bias = {data(bias), check_dense(bias.value(), "bias")};
  }
  return a;
}

void fwd(TensorView x, MaybeTensor bias, TensorView y, int64_t kind) {
  ActivationArgs a = common_args(x, bias, kind);
  a.y = like(y, "y", x);
  Scratch buffers(bias.has_value() ? omp_get_max_threads() * a.D : 0);
  a.buffers = buffers.get();
  MF_CALL(bias_act_fwd, a);
}

void bwd(TensorView dy, TensorView x, MaybeTensor bias, TensorView dx, MaybeTensor dbias, int64_t kind) {
  ActivationArgs a = common_args(x, bias, kind);
  a.dy = like(dy, "dy", x);
  a.dx = like(dx, "dx", x);
  if (dbias.has_value()) {
    check_shape(dbias.value(), "dbias", {a.D});
    check_dense(dbias.value(), "dbias");
    check_dtype(dbias.value(), "dbias", DType::f32, "");
    a.dbias = data<float>(dbias);
  }
  Scratch buffers(bias.has_value() ? omp_get_max_threads() * a.D : 0);
  Scratch partials(dbias.has_value() ? chunks(a.rows) * a.D : 0);
  a.buffers = buffers.get();
  a.partials = partials.get();
  MF_CALL(bias_act_bwd, a);
}

SwigluArgs swiglu_args(const TensorView& x, const TensorView& y, const char* name) {
  SwigluArgs a{};
  a.x = {data(x), check_dense(x, "x")};
  a.H = last_size(y, name);
  if (last_size(x, "x") != 2 * a.H || x.numel() != 2 * y.numel())
    TVM_FFI_THROW(ValueError) << name << " must be half as wide as x " << shape_text(x) << "; got " << shape_text(y);
  check_dense(y, name);
  check_dtype(y, name, a.x.type, " like x");
  a.rows = a.H == 0 ? 0 : y.numel() / a.H;
  return a;
}

void glu_fwd(TensorView x, TensorView y) {
  SwigluArgs a = swiglu_args(x, y, "y");
  a.y = {data(y), a.x.type};
  MF_CALL(swiglu_fwd, a);
}

void glu_bwd(TensorView dy, TensorView x, TensorView dx) {
  SwigluArgs a = swiglu_args(x, dy, "dy");
  a.dy = {data(dy), a.x.type};
  a.dx = like(dx, "dx", x);
  MF_CALL(swiglu_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bias_act_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bias_act_bwd, mf::bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_fwd, mf::glu_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_bwd, mf::glu_bwd);
#endif
