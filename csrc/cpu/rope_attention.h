// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What attention on vectors (rope_attention.cpp) and on tiles (attention.cpp) share.
#pragma once

#include "cpu/rope.h"

namespace mf {

struct RopeAttentionArgs : RopeInputs {
  const void* dqkv;  // tangents of qkv, or null; then no norm
  void *out, *dout;  // (B, Nq, H, hd), qkv's type
  float* lse;  // (B, Nq, H), natural logarithm
  float scale;
  int threads;
  char* scratch;  // null: only say in *scratch_bytes how much it takes
  int64_t* scratch_bytes;
};

}  // namespace mf

#ifdef MF_VARIANT
namespace mf {
namespace MF_VARIANT {
namespace {

// The work: every head's queries, of which threads share a head's where there are fewer heads, `least` or more each and in
// whole blocks. K and V are packed again for each share.
struct Shares {
  int64_t heads, shares, share, all, count;
  Shares(const RopeAttentionArgs& a, int64_t block, int64_t least) : heads(a.H), all(a.Nq) {
    const int64_t total = a.B * a.H, most = (a.Nq + least - 1) / least, wanted = (a.threads + total - 1) / total;
    shares = wanted < most ? wanted : most;
    share = ((a.Nq + shares - 1) / shares + block - 1) / block * block;
    count = total * shares;
  }
  int64_t image(int64_t i) const { return i / shares / heads; }
  int64_t head(int64_t i) const { return i / shares % heads; }
  Share queries(int64_t i) const {
    const int64_t begin = i % shares * share;
    return {begin, begin + share < all ? begin + share : all};
  }
};

}  // namespace
}  // namespace MF_VARIANT
}  // namespace mf
#endif
