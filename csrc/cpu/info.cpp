// What this library was built with. MF_HOST_ONLY: no kernels, so compiled once and not per instruction set.
#include "common.h"

namespace {

tvm::ffi::String cpu_variant() { return mf::variant_name(mf::variant()); }

tvm::ffi::String cuda_archs() {
#ifdef MF_CUDA
  return MF_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_variant, cpu_variant);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_archs, cuda_archs);
