// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// ema_update: ema += weight * (param - ema), and cast = param, over many tensors in one call.
//
// table (n, 4) int64: the addresses of ema, param, cast (0: none) and the number of elements of each tensor; all
// tensors of a call have the same three types. The tensors laid end to end are cut into blocks; a thread takes a
// contiguous run of them, so small tensors cost no barrier each. Elementwise, so the same for any number of threads.
// Memory: reads ema and param, writes ema (and cast).

#include "cpu/types.h"

namespace mf {

struct EmaArgs {
  const int64_t* table;
  int64_t tensors;
  float weight;
  DType ema, param, cast;
  bool casts;
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

constexpr int64_t kEmaBlock = 4096;

template <class E, class P, class C, bool CASTS> static void run(const EmaArgs& a) {
  int64_t blocks = 0;
  for (int64_t t = 0; t < a.tensors; ++t) blocks += (a.table[4 * t + 3] + kEmaBlock - 1) / kEmaBlock;
#pragma omp parallel if (blocks * kEmaBlock > kSerial)
  {
    const Share share = my_share(blocks);
    const vf weight = splat(a.weight);
    int64_t tensor = 0, first = 0;  // the tensor that holds the current block, and that tensor's first block
    for (int64_t block = share.begin; block < share.end; ++block) {
      int64_t count = a.table[4 * tensor + 3];
      while (block - first >= (count + kEmaBlock - 1) / kEmaBlock) {
        first += (count + kEmaBlock - 1) / kEmaBlock;
        count = a.table[4 * ++tensor + 3];
      }
      const int64_t start = (block - first) * kEmaBlock;
      E* e = (E*)a.table[4 * tensor] + start;
      const P* p = (const P*)a.table[4 * tensor + 1] + start;
      C* c = (C*)a.table[4 * tensor + 2] + start;
      each(count - start < kEmaBlock ? count - start : kEmaBlock, [&](int64_t i, auto k) {
        const vf value = load(p + i, k), old = load(e + i, k);
        store(e + i, old + weight * (value - old), k);
        if (CASTS) store(c + i, value, k);
      });
    }
  }
}

void ema_update(const EmaArgs& a) {
  with_type(a.ema, [&](auto e) {
    with_type(a.param, [&](auto p) {
      if (!a.casts) run<decltype(e), decltype(p), float, false>(a);
      else with_type(a.cast, [&](auto c) { run<decltype(e), decltype(p), decltype(c), true>(a); });
    });
  });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(ema_update, EmaArgs)

namespace mf {
namespace {

void update(TensorView table, double weight, int64_t ema, int64_t param, int64_t cast) {
  check_ndim(table, "table", 2, "(tensors, 4)");
  check_shape(table, "table", {table.size(0), 4});
  check_addresses(table, "table");
  EmaArgs a{data<const int64_t>(table), table.size(0), static_cast<float>(weight), dtype_code(ema, "ema"),
            dtype_code(param, "param"), DType::f32, cast >= 0};
  if (a.casts) a.cast = dtype_code(cast, "cast");
  for (int64_t t = 0; t < a.tensors; ++t)
    if (a.table[4 * t] == 0 || a.table[4 * t + 1] == 0 || (a.casts && a.table[4 * t + 2] == 0))
      TVM_FFI_THROW(ValueError) << "row " << t << " of the table has no address";
  MF_CALL(ema_update, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(ema_update, mf::update);
#endif
