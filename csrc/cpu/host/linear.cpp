// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The host side of the packed GEMM (cpu/gemm.cpp, cpu/gemm_pack.cpp): checks of operands, scratch.
#include <sys/mman.h>

#include <tuple>
#include <utility>

#include "common.h"
#include "cpu/gemm.h"
#include "cpu/integers.h"

MF_DECLARE(gemm, GemmArgs)
MF_DECLARE(gemm_pack, GemmPackArgs)

namespace mf {
namespace {

// Scratch of one product: this thread's own, kept from call to call because fresh memory costs a page fault for every
// 4 KB, or, beyond what a model's layers take at usual batches, its own.
class ProductScratch {
 public:
  explicit ProductScratch(int64_t bytes) {
    thread_local Kept kept;
    Kept& memory = bytes > kMostKept ? own_ : kept;
    if (bytes > memory.bytes) memory.grow(bytes);
    start_ = memory.start;
  }
  char* get() const { return start_; }

 private:
  static constexpr int64_t kPage = 2 << 20, kMostKept = 64 << 20;
  struct Kept {
    char* start = nullptr;
    int64_t bytes = 0;
    Kept() = default;
    Kept(const Kept&) = delete;
    ~Kept() { std::free(start); }
    void grow(int64_t wanted) {
      std::free(start);
      const int64_t size = (wanted + kPage - 1) / kPage * kPage;
      start = static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(size)));
      bytes = start == nullptr ? 0 : size;
      if (start == nullptr) TVM_FFI_THROW(MemoryError) << "out of memory for " << wanted << " bytes of scratch";
#ifdef MADV_HUGEPAGE
      madvise(start, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
    }
  };
  Kept own_;
  char* start_ = nullptr;
};

constexpr int64_t kMostBytes = 65536;  // of K: sums of 255 * 127 each stay below 2^31

// Columns of a panel for the instruction set in use.
int64_t gemm_columns() {
  switch (variant()) {
    case Variant::amx: case Variant::avx512bf16: case Variant::avx512: return 32;
    case Variant::avx2: return 16;
    default: return 8;
  }
}

// (M, K) with contiguous rows, or, transposed, with contiguous columns; leading dimensions are rows.
struct Rows { int64_t count, stride; bool transposed; };
Rows rows_of(const TensorView& t, const char* name, int64_t width) {
  check_cpu(t, name);
  const int n = t.ndim();
  if (n == 0 || t.size(n - 1) != width)
    TVM_FFI_THROW(ValueError) << name << " must have " << width << " columns; got " << shape_text(t);
  if (n == 2 && (t.stride(1) == 1 || width == 1)) return {t.size(0), t.stride(0), false};
  if (n == 2 && t.stride(0) == 1) return {t.size(0), t.stride(1), true};
  check_contiguous(t, name);
  return {width == 0 ? 0 : t.numel() / width, width, false};
}

GemmWeight weight_of(const TensorView& w, bool gated) {
  check_ndim(w, "w", 2, "(out, in)");
  const Rows rows = rows_of(w, "w", w.size(1));
  if (gated && (w.size(0) % 2 != 0 || rows.transposed))
    TVM_FFI_THROW(ValueError) << "a gated w must be two halves of contiguous rows; got " << shape_text(w);
  return {{data(w), dtype_of(w, "w")}, rows.stride, w.size(0), w.size(1), rows.transposed, gated};
}

Products products_of(bool pairs) {
  if (!pairs) return Products::fma;
  if (!pair_products().has_value())
    TVM_FFI_THROW(ValueError) << "pairs of bfloat16 need AVX512_BF16, the instruction set in use is "
                              << variant_name(variant());
  return *pair_products();
}

// panels: (panels, dwords, columns), fp32 or bf16; (panels, dwords, columns, 2) bf16 pairs; (.., 4) int8.
Products check_panels(const TensorView& panels, int64_t N, int64_t K, bool gated) {
  const int64_t columns = gemm_columns(), each = gated ? columns / 2 : columns, rows = gated ? N / 2 : N;
  if (panels.ndim() == 4 && panels.size(3) == 4) {
    if (!byte_products().has_value() || K > kMostBytes)
      TVM_FFI_THROW(ValueError) << "products of int8 need AVX512_VNNI, AVX_VNNI or AMX-INT8 and at most " << kMostBytes
                                << " columns; the instruction set in use is " << variant_name(variant()) << ", x has " << K;
    check_integers(panels, "panels", kDLInt, 8);
    check_shape(panels, "panels", {(rows + each - 1) / each, gemm_dwords(K, *byte_products()), columns, 4});
    return *byte_products();
  }
  const DType type = check_dense(panels, "panels");
  const Products products = products_of(panels.ndim() == 4);
  if (products == Products::fma) {
    check_shape(panels, "panels", {(rows + each - 1) / each, K, columns});
    if (type == DType::f16) TVM_FFI_THROW(TypeError) << "panels must be float32 or bfloat16; got float16";
    return products;
  }
  check_shape(panels, "panels", {(rows + each - 1) / each, gemm_dwords(K, products), columns, 2});
  check_dtype(panels, "panels", DType::bf16, "");
  return products;
}

Column column_of(const MaybeTensor& t, const char* name) {
  return t.has_value() ? Column{data(t), dtype_of(t.value(), name)} : Column{nullptr, DType::f32};
}

// Like y: as many rows and columns.
int64_t check_like_y(const TensorView& t, const char* name, int64_t rows, int64_t width) {
  const Rows found = rows_of(t, name, width);
  if (found.count != rows || found.transposed)
    TVM_FFI_THROW(ValueError) << name << " must have " << rows << " contiguous rows; got " << shape_text(t);
  return found.stride;
}

// Row stride of a modulation (R, D) or (B, T, D).
int64_t modulation_stride(const TensorView& t, const char* name, int64_t rows, int64_t width) {
  check_cpu(t, name);
  const int n = t.ndim();
  if (n < 1 || t.size(n - 1) != width || t.stride(n - 1) != 1 || (n == 1 ? 1 : n == 2 ? t.size(0) : t.size(0) * t.size(1)) != rows ||
      (n == 3 && t.stride(0) != t.size(1) * t.stride(1)))
    TVM_FFI_THROW(ValueError) << name << " must have " << rows << " rows of " << width << " contiguous numbers; got " << shape_text(t);
  return n == 1 ? 0 : t.stride(n - 2);
}

// panels: w packed, those of int8 with their scale and offset (gemm.h); or w itself (out, in), for one product, by fp32 or
// (pairs) by bf16 products.
void linear(TensorView x, MaybeTensor panels, MaybeTensor w, bool pairs, MaybeTensor column_scale, MaybeTensor column_offset, int64_t N, MaybeTensor bias, TensorView y, int64_t act, bool gated, int64_t join,
            MaybeTensor other, MaybeTensor gate, MaybeTensor before, int64_t norm, MaybeTensor norm_weight,
            MaybeTensor norm_bias, MaybeTensor shift, MaybeTensor scale, double eps, double offset, int64_t tokens) {
  GemmArgs g{};
  const int64_t width = gated ? N / 2 : N;
  g.K = x.ndim() == 0 ? 0 : x.size(x.ndim() - 1);
  g.N = N, g.gated = gated;
  const Rows rows = rows_of(x, "x", g.K);
  g.M = rows.count, g.x_row = rows.stride, g.x_transposed = rows.transposed;
  g.x = {data(x), dtype_of(x, "x")};
  if (panels.has_value()) {
    g.products = check_panels(panels.value(), N, g.K, gated);
    g.panels = data(panels);
    if (g.products == Products::bytes || g.products == Products::byte_tiles) {
      if (!column_scale.has_value() || !column_offset.has_value() || g.x_transposed)
        TVM_FFI_THROW(ValueError) << "panels of int8 need a scale and an offset for each column, and rows of x";
      const int64_t columns = panels.value().size(0) * panels.value().size(2);
      check_shape(column_scale.value(), "column_scale", {columns});
      check_shape(column_offset.value(), "column_offset", {columns});
      check_dense(column_scale.value(), "column_scale"), check_dtype(column_scale.value(), "column_scale", DType::f32, "");
      check_integers(column_offset.value(), "column_offset", kDLInt, 32);
      g.column_scale = data<float>(column_scale), g.column_offset = data<int32_t>(column_offset);
    } else g.panel_type = dtype_of(panels.value(), "panels");
  } else {
    if (!w.has_value()) TVM_FFI_THROW(ValueError) << "panels or w must be given";
    check_shape(w.value(), "w", {N, g.K});
    g.w = weight_of(w.value(), gated);
    g.products = products_of(pairs);
    g.panel_type = pairs ? DType::bf16 : DType::f32;
  }
  if (bias.has_value()) {
    const int64_t columns = gemm_columns(), each = gated ? columns / 2 : columns;
    check_shape(bias.value(), "bias", {(width + each - 1) / each * columns});
    check_dense(bias.value(), "bias"), check_dtype(bias.value(), "bias", DType::f32, "");
    g.bias = data<float>(bias);
  }
  if (act < -1 || act > 3) TVM_FFI_THROW(ValueError) << "act must be -1 .. 3; got " << act;
  if (join < 0 || join > 3) TVM_FFI_THROW(ValueError) << "join must be 0 .. 3; got " << join;
  if ((join != 0) != other.has_value() || (join == 3) != gate.has_value() || (gated && N % 2 != 0))
    TVM_FFI_THROW(ValueError) << "join " << join << " and its operands do not fit together";
  g.act = static_cast<int>(act), g.join = static_cast<Join>(join);
  g.y = {data(y), dtype_of(y, "y")}, g.y_row = check_like_y(y, "y", g.M, width);
  g.other = column_of(other, "other"), g.gate = column_of(gate, "gate"), g.before = column_of(before, "before");
  if (other.has_value()) g.other_row = check_like_y(other.value(), "other", g.M, width);
  if (before.has_value()) {
    g.before_row = check_like_y(before.value(), "before", g.M, N);
    check_dtype(before.value(), "before", g.y.type, " like y");
  }
  const auto images = [&] {
    if (tokens <= 0 || g.M % tokens != 0)
      TVM_FFI_THROW(ValueError) << "tokens must divide the " << g.M << " rows of x; got " << tokens;
    return g.M / tokens;
  };
  if (gate.has_value()) {
    const bool shared = gate.value().ndim() == 1;
    g.gate_row = modulation_stride(gate.value(), "gate", shared ? 1 : images(), width);
    g.gate_tokens = shared ? 0 : tokens;
  }
  if (norm != 0) {
    if (norm < 0 || norm > 2 || g.x_transposed) TVM_FFI_THROW(ValueError) << "norm must be 0 .. 2, of contiguous rows; got " << norm;
    GemmNorm& n = g.norm;
    n.kind = static_cast<int>(norm), n.eps = static_cast<float>(eps), n.offset = static_cast<float>(offset);
    if (g.M > 0) n.tokens = g.M / images();
    n.weight = column_of(norm_weight, "norm_weight"), n.bias = column_of(norm_bias, "norm_bias");
    n.shift = column_of(shift, "shift"), n.scale = column_of(scale, "scale");
    for (const auto& [t, name] : {std::pair{&norm_weight, "norm_weight"}, {&norm_bias, "norm_bias"}})
      if (t->has_value()) check_shape(t->value(), name, {g.K}), check_contiguous(t->value(), name);
    for (const auto& [t, name, row] : {std::tuple{&shift, "shift", &n.shift_row}, {&scale, "scale", &n.scale_row}})
      if (t->has_value()) {
        const TensorView& m = t->value();
        n.per_image = m.ndim() == 2, n.modulated = n.per_image ? tokens : m.ndim() == 3 ? m.size(1) : 0;
        *row = modulation_stride(m, name, n.per_image ? images() : images() * n.modulated, g.K);
      }
  }
  if (g.M == 0 || width == 0) return;
  if (g.K == 0) TVM_FFI_THROW(ValueError) << "x must have columns; got " << shape_text(x);
  int64_t bytes = 0;
  g.threads = omp_get_max_threads();
  g.scratch_bytes = &bytes;
  MF_CALL(gemm, g);
  const ProductScratch scratch(bytes);
  g.scratch = scratch.get();
  MF_CALL(gemm, g);
}

void pack(TensorView w, TensorView panels, bool gated) {
  GemmPackArgs a{};
  a.w = weight_of(w, gated);
  a.products = check_panels(panels, a.w.N, a.w.K, gated);
  if (a.products != Products::fma && a.products != products_of(true))
    TVM_FFI_THROW(TypeError) << "weights of int8 are laid out by the caller";
  a.panels = data(panels), a.panel_type = dtype_of(panels, "panels");
  MF_CALL(gemm_pack, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_columns, mf::gemm_columns);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, mf::linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_pack, mf::pack);
