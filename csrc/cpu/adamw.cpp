// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// adamw_step: one step of AdamW, the average of the parameters and their low-precision copy, over many tensors in one
// call.
//
//     m += (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2      g: the gradient times `scale`
//     p -= rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps) + rate weight_decay p
//     average += weight (p - average)      cast = p      p: as it was stored
//
// table (n, 8) int64: the addresses of p, m, v, average, cast (0: none), the number of elements, the address of the
// tensor's step count (fp32, one element, counted up here), the bits of its weight_decay (a double). gradients (n,)
// int64: their addresses. m and v are fp32; p, g, average and cast each of one type in a call.
//
// Memory: reads p, g, m, v, average and writes all but g, once: 36 bytes a parameter in fp32. The average and the copy
// take p from L1, kTile elements after it was written: that costs nothing beside the memory, and spares a kernel for
// each of 144 combinations of types. Each stream is touched kAhead elements before it is read: the processor's own
// prefetcher stops at the end of a page, and without it this pass takes 1.1 to 1.2 times as long (two cores of an Emerald
// Rapids, 25 to 34 million parameters). Stores past the cache lose by 1.3: the lines that they write have been read.
// Elementwise, so the same for any number of threads.

#include "cpu/types.h"

namespace mf {

// What depends on the tensor: rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), rate * weight_decay.
struct AdamwNumbers {
  float rate, root, decay;
};

struct AdamwArgs {
  const int64_t* table;
  const int64_t* gradients;
  const AdamwNumbers* numbers;
  int64_t tensors;
  float rest1, beta2, rest2, eps, weight, scale;
  DType param, gradient, average, cast;
  bool averages, casts;
};

constexpr int64_t kAdamwColumns = 8;

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

constexpr int64_t kBlock = 4096, kTile = 512;  // a tile's five streams are 10 KB of L1
constexpr int64_t kAhead = 2048;               // elements

template <class P, class G>
static void step_tile(const AdamwArgs& a, const AdamwNumbers& numbers, P* p, const G* g, float* m, float* v, int64_t n) {
  const vf rest1 = splat(a.rest1), beta2 = splat(a.beta2), rest2 = splat(a.rest2), eps = splat(a.eps);
  const vf rate = splat(numbers.rate), inverse = splat(numbers.root), decay = splat(numbers.decay), scale = splat(a.scale);
  each(n, [&](int64_t i, auto k) {
    __builtin_prefetch(p + i + kAhead);
    __builtin_prefetch(g + i + kAhead);
    __builtin_prefetch(m + i + kAhead);
    __builtin_prefetch(v + i + kAhead);
    const vf gradient = load(g + i, k) * scale, value = load(p + i, k);
    vf first = load(m + i, k), second = load(v + i, k);
    first += rest1 * (gradient - first);
    second = beta2 * second + rest2 * (gradient * gradient);
    store(m + i, first, k);
    store(v + i, second, k);
    store(p + i, value - (rate * first / (root(second) * inverse + eps) + decay * value), k);
  });
}

template <class P, class E> static void average_tile(const P* p, E* e, float by, int64_t n) {
  const vf weight = splat(by);
  each(n, [&](int64_t i, auto k) {
    __builtin_prefetch(e + i + kAhead);
    const vf old = load(e + i, k);
    store(e + i, old + weight * (load(p + i, k) - old), k);
  });
}

template <class P, class C> static void cast_tile(const P* p, C* c, int64_t n) {
  each(n, [&](int64_t i, auto k) {
    __builtin_prefetch(c + i + kAhead);
    store(c + i, load(p + i, k), k);
  });
}

template <class P, class G>
static void step_block(const AdamwArgs& a, const AdamwNumbers& numbers, const int64_t* row, const G* g, int64_t start,
                       int64_t count) {
  for (int64_t at = start; at < start + count; at += kTile) {
    const int64_t n = start + count - at < kTile ? start + count - at : kTile;
    P* p = (P*)row[0] + at;
    step_tile(a, numbers, p, g + at, (float*)row[1] + at, (float*)row[2] + at, n);
    if (a.averages) with_type(a.average, [&](auto e) { average_tile(p, (decltype(e)*)row[3] + at, a.weight, n); });
    if (a.casts) with_type(a.cast, [&](auto c) { cast_tile(p, (decltype(c)*)row[4] + at, n); });
  }
}

template <class P, class G> static void run(const AdamwArgs& a) {
  const auto blocks_of = [&](int64_t t) { return (a.table[kAdamwColumns * t + 5] + kBlock - 1) / kBlock; };
  int64_t blocks = 0;
  for (int64_t t = 0; t < a.tensors; ++t) blocks += blocks_of(t);
#pragma omp parallel if (blocks * kBlock > kSerial)
  {
    const Share share = my_share(blocks);
    int64_t tensor = 0, first = 0;  // the tensor that holds the current block, and that tensor's first block
    for (int64_t block = share.begin; block < share.end; ++block) {
      while (block - first >= blocks_of(tensor)) first += blocks_of(tensor++);
      const int64_t* row = a.table + kAdamwColumns * tensor;
      const int64_t start = (block - first) * kBlock, rest = row[5] - start;
      step_block<P>(a, a.numbers[tensor], row, (const G*)a.gradients[tensor], start, rest < kBlock ? rest : kBlock);
    }
  }
}

void adamw_step(const AdamwArgs& a) {
  with_type(a.param, [&](auto p) {
    with_type(a.gradient, [&](auto g) { run<decltype(p), decltype(g)>(a); });
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include <cmath>
#include <vector>

#include "common.h"

MF_DECLARE(adamw_step, AdamwArgs)

namespace mf {
namespace {

// weight: 1 - decay of the average. scale: of the gradients. average, cast: -1 for none.
void step(TensorView table, TensorView gradients, double rate, double beta1, double beta2, double eps, double weight,
          double scale, int64_t param, int64_t gradient, int64_t average, int64_t cast) {
  check_ndim(table, "table", 2, "(tensors, 8)");
  check_shape(table, "table", {table.size(0), kAdamwColumns});
  check_addresses(table, "table");
  check_shape(gradients, "gradients", {table.size(0)});
  check_addresses(gradients, "gradients");
  AdamwArgs a{data<const int64_t>(table),
              data<const int64_t>(gradients),
              nullptr,
              table.size(0),
              static_cast<float>(1 - beta1),
              static_cast<float>(beta2),
              static_cast<float>(1 - beta2),
              static_cast<float>(eps),
              static_cast<float>(weight),
              static_cast<float>(scale),
              dtype_code(param, "param"),
              dtype_code(gradient, "gradient"),
              DType::f32,
              DType::f32,
              average >= 0,
              cast >= 0};
  if (a.averages) a.average = dtype_code(average, "average");
  if (a.casts) a.cast = dtype_code(cast, "cast");
  for (int64_t t = 0; t < a.tensors; ++t) {
    const int64_t* row = a.table + kAdamwColumns * t;
    const bool filled = row[0] && row[1] && row[2] && a.gradients[t] && (row[3] || !a.averages) && (row[4] || !a.casts);
    if (row[6] == 0 || (row[5] > 0 && !filled))
      TVM_FFI_THROW(ValueError) << "row " << t << " of the table has no address";
  }
  std::vector<AdamwNumbers> numbers(static_cast<size_t>(a.tensors));
  for (int64_t t = 0; t < a.tensors; ++t) {
    const int64_t* row = a.table + kAdamwColumns * t;
    double decay;
    memcpy(&decay, &row[7], sizeof decay);
    float* count = reinterpret_cast<float*>(row[6]);
    *count += 1.0f;
    numbers[static_cast<size_t>(t)] = {static_cast<float>(rate / (1 - std::pow(beta1, *count))),
                                       static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, *count))),
                                       static_cast<float>(rate * decay)};
  }
  a.numbers = numbers.data();
  MF_CALL(adamw_step, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(adamw_step, mf::step);
#endif
