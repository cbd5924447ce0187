// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// out = [cls | image tokens] + pos, then latents + latent_pos; (B, P + N + L, D), and its gradients.
//
// An image token is its patch, or mask_token where mask is set or where there are no patches at all.
// Forward: one sum of two rows per output row, in any types. Backward: blocks of kRows tokens and for each all images, so
// that the sums over the images stay in the cache; the sum for mask_token is kept per block and added in order, so results
// do not depend on the number of threads.

#include "cpu/types.h"

namespace mf {

struct EmbedArgs {
  const uint8_t* mask;  // (B, N) or null
  // Forward: inputs and out. Backward: their gradients, out is dy. data == null: absent.
  Column patches, token, pos, cls, latents, latent_pos, out;
  bool batched;   // latents (B, L, D), else (L, D)
  bool replaced;  // no patches: every image token is the mask token
  int64_t B, N, P, L, D;
  float* rows;      // backward: kRows rows of D floats per thread
  float* partials;  // backward: blocks * D floats
};

constexpr int64_t kStretch = 256, kRows = 16;
constexpr int kImages = 4;  // the backward adds up this many images in registers before it touches the sum

}  // namespace mf

#ifdef MF_VARIANT
#include "cpu/simd.h"

namespace mf {
namespace MF_VARIANT {

// f(type of the sequence, type of the patches): the same, or a wider sequence.
template <class F> MF_INLINE void with_types(const EmbedArgs& a, F f) {
  if (a.patches.data == nullptr || a.patches.type == a.out.type) with_type(a.out.type, [&](auto t) { f(t, t); });
  else if (a.patches.type == DType::bf16) f(float{}, bf16{});
  else f(float{}, f16{});
}

MF_INLINE void put_row(Column c, int64_t at, int64_t D, const float* row) {
  if (c.data == nullptr) return;
  each(D, [&](int64_t i, auto k) { store_row(c, at, D, i, load(row + i, k), k); });
}

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// out = row i of a plus row j of b; either may be absent
template <class T> MF_INLINE void add_rows(T* out, Column a, int64_t i, Column b, int64_t j, int64_t D) {
  if (a.data == nullptr) a = b, i = j, b.data = nullptr;
  if (a.data == nullptr) {
    memset(out, 0, sizeof(T) * D);
    return;
  }
  with_type(a.type, [&](auto ta) {
    const auto* first = (const decltype(ta)*)a.data + i * D;
    if (b.data == nullptr) {
      if (Same<T, decltype(ta)>::value) memcpy(out, first, sizeof(T) * D);
      else each(D, [&](int64_t n, auto k) { store(out + n, load(first + n, k), k); });
      return;
    }
    with_type(b.type, [&](auto tb) {
      const auto* second = (const decltype(tb)*)b.data + j * D;
      each(D, [&](int64_t n, auto k) { store(out + n, load(first + n, k) + load(second + n, k), k); });
    });
  });
}

// Stretches of about kStretch tokens, for each all images, so that the stretch's pos stays in L2 and the output is written
// in long runs.
template <class T> static void forward(const EmbedArgs& a) {
  const int64_t D = a.D, S = a.P + a.N + a.L, image_end = a.P + a.N;
  const int64_t stretches = (S + kStretch - 1) / kStretch, length = (S + stretches - 1) / stretches;
#pragma omp parallel if (a.B * S * D > kSerial)
  {
    const Share share = my_share(stretches * a.B * length);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / length % a.B, t = item / (length * a.B) * length + item % length;
      if (t >= S) continue;
      T* out = (T*)a.out.data + (b * S + t) * D;
      const int64_t n = b * a.N + t - a.P, l = t - image_end;
      if (t < a.P) add_rows(out, a.cls, t, a.pos, t, D);
      else if (t >= image_end) add_rows(out, a.latents, a.batched ? b * a.L + l : l, a.latent_pos, l, D);
      else if (a.replaced || (a.mask != nullptr && a.mask[n])) add_rows(out, a.token, 0, a.pos, t, D);
      else add_rows(out, a.patches, n, a.pos, t, D);
    }
  }
}

template <int N> struct Images { static constexpr int n = N; };

template <class T, class TP> static void backward(const EmbedArgs& a) {
  const int64_t D = a.D, S = a.P + a.N + a.L, image_end = a.P + a.N, blocks = (S + kRows - 1) / kRows;
  const bool latent_sums = a.latent_pos.data != nullptr || (!a.batched && a.latents.data != nullptr);
  const bool image_sums = a.pos.data != nullptr, tail_writes = a.batched && a.latents.data != nullptr;
  const bool token_sums = a.token.data != nullptr && (a.replaced || a.mask != nullptr);
  const bool latents_as_patches = a.patches.data == nullptr && a.latents.type == a.out.type;  // else a pass of their own
#pragma omp parallel if (a.B * S * D > kSerial)
  {
    float* rows = a.rows + omp_get_thread_num() * kRows * D;
    const Share share = my_share(blocks);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t first = block * kRows, last = first + kRows < S ? first + kRows : S;
      float* token = a.partials + block * D;
      memset(token, 0, sizeof(float) * D);
      if (a.B == 0) memset(rows, 0, sizeof(float) * kRows * D);
      for (int64_t b = 0; b < a.B; b += kImages)
        for (int64_t t = first; t < last; ++t) {
          const bool image = t >= a.P && t < image_end, tail = t >= image_end;
          const bool sums = image ? image_sums : tail ? latent_sums : true;
          float* row = rows + (t - first) * D;
          const T* dy[kImages];
          TP* dx[kImages] = {};
          bool masked[kImages] = {}, any = false, writes = tail && tail_writes;
          const int count = (int)(a.B - b < kImages ? a.B - b : kImages);
          for (int j = 0; j < count; ++j) {
            dy[j] = (const T*)a.out.data + ((b + j) * S + t) * D;
            if (tail && tail_writes && latents_as_patches)
              dx[j] = (TP*)a.latents.data + ((b + j) * a.L + t - image_end) * D;
            if (!image) continue;
            const int64_t at = (b + j) * a.N + t - a.P;
            masked[j] = a.replaced || (a.mask != nullptr && a.mask[at]);
            if (a.patches.data != nullptr) dx[j] = (TP*)a.patches.data + at * D;
            if (dx[j] != nullptr && masked[j]) memset(dx[j], 0, sizeof(TP) * D), dx[j] = nullptr;
            masked[j] = masked[j] && token_sums;
            writes = writes || dx[j] != nullptr;
            any = any || masked[j];
          }
          if (!sums && !any && !writes) continue;
          const auto group = [&](auto n) {
            each(D, [&](int64_t i, auto k) {
              vf s = sums && b > 0 ? load(row + i, k) : (vf){}, m = any ? load(token + i, k) : (vf){};
              for (int j = 0; j < (n.n > 0 ? n.n : count); ++j) {
                const vf d = load(dy[j] + i, k);
                s += d;
                if (masked[j]) m += d;
                if (dx[j] != nullptr) store(dx[j] + i, d, k);
              }
              if (sums) store(row + i, s, k);
              if (any) store(token + i, m, k);
            });
          };
          if (count == kImages) group(Images<kImages>{});
          else group(Images<0>{});
          if (tail && tail_writes && !latents_as_patches)
            for (int j = 0; j < count; ++j)
              with_type(a.latents.type, [&](auto type) {
                auto* dz = (decltype(type)*)a.latents.data + ((b + j) * a.L + t - image_end) * D;
                each(D, [&](int64_t i, auto k) { store(dz + i, load(dy[j] + i, k), k); });
              });
        }
      for (int64_t t = first; t < last; ++t) {
        const float* row = rows + (t - first) * D;
        if (t < image_end) put_row(a.pos, t, D, row);
        else put_row(a.latent_pos, t - image_end, D, row);
        if (t < a.P) put_row(a.cls, t, D, row);
        if (t >= image_end && !a.batched) put_row(a.latents, t - image_end, D, row);
      }
    }
    if (a.token.data != nullptr) {
#pragma omp barrier
      const Share columns = my_share((D + W - 1) / W);
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const int64_t i = column * W;
        const Part k{(int)(D - i < W ? D - i : W)};
        vf total = {};
        for (int64_t block = 0; block < blocks; ++block) total += load(a.partials + block * D + i, k);
        store_row(a.token, 0, D, i, total, k);
      }
    }
  }
}

void embed_tokens_fwd(const EmbedArgs& a) {
  with_type(a.out.type, [&](auto t) { forward<decltype(t)>(a); });
}
void embed_tokens_bwd(const EmbedArgs& a) {
  with_types(a, [&](auto t, auto tp) { backward<decltype(t), decltype(tp)>(a); });
}

}  // namespace MF_VARIANT
}  // namespace mf
#endif

#ifdef MF_HOST
#include "common.h"
#include "cpu/integers.h"

MF_DECLARE(embed_tokens_fwd, EmbedArgs)
MF_DECLARE(embed_tokens_bwd, EmbedArgs)

namespace mf {
namespace {

Column rows_of(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> shape) {
  if (!t.has_value()) return {nullptr, DType::f32};
  check_shape(t.value(), name, shape);
  return {data(t), check_dense(t.value(), name)};
}

// Everything but the sizes, which forward and backward learn from different tensors.
void fill(EmbedArgs& a, const TensorView& sequence, const MaybeTensor& mask, const MaybeTensor& patches,
          const MaybeTensor& token, const MaybeTensor& pos, const MaybeTensor& cls, const MaybeTensor& latents,
          const MaybeTensor& latent_pos) {
  if (mask.has_value()) {
    check_shape(mask.value(), "mask", {a.B, a.N});
    check_integers(mask.value(), "mask", kDLBool, 8);
    a.mask = data<uint8_t>(mask);
  }
  a.out = {data(sequence), check_dense(sequence, "the sequence")};
  a.patches = rows_of(patches, "patches", {a.B, a.N, a.D});
  if (patches.has_value() && a.patches.type != a.out.type && a.out.type != DType::f32)
    TVM_FFI_THROW(TypeError) << "the sequence must be float32 or of the patches' " << dtype_name(a.patches.type)
                             << "; got " << dtype_name(a.out.type);
  a.token = rows_of(token, "mask_token", {a.D});
  a.pos = rows_of(pos, "pos", {a.P + a.N, a.D});
  a.cls = rows_of(cls, "cls", {a.P, a.D});
  if (latents.has_value()) a.batched = latents.value().ndim() == 3;
  a.latents = a.batched ? rows_of(latents, "latents", {a.B, a.L, a.D}) : rows_of(latents, "latents", {a.L, a.D});
  a.latent_pos = rows_of(latent_pos, "latent_pos", {a.L, a.D});
}

void fwd(MaybeTensor patches, MaybeTensor mask, MaybeTensor token, MaybeTensor pos, MaybeTensor cls,
         MaybeTensor latents, MaybeTensor latent_pos, TensorView out) {
  check_ndim(out, "out", 3, "(B, P + N + L, D)");
  EmbedArgs a{};
  a.B = out.size(0), a.D = out.size(2);
  a.P = cls.has_value() ? cls.value().size(0) : 0;
  a.L = latents.has_value() ? latents.value().size(latents.value().ndim() - 2) : 0;
  a.N = out.size(1) - a.P - a.L;
  a.replaced = !patches.has_value();
  fill(a, out, mask, patches, token, pos, cls, latents, latent_pos);
  if ((a.replaced || mask.has_value()) && !token.has_value())
    TVM_FFI_THROW(ValueError) << "mask_token must be given where tokens are replaced by it";
  if (out.numel() == 0) return;
  MF_CALL(embed_tokens_fwd, a);
}

void bwd(TensorView dy, MaybeTensor mask, MaybeTensor dpatches, MaybeTensor dtoken, MaybeTensor dpos, MaybeTensor dcls,
         MaybeTensor dlatents, MaybeTensor dlatent_pos, int64_t tokens, int64_t prefix, int64_t latents,
         int64_t replaced) {
  check_shape(dy, "dy", {dy.size(0), prefix + tokens + latents, dy.size(2)});
  EmbedArgs a{};
  a.B = dy.size(0), a.D = dy.size(2), a.N = tokens, a.P = prefix, a.L = latents;
  a.replaced = replaced != 0;
  fill(a, dy, mask, dpatches, dtoken, dpos, dcls, dlatents, dlatent_pos);
  if (a.D == 0) return;
  Scratch rows(omp_get_max_threads() * kRows * a.D);
  Scratch partials((prefix + tokens + latents + kRows - 1) / kRows * a.D);
  a.rows = rows.get();
  a.partials = partials.get();
  MF_CALL(embed_tokens_bwd, a);
}

}  // namespace
}  // namespace mf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_tokens_fwd, mf::fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_tokens_bwd, mf::bwd);
#endif
