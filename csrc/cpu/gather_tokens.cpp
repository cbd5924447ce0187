// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Rows moved by index, and the sum of the rows that no index names.
//
//     gather    y[b, k] = x[b, index[b, k]]                         x (B, N, D), index (B, K), y (B, K, D)
//     scatter   y[b, index[b, k]] = x[b, k], elsewhere fill or 0    x (B, K, D), y (B, N, D)
//     fill_sum  dfill = sum over b and the n that no index[b] names of dy[b, n]
//
// Whole rows are copied, so gather and scatter know bytes only. Scatter and fill_sum invert the index first: every output
// row is then written once and by one thread.

#include "cpu/types.h"

namespace mf {

struct MoveArgs {
  const char *x, *fill;  // fill may be null
  char* y;
  const int32_t* source;  // (B, rows): the input row of each output row, -1: fill
  int64_t B, in_rows, out_rows, bytes;
};

struct FillArgs {
  const void* dy;
  const int32_t* source;  // (B, N), -1: summed
  Column out;
  DType type;
  int64_t B, N, D;
  float* partials;  // B * chunks(N) * D floats
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

void move_rows(const MoveArgs& a) {
  const int64_t rows = a.B * a.out_rows;
#pragma omp parallel if (rows * a.bytes > 4 * kSerial)
  {
    const Share share = my_share(rows);
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t from = a.source[row];
      char* y = a.y + row * a.bytes;
      if (from >= 0) memcpy(y, a.x + (row / a.out_rows * a.in_rows + from) * a.bytes, a.bytes);
      else if (a.fill != nullptr) memcpy(y, a.fill, a.bytes);
      else memset(y, 0, a.bytes);
    }
  }
}

void fill_sum(const FillArgs& a) {
  const int64_t per_sample = chunks(a.N), items = a.B * per_sample;
  with_type(a.type, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel if (a.B * a.N * a.D > kSerial)
    {
      const Share share = my_share(items);
      for (int64_t item = share.begin; item < share.end; ++item) {
        const int64_t b = item / per_sample, first = item % per_sample * kChunk;
        const int64_t last = first + kChunk < a.N ? first + kChunk : a.N;
        float* part = a.partials + item * a.D;
        memset(part, 0, sizeof(float) * a.D);
        for (int64_t n = first; n < last; ++n) {
          if (a.source[b * a.N + n] >= 0) continue;
          const T* dy = (const T*)a.dy + (b * a.N + n) * a.D;
          each(a.D, [&](int64_t i, auto k) { store(part + i, load(part + i, k) + load(dy + i, k), k); });
        }
      }
#pragma omp barrier
      const Share columns = my_share((a.D + W - 1) / W);
      for (int64_t block = columns.begin; block < columns.end; ++block) {
        const int64_t i = block * W;
        const Part k{(int)(a.D - i < W ? a.D - i : W)};
        vf total = {};
        for (int64_t item = 0; item < items; ++item) total += load(a.partials + item * a.D + i, k);
        store_row(a.out, 0, a.D, i, total, k);
      }
    }
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"
#include "cpu/integers.h"

MF_DECLARE(move_rows, MoveArgs)
MF_DECLARE(fill_sum, FillArgs)

namespace mf {
namespace {

void check_index(const TensorView& index, int64_t B) {
  check_ndim(index, "index", 2, "(B, K)");
  check_integers(index, "index", kDLInt, 64);
  check_shape(index, "index", {B, index.size(1)});
}

int64_t in_range(int64_t n, int64_t rows) {
  if (n < 0 || n >= rows) TVM_FFI_THROW(IndexError) << "index " << n << " lies outside 0 .. " << rows - 1;
  return n;
}

// source (B, N): k where index[b, k] = n, -1 where no index is n.
void invert(const TensorView& index, int64_t N, int32_t* source) {
  const int64_t *at = data<int64_t>(index), B = index.size(0), K = index.size(1);
  for (int64_t i = 0; i < B * N; ++i) source[i] = -1;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      int32_t& slot = source[b * N + in_range(at[b * K + k], N)];
      if (slot >= 0) TVM_FFI_THROW(ValueError) << "index " << at[b * K + k] << " stands twice in the row of image " << b;
      slot = static_cast<int32_t>(k);
    }
}

void move(TensorView x, TensorView index, MaybeTensor fill, TensorView y, int64_t scatter) {
  check_ndim(x, "x", 3, "(B, rows, D)");
  const DType type = check_dense(x, "x");
  MoveArgs a{};
  a.B = x.size(0), a.in_rows = x.size(1);
  check_index(index, a.B);
  const int64_t D = x.size(2), K = index.size(1);
  if (scatter != 0 && K != a.in_rows)
    TVM_FFI_THROW(ValueError) << "index must have one entry per row of x " << shape_text(x) << "; got "
                              << shape_text(index);
  check_ndim(y, "y", 3, "(B, rows, D)");
  a.out_rows = scatter != 0 ? y.size(1) : K;
  check_shape(y, "y", {a.B, a.out_rows, D});
  check_dense(y, "y");
  check_dtype(y, "y", type, " like x");
  if (fill.has_value()) {
    check_shape(fill.value(), "fill", {D});
    check_dense(fill.value(), "fill");
    check_dtype(fill.value(), "fill", type, " like x");
  }
  a.bytes = D * (type == DType::f32 ? 4 : 2);
  a.x = data<char>(x), a.y = data<char>(y), a.fill = data<char>(fill);
  Scratch rows(a.B * a.out_rows);
  int32_t* source = reinterpret_cast<int32_t*>(rows.get());
  if (scatter != 0) {
    invert(index, a.out_rows, source);
  } else {
    const int64_t* at = data<int64_t>(index);
    for (int64_t i = 0; i < a.B * K; ++i) source[i] = static_cast<int32_t>(in_range(at[i], a.in_rows));
  }
  a.source = source;
  MF_CALL(move_rows, a);
}

void sum_of_filled(TensorView dy, TensorView index, TensorView dfill) {
  check_ndim(dy, "dy", 3, "(B, N, D)");
  FillArgs a{};
  a.type = check_dense(dy, "dy");
  a.dy = data(dy);
  a.B = dy.size(0), a.N = dy.size(1), a.D = dy.size(2);
  check_index(index, a.B);
  check_shape(dfill, "dfill", {a.D});
  a.out = {data(dfill), check_dense(dfill, "dfill")};
  Scratch rows(a.B * a.N), partials(a.B * chunks(a.N) * a.D);
  int32_t* source = reinterpret_cast<int32_t*>(rows.get());
  invert(index, a.N, source);
  a.source = source;
  a.partials = partials.get();
  MF_CALL(fill_sum, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(move_rows, mf::move);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fill_sum, mf::sum_of_filled);
#endif
