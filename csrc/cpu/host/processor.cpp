// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// Which instruction set the kernels use: the best that the processor and the system offer, or a lesser one on request.
//
// AMX is there only if everything that its tiles need is: the feature bits, a tile palette of the shape that cpu/amx.h
// configures (virtual machines and emulators show the bits without it), an operating system that saves the tiles
// (XCR0), and Linux's permission to use them, which every process has to ask for.
#include "common.h"
#include "cpu/gemm.h"

#ifdef MF_X86
#include <cpuid.h>
#endif
#ifdef MF_AMX_COMPILED
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mf {

const char* variant_name(Variant v) {
  switch (v) {
    case Variant::v2: return "v2";
    case Variant::avx2: return "avx2";
    case Variant::avx512: return "avx512";
    case Variant::avx512bf16: return "avx512bf16";
    case Variant::amx: return "amx";
    case Variant::generic: return "generic";
    default: return "none";
  }
}

namespace {

// "" where AMX-BF16 can be used, else what is missing.
std::string why_no_amx() {
#if defined(MF_EMULATED_TILES)
  return "";
#elif defined(MF_AMX_COMPILED)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) == 0 || (d >> 22 & 1) == 0)
    return "the processor has no AMX-BF16";
  if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) return "CPUID leaf 0x1D shows no tile palette";
  __get_cpuid_count(0x1d, 1, &a, &b, &c, &d);
  const unsigned tile_bytes = a >> 16, row_bytes = b & 0xffff, tiles = b >> 16, rows = c & 0xffff;
  if (tile_bytes != 1024 || row_bytes != 64 || tiles < 8 || rows != 16)
    return "palette 1 is not of eight tiles of 16 rows of 64 bytes";
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return "the system does not use XSAVE";
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return "the system does not save AMX tiles (XCR0)";
  if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0)
    return "Linux refuses this process the tiles (ARCH_REQ_XCOMP_PERM)";
  return "";
#else
  return "the kernels on AMX tiles are written for x86-64 Linux and GCC 11 or Clang 12";
#endif
}

Variant best() {
  static const Variant found = [] {
#ifdef MF_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt")))
      return Variant::none;
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")))
      return Variant::v2;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
      return Variant::avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Variant::avx512;
    return why_no_amx().empty() ? Variant::amx : Variant::avx512bf16;
#else
    return Variant::generic;
#endif
  }();
  return found;
}

Variant limit = Variant::amx;  // no static initialisation: the first call of a kernel may come from any thread

}  // namespace

Variant variant() {
  const Variant own = best();
  return limit < own && own != Variant::generic ? limit : own;
}

std::optional<Products> pair_products() {
  if (variant() == Variant::amx) return Products::tiles;
  return variant() == Variant::avx512bf16 ? std::optional(Products::dot) : std::nullopt;
}

std::optional<Products> byte_products() {
#ifdef MF_X86
  unsigned a = 0, b = 0, c = 0, d = 0, subleaf = 0, none = 0;
  if (!__get_cpuid_count(7, 0, &subleaf, &b, &c, &d)) return std::nullopt;
#ifndef MF_EMULATED_TILES
  const bool byte_tiles = (d >> 25 & 1) != 0;
#else
  const bool byte_tiles = true;
#endif
  if (variant() == Variant::amx && byte_tiles) return Products::byte_tiles;
  if (variant() >= Variant::avx512) return (c >> 11 & 1) != 0 ? std::optional(Products::bytes) : std::nullopt;
  if (variant() == Variant::avx2 && subleaf >= 1 && __get_cpuid_count(7, 1, &a, &none, &none, &none) && (a >> 4 & 1) != 0)
    return Products::bytes;
#endif
  return std::nullopt;
}

namespace {

tvm::ffi::String cpu_best() { return variant_name(best()); }
tvm::ffi::String cpu_variant() { return variant_name(variant()); }
tvm::ffi::String amx_status() { return why_no_amx(); }

// Whether linear layers of int8 exist in the instruction set in use.
bool cpu_byte_products() { return byte_products().has_value(); }

// From here on calls use no instruction set above `name`; one that the processor does not have is an error.
void cpu_limit(tvm::ffi::String name) {
  for (Variant v : {Variant::generic, Variant::v2, Variant::avx2, Variant::avx512, Variant::avx512bf16, Variant::amx})
    if (std::string(name) == variant_name(v) && v <= best()) {
      limit = v;
      return;
    }
  TVM_FFI_THROW(ValueError) << "this processor's instruction set is " << variant_name(best()) << "; it cannot run "
                            << std::string(name);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_best, mf::cpu_best);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_variant, mf::cpu_variant);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_limit, mf::cpu_limit);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(amx_status, mf::amx_status);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_byte_products, mf::cpu_byte_products);
