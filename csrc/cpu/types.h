// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What kernels and their callers share: element types by number, plain pointers. No functions with code in them.
#pragma once

#include <stdint.h>

// Compilers and systems for which the kernels on AMX tiles exist (csrc/cpu/amx.h).
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define MF_AMX_COMPILED 1
#endif

namespace mf {

enum class DType : int { f32, bf16, f16 };

constexpr const char* dtype_name(DType d) {
  return d == DType::f32 ? "float32" : d == DType::bf16 ? "bfloat16" : "float16";
}

// A tensor read or written row by row in its own element type; data == nullptr: absent.
struct Column {
  void* data;
  DType type;
};

// Gradients that are sums over tokens are summed over chunks of this many tokens first, whatever the number of threads,
// and the chunks in order: the result is the same for every number of threads.
constexpr int64_t kChunk = 32;

constexpr int64_t chunks(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// The row of a modulation for a token of an image, -1 for none: one row per image, or one for each of its last `modulated`
// tokens.
constexpr int64_t modulation_row(int64_t image, int64_t token, int64_t tokens, int64_t modulated, bool per_image) {
  if (modulated == 0) return -1;
  if (per_image) return image;
  return token < tokens - modulated ? -1 : image * modulated + token - (tokens - modulated);
}

}  // namespace mf
