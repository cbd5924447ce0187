// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// gemm_pack: a weight into the panels that gemm.cpp multiplies by, once per model: one pass over w, 1 / M of the product's
// own work.

#include "cpu/gemm.h"

#ifdef MF_VARIANT
#include "cpu/gemm_columns.h"

namespace mf {
namespace MF_VARIANT {

template <bool PAIRS, class O> static void pack(const GemmPackArgs& a) {
  const int64_t dwords = gemm_dwords(a.w.K, a.products);
  const int64_t width = a.w.gated ? a.w.N / 2 : a.w.N, each = a.w.gated ? W : NR, panels = (width + each - 1) / each;
#pragma omp parallel for
  for (int64_t i = 0; i < 2 * panels; ++i)
    pack_half<PAIRS>(a.w, i / 2, i % 2 * W, 0, dwords, (O*)a.panels + i / 2 * dwords * NR * (PAIRS ? 2 : 1));
}

void gemm_pack(const GemmPackArgs& a) {
#ifdef __AVX512BF16__
  if (a.products != Products::fma) return pack<true, bf16>(a);
#endif
  if (a.panel_type == DType::f32) pack<false, float>(a);
  else pack<false, bf16>(a);
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif
