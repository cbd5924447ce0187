# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""MAETok against an independent, plain implementation of the published architecture: complex-number RoPE, naive
attention over all tokens, no pruning, weights read straight from the state dict by their public names."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maetok_fast import models
from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.positions import resample_grid

ENCODER, DECODER = ViTSize(32, 3, 2), ViTSize(48, 2, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: object) -> MAETok:
    """A tiny tokenizer whose every parameter is random (fresh weights have near-zero gammas and modulations)."""
    defaults = {"image_size": 64, "base_image_size": 64, "num_latent_tokens": 8, "latent_dim": 6}
    torch.manual_seed(seed)
    model = MAETok(MAETokConfig(**{**defaults, "encoder": ENCODER, "decoder": DECODER, **fields}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("freqs"):
                p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 1 else 0.15))
                p.add_(1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0)
    return model.to(dtype).eval()


# ---- the plain implementation --------------------------------------------------------------------------------------


def rotations(sd: dict[str, Tensor], half: str, cfg: MAETokConfig, size: ViTSize, grid: tuple[int, int]) -> list:
    """Per block: unit complex numbers (heads or 1, N, head_dim / 2), or None."""
    h, w = grid
    hd = size.dim // size.heads
    dtype = sd["quant_conv.weight"].dtype
    col = torch.tensor([n % w for n in range(h * w)], dtype=dtype)
    row = torch.tensor([n // w for n in range(h * w)], dtype=dtype)
    if cfg.position == "absolute":
        return [None] * size.depth
    if cfg.position == "axial":
        f = torch.tensor([1 / cfg.rope_theta ** (4 * k / hd) for k in range(hd // 4)], dtype=dtype)
        angle = torch.cat([col[:, None] * f, row[:, None] * f], dim=1)
        return [torch.polar(torch.ones_like(angle), angle)[None]] * size.depth
    freqs = sd[f"{half}.freqs"]
    out = []
    for layer in range(size.depth):
        fx, fy = freqs[0, layer].view(size.heads, 1, -1), freqs[1, layer].view(size.heads, 1, -1)
        angle = col[None, :, None] * fx + row[None, :, None] * fy
        out.append(torch.polar(torch.ones_like(angle), angle))
    return out


def attention(sd: dict[str, Tensor], p: str, x: Tensor, heads: int, cis: Tensor | None, prefix: int) -> Tensor:
    b, n, d = x.shape
    q, k, v = F.linear(x, sd[p + "qkv.weight"], sd[p + "qkv.bias"]).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if cis is not None:
        stop = prefix + cis.shape[1]

        def turn(t: Tensor) -> Tensor:
            c = torch.view_as_complex(t[:, :, prefix:stop].reshape(b, heads, stop - prefix, -1, 2).contiguous()) * cis
            return torch.cat([t[:, :, :prefix], torch.view_as_real(c).flatten(3), t[:, :, stop:]], dim=2)

        q, k = turn(q), turn(k)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).reshape(b, n, d), sd[p + "proj.weight"], sd[p + "proj.bias"])


def mlp(sd: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    x = F.linear(x, sd[p + "fc1.weight"], sd[p + "fc1.bias"])
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return F.linear(x, sd[p + "fc2.weight"], sd[p + "fc2.bias"])


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight + bias


def modulated(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    n = y.shape[1] - shift.shape[1]
    return torch.cat([y[:, :n], y[:, n:] * scale + shift], dim=1)


def cubic(old: int, new: int, dtype: torch.dtype) -> Tensor:
    """(new, old) weights of antialiased bicubic resampling (Keys' kernel, a = -0.5), half-pixel centres."""
    scale = old / new
    stretch = max(scale, 1.0)
    rows = []
    for i in range(new):
        x = (torch.arange(old, dtype=torch.float64) + 0.5 - (i + 0.5) * scale).abs() / stretch
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        w = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        rows.append(w / w.sum())
    return torch.stack(rows).to(dtype)


def positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, 1 + N, D): the cls slot as it is, the rest resampled to the new grid."""
    if old == new:
        return pos
    image = pos[0, 1:].reshape(*old, -1)
    image = torch.einsum("ih,hwd,jw->ijd", cubic(old[0], new[0], pos.dtype), image, cubic(old[1], new[1], pos.dtype))
    return torch.cat([pos[:, :1], image.flatten(0, 1)[None]], dim=1)


def encode(model: MAETok, images: Tensor, mask: Tensor | None = None, sd: dict[str, Tensor] | None = None) -> Tensor:
    cfg = model.config
    sd = model.state_dict() if sd is None else sd
    p, h, w = cfg.patch, images.shape[2] // cfg.patch, images.shape[3] // cfg.patch
    weight = sd["encoder.model.patch_embed.proj.weight"]
    patches = images.reshape(images.shape[0], 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = patches @ weight.flatten(1).T + sd["encoder.model.patch_embed.proj.bias"]
    if mask is not None:
        x = torch.where(mask[..., None], sd["encoder.mask_token"], x)
    x = torch.cat([sd["encoder.model.cls_token"].expand(len(x), -1, -1), x], dim=1)
    old = (cfg.size[0] // p, cfg.size[1] // p)
    x = x + positions(sd["encoder.model.pos_embed"], old, (h, w))
    if cfg.num_latent_tokens:
        z = sd["encoder.latent_tokens"] + sd["encoder.latent_pos_embed"]
        x = torch.cat([x, z.expand(len(x), -1, -1)], dim=1)
    for i, cis in enumerate(rotations(sd, "encoder", cfg, cfg.encoder, (h, w))):
        b = f"encoder.model.blocks.{i}."
        y = norm(x, sd[b + "norm1.weight"], sd[b + "norm1.bias"])
        x = x + sd[b + "ls1.gamma"] * attention(sd, b + "attn.", y, cfg.encoder.heads, cis, 1)
        x = x + sd[b + "ls2.gamma"] * mlp(sd, b + "mlp.", norm(x, sd[b + "norm2.weight"], sd[b + "norm2.bias"]))
    x = norm(x, sd["encoder.model.norm.weight"], sd["encoder.model.norm.bias"])
    x = x[:, -cfg.num_latent_tokens :] if cfg.num_latent_tokens else x[:, 1:]
    return F.linear(x, sd["quant_conv.weight"], sd["quant_conv.bias"])


def decode(model: MAETok, z: Tensor, size: tuple[int, int], sd: dict[str, Tensor] | None = None) -> Tensor:
    cfg = model.config
    sd = model.state_dict() if sd is None else sd
    p, h, w = cfg.out_patch, size[0] // cfg.out_patch, size[1] // cfg.out_patch
    prefix = int(cfg.decoder_cls_token)
    q = F.linear(z, sd["post_quant_conv.weight"], sd["post_quant_conv.bias"])
    x = sd["decoder.mask_token"].expand(len(z), h * w, -1) if cfg.num_latent_tokens else q
    if prefix:
        x = torch.cat([sd["decoder.model.cls_token"].expand(len(z), -1, -1), x], dim=1)
    if cfg.position == "absolute":
        old = (cfg.size[0] // p, cfg.size[1] // p)
        x = x + positions(sd["decoder.model.pos_embed"], old, (h, w))[:, 1 - prefix :]
    if cfg.num_latent_tokens:
        x = torch.cat([x, q + sd["decoder.latent_pos_embed"]], dim=1)
    movq = cfg.decoder_kind == "movqv2"
    for i, cis in enumerate(rotations(sd, "decoder", cfg, cfg.decoder, (h, w))):
        b = f"decoder.model.blocks.{i}."
        if movq:
            m = F.linear(F.silu(z), sd[b + "adaLN_modulation.1.weight"], sd[b + "adaLN_modulation.1.bias"])
            shift_a, scale_a, shift_m, scale_m = m.chunk(4, dim=-1)
            x = x + attention(sd, b + "attn.", modulated(norm(x), shift_a, scale_a), cfg.decoder.heads, cis, prefix)
            x = x + mlp(sd, b + "mlp.", modulated(norm(x), shift_m, scale_m))
        else:
            y = norm(x, sd[b + "norm1.weight"], sd[b + "norm1.bias"])
            x = x + sd[b + "ls1.gamma"] * attention(sd, b + "attn.", y, cfg.decoder.heads, cis, prefix)
            x = x + sd[b + "ls2.gamma"] * mlp(sd, b + "mlp.", norm(x, sd[b + "norm2.weight"], sd[b + "norm2.bias"]))
    if movq:
        k = "decoder.model.norm.adaLN_modulation.1."
        x = modulated(norm(x), *F.linear(F.silu(z), sd[k + "weight"], sd[k + "bias"]).chunk(2, dim=-1))
    else:
        x = norm(x, sd["decoder.model.norm.weight"], sd["decoder.model.norm.bias"])
    x = F.linear(x[:, prefix : prefix + h * w], sd["decoder.to_pixel.model.weight"], sd["decoder.to_pixel.model.bias"])
    return torch.einsum("nhwpqc->nchpwq", x.reshape(len(z), h, w, p, p, 3)).reshape(len(z), 3, h * p, w * p)


def close(ours: Tensor, theirs: Tensor) -> None:
    # fixed (axial) angles are fp32 by definition, as in the public code; everything else follows the weights' dtype
    tolerance = 2e-6 if ours.dtype == torch.float64 else 2e-5
    assert ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


VARIANTS = list(itertools.product(("movqv2", "plain"), (False, True), ("mixed", "axial", "absolute"), (0, 8)))


@pytest.mark.parametrize(("kind", "cls", "position", "count"), VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (128, 128)], ids=["trained", "rectangle", "larger"])
def test_equals_the_plain_implementation(
    kind: str, cls: bool, position: str, count: int, size: tuple[int, int]
) -> None:
    model = build(decoder_kind=kind, decoder_cls_token=cls, position=position, num_latent_tokens=count)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        latents = model.encode(images)
        assert latents.shape == (2, count or size[0] * size[1] // 256, 6)
        close(latents, encode(model, images))
        close(model.decode(latents, size), decode(model, latents, size))


@pytest.mark.parametrize("kind", ["movqv2", "plain"])
def test_fp32_equals_to_rounding(kind: str) -> None:
    model = build(dtype=torch.float32, decoder_kind=kind)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        latents = model.encode(images)
        close(latents, encode(model, images))
        close(model.decode(latents), decode(model, latents, (64, 64)))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patches=st.sampled_from([(8, None), (8, 4), (4, 8)]),
    count=st.integers(1, 5),
    latent_dim=st.integers(1, 7),
    batch=st.integers(1, 3),
    square=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_grid_patch_and_width(
    rows: int, columns: int, patches: tuple, count: int, latent_dim: int, batch: int, square: bool, seed: int
) -> None:
    patch, decoder_patch = patches
    model = build(
        seed,
        image_size=32 if square else (16, 32),
        patch=patch,
        decoder_patch=decoder_patch,
        num_latent_tokens=count,
        latent_dim=latent_dim,
    )
    size = (rows * 8, columns * 8)
    images = torch.randn(batch, 3, *size, dtype=torch.float64)
    mask = torch.rand(batch, (size[0] // patch) * (size[1] // patch)) < 0.5
    with torch.no_grad():
        latents = model.encode(images, mask)
        close(latents, encode(model, images, mask))
        close(model.decode(latents, size), decode(model, latents, size))


@pytest.mark.parametrize("kind", ["movqv2", "plain"])
@pytest.mark.parametrize("position", ["mixed", "absolute"])
@pytest.mark.parametrize("count", [0, 8])
def test_gradients(kind: str, position: str, count: int) -> None:
    """Every parameter's gradient, RoPE frequencies included; what no output reads gets none or zero."""
    model = build(decoder_kind=kind, position=position, num_latent_tokens=count, decoder_cls_token=True)
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.5
    target = torch.randn_like(images)
    ((model(images, mask) - target) ** 2).sum().backward()
    sd = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    ((decode(model, encode(model, images, mask, sd), (48, 64), sd) - target) ** 2).sum().backward()
    for name, p in model.named_parameters():
        theirs = sd[name].grad
        if theirs is None or not theirs.any():
            assert p.grad is None or not p.grad.any(), name
        else:
            assert p.grad is not None, f"{name} got no gradient"
            error = (p.grad - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-5, f"{name}: {error:.2e}"
    assert position != "mixed" or model.encoder.freqs.grad.abs().sum() > 0


def test_mask() -> None:
    model = build()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    nothing, everything = torch.zeros(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model.encode(images, nothing), model.encode(images))
        # fully masked images all look the same
        assert torch.equal(model.encode(images, everything)[:1], model.encode(images.flip(0), everything)[:1])
        mask = torch.rand(2, 16) < 0.5
        hidden = images.clone()
        for b, n in mask.nonzero().tolist():
            hidden[b, :, n // 4 * 16 : n // 4 * 16 + 16, n % 4 * 16 : n % 4 * 16 + 16] = 7.0
        assert torch.equal(model.encode(images, mask), model.encode(hidden, mask))
        assert not torch.equal(model.encode(images, mask), model.encode(images))
        assert torch.equal(model(images, mask), model.decode(model.encode(images, mask)))


def test_rope_tells_rows_from_columns() -> None:
    """A transposed grid is another image: positions come from the grid at hand, not from the stored base grid."""
    model = build()
    wide = model.encoder.rope((2, 8))
    tall = model.encoder.rope((8, 2))
    assert wide[0].shape == tall[0].shape == (2, 2, 16, 8)
    assert not torch.equal(wide[0], tall[0])


def test_the_encoder_is_timms_vit() -> None:
    """With absolute positions and no latent tokens, our encoder is a ViT of timm under the same parameter names."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except Exception as error:
        pytest.skip(f"timm does not import here: {error}")
    model = build(dtype=torch.float32, position="absolute", num_latent_tokens=0)
    theirs = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2, init_values=1e-5, num_classes=0, global_pool=""
    ).eval()
    theirs.load_state_dict(model.encoder.model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(model.encoder(images), theirs.forward_features(images)[:, 1:])


def test_drop_path_keeps_the_expectation_and_rests_in_eval() -> None:
    from maetok_fast.layers import drop_path

    torch.manual_seed(0)
    x = torch.ones(4000, 1, 1)
    y = drop_path(x, 0.25, True)
    assert torch.equal(y, torch.where(y > 0, 1 / 0.75, 0.0))
    assert abs(y.mean() - 1) < 0.05
    assert drop_path(x, 0.25, False) is x
    model = build(decoder_drop_path=0.5)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(model(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


def test_fresh_weights_start_as_published() -> None:
    torch.manual_seed(0)
    model = MAETok(MAETokConfig(image_size=64, encoder=ViTSize(64, 2, 1), decoder=ViTSize(64, 2, 1)))
    sd = model.state_dict()
    assert torch.all(sd["encoder.model.blocks.0.ls1.gamma"] == 1e-5)
    assert not sd["decoder.model.blocks.1.adaLN_modulation.1.weight"].any()
    assert not sd["decoder.model.norm.adaLN_modulation.1.weight"].any()
    assert 0.015 < sd["encoder.latent_tokens"].std() < 0.025
    fx, fy = sd["encoder.freqs"].view(2, 2, 32)
    # 16 magnitudes theta^(-4k/64), each once per half, the halves a quarter turn apart
    magnitude = 10.0 ** -(torch.arange(16) * 4 / 64)
    assert torch.allclose((fx**2 + fy**2).sqrt(), magnitude.repeat(2).expand(2, -1))
    assert torch.allclose(fx[:, :16] * fx[:, 16:] + fy[:, :16] * fy[:, 16:], torch.zeros(2, 16), atol=1e-6)
    assert sd["encoder.freqs_t_x"].tolist() == [n % 16 for n in range(256)]
    assert sd["encoder.freqs_t_y"].tolist() == [n // 16 for n in range(256)]
    again = torch.manual_seed(0) and MAETok(model.config).state_dict()
    assert all(torch.equal(again[k], v) for k, v in sd.items())


@pytest.mark.parametrize(
    ("changes", "millions"),
    [({}, 173.891360), ({"decoder_kind": "plain"}, 172.680992), ({"decoder_cls_token": True}, 173.892128)],
)
def test_parameter_counts(changes: dict, millions: float) -> None:
    with torch.device("meta"):
        model = models.create("maetok-b-128", **changes)
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_public_names_and_shapes() -> None:
    with torch.device("meta"):
        model = models.create("maetok-b-128-512", base_image_size=256)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    expected = {
        "encoder.latent_tokens": (1, 128, 768),
        "encoder.latent_pos_embed": (1, 128, 768),
        "encoder.mask_token": (1, 1, 768),
        "encoder.freqs": (2, 12, 384),
        "encoder.freqs_t_x": (256,),
        "encoder.freqs_t_y": (256,),
        "encoder.model.cls_token": (1, 1, 768),
        "encoder.model.pos_embed": (1, 1025, 768),
        "encoder.model.patch_embed.proj.weight": (768, 3, 16, 16),
        "encoder.model.patch_embed.proj.bias": (768,),
        "encoder.model.norm.weight": (768,),
        "encoder.model.norm.bias": (768,),
        "quant_conv.weight": (32, 768),
        "quant_conv.bias": (32,),
        "post_quant_conv.weight": (768, 32),
        "post_quant_conv.bias": (768,),
        "decoder.mask_token": (1, 1, 768),
        "decoder.latent_pos_embed": (1, 128, 768),
        "decoder.freqs": (2, 12, 384),
        "decoder.freqs_t_x": (256,),
        "decoder.freqs_t_y": (256,),
        "decoder.model.pos_embed": (1, 1025, 768),
        "decoder.model.patch_embed.proj.weight": (768, 3, 16, 16),
        "decoder.model.patch_embed.proj.bias": (768,),
        "decoder.model.norm.adaLN_modulation.1.weight": (1536, 32),
        "decoder.model.norm.adaLN_modulation.1.bias": (1536,),
        "decoder.to_pixel.model.weight": (768, 768),
        "decoder.to_pixel.model.bias": (768,),
    }
    block = {
        "attn.qkv.weight": (2304, 768),
        "attn.qkv.bias": (2304,),
        "attn.proj.weight": (768, 768),
        "attn.proj.bias": (768,),
        "mlp.fc1.weight": (3072, 768),
        "mlp.fc1.bias": (3072,),
        "mlp.fc2.weight": (768, 3072),
        "mlp.fc2.bias": (768,),
    }
    plain = {f"{n}.{k}": (768,) for n, k in itertools.product(("norm1", "norm2"), ("weight", "bias"))}
    plain |= {"ls1.gamma": (768,), "ls2.gamma": (768,)}
    movq = {"adaLN_modulation.1.weight": (3072, 32), "adaLN_modulation.1.bias": (3072,)}
    for i in range(12):
        expected |= {f"encoder.model.blocks.{i}.{k}": v for k, v in (block | plain).items()}
        expected |= {f"decoder.model.blocks.{i}.{k}": v for k, v in (block | movq).items()}
    assert shapes == expected


def test_bf16_and_autocast_run() -> None:
    model = build(dtype=torch.float32)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        low = model.to(torch.bfloat16)(images.bfloat16())
    assert low.dtype == torch.bfloat16
    for y in (mixed, low):
        assert (y.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_autocast_casts_no_fp64() -> None:
    model, images = build(dtype=torch.float32), torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    message = r"model's dtype torch.float32, got torch.float64; use .to\(torch.float32\)$"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        model.encode(images)


def test_compiles_without_graph_breaks() -> None:
    model = build(dtype=torch.float32)
    images, mask = torch.randn(1, 3, 64, 64), torch.rand(1, 16) < 0.5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(images, mask), model(images, mask))
    compiled(images, mask).square().sum().backward()
    assert model.encoder.freqs.grad is not None


BAD_INPUTS = [
    (lambda m, x: m.encode(x[0]), ValueError, r"images: expected shape \(B, 3, H, W\), got \(3, 64, 64\)"),
    (lambda m, x: m.encode(x[:, :1]), ValueError, r"got \(1, 1, 64, 64\)"),
    (lambda m, x: m.encode(x[..., :40]), ValueError, r"images of 64x40 must be a positive multiple of the patch 16"),
    (lambda m, x: m.encode(x[..., :0]), ValueError, r"images: expected shape .*, no size 0, got \(1, 3, 64, 0\)"),
    (lambda m, x: m.encode(x[:0]), ValueError, r"no size 0, got \(0, 3, 64, 64\)"),
    (lambda m, x: m.encode(x.byte()), TypeError, r"images: expected torch.float32, got torch.uint8"),
    (lambda m, x: m.encode(x.half()), TypeError, r"model's dtype torch.float32, got torch.float16"),
    (lambda m, x: m.encode(x.numpy()), TypeError, r"expected a torch.Tensor .* got ndarray"),
    (lambda m, x: m.encode(x, torch.zeros(1, 9, dtype=torch.bool)), ValueError, r"mask: expected shape \(1, 16\)"),
    (lambda m, x: m.encode(x, torch.zeros(1, 16)), TypeError, r"mask: expected torch.bool"),
    (lambda m, x: m.decode(torch.zeros(1, 9, 6)), ValueError, r"latents: expected shape \(B, 8, 6\), got \(1, 9, 6\)"),
    (lambda m, x: m.decode(torch.zeros(1, 8, 6), 60), ValueError, r"size 60x60 must be a positive multiple"),
    *(
        (
            lambda m, x, size=size: m.decode(torch.zeros(1, 8, 6), size),
            ValueError,
            r"size: expected an integer or \(hei",
        )
        for size in (64.0, 64.9, (64.9, 64), (64, 64, 3), "64", (64,), "6", ("64", "64"), torch.ones(2))
    ),
    (lambda m, x: m.decode(torch.zeros(1, 8, 6).double()), TypeError, r"latents: .*torch.float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUTS)
def test_bad_inputs(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(build(dtype=torch.float32), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_kind": "movq"}, "decoder_kind 'movq'"),
        ({"position": "rope"}, "position 'rope'"),
        ({"image_size": "256"}, r"image_size: expected an integer or \(height, width\) in pixels, got '256'"),
        ({"image_size": (256,)}, r"got \(256,\)"),
        ({"patch": "16"}, "patch must be an integer, got '16'"),
        ({"latent_dim": 8.0}, "latent_dim must be an integer, got 8.0"),
        ({"decoder_patch": 0}, "decoder_patch 0 >= 1"),
        ({"image_size": 250}, "250x250 must be a positive multiple of the patch 16"),
        ({"num_latent_tokens": -1}, "must be >= 0"),
        ({"num_latent_tokens": 0, "decoder_patch": 8}, "must equal"),
        ({"encoder": 768}, "encoder must be a ViTSize, got 768"),
        ({"base_image_size": 8}, "base_image_size 8 must be at least a patch of 16"),
        *(
            ({name: value}, f"{name} must be finite, >= 0 and < 1, got {value}")
            for name in ("encoder_drop_path", "decoder_drop_path")
            for value in (1.0, -0.1, math.nan, math.inf)
        ),
        *(
            ({name: value}, f"{name} must be finite, > 0, got {value}")
            for name in ("rope_theta", "latent_std")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(({"latent_mean": value}, "latent_mean must be finite, got") for value in (math.nan, math.inf, -math.inf)),
        ({"rope_theta": "10"}, "rope_theta must be a number, got '10'"),
        ({"latent_std": True}, "latent_std must be a number, got True"),
    ],
)
def test_bad_configs(fields: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MAETokConfig(**fields)


def test_bad_vit_sizes() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ViTSize(36, 2, 6)
    with pytest.raises(TypeError, match="ViTSize: depth must be an integer, got '2'"):
        ViTSize(depth="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ViTSize: mlp_ratio must be a number"):
        ViTSize(mlp_ratio=0)


def test_sizes() -> None:
    model, latents = build(dtype=torch.float32), torch.zeros(1, 8, 6)
    with torch.no_grad():
        for size in (32, (32, 48), [32, 48], np.int64(32), (np.int32(32), 48), torch.Size((32, 48))):
            height, width = (size, size) if isinstance(size, (int, np.integer)) else size
            assert model.decode(latents, size).shape == (1, 3, height, width)
    assert MAETokConfig(image_size=(256, 256)) == MAETokConfig(image_size=np.int64(256)) == MAETokConfig()
    assert MAETokConfig(image_size=[256, 128]).image_size == (256, 128)


@pytest.mark.parametrize("old", [(4, 4), (1, 3), (7, 5)])
@pytest.mark.parametrize("new", [(4, 5), (8, 3), (1, 1), (2, 13)])
def test_resampling_is_torchs(old: tuple[int, int], new: tuple[int, int]) -> None:
    embed = torch.randn(1, old[0] * old[1], 3)
    image = embed.view(1, *old, 3).permute(0, 3, 1, 2)
    theirs = F.interpolate(image, size=new, mode="bicubic", antialias=True).flatten(2).mT
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resample_grid(embed, old, new), theirs, atol=2e-6, rtol=1e-5)


def test_compiled_training_at_changing_sizes() -> None:
    size = ViTSize(16, 1, 2)
    model = build(dtype=torch.float32, position="absolute", encoder=size, decoder=size)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((64, 64), (48, 80)):
        images = torch.randn(1, 3, *shape)
        close(compiled(images), model(images))
        compiled(images).square().sum().backward()
    torch._dynamo.reset()


def test_mask_needs_a_mask_token() -> None:
    model = build(dtype=torch.float32, mask_token=False)
    assert "encoder.mask_token" not in model.state_dict()
    with pytest.raises(ValueError, match="no mask token"):
        model.encode(torch.zeros(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.bool))


def test_image_token_ablation_guesses_a_square_output() -> None:
    model = build(dtype=torch.float32, num_latent_tokens=0)
    with torch.no_grad():
        assert model.decode(torch.zeros(1, 64, 6)).shape == (1, 3, 128, 128)
        assert model.decode(torch.zeros(1, 8, 6), (32, 64)).shape == (1, 3, 32, 64)
        with pytest.raises(ValueError, match="latents: expected shape"):
            model.decode(torch.zeros(1, 8, 6))


COMPILED = [
    {},
    {"position": "absolute"},
    {"position": "axial", "decoder_kind": "plain", "decoder_cls_token": True},
    {"num_latent_tokens": 0},
]


@pytest.mark.parametrize("changes", COMPILED, ids=str)
def test_twelve_sizes_are_two_graphs(changes: dict) -> None:
    """One for the square, whose equal sides torch takes for one size, and one for all others."""
    size = ViTSize(16, 1, 2)
    model = build(dtype=torch.float32, encoder=size, decoder=size, **changes)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda module, inputs: graphs.append(module) or module
    )
    with torch.no_grad():
        for rows in range(4, 16):
            images = torch.rand(2, 3, 16 * rows, 64)
            close(compiled(images), model(images))
    torch._dynamo.reset()
    assert len(graphs) <= 2


@pytest.mark.parametrize("count", [0, 8])
@pytest.mark.parametrize("position", ["mixed", "axial", "absolute"])
@pytest.mark.parametrize("kind", ["plain", "movqv2"])
def test_what_no_input_reaches_does_not_require_gradients(kind: str, position: str, count: int) -> None:
    model = build(dtype=torch.float32, decoder_kind=kind, position=position, num_latent_tokens=count)
    images, mask = torch.rand(2, 3, 64, 64), torch.rand(2, 16) < 0.5
    model(images, mask).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.numel() == 0 or parameter.grad.any(), f"{name} is never read"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"decoder.model.patch_embed.proj.weight", "decoder.model.patch_embed.proj.bias"} <= frozen
    assert ("decoder.model.pos_embed" in frozen) == (position != "absolute")
