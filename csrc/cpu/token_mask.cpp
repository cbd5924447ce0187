// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Token masks from counters: Philox4x32-10 (Salmon et al. 2011), the smallest `count` keys of an image, and the indices
// of what stays visible. The drawing of the counters is in kernels/token_mask.py; every number here is an integer.
//
// The threshold below which just `count` keys lie is found bit by bit, 32 passes over keys that lie in L1: for 1024
// tokens a microsecond where sorting takes fifty.

#include "cpu/types.h"

namespace mf {

struct MaskArgs {
  uint64_t seed, step;
  const void* count;  // (B,) int32 or int64
  bool count64;
  uint8_t* out;  // (B, N) bool
  int64_t B, N, first_image;
  uint32_t* keys;  // per thread `stride`
  int64_t stride;
};

struct CountArgs {
  uint64_t seed, step;
  const int64_t* table;  // (K,)
  int32_t* out;          // (B,)
  int64_t B, K, base, first_image;
  bool per_image;
};

struct VisibleArgs {
  const uint8_t* mask;  // (B, N)
  int64_t* out;         // (B, K)
  int64_t B, N, K;
};

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// Four words of each of `n` <= kBlock counters (first + i, c1, step) under the key, words[4 * i + w].
constexpr int kBlock = 32;
MF_INLINE void philox(uint32_t first, uint32_t c1, uint64_t step, uint64_t seed, uint32_t* words, int n) {
  uint32_t x0[kBlock], x1[kBlock], x2[kBlock], x3[kBlock];
  for (int i = 0; i < kBlock; ++i) x0[i] = first + i, x1[i] = c1, x2[i] = (uint32_t)step, x3[i] = step >> 32;
  uint32_t k0 = (uint32_t)seed, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlock; ++i) {
      const uint64_t p0 = (uint64_t)x0[i] * 0xD2511F53u, p1 = (uint64_t)x2[i] * 0xCD9E8D57u;
      x0[i] = (uint32_t)(p1 >> 32) ^ x1[i] ^ k0;
      x1[i] = (uint32_t)p1;
      x2[i] = (uint32_t)(p0 >> 32) ^ x3[i] ^ k1;
      x3[i] = (uint32_t)p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < n; ++i) {
    words[4 * i] = x0[i];
    words[4 * i + 1] = x1[i];
    words[4 * i + 2] = x2[i];
    words[4 * i + 3] = x3[i];
  }
}

// How many of n keys (a multiple of 2 W) are below the limit.
MF_INLINE int64_t count_below(const uint32_t* keys, int64_t n, uint32_t limit) {
  vi s0 = {}, s1 = {};
  const vu bound = splat_u(limit);
  for (int64_t i = 0; i < n; i += 2 * W) {
    vu a, b;
    memcpy(&a, keys + i, sizeof a);
    memcpy(&b, keys + i + W, sizeof b);
    s0 += (vi)(a < bound);
    s1 += (vi)(b < bound);
  }
  s0 += s1;
  int64_t total = 0;
  for (int i = 0; i < W; ++i) total -= s0[i];
  return total;
}

void random_mask(const MaskArgs& a) {
#pragma omp parallel if (a.B * a.N > kSerial)
  {
    uint32_t* keys = a.keys + omp_get_thread_num() * a.stride;
    const int64_t blocks = (a.N + 3) / 4, padded = (a.N + 2 * W - 1) / (2 * W) * (2 * W);
    const Share share = my_share(a.B);
    for (int64_t b = share.begin; b < share.end; ++b) {
      for (int64_t c = 0; c < blocks; c += kBlock)
        philox((uint32_t)c, (uint32_t)(a.first_image + b), a.step, a.seed, keys + 4 * c,
               (int)(blocks - c < kBlock ? blocks - c : kBlock));
      for (int64_t n = a.N; n < padded; ++n) keys[n] = 0xffffffffu;  // below no threshold
      const int64_t count = a.count64 ? ((const int64_t*)a.count)[b] : ((const int32_t*)a.count)[b];
      uint32_t threshold = 0;
      int64_t below = 0;
      for (int bit = 31; bit >= 0; --bit) {
        const uint32_t candidate = threshold | 1u << bit;
        const int64_t found = count_below(keys, padded, candidate);
        if (found <= count) threshold = candidate, below = found;
      }
      int64_t missing = count - below;  // of the keys equal to the threshold the first ones
      uint8_t* out = a.out + b * a.N;
      for (int64_t n = 0; n < a.N; ++n) out[n] = keys[n] < threshold;
      for (int64_t n = 0; n < a.N && missing > 0; ++n)
        if (keys[n] == threshold) out[n] = 1, --missing;
    }
  }
}

void mask_counts(const CountArgs& a) {
  for (int64_t b = 0; b < a.B; ++b) {
    if (b > 0 && !a.per_image) {
      a.out[b] = a.out[0];
      continue;
    }
    uint32_t words[4];
    philox(a.per_image ? 0xfffffffeu : 0xffffffffu, a.per_image ? (uint32_t)(a.first_image + b) : 0, a.step, a.seed,
           words, 1);
    const int64_t uniform = (int64_t)(words[0] >> 5) << 26 | words[1] >> 6;
    int64_t count = a.base;
    for (int64_t k = 0; k < a.K; ++k) count += a.table[k] < uniform;
    a.out[b] = (int32_t)count;
  }
}

void visible_index(const VisibleArgs& a) {
#pragma omp parallel if (a.B * a.N > kSerial)
  {
    const Share share = my_share(a.B);
    for (int64_t b = share.begin; b < share.end; ++b) {
      const uint8_t* mask = a.mask + b * a.N;
      int64_t *out = a.out + b * a.K, at = 0;
      for (int pass = 0; pass < 2; ++pass)  // the masked ones only where the visible do not fill the row
        for (int64_t n = 0; n < a.N && at < a.K; ++n) {
          out[at] = n;
          at += mask[n] == pass;
        }
    }
  }
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"
#include "cpu/integers.h"

MF_DECLARE(random_mask, MaskArgs)
MF_DECLARE(mask_counts, CountArgs)
MF_DECLARE(visible_index, VisibleArgs)

namespace mf {
namespace {

void read_seed(const TensorView& seed, uint64_t& first, uint64_t& step) {
  check_shape(seed, "seed", {2});
  check_integers(seed, "seed", kDLInt, 64);
  first = data<uint64_t>(seed)[0];
  step = data<uint64_t>(seed)[1];
}

void mask(TensorView seed, TensorView count, TensorView out, int64_t first_image) {
  MaskArgs a{};
  read_seed(seed, a.seed, a.step);
  check_ndim(out, "out", 2, "(B, N)");
  check_integers(out, "out", kDLBool, 8);
  a.B = out.size(0), a.N = out.size(1), a.first_image = first_image;
  check_shape(count, "count", {a.B});
  a.count64 = check_integers(count, "count", kDLInt, 32, 64) == 64;
  a.count = data(count);
  a.out = data<uint8_t>(out);
  if (out.numel() == 0) return;
  a.stride = (a.N + 63) / 64 * 64;  // whole vectors of every instruction set
  Scratch keys(omp_get_max_threads() * a.stride);
  a.keys = reinterpret_cast<uint32_t*>(keys.get());
  MF_CALL(random_mask, a);
}

void counts(TensorView seed, TensorView table, TensorView out, int64_t base, int64_t first_image, int64_t per_image) {
  CountArgs a{};
  read_seed(seed, a.seed, a.step);
  check_ndim(table, "table", 1, "(K,)");
  check_integers(table, "table", kDLInt, 64);
  check_ndim(out, "out", 1, "(B,)");
  check_integers(out, "out", kDLInt, 32);
  a.table = data<int64_t>(table);
  a.out = data<int32_t>(out);
  a.B = out.size(0), a.K = table.size(0), a.base = base, a.first_image = first_image, a.per_image = per_image != 0;
  MF_CALL(mask_counts, a);
}

void visible(TensorView mask, TensorView out) {
  check_ndim(mask, "mask", 2, "(B, N)");
  check_integers(mask, "mask", kDLBool, 8);
  check_ndim(out, "out", 2, "(B, K)");
  check_integers(out, "out", kDLInt, 64);
  if (out.size(0) != mask.size(0) || out.size(1) > mask.size(1))
    TVM_FFI_THROW(ValueError) << "out must be (B, K <= N) for mask " << shape_text(mask) << "; got " << shape_text(out);
  VisibleArgs a{data<uint8_t>(mask), data<int64_t>(out), mask.size(0), mask.size(1), out.size(1)};
  MF_CALL(visible_index, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(random_mask, mf::mask);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mask_counts, mf::counts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(visible_index, mf::visible);
#endif
