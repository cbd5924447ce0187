# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Finds the native library (csrc/), or says why there is none.

``why_missing()`` is cheap; ``lib()`` returns the library or raises RuntimeError with that reason and the cure. Both
raise ValueError where MAETOK_FAST_CPU asks for what cannot be (`_processor`). Nothing is loaded on import.

Every function of the library writes into the tensors it is given and returns nothing. Tensors are contiguous, on the
CPU, float32, bfloat16 or float16 unless said; sums run in float32, and results do
not depend on the number of threads. ``T | None`` may be None.

    rope_rotate(qkv, rope|None, q_weight|None, q_bias|None, k_weight|None, k_bias|None, index|None, q_out, k_out,
                prefix, first_query, norm, eps)
    rope_rotate_bwd(qkv, rope|None, q_weight|None, q_bias|None, k_weight|None, k_bias|None, index|None, dq, dk, dv,
                    dqkv, drope|None, dweights|None, prefix, first_query, norm, eps)
        qkv, dqkv (B, N, 3, H, hd), hd even and <= 512; rope, drope (2, H or 1, R, hd/2) fp32; weights (hd,) fp32;
        index (B, M) int64 in [0, R): the table row of token prefix + m, None: row m; q_out, dq (B, Nq, H, hd);
        k_out, dk, dv (B, N, H, hd); dq, dk, dv: any strides, last dimension contiguous, may be views of dqkv;
        dweights (4, hd) fp32: dq_weight, dq_bias, dk_weight, dk_bias; norm 0 none, 1 rms, 2 layer
    adaln_fwd(x, shift|None, scale|None, weight|None, bias|None, y, mean_rstd, eps, offset, per_sample, rms)
    adaln_bwd(dy, x, scale|None, weight|None, bias|None, mean_rstd, dx, dshift|None, dscale|None,
              dweight|None, dbias|None, offset, per_sample, rms)
    residual_adaln_fwd(x, branch, gate|None, shift|None, scale|None, weight|None, bias|None, h, y, mean_rstd, eps,
                       offset, per_sample, rms)
    residual_adaln_bwd(dh, dy, x, branch, gate|None, scale|None, weight|None, bias|None, mean_rstd, dx, dbranch|None,
                       dgate|None, dshift|None, dscale|None, dweight|None, dbias|None, offset, per_sample, rms)
        x, branch, h, y and their gradients (B, N, D), each of its own dtype, but h, dh and dx have x's and dbranch
        branch's; gate (D,) or (B, D); shift, scale (B, T, D), the last T tokens, or per_sample=1 with T=1: all tokens;
        weight, bias (D,); these five and their gradients of any of the three dtypes, dweight and dbias fp32;
        mean_rstd (B*N, 2) fp32; rms 0 LayerNorm, 1 RMSNorm. bias enters the gradient of scale.
    gate_residual_fwd(x, gate, branch, y, gate_kind)
    gate_residual_bwd(dy, gate, branch, dbranch|None, dgate|None, gate_kind)
        gate_kind 0: (D,), 1: (B, D), 2: (B, N, D); x, dy and y of one dtype, gate and branch of their own
    bias_act_fwd(x, bias|None, y, kind): y may be x
    bias_act_bwd(dy, x, bias|None, dx, dbias|None, kind)
        x, y, dy, dx (..., D) of one dtype, bias (D,), dbias (D,) fp32; kind 0 tanh-GELU, 1 SiLU, 2 erf GELU
    swiglu_fwd(x, y), swiglu_bwd(dy, x, dx): x, dx (..., 2H), y, dy (..., H) of one dtype
    mask_counts(seed, table, out, base, first_image, per_image): out[b] = base + table entries below the uniform
    random_mask(seed, count, out, first_image): Philox4x32-10 as in token_mask.py
    visible_index(mask, out)
        seed (2,), table (K,) int64; count (B,) int32 or int64; mask (B, N) bool;
        out (B,) int32, (B, N) bool, (B, K) int64
    embed_tokens_fwd(patches|None, mask|None, mask_token|None, pos|None, cls|None, latents|None, latent_pos|None, out)
    embed_tokens_bwd(dy, mask|None, dpatches|None, dmask_token|None, dpos|None, dcls|None, dlatents|None,
                     dlatent_pos|None, N, P, L, replaced)
        out, dy (B, P + N + L, D); patches (B, N, D) of the same type, or 16-bit with out fp32; mask (B, N) bool; the
        others of any of the three types: (D,), (P + N, D), (P, D), (L, D) or (B, L, D), (L, D); no patches: replaced
    move_rows(x, index, fill|None, y, scatter)
    fill_sum(dy, index, dfill)
        y (B, K, D) = rows index (B, K) int64 of x (B, M, D), or scatter: y (B, N, D) = x (B, K, D) in rows index, else
        fill (D,) or 0; dfill (D,) = sum of the rows of dy (B, N, D) that no index names; indices are checked
    attention_bf16(q, k, v, out, lse): AMX attention, where attention_bf16_usable() is 1
    attention_bf16_bwd(q, k, v, out, dout, lse, dq, dk, dv)
        q, dq, out, dout (B, Nq, H, hd), k, v, dk, dv (B, N, H, hd) bfloat16, heads and channels contiguous, out and
        dout dense; lse (B, Nq, H) fp32
    ema_update(table, weight, ema_type, param_type, cast_type)
        ema += weight * (param - ema), cast = param; table (n, 4) int64: their addresses (cast: 0 for none) and the
        number of elements; types 0 float32, 1 bfloat16, 2 float16, cast_type -1 for none
    norm_act_fwd(x, conv_bias|None, weight|None, bias|None, y, mean, var, stats, workspace, groups, eps, slope)
    norm_act_bwd(dy, x, conv_bias|None, weight|None, bias|None, stats, dx|None, dconv_bias|None, dweight|None,
                 dbias|None, workspace, groups, slope)
    affine_act_fwd(x, conv_bias|None, mean|None, var|None, weight|None, bias|None, y, eps, slope)
    affine_act_bwd(dy, x, conv_bias|None, mean|None, var|None, weight|None, bias|None, dx|None, dconv_bias|None,
                   dmean|None, dvar|None, dweight|None, dbias|None, workspace, eps, slope)
        x, y, dy, dx (B, C, H, W); the vectors (C,) fp32; groups 0: batch statistics, C units, else B * groups units;
        mean, var: a number per unit, stats (units, 2): mean, rstd; workspace: 3 BC ceil(HW / 8192) + 2 units
    blur_down(x, y, stride, pad0, pad1, reflect, gain), blur_up(y, x, ...): its transpose; x the large side
    diff_augment_fwd(x, colour|None, shift|None, box|None, y, workspace)
    diff_augment_bwd(dy, x, colour|None, shift|None, box|None, dx|None, dcolour|None, workspace)
        colour (B, 3) fp32, shift (B, 2), box (B, 4) int32; workspace as kernels/augment.py counts it
    discriminator_loss_fwd(real, fake, ema|None, adversarial, lecam, mean_real, mean_fake, slopes, kind)
    discriminator_loss_bwd(the four gradients, real, fake, ema|None, slopes, dreal|None, dfake|None, dema|None, kind)
    generator_loss_fwd(fake, loss, kind), generator_loss_bwd(dloss, fake, dfake, kind)
        losses and means one fp32 number each, slopes and ema two; kind 0 hinge, 1 softplus, 2 linear
    All of norm_act .. generator_loss exist for GPUs as <fn>_cuda with the same arguments.
    hog(image, out, patch, eps)
        image (B, 3, H, W) of any of the three dtypes or uint8, patch % 16 == 0 and dividing H and W;
        out (B, H / patch * W / patch, 27 (patch / 8)^2) fp32
    lpips_fwd(f0, f1, weight, out, stats, channels_last, eps)
    lpips_bwd(dout, f0, f1, weight, stats, d0|None, d1|None, dweight|None, channels_last)
        f0, f1, d0, d1 (B, C, H, W), channels_last=1: (B, H, W, C), of one dtype; out, dout (B,), weight, dweight (C,),
        stats (B, 4, H*W) fp32
    cpu_best() -> "v2" | "avx2" | "avx512" | "avx512bf16" | "amx" | "generic" | "none": the processor's own level
    cpu_variant() -> the level in use: that, or the lesser one that cpu_limit(level) has set for all later calls
    amx_status() -> "" when the processor and the system have AMX tiles, else what is missing
    cuda_archs() -> "8.0 9.0 ...", "" when built without nvcc
    cuda_status() -> "" when the CUDA kernels can run on this machine, else why not (only when built with nvcc)

`cuda()` is the module with the CUDA C++ functions, which take GPU tensors: this library, or, with the environment's
MAETOK_FAST_CUDA_EMULATOR naming one, a build of csrc/cuda for the CPU, which takes CPU tensors (the tests do that).

    emulator_seed(seed): the order in which emulated threads run; 0: the kind one (emulation only)
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from . import _processor

_HERE = Path(__file__).resolve().parent
_LIBRARY = _HERE / "_csrc.so"
_REASON = _HERE / "_csrc.missing.txt"
# A library of csrc/cuda compiled for the CPU (tests/emulate.py): the CUDA functions then take CPU tensors.
EMULATOR = os.environ.get("MAETOK_FAST_CUDA_EMULATOR", "")
_CURE = "install a C++ compiler (Debian: apt-get install g++) and run `pip install -e .` (or `pip install .`) again"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(library, None) or (None, one sentence on why not); ValueError for an impossible MAETOK_FAST_CPU."""
    _processor.checked(_processor.LEVELS[-1])  # a word that is no level is refused without a library too
    if not _LIBRARY.exists():
        if _REASON.exists():
            return None, f"the native library was not built: {_REASON.read_text().strip()}"
        return None, f"the native library {_LIBRARY.name} is not beside {_HERE}: the package was never installed by pip"
    import torch  # noqa: F401  (its libgomp.so.1 has to be the one that the library finds)

    try:
        import tvm_ffi

        library = tvm_ffi.load_module(str(_LIBRARY))
        own = str(library.cpu_best())
    except Exception as error:  # a wrong platform, a missing libtvm_ffi: whatever the loader says
        return None, f"the native library {_LIBRARY} does not load: {error}"
    if own == "none":
        return None, "the native kernels need an x86-64-v2 processor (SSE4.2)"
    library.cpu_limit(_processor.checked(own))
    return library, None


def why_missing() -> str | None:
    """None when the native library can be used, else the reason in words. Cached."""
    return _load()[1]


def lib() -> Any:
    """The native library, a module with the functions above; RuntimeError with reason and cure if there is none."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"{reason}; {_CURE}")
    return library


@functools.cache
def own_level() -> str:
    """The processor's own instruction set, one of `_processor.LEVELS` or another word (torch's without a library)."""
    if why_missing() is None:
        return str(lib().cpu_best())
    import torch

    has = torch.cpu.get_capabilities().get
    needs = (
        ("amx", ("amx_tile", "amx_bf16", "avx512_bf16")),
        ("avx512bf16", ("avx512_bf16",)),
        ("avx512", ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")),
        ("avx2", ("avx2", "fma3", "f16c", "bmi2")),
        ("v2", ("sse4_2", "popcnt")),
    )
    return next((level for level, features in needs if all(map(has, features))), "generic")


def level() -> str:
    """The instruction set in use: the processor's own or MAETOK_FAST_CPU's; ValueError where that cannot be."""
    return _processor.checked(own_level())


@functools.cache
def _load_cuda() -> tuple[Any, str | None]:
    """(the module with the CUDA functions, None) or (None, why not)."""
    if EMULATOR:
        import tvm_ffi

        try:
            return tvm_ffi.load_module(EMULATOR), None
        except Exception as error:
            return None, f"the emulated CUDA kernels {EMULATOR} do not load: {error}"
    reason = why_missing()
    if reason is None and not lib().cuda_archs():
        reason = "the native library was built without nvcc"
    return (None, reason) if reason is not None else (lib(), lib().cuda_status() or None)


def why_no_cuda(device: str) -> str | None:
    """Why the CUDA C++ kernels cannot run on tensors of this device type ("cuda", "cpu"), or None."""
    if EMULATOR and device != "cpu":
        return "MAETOK_FAST_CUDA_EMULATOR runs the CUDA kernels on CPU tensors"
    if not EMULATOR and device != "cuda":
        return f"the CUDA kernels run on CUDA tensors, these are on {device}"
    return _load_cuda()[1]


def cuda() -> Any:
    """The module with the `<fn>_cuda` functions; RuntimeError with the reason if there is none."""
    module, reason = _load_cuda()
    if module is None:
        raise RuntimeError(f"{reason}")
    return module
