// __half for the CPU emulation: 16 bits of storage, arithmetic in fp32 rounded to nearest even, which for + - * / of
// two halves gives the correctly rounded half (24 >= 2 * 11 + 2 bits).
#pragma once

#include "cuda_runtime.h"

namespace emulator {

inline uint16_t half_bits(float value) {
  const uint32_t in = bits<uint32_t>(value), sign = (in >> 16) & 0x8000u, magnitude = in & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                                    // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);    // rounds to at least 2^16: infinity
  if (magnitude < 0x33000001u) return static_cast<uint16_t>(sign);               // at most 2^-25: zero
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: subnormal
    const uint32_t shift = 126 - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    return static_cast<uint16_t>(sign | (kept + (rest > middle || (rest == middle && (kept & 1)))));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float half_value(uint16_t in) {
  const uint32_t sign = (in & 0x8000u) << 16, exponent = (in >> 10) & 31, mantissa = in & 0x3ffu;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float v = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -v : v;
  }
  return bits<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace emulator

struct __half_raw { unsigned short x; };

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  __half(float v) : bits(emulator::half_bits(v)) {}
  __half(double v) : bits(emulator::half_bits(static_cast<float>(v))) {}
  __half(int v) : bits(emulator::half_bits(static_cast<float>(v))) {}
  __half(__half_raw v) : bits(v.x) {}
  operator float() const { return emulator::half_value(bits); }
};
typedef __half half;

struct alignas(4) __half2 { __half x, y; };
typedef __half2 half2;

#define EMULATOR_ARITHMETIC(T, T2)                                                           \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); }                            \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); }                            \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); }                            \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); }                            \
  inline T operator-(T a) { return T(-float(a)); }                                           \
  inline T& operator+=(T& a, T b) { return a = a + b; }                                      \
  inline T& operator-=(T& a, T b) { return a = a - b; }                                      \
  inline T& operator*=(T& a, T b) { return a = a * b; }                                      \
  inline bool operator==(T a, T b) { return float(a) == float(b); }                          \
  inline bool operator!=(T a, T b) { return float(a) != float(b); }                          \
  inline bool operator<(T a, T b) { return float(a) < float(b); }                            \
  inline bool operator>(T a, T b) { return float(a) > float(b); }                            \
  inline bool operator<=(T a, T b) { return float(a) <= float(b); }                          \
  inline bool operator>=(T a, T b) { return float(a) >= float(b); }                          \
  inline T __hadd(T a, T b) { return a + b; }                                                \
  inline T __hsub(T a, T b) { return a - b; }                                                \
  inline T __hmul(T a, T b) { return a * b; }                                                \
  inline float __low2float(T2 v) { return float(v.x); }                                      \
  inline float __high2float(T2 v) { return float(v.y); }
EMULATOR_ARITHMETIC(__half, __half2)

inline float __half2float(__half v) { return float(v); }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return __half(__half_raw{v}); }
