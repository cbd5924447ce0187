// __nv_bfloat16 for the CPU emulation: 16 bits of storage, arithmetic in fp32 rounded to nearest even.
#pragma once

#include "cuda_fp16.h"

namespace emulator {

inline uint16_t bfloat16_bits(float value) {
  const uint32_t in = bits<uint32_t>(value);
  if ((in & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN, as the hardware writes it
  return static_cast<uint16_t>((in + 0x7fffu + ((in >> 16) & 1)) >> 16);
}

}  // namespace emulator

struct __nv_bfloat16_raw { unsigned short x; };

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(emulator::bfloat16_bits(v)) {}
  __nv_bfloat16(double v) : bits(emulator::bfloat16_bits(static_cast<float>(v))) {}
  __nv_bfloat16(int v) : bits(emulator::bfloat16_bits(static_cast<float>(v))) {}
  __nv_bfloat16(__nv_bfloat16_raw v) : bits(v.x) {}
  operator float() const { return emulator::bits<float>(static_cast<uint32_t>(bits) << 16); }
};

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

EMULATOR_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)

inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16(__nv_bfloat16_raw{v}); }
