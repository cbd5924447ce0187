// attention_bf16: softmax(q k^T / sqrt(D)) v on AMX tiles, for sequences short enough that a row of scores fits in cache.
//
//   per (image, head):  K -> tiles of 32 channels x 16 keys, V -> tiles of 32 keys x 16 channels      (packed once)
//     per 32 queries:   S = Q K^T (fp32) -> P = 2^(S log2(e)/sqrt(D) - max), bf16, unnormalised -> O = P V (fp32) / sum
//
// The whole row of scores is there before the maximum is taken, so nothing is rescaled as in streaming softmax; 32 rows
// of N fp32 scores are 49 KB at 385 tokens and 148 KB at 1153, within a core's second-level cache. Scores and sums stay
// fp32; P and the result are rounded to bf16 once each, as in torch's flash attention. log-sum-exp comes out for a backward.
// Needs AVX-512, AVX512_BF16 and AMX-BF16 and Linux's permission to use the tiles; `attention_bf16_usable` asks for all.
#include <cstdint>

#include "cpu/types.h"

namespace mf {

struct AttentionArgs {
  const uint16_t *q, *k, *v;               // heads and channels contiguous; token and image strides below, in elements
  uint16_t* out;                           // (B, queries, heads, D) contiguous
  float* lse;                              // (B, queries, heads) contiguous, natural logarithm
  int64_t batch, queries, keys, heads, dim;
  int64_t q_token, k_token, v_token, q_image, k_image, v_image;
  float scale;
};

}  // namespace mf

#ifdef MF_VARIANT

#if defined(__x86_64__) && defined(__AVX512BW__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers (its bug 105593)
#endif
#define MF_AMX __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace mf::MF_VARIANT {
namespace {

constexpr int64_t ROWS = 32;   // queries at a time: two tiles
constexpr int64_t TILE = 256;  // dwords of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// 2^t for t <= 0, -inf gives 0; relative error 2.4e-6.
MF_AMX inline __m512 exp2_short(__m512 t) {
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

struct Sizes {
  int64_t channel_blocks, key_tiles, padded_keys, channel_tiles;
};

template <class T>
T* take(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64)));
}

// A thread's scratch.
struct Scratch {
  explicit Scratch(const Sizes& s)
      : k(take<uint32_t>(s.channel_blocks * s.key_tiles * TILE)),
        v(take<uint32_t>(s.padded_keys / 32 * s.channel_tiles * TILE)),
        q(take<uint16_t>(ROWS * s.channel_blocks * 32)),
        p(take<uint16_t>(ROWS * s.padded_keys)),
        scores(take<float>(ROWS * s.padded_keys)),
        o(take<float>(ROWS * s.channel_tiles * 16)) {}
  ~Scratch() {
    std::free(k), std::free(v), std::free(q), std::free(p), std::free(scores), std::free(o);
  }
  Scratch(const Scratch&) = delete;
  uint32_t *k, *v;
  uint16_t *q, *p;
  float *scores, *o;
};

void pack(const AttentionArgs& a, const Sizes& z, const uint16_t* k, const uint16_t* v, const Scratch& s) {
  std::memset(s.k, 0, z.channel_blocks * z.key_tiles * TILE * 4);
  std::memset(s.v, 0, z.padded_keys / 32 * z.channel_tiles * TILE * 4);
  for (int64_t n = 0; n < a.keys; ++n) {
    const uint16_t* row = k + n * a.k_token;
    uint32_t* to = s.k + n / 16 * z.channel_blocks * TILE + n % 16;
    for (int64_t d = 0; d < a.dim / 2; ++d) std::memcpy(to + d / 16 * TILE + d % 16 * 16, row + 2 * d, 4);
  }
  for (int64_t n = 0; n < a.keys; ++n) {
    const uint16_t* row = v + n * a.v_token;
    uint16_t* to = reinterpret_cast<uint16_t*>(s.v + n / 32 * z.channel_tiles * TILE) + n % 32 / 2 * 32 + n % 2;
    for (int64_t d = 0; d < a.dim; ++d) to[d / 16 * 2 * TILE + d % 16 * 2] = row[d];
  }
}

// scores (32, padded keys) = Q K^T; two by two tiles.
MF_AMX void score(const Sizes& z, const Scratch& s) {
  const int64_t row = z.padded_keys, width = z.channel_blocks * 64;
  for (int64_t t = 0; t < z.key_tiles; t += 2) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t c = 0; c < z.channel_blocks; ++c) {
      _tile_loadd(4, s.q + c * 32, width);
      _tile_loadd(5, s.q + 16 * z.channel_blocks * 32 + c * 32, width);
      _tile_loadd(6, s.k + (t * z.channel_blocks + c) * TILE, 64);
      _tile_loadd(7, s.k + ((t + 1) * z.channel_blocks + c) * TILE, 64);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, s.scores + t * 16, row * 4); _tile_stored(1, s.scores + t * 16 + 16, row * 4);
    _tile_stored(2, s.scores + 16 * row + t * 16, row * 4); _tile_stored(3, s.scores + 16 * row + t * 16 + 16, row * 4);
  }
}

// One row: P = 2^(scores * scale - max); returns the sum of P, the scaled maximum in `top`.
MF_AMX float exponentials(float* scores, uint16_t* p, int64_t keys, int64_t padded, float scale, float* top) {
  for (int64_t n = keys; n < padded; ++n) scores[n] = -INFINITY;
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t n = 0; n < padded; n += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores + n));
  *top = _mm512_reduce_max_ps(most) * scale;
  const __m512 max = _mm512_set1_ps(*top), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t n = 0; n < padded; n += 32) {
    const __m512 a = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(scores + n), factor, max));
    const __m512 b = exp2_short(_mm512_fmsub_ps(_mm512_load_ps(scores + n + 16), factor, max));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
    std::memcpy(p + n, &both, 64);
  }
  return _mm512_reduce_add_ps(sum);
}

// o (32, padded channels) = P V.
MF_AMX void mix(const Sizes& z, const Scratch& s) {
  const int64_t row = z.padded_keys * 2, width = z.channel_tiles * 64;
  for (int64_t t = 0; t < z.channel_tiles; t += 2) {
    const bool two = t + 1 < z.channel_tiles;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t n = 0; n < z.padded_keys / 32; ++n) {
      _tile_loadd(4, s.p + n * 32, row);
      _tile_loadd(5, s.p + 16 * z.padded_keys + n * 32, row);
      _tile_loadd(6, s.v + (n * z.channel_tiles + t) * TILE, 64);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
      if (two) {
        _tile_loadd(7, s.v + (n * z.channel_tiles + t + 1) * TILE, 64);
        _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
      }
    }
    float *low = s.o + t * 16, *high = low + 16 * z.channel_tiles * 16;
    _tile_stored(0, low, width); _tile_stored(2, high, width);
    if (two) {
      _tile_stored(1, low + 16, width);
      _tile_stored(3, high + 16, width);
    }
  }
}

MF_AMX void write_row(const float* o, uint16_t* out, int64_t dim, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t d = 0; d < dim; d += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(o + d), f));
    std::memcpy(out + d, &rounded, 2 * (dim - d < 16 ? dim - d : 16));
  }
}

MF_AMX void one_head(const AttentionArgs& a, const Sizes& z, int64_t image, int64_t head, const Scratch& s) {
  pack(a, z, a.k + image * a.k_image + head * a.dim, a.v + image * a.v_image + head * a.dim, s);
  const uint16_t* q = a.q + image * a.q_image + head * a.dim;
  const float scale = a.scale * 1.44269504f;
  std::memset(s.q, 0, ROWS * z.channel_blocks * 64);
  std::memset(s.p, 0, ROWS * z.padded_keys * 2);
  for (int64_t m = 0; m < a.queries; m += ROWS) {
    const int64_t rows = a.queries - m < ROWS ? a.queries - m : ROWS;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(s.q + r * z.channel_blocks * 32, q + (m + r) * a.q_token, 2 * a.dim);
    score(z, s);
    float sums[ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      float top;
      sums[r] = exponentials(s.scores + r * z.padded_keys, s.p + r * z.padded_keys, a.keys, z.padded_keys, scale, &top);
      a.lse[(image * a.queries + m + r) * a.heads + head] = top * 0.69314718f + std::log(sums[r]);
    }
    mix(z, s);
    for (int64_t r = 0; r < rows; ++r)
      write_row(s.o + r * z.channel_tiles * 16, a.out + ((image * a.queries + m + r) * a.heads + head) * a.dim, a.dim, 1.f / sums[r]);
  }
}

MF_AMX void all_heads(const AttentionArgs& a, const Sizes& z) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  asm volatile("" ::"r"(&config) : "memory");  // GCC believes that ldtilecfg reads eight bytes
  _tile_loadconfig(&config);
  const Scratch scratch(z);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a.batch * a.heads; ++i) one_head(a, z, i / a.heads, i % a.heads, scratch);
  _tile_release();
}

}  // namespace

void attention(const AttentionArgs& a) {
  const int64_t padded = (a.keys + 31) / 32 * 32;
  const Sizes sizes{(a.dim + 31) / 32, padded / 16, padded, (a.dim + 15) / 16};
#pragma omp parallel
  all_heads(a, sizes);
}

bool amx() {
  __builtin_cpu_init();
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  unsigned a1 = 7, b1 = 0, c1 = 1, d1 = 0;
  asm volatile("cpuid" : "+a"(a1), "=b"(b1), "+c"(c1), "=d"(d1));
  const bool tiles = (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0, bf16 = (a1 >> 5 & 1) != 0;
  return tiles && bf16 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

}  // namespace mf::MF_VARIANT

#else

namespace mf::MF_VARIANT {
void attention(const AttentionArgs&) {}
bool amx() { return false; }
}  // namespace mf::MF_VARIANT

#endif
#endif

#ifdef MF_HOST
#include <cmath>

#include "common.h"

MF_DECLARE(attention, AttentionArgs)
#ifdef MF_X86
namespace mf::avx512 { bool amx(); }
#endif

namespace {

bool usable() {
#ifdef MF_X86
  static const bool answer = mf::variant() >= mf::Variant::avx512 && mf::avx512::amx();
  return answer;
#else
  return false;
#endif
}

int64_t attention_bf16_usable() { return usable() ? 1 : 0; }

// Strides in elements of (B, N, H, D) with the last two contiguous.
void check_heads(const mf::TensorView& t, const char* name) {
  mf::check_cpu(t, name);
  mf::check_ndim(t, name, 4, "(B, N, heads, head_dim)");
  mf::check_dtype(t, name, mf::DType::bf16, "");
  if (t.stride(3) != 1 || (t.size(2) > 1 && t.stride(2) != t.size(3)))
    TVM_FFI_THROW(ValueError) << name << " must have contiguous heads and channels; call .contiguous() on it";
}

void attention_bf16(mf::TensorView q, mf::TensorView k, mf::TensorView v, mf::TensorView out, mf::TensorView lse) {
  check_heads(q, "q"), check_heads(k, "k"), check_heads(v, "v");
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3), keys = k.size(1);
  mf::check_shape(k, "k", {batch, keys, heads, dim});
  mf::check_shape(v, "v", {batch, keys, heads, dim});
  mf::check_shape(out, "out", {batch, queries, heads, dim});
  mf::check_shape(lse, "lse", {batch, queries, heads});
  if (mf::check_dense(out, "out") != mf::DType::bf16 || mf::check_dense(lse, "lse") != mf::DType::f32)
    TVM_FFI_THROW(TypeError) << "out must be bfloat16 and lse float32";
  if (dim % 2 != 0 || keys == 0)
    TVM_FFI_THROW(ValueError) << "head_dim must be even and there must be keys; got " << mf::shape_text(k);
  if (!usable()) TVM_FFI_THROW(RuntimeError) << "attention_bf16 needs AMX-BF16 and AVX512_BF16; ask attention_bf16_usable()";
  const mf::AttentionArgs args{mf::data<uint16_t>(q), mf::data<uint16_t>(k), mf::data<uint16_t>(v),
                               mf::data<uint16_t>(out), mf::data<float>(lse), batch, queries, keys, heads, dim,
                               q.stride(1), k.stride(1), v.stride(1), q.stride(0), k.stride(0), v.stride(0),
                               static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)))};
  MF_CALL(attention, args)
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_bf16, attention_bf16);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_bf16_usable, attention_bf16_usable);
#endif
