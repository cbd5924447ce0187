// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The tile instructions as plain code, for tests on processors without AMX (tests/emulate_tiles.py): eight tiles of 16
// rows of 64 bytes for each thread, and nothing until they are configured.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace mf::emulated {

struct State {
  alignas(64) char tile[8][16][64];
  bool configured = false;
};
inline thread_local State state;

inline State& configured() {
  if (!state.configured) abort();  // a processor raises #UD
  return state;
}
inline void configure() { memset(state.tile, 0, sizeof state.tile), state.configured = true; }
inline void release() { state.configured = false; }
inline void zero(int t) { memset(configured().tile[t], 0, sizeof state.tile[t]); }
inline void load(int t, const void* from, int64_t line) {
  for (int64_t r = 0; r < 16; ++r) memcpy(configured().tile[t][r], (const char*)from + r * line, 64);
}
inline void store(int t, void* to, int64_t line) {
  for (int64_t r = 0; r < 16; ++r) memcpy((char*)to + r * line, configured().tile[t][r], 64);
}
// c[m][n] += sum over pairs p of a[m][p] . b[p][n], bf16 products in fp32
inline void multiply(int c, int a, int b) {
  State& s = configured();
  const auto value = [](const char* at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t wide = (uint32_t)half << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
  };
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, s.tile[c][m] + 4 * n, 4);
      for (int p = 0; p < 16; ++p)
        for (int i = 0; i < 4; i += 2) sum += value(s.tile[a][m] + 4 * p + i) * value(s.tile[b][p] + 4 * n + i);
      memcpy(s.tile[c][m] + 4 * n, &sum, 4);
    }
}

// the same of four unsigned by four signed bytes, into int32
inline void multiply_bytes(int c, int a, int b) {
  State& s = configured();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, s.tile[c][m] + 4 * n, 4);
      for (int p = 0; p < 16; ++p)
        for (int i = 0; i < 4; ++i) sum += (int32_t)(uint8_t)s.tile[a][m][4 * p + i] * (int8_t)s.tile[b][p][4 * n + i];
      memcpy(s.tile[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace mf::emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(config) ((void)(config), ::mf::emulated::configure())
#define _tile_release() ::mf::emulated::release()
#define _tile_zero(t) ::mf::emulated::zero(t)
#define _tile_loadd(t, from, line) ::mf::emulated::load(t, from, line)
#define _tile_stored(t, to, line) ::mf::emulated::store(t, to, line)
#define _tile_dpbf16ps(c, a, b) ::mf::emulated::multiply(c, a, b)
#define _tile_dpbusd(c, a, b) ::mf::emulated::multiply_bytes(c, a, b)
