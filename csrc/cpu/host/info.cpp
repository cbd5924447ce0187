// Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
// What this library was built with.
#include "common.h"

namespace {

tvm::ffi::String cuda_archs() {
#ifdef MF_CUDA
  return MF_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_archs, cuda_archs);
