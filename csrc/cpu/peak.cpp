// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// peak: multiply-adds of registers on every thread, nothing loaded and nothing stored: the rate that a product of matrices
// may reach on this processor, for benchmarks to hold theirs against.
//
// kind 0: fp32. kind 1: pairs of bf16, on tiles or vectors of AVX512_BF16 where there are some, else fp32 too. kind 2: bytes,
// where there are such products, else fp32.

#include "cpu/gemm.h"

namespace mf {

struct PeakArgs {
  int64_t steps;     // rounds of one multiply-add for each sum that a thread keeps
  Products products;
  int threads;
  double* operations;  // a multiply and an add counted apart; what one round of one thread is
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/gemm_kernels.h"

namespace mf {
namespace MF_VARIANT {

template <class E> static void vectors(const PeakArgs& a) {
  constexpr int SUMS = W == 16 ? 24 : 12;  // enough to hide the latency of two units, few enough for the registers
  *a.operations = 2.0 * SUMS * W * E::step;
#pragma omp parallel num_threads(a.threads)
  {
    vf sums[SUMS], x = splat(1.0f), y = splat(0.5f);
    for (int s = 0; s < SUMS; ++s) sums[s] = splat((float)s);  // equal ones would be computed once
    for (int64_t i = 0; i < a.steps; ++i) {
#pragma GCC unroll 24
      for (int s = 0; s < SUMS; ++s) sums[s] = E::add(sums[s], x, y);
#ifdef MF_X86
      asm volatile("" : "+x"(x), "+x"(y));
#endif
    }
    vf total = sums[0];
    for (int s = 1; s < SUMS; ++s) total += sums[s];
    const float kept = sum(total);
    asm volatile("" ::"m"(kept));
  }
}

#ifdef MF_HAS_AMX
template <bool BYTES> MF_AMX static void one_thread_of_tiles(int64_t steps) {
  alignas(64) char ones[TILE] = {};
  const Tiles configured;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_loadd(4, ones, 64); _tile_loadd(5, ones, 64); _tile_loadd(6, ones, 64); _tile_loadd(7, ones, 64);
  for (int64_t i = 0; i < steps; ++i) {
    MF_MULTIPLY(0, 4, 6);
    MF_MULTIPLY(1, 4, 7);
    MF_MULTIPLY(2, 5, 6);
    MF_MULTIPLY(3, 5, 7);
  }
}

template <bool BYTES> static void tiles(const PeakArgs& a) {
  *a.operations = 4.0 * 2 * 16 * 16 * (BYTES ? 64 : 32);
#pragma omp parallel num_threads(a.threads)
  one_thread_of_tiles<BYTES>(a.steps);
}
#endif

void peak(const PeakArgs& a) {
#ifdef __AVX512BF16__
#ifdef MF_HAS_AMX
  if (a.products == Products::tiles) return tiles<false>(a);
  if (a.products == Products::byte_tiles) return tiles<true>(a);
#endif
  if (a.products == Products::dot) return vectors<Dot>(a);
#endif
#ifdef MF_HAS_BYTES
  if (a.products == Products::bytes) return vectors<Bytes>(a);
#endif
  vectors<Fma>(a);
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(peak, PeakArgs)

namespace mf {
namespace {

// Operations done in `steps` rounds on all threads of the pool.
double run_peak(int64_t kind, int64_t steps) {
  Products products = Products::fma;
  if (kind == 1) products = pair_products().value_or(products);
  if (kind == 2) products = byte_products().value_or(products);
  double one = 0.0;
  const PeakArgs a{steps, products, omp_get_max_threads(), &one};
  MF_CALL(peak, a);
  return one * static_cast<double>(steps) * a.threads;
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(peak, mf::run_peak);
#endif
