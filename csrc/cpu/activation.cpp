// activation_bf16: tanh-GELU or SiLU of a bf16 tensor, in place, for the output of a linear layer.
//
//   gelu_tanh(v) = v / (1 + exp(-2u)), u = sqrt(2/pi) (v + 0.044715 v^3)        silu(v) = v / (1 + exp(-v))
//
// Both are one exponential and one division in fp32, rounded once. The exponential is 2^n times a polynomial of degree 5
// in [-1/2, 1/2], relative error 2.4e-6: 1/800 of a bf16 step, hence bf16 only. oneDNN's tanh epilogue evaluates a table
// of polynomials per element instead and costs 25-30 % of the GEMM of an MLP's first layer; this pass costs half of it.
#ifdef MF_VARIANT
#include <omp.h>

#include <cstring>
#endif
#include <cstdint>

#include "cpu/types.h"

namespace mf {

struct ActivationArgs {
  uint16_t* x;
  int64_t count;
  bool gelu;
};

}  // namespace mf

#ifdef MF_VARIANT
namespace mf::MF_VARIANT {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// 2^t for t in [-126, 126]. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
inline float exp2_short(float t) {
  const float shifted = t + 12582912.f;
  const float f = t - (shifted - 12582912.f);
  float p = 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

// v / (1 + 2^t); below -1e4 the quotient is zero in bf16, and v is cut there lest it beat the clamped power.
inline uint16_t finish(float v, float t) {
  t = t < -126.f ? -126.f : t;
  t = t > 126.f ? 126.f : t;
  const float top = v < -1e4f ? -1e4f : v;
  const uint32_t bits = as_bits(top / (1.f + exp2_short(t)));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

template <bool GELU>
void run(uint16_t* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float v = as_float(static_cast<uint32_t>(x[i]) << 16);
    // -2 log2(e) sqrt(2/pi) (v + 0.044715 v^3), or -log2(e) v
    x[i] = finish(v, GELU ? v * (-2.3022082f - 0.10294324f * v * v) : -1.4426950f * v);
  }
}

}  // namespace

void activation(const ActivationArgs& a) {
#pragma omp parallel
  {
    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = a.count * id / threads, last = a.count * (id + 1) / threads;
    (a.gelu ? run<true> : run<false>)(a.x + first, last - first);
  }
}

}  // namespace mf::MF_VARIANT
#endif

#ifdef MF_HOST
#include "common.h"

MF_DECLARE(activation, ActivationArgs)

namespace {

void activation_bf16(mf::TensorView x, int64_t kind) {
  if (mf::check_dense(x, "x") != mf::DType::bf16)
    TVM_FFI_THROW(TypeError) << "x must be bfloat16; got " << mf::dtype_name(mf::dtype_of(x, "x"));
  if (kind != 0 && kind != 1) TVM_FFI_THROW(ValueError) << "kind must be 0 (gelu_tanh) or 1 (silu); got " << kind;
  int64_t count = 1;
  for (int i = 0; i < x.ndim(); ++i) count *= x.size(i);
  const mf::ActivationArgs args{mf::data<uint16_t>(x), count, kind == 0};
  MF_CALL(activation, args)
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(activation_bf16, activation_bf16);
#endif
