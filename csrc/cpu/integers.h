// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// The check of integer and boolean tensors on the host: masks, counts, indices.
#pragma once

#include "common.h"

namespace mf {

// A contiguous CPU tensor of `code` (kDLInt, kDLUInt, kDLBool) with one of two widths; returns its width in bits.
inline int check_integers(const TensorView& t, const char* name, int code, int bits, int or_bits = 0) {
  check_cpu(t, name);
  check_contiguous(t, name);
  const DLDataType d = t.dtype();
  if (d.lanes == 1 && d.code == code && (d.bits == bits || d.bits == or_bits)) return d.bits;
  const std::string kind = code == kDLBool ? "bool" : code == kDLUInt ? "uint" : "int";
  std::string wanted = code == kDLBool ? kind : kind + std::to_string(bits);
  if (or_bits != 0) wanted += " or " + kind + std::to_string(or_bits);
  TVM_FFI_THROW(TypeError) << name << " must be " << wanted << "; got DLPack type code " << static_cast<int>(d.code)
                           << " with " << static_cast<int>(d.bits) << " bits";
  return 0;
}

}  // namespace mf
