// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// fp32 vectors of the width that this translation unit is compiled for, and loads and stores of fp32, bf16 and fp16
// through them. bf16 and fp16 stores round to nearest even.
//
//     avx512, avx512bf16 (x86-64-v4): 16 lanes    avx2 (x86-64-v3, with F16C): 8    x86-64-v2, NEON, anything else: 4
//
// Everything is in namespace mf::MF_VARIANT and inlined, so that no code of one instruction set can be linked into another.
#pragma once

#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(MF_X86)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/types.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define MF_INLINE static inline __attribute__((always_inline))

namespace mf {
namespace MF_VARIANT {

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MF_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__F16C__)
#define MF_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

MF_INLINE vf splat(float a) { return a - (vf){}; }
MF_INLINE vu splat_u(uint32_t a) { return a - (vu){}; }

// a * b + c, rounded once; x86-64-v2 has no such instruction and rounds twice. The compiler makes none on its own
// (setup.py: -ffp-contract=off), so that a formula gives the same bits in every kernel of an instruction set: for
// polynomials and for the exact remainder of a product.
MF_INLINE vf fma(vf a, vf b, vf c) {
#if defined(MF_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MF_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger of each lane; b where one of them is NaN.
MF_INLINE vf larger(vf a, vf b) {
#if defined(MF_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(MF_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The square root of each lane.
MF_INLINE vf root(vf v) {
#if defined(MF_AVX512)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(MF_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// ---- conversions ---------------------------------------------------------------------------------------------------

MF_INLINE vu widen(vh h) {
#if defined(MF_AVX512)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);  // gcc 12 makes five shuffles of the general form
#elif defined(MF_AVX2)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
MF_INLINE vh narrow(vu u) {
#if defined(MF_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(MF_AVX2)
  __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(u, vh);
#endif
}

MF_INLINE vf to_float(vh h, bf16) { return (vf)(widen(h) << 16); }

MF_INLINE vh from_float(vf v, bf16) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);  // as below, but subnormals (below 2^-126) become zero
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return narrow(v == v ? rounded : splat_u(0x7fc0u));  // a NaN may not round up to infinity
#endif
}

MF_INLINE vf to_float(vh h, f16) {
#if defined(MF_AVX512)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(MF_AVX2)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vu u = widen(h), sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13;
  vf scaled = (vf)magnitude * splat(0x1p112f);  // moves the exponent's bias, exact for subnormals too
  vu special = magnitude | 0x7f800000u;         // infinity and NaN
  return (vf)(sign | (magnitude >= 0x0f800000u ? special : (vu)scaled));
#endif
}

MF_INLINE vh from_float(vf v, f16) {
#if defined(MF_AVX512)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MF_AVX2)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vu u = (vu)v, sign = (u >> 16) & 0x8000u, x = u & 0x7fffffffu;
  vu special = x > 0x7f800000u ? splat_u(0x7e00u) : splat_u(0x7c00u);
  vu subnormal = (vu)((vf)x + splat(0.5f)) - 0x3f000000u;  // the adder rounds at 2^-24, fp16's last place
  vu normal = (x + 0xc8000fffu + ((x >> 13) & 1u)) >> 13;
  vu finite = x < 0x38800000u ? subnormal : normal;
  return narrow(sign | (x >= 0x47800000u ? special : finite));
#endif
}

// ---- loads and stores: a full vector, or the first n < W lanes (the others read as zero) ------------------------------

struct Full {};
struct Part { int n; };

MF_INLINE vf load(const float* p, Full) { vf v; memcpy(&v, p, sizeof v); return v; }
MF_INLINE void store(float* p, vf v, Full) { memcpy(p, &v, sizeof v); }
template <class H> MF_INLINE vf load(const H* p, Full) { vh h; memcpy(&h, p, sizeof h); return to_float(h, H{}); }
template <class H> MF_INLINE void store(H* p, vf v, Full) { vh h = from_float(v, H{}); memcpy(p, &h, sizeof h); }

#ifdef MF_AVX512
MF_INLINE __mmask16 mask(Part k) { return (__mmask16)((1u << k.n) - 1u); }
MF_INLINE vf load(const float* p, Part k) { return (vf)_mm512_maskz_loadu_ps(mask(k), p); }
MF_INLINE void store(float* p, vf v, Part k) { _mm512_mask_storeu_ps(p, mask(k), (__m512)v); }
template <class H> MF_INLINE vf load(const H* p, Part k) {
  return to_float((vh)_mm256_maskz_loadu_epi16(mask(k), p), H{});
}
template <class H> MF_INLINE void store(H* p, vf v, Part k) {
  _mm256_mask_storeu_epi16(p, mask(k), (__m256i)from_float(v, H{}));
}
#else
template <class T> MF_INLINE vf load(const T* p, Part k) {
  T lanes[W] = {};
  for (int i = 0; i < k.n; ++i) lanes[i] = p[i];
  return load(lanes, Full{});
}
template <class T> MF_INLINE void store(T* p, vf v, Part k) {
  T lanes[W];
  store(lanes, v, Full{});
  for (int i = 0; i < k.n; ++i) p[i] = lanes[i];
}
#endif

// What a value of type T is after a store and a load, and a store that returns it.
MF_INLINE vf rounded(vf v, float) { return v; }
template <class H> MF_INLINE vf rounded(vf v, H) { return to_float(from_float(v, H{}), H{}); }
MF_INLINE vf store_rounded(float* p, vf v, Full k) { store(p, v, k); return v; }
MF_INLINE vf store_rounded(float* p, vf v, Part k) { store(p, v, k); return v; }
template <class H> MF_INLINE vf store_rounded(H* p, vf v, Full) {
  vh h = from_float(v, H{});
  memcpy(p, &h, sizeof h);
  return to_float(h, H{});
}
template <class H> MF_INLINE vf store_rounded(H* p, vf v, Part k) {
  store(p, v, k);
  return load(p, k);
}

// f(i, Full{}) for every whole vector of n elements, then f(i, Part{rest}).
template <class F> MF_INLINE void each(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Part{(int)(n - i)});
}

// ---- lanes ------------------------------------------------------------------------------------------------------------

MF_INLINE float sum(vf v) {
#if defined(MF_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[W];
  memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Sum over the row of f(i, k), in four independent accumulators to hide the adder's latency.
template <class F> MF_INLINE float row_sum(int64_t n, F f) {
  vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += f(i, Full{});
    s1 += f(i + W, Full{});
    s2 += f(i + 2 * W, Full{});
    s3 += f(i + 3 * W, Full{});
  }
  for (; i + W <= n; i += W) s0 += f(i, Full{});
  if (i < n) s1 += f(i, Part{(int)(n - i)});
  return sum((s0 + s1) + (s2 + s3));
}

// Sets the lanes from k on to zero (a subtraction has made them non-zero).
MF_INLINE vf keep(vf v, Full) { return v; }
MF_INLINE vf keep(vf v, Part k) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < k.n ? v : (vf){};
}

// (a0, a1, a2, a3, ...) -> (a1, a0, a3, a2, ...)
MF_INLINE vf swap_pairs(vf v) {
#if defined(MF_AVX512)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(MF_AVX2)
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#elif defined(__clang__)
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#else
  return __builtin_shuffle(v, (vi){1, 0, 3, 2});
#endif
}

// W/2 floats at p, each twice: (c0, c0, c1, c1, ...)
MF_INLINE vf load_twice(const float* p, Full) {
#if defined(MF_AVX512)
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (vf)_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
#elif defined(MF_AVX2)
  const __m256i twice = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return (vf)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), twice);
#else
  return (vf){p[0], p[0], p[1], p[1]};
#endif
}
MF_INLINE vf load_twice(const float* p, Part k) {
#if defined(MF_AVX512)
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (vf)_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_maskz_loadu_ps((__mmask8)mask(Part{k.n / 2}), p)));
#else
  float half[W / 2] = {};
  for (int i = 0; i < k.n / 2; ++i) half[i] = p[i];
  return load_twice(half, Full{});
#endif
}

// (-1, 1, -1, 1, ...)
MF_INLINE vf alternating() {
  vf v;
  for (int i = 0; i < W; ++i) v[i] = i % 2 ? 1.0f : -1.0f;
  return v;
}

#ifdef MF_AVX2
// 8 x 8 dwords, transposed.
MF_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

#ifdef MF_AVX512
// 16 x 16 dwords, transposed.
MF_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + j] holds, in its lane l, column 4 l + j of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// ---- element type and rows ----------------------------------------------------------------------------------------------

template <class F> MF_INLINE void with_type(DType t, F f) {
  if (t == DType::f32) f(float{});
  else if (t == DType::bf16) f(bf16{});
  else f(f16{});
}

// Row `row` of length n at p as fp32: p itself when it is fp32, else converted into buffer. Null stays null.
MF_INLINE const float* float_row(Column p, int64_t row, int64_t n, float* buffer) {
  if (p.data == nullptr) return nullptr;
  if (p.type == DType::f32) return (const float*)p.data + row * n;
  with_type(p.type, [&](auto t) {
    const auto* source = (const decltype(t)*)p.data + row * n;
    each(n, [&](int64_t i, auto k) { store(buffer + i, load(source + i, k), k); });
  });
  return buffer;
}

// Lanes [i, i + k) of fp32 `v` to row `row` of p, in p's type.
template <class K> MF_INLINE void store_row(Column p, int64_t row, int64_t n, int64_t i, vf v, K k) {
  if (p.data == nullptr) return;
  with_type(p.type, [&](auto t) { store((decltype(t)*)p.data + row * n + i, v, k); });
}

// Row `row` of p, to be touched ahead of its use: a pass that computes in L1 has the memory to itself. An absent p is a
// line that is there anyway.
struct Ahead {
  const char* start;
  int64_t step;
  static inline __attribute__((always_inline)) Ahead of(Column p, int64_t row, int64_t n, const void* absent) {
    const int64_t size = p.type == DType::f32 ? 4 : 2;
    if (p.data == nullptr) return {(const char*)absent, 0};
    return {(const char*)p.data + row * n * size, size};
  }
  inline __attribute__((always_inline)) void touch(int64_t i) const { __builtin_prefetch(start + i * step); }
};

// The share [begin, end) of `count` items that belongs to this thread of the team.
struct Share { int64_t begin, end; };
MF_INLINE Share my_share(int64_t count) {
  const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
  return {count * me / threads, count * (me + 1) / threads};
}

// Below this many elements a team of threads costs more than it saves (about 3 us to wake it).
constexpr int64_t kSerial = 16384;

}  // namespace MF_VARIANT
}  // namespace mf
