"""The op library. This folder is the package ``maetok_fast.kernels``; it imports nothing of maetok_fast outside itself.

One file per op; an op becomes public by its line below.
"""

from __future__ import annotations

if __name__ != "maetok_fast.kernels":
    # Under a second name every op would be registered twice, and torch silently runs the second body for both handles.
    # The bare name would also shadow the Hugging Face package `kernels`, which transformers looks for.
    raise ImportError(
        f"this folder is the package 'maetok_fast.kernels' and was imported as {__name__!r}; write "
        "`import maetok_fast.kernels`, and install the project with `pip install -e .` if that is not found"
    )

from ._dispatch import backend, forced_backend
from ._op import Op, ops
from ._record import Backend, BackendError, Cost, Sample, drawn
from .activation import bias_gelu, bias_gelu_ref, swiglu, swiglu_ref
from .adaln import adaln, adaln_ref, residual_adaln, residual_adaln_ref
from .augment import diff_augment, diff_augment_ref, draw_augmentation
from .blur import blur_down, blur_down_ref, blur_up, blur_up_ref
from .ema import ema_update, ema_update_ref
from .embed_tokens import decoder_tokens, decoder_tokens_ref, embed_tokens, embed_tokens_ref
from .fp8 import adaln_quantize, fp8_quantize, fp8_quantize_columns, transpose_pad
from .fp8_linear import Fp8Linear, adaln_linear_fp8, why_not_fp8
from .gan_loss import discriminator_loss, discriminator_loss_ref, generator_loss, generator_loss_ref
from .gate_residual import gate_residual, gate_residual_ref
from .gather_tokens import gather_tokens, gather_tokens_ref, scatter_tokens, scatter_tokens_ref
from .hog import hog, hog_ref
from .lpips import lpips_tail, lpips_tail_ref
from .patchgan import affine_act, affine_act_ref, norm_act, norm_act_ref
from .rope_attention import rope_attention, rope_attention_ref, rope_table
from .token_mask import (
    host_mask_count,
    mask_counts,
    mask_counts_ref,
    random_mask,
    random_mask_ref,
    sample_mask,
    sample_visible,
    visible_index,
    visible_index_ref,
)

__all__ = [
    "Backend",
    "BackendError",
    "Cost",
    "Fp8Linear",
    "Op",
    "Sample",
    "adaln",
    "adaln_linear_fp8",
    "adaln_quantize",
    "adaln_ref",
    "affine_act",
    "affine_act_ref",
    "backend",
    "bias_gelu",
    "bias_gelu_ref",
    "blur_down",
    "blur_down_ref",
    "blur_up",
    "blur_up_ref",
    "decoder_tokens",
    "decoder_tokens_ref",
    "diff_augment",
    "diff_augment_ref",
    "discriminator_loss",
    "discriminator_loss_ref",
    "draw_augmentation",
    "drawn",
    "ema_update",
    "ema_update_ref",
    "embed_tokens",
    "embed_tokens_ref",
    "forced_backend",
    "fp8_quantize",
    "fp8_quantize_columns",
    "gate_residual",
    "gate_residual_ref",
    "gather_tokens",
    "gather_tokens_ref",
    "generator_loss",
    "generator_loss_ref",
    "hog",
    "hog_ref",
    "host_mask_count",
    "lpips_tail",
    "lpips_tail_ref",
    "mask_counts",
    "mask_counts_ref",
    "norm_act",
    "norm_act_ref",
    "ops",
    "random_mask",
    "random_mask_ref",
    "residual_adaln",
    "residual_adaln_ref",
    "rope_attention",
    "rope_attention_ref",
    "rope_table",
    "sample_mask",
    "sample_visible",
    "scatter_tokens",
    "scatter_tokens_ref",
    "swiglu",
    "swiglu_ref",
    "transpose_pad",
    "visible_index",
    "visible_index_ref",
    "why_not_fp8",
]
