// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The host side of every op: argument checks, dtypes, and the choice of the instruction set. Needs no torch.
//
// Each csrc/cpu/<op>.cpp is compiled several times: once per instruction set with MF_VARIANT=<name>, which yields the
// kernels in namespace mf::<name> (they include cpu/simd.h only), and once with MF_HOST, which yields the checks and
// exports below. What has no kernels lies in csrc/cpu/host/ and is compiled once. Kernels take plain structs of pointers
// and sizes, so that nothing of the C++ library is instantiated with AVX-512 and then picked by the linker for everybody.
//
// Errors become Python ValueError / TypeError naming the argument, what was expected and what came.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>

#include "cpu/types.h"

namespace mf {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;
using MaybeTensor = Optional<TensorView>;

// ---- instruction set (cpu/host/processor.cpp) --------------------------------------------------------------------

// Each has all of those before it; amx runs avx512bf16's kernels and, where there are such, those on tiles.
enum class Variant { none, generic, v2, avx2, avx512, avx512bf16, amx };

const char* variant_name(Variant v);
Variant variant();  // the one that calls use: the processor's own, or a lesser one that cpu_limit has set

// Products of pairs of bf16 and of bytes in the instruction set in use, if there are such.
enum class Products : int;
std::optional<Products> pair_products();
std::optional<Products> byte_products();

// MF_CALL(adaln_fwd, args): the kernel of the instruction set in use.
#if defined(MF_EMULATED_TILES)  // tests/emulate_tiles.py
#define MF_DECLARE(FN, ARGS) \
  namespace mf::avx512bf16 { void FN(const ARGS&); }
#define MF_CALL(FN, args) ::mf::avx512bf16::FN(args);
#elif defined(MF_X86)
#define MF_DECLARE(FN, ARGS)                     \
  namespace mf::v2 { void FN(const ARGS&); }     \
  namespace mf::avx2 { void FN(const ARGS&); }   \
  namespace mf::avx512 { void FN(const ARGS&); } \
  namespace mf::avx512bf16 { void FN(const ARGS&); }
#define MF_CALL(FN, args)                                                                             \
  switch (::mf::variant()) {                                                                          \
    case ::mf::Variant::amx:                                                                          \
    case ::mf::Variant::avx512bf16: ::mf::avx512bf16::FN(args); break;                                \
    case ::mf::Variant::avx512: ::mf::avx512::FN(args); break;                                        \
    case ::mf::Variant::avx2: ::mf::avx2::FN(args); break;                                            \
    case ::mf::Variant::v2: ::mf::v2::FN(args); break;                                                \
    default: TVM_FFI_THROW(RuntimeError) << "the native kernels need an x86-64-v2 processor (SSE4.2)"; \
  }
#else
#define MF_DECLARE(FN, ARGS) \
  namespace mf::generic { void FN(const ARGS&); }
#define MF_CALL(FN, args) ::mf::generic::FN(args)
#endif

// ---- checks ------------------------------------------------------------------------------------------------------

inline std::string shape_text(const TensorView& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

inline DType dtype_of(const TensorView& t, const char* name) {
  const DLDataType d = t.dtype();
  if (d.lanes == 1) {
    if (d.code == kDLFloat && d.bits == 32) return DType::f32;
    if (d.code == kDLFloat && d.bits == 16) return DType::f16;
    if (d.code == kDLBfloat && d.bits == 16) return DType::bf16;
  }
  TVM_FFI_THROW(TypeError) << name << " must be float32, bfloat16 or float16; got DLPack type code "
                           << static_cast<int>(d.code) << " with " << static_cast<int>(d.bits) << " bits";
  return DType::f32;
}

inline void check_dtype(const TensorView& t, const char* name, DType want, const char* why) {
  if (dtype_of(t, name) != want)
    TVM_FFI_THROW(TypeError) << name << " must be " << dtype_name(want) << why << "; got "
                             << dtype_name(dtype_of(t, name));
}

inline void check_shape(const TensorView& t, const char* name, std::initializer_list<int64_t> want) {
  bool same = t.ndim() == static_cast<int>(want.size());
  int i = 0;
  for (int64_t size : want) same = same && t.size(i++) == size;
  if (same) return;
  std::string text;
  for (int64_t size : want) text += (text.empty() ? "" : ", ") + std::to_string(size);
  TVM_FFI_THROW(ValueError) << name << " must have shape (" << text << "); got " << shape_text(t);
}

inline void check_ndim(const TensorView& t, const char* name, int want, const char* layout) {
  if (t.ndim() != want)
    TVM_FFI_THROW(ValueError) << name << " must have " << want << " dimensions " << layout << "; got "
                              << shape_text(t);
}

inline void check_cpu(const TensorView& t, const char* name) {
  if (t.device().device_type != kDLCPU)
    TVM_FFI_THROW(ValueError) << name << " must be on the CPU; got DLPack device type "
                              << static_cast<int>(t.device().device_type);
}

// A number by which Python names a type.
inline DType dtype_code(int64_t value, const char* name) {
  if (value < 0 || value > 2)
    TVM_FFI_THROW(ValueError) << name << " must be 0 (float32), 1 (bfloat16) or 2 (float16); got " << value;
  return static_cast<DType>(value);
}

inline void check_contiguous(const TensorView& t, const char* name) {
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " must be contiguous; call .contiguous() on it";
}

// A table of addresses.
inline void check_addresses(const TensorView& t, const char* name) {
  check_cpu(t, name);
  check_contiguous(t, name);
  if (t.dtype().code != kDLInt || t.dtype().bits != 64)
    TVM_FFI_THROW(TypeError) << name << " must be int64; got DLPack type code " << static_cast<int>(t.dtype().code)
                             << " with " << static_cast<int>(t.dtype().bits) << " bits";
}

inline DType check_dense(const TensorView& t, const char* name) {
  check_cpu(t, name);
  check_contiguous(t, name);
  return dtype_of(t, name);
}

template <class T = void>
inline T* data(const TensorView& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

template <class T = void>
inline T* data(const MaybeTensor& t) {
  return t.has_value() ? data<T>(t.value()) : nullptr;
}

// Uninitialised fp32 scratch; 64-byte aligned.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(floats > 0 ? floats : 1) * 4 + 63) / 64 * 64))) {
    if (memory_ == nullptr) TVM_FFI_THROW(MemoryError) << "out of memory for " << floats << " floats of scratch";
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return memory_; }

 private:
  float* memory_;
};

}  // namespace mf
