// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// A block's walk over a stretch of a tensor: 16-byte packs between the first and the last aligned address, single
// elements at the ends.
#pragma once

#include "cuda/device.cuh"

namespace mf {

template <int N> struct Lanes { static constexpr int count = N; };

// Whether packs of a tensor at p start at multiples of Pack<T>::size elements.
template <class T> inline bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f(i, Lanes<N>{}) for the elements [i, i + N) of [begin, end), each once, over the threads of the block. Indices
// count from the tensors' starts; packed: these are 16-byte aligned.
template <class T, class F> __device__ __forceinline__ void each(int64_t begin, int64_t end, bool packed, F f) {
  constexpr int N = Pack<T>::size;
  const int64_t first = packed ? (begin + N - 1) / N * N : end, last = packed ? end / N * N : end;
  if (first >= last) {
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) f(i, Lanes<1>{});
    return;
  }
  if (begin + threadIdx.x < first) f(begin + threadIdx.x, Lanes<1>{});
  for (int64_t i = first + (int64_t)threadIdx.x * N; i < last; i += (int64_t)blockDim.x * N) f(i, Lanes<N>{});
  if (last + threadIdx.x < end) f(last + threadIdx.x, Lanes<1>{});
}

template <class T, int N> __device__ __forceinline__ void load(const T* p, float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = to_float(*p);
  } else {
    const Pack<T> pack = load_pack(p);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = to_float(pack.at[j]);
  }
}

template <class T, int N> __device__ __forceinline__ void store(T* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(v[0]);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.at[j] = from_float<T>(v[j]);
    store_pack(p, pack);
  }
}

}  // namespace mf
