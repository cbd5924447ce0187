# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""SiT and LightningDiT against plain implementations that read the state dict by its public names."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maetok_fast import models
from maetok_fast.models import LightningDiT, LightningDiTConfig, SiT, SiTConfig
from maetok_fast.positions import sincos_1d, sincos_2d

TINY: dict[str, Any] = {"channels": 5, "dim": 48, "depth": 2, "heads": 4, "num_classes": 10}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind: type, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**TINY, **fields}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 1 else 0.15))
    return model.to(dtype).eval()


# ---- the plain implementation --------------------------------------------------------------------------------------


def reference(model: Any, x: Tensor, t: Tensor, y: Tensor, sd: dict[str, Tensor] | None = None) -> Tensor:
    """The public network's own output (in its own time convention)."""
    cfg = model.config
    sd = model.state_dict() if sd is None else sd
    lightning = isinstance(cfg, LightningDiTConfig)
    one_d = isinstance(cfg.tokens, int)

    def linear(name: str, v: Tensor) -> Tensor:
        return F.linear(v, sd[name + ".weight"], sd[name + ".bias"])

    def norm(v: Tensor, name: str) -> Tensor:
        if lightning and cfg.rmsnorm:
            return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * sd[name + ".weight"]
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def head_norm(v: Tensor, name: str) -> Tensor:
        if not cfg.qk_norm:
            return v
        if lightning and cfg.rmsnorm:
            return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * sd[name + ".weight"]
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return v * sd[name + ".weight"] + sd[name + ".bias"]

    half = 128
    frequencies = torch.tensor([math.exp(-math.log(10000) * k / half) for k in range(half)], dtype=x.dtype)
    angles = t[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + sd["y_embedder.embedding_table.weight"][y])

    b, p = x.shape[0], cfg.patch
    if one_d:
        tokens = linear("x_embedder", x)
    else:
        h, w = cfg.tokens[0] // p, cfg.tokens[1] // p
        patches = x.reshape(b, cfg.channels, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, -1)
        tokens = patches @ sd["x_embedder.proj.weight"].flatten(1).T + sd["x_embedder.proj.bias"]
    tokens = tokens + sd["pos_embed"]
    n, d, heads = tokens.shape[1], cfg.dim, cfg.heads
    hd = d // heads
    cis = None
    if lightning and cfg.rope and not one_d:
        f = torch.tensor([10000.0 ** (-2 * k / (hd // 2)) for k in range(hd // 4)], dtype=x.dtype)
        row = torch.tensor([i // w for i in range(n)], dtype=x.dtype)
        col = torch.tensor([i % w for i in range(n)], dtype=x.dtype)
        angle = torch.cat([row[:, None] * f, col[:, None] * f], dim=1)
        cis = torch.polar(torch.ones_like(angle), angle)

    def turn(v: Tensor) -> Tensor:
        if cis is None:
            return v
        return torch.view_as_real(torch.view_as_complex(v.reshape(b, heads, n, -1, 2).contiguous()) * cis).flatten(3)

    for i in range(cfg.depth):
        k = f"blocks.{i}."
        m = linear(k + "adaLN_modulation.1", c)[:, None]
        if lightning and not cfg.shift:
            scale_a, gate_a, scale_m, gate_m = m.chunk(4, dim=-1)
            shift_a = shift_m = torch.zeros_like(scale_a)
        else:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m.chunk(6, dim=-1)
        v = norm(tokens, k + "norm1") * (1 + scale_a) + shift_a
        q, key, value = linear(k + "attn.qkv", v).reshape(b, n, 3, heads, hd).permute(2, 0, 3, 1, 4)
        q, key = turn(head_norm(q, k + "attn.q_norm")), turn(head_norm(key, k + "attn.k_norm"))
        v = (q @ key.transpose(-1, -2) * hd**-0.5).softmax(-1) @ value
        tokens = tokens + gate_a * linear(k + "attn.proj", v.transpose(1, 2).reshape(b, n, d))
        v = norm(tokens, k + "norm2") * (1 + scale_m) + shift_m
        if lightning and cfg.swiglu:
            both = linear(k + "mlp.w12", v)
            width = both.shape[-1] // 2
            v = linear(k + "mlp.w3", F.silu(both[..., :width]) * both[..., width:])
        else:
            v = linear(k + "mlp.fc1", v)
            v = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            v = linear(k + "mlp.fc2", v)
        tokens = tokens + gate_m * v
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(tokens, "final_layer.norm_final") * (1 + scale) + shift)
    if not one_d:
        out = torch.einsum("nhwpqc->nchpwq", out.reshape(b, h, w, p, p, -1)).reshape(b, -1, h * p, w * p)
    return out[:, :, : cfg.channels] if one_d else out[:, : cfg.channels]


def inputs(config: SiTConfig, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shape = (config.tokens, config.channels) if isinstance(config.tokens, int) else (config.channels, *config.tokens)
    return torch.randn(batch, *shape, dtype=dtype), torch.rand(batch, dtype=dtype), torch.tensor([3, 10, 0, 7])[:batch]


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


LATENTS = [{"tokens": 7}, {"tokens": (8, 8), "patch": 2}, {"tokens": (4, 6), "patch": 1}]


@pytest.mark.parametrize("latents", LATENTS, ids=["1d", "patch2", "rectangle"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sigma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sit(latents: dict, qk_norm: bool, sigma: bool, dtype: torch.dtype) -> None:
    model = build(SiT, dtype, qk_norm=qk_norm, learn_sigma=sigma, **latents)
    x, t, y = inputs(model.config, dtype=dtype)
    with torch.no_grad():
        # the sigma outputs of 1-D latents do not exist publicly; ours drops the last C channels likewise
        close(model(x, t, y), reference(model, x, t, y), 1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("latents", LATENTS, ids=["1d", "patch2", "rectangle"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rmsnorm", [False, True])
@pytest.mark.parametrize(("swiglu", "shift", "rope"), [(True, True, True), (False, True, False), (True, False, True)])
def test_lightningdit(latents: dict, qk_norm: bool, rmsnorm: bool, swiglu: bool, shift: bool, rope: bool) -> None:
    switches = {"qk_norm": qk_norm, "rmsnorm": rmsnorm, "swiglu": swiglu, "shift": shift, "rope": rope}
    model = build(LightningDiT, time="maetok", **switches, **latents)
    x, t, y = inputs(model.config)
    with torch.no_grad():
        close(model(x, t, y), reference(model, x, t, y), 2e-6)  # fp32 angles, as in the public code


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
def test_official_time_convention_is_flipped(kind: type) -> None:
    """Weights trained with t = 1 data: our t = 0 is their t = 1, and our v = noise - data is minus theirs."""
    model = build(kind, tokens=(4, 4), time="sit")
    x, t, y = inputs(model.config)
    with torch.no_grad():
        close(model(x, t, y), -reference(model, x, 1 - t, y), 2e-6)
    assert LightningDiTConfig().time == "sit"
    assert SiTConfig().time == "maetok"


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
def test_compiles_without_graph_breaks(kind: type) -> None:
    model = build(kind, torch.float32, tokens=(4, 4))
    x, t, y = inputs(model.config, dtype=torch.float32)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y), model(x, t, y), 2e-5)


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
def test_gradients(kind: type) -> None:
    model = build(kind, tokens=(4, 4), qk_norm=True, time="maetok")
    x, t, y = inputs(model.config)
    model(x, t, y).square().sum().backward()
    sd = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    reference(model, x, t, y, sd).square().sum().backward()
    # without RoPE a k_norm bias shifts all scores of a query alike: its true gradient is zero, hence the floor
    largest = max(v.grad.abs().max() for k, v in sd.items() if k != "pos_embed" and v.grad is not None)
    for name, p in model.named_parameters():
        if name == "pos_embed":
            assert p.grad is None
            continue
        theirs = sd[name].grad
        error = (p.grad - theirs).abs().max() / max(theirs.abs().max(), 1e-6 * largest)
        assert error < 1e-5, f"{name}: {error:.2e}"


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 4), batch=st.integers(1, 3), kind=st.sampled_from([SiT, LightningDiT]), one_d=st.booleans())
def test_hoisted_modulations(steps: int, batch: int, kind: type, one_d: bool) -> None:
    """Modulations of all steps at once, taken apart by rows, give every step's forward."""
    model = build(kind, tokens=6 if one_d else (2, 4))
    x, _, y = inputs(model.config, batch)
    times = torch.rand(steps, dtype=torch.float64)
    with torch.no_grad():
        c = model.condition(times.repeat_interleave(batch), y.repeat(steps))
        assert c.shape == (steps * batch, 48)
        all_steps = model.modulations(c)
        assert len(all_steps.blocks) == 2
        assert all_steps.blocks[0].shape == (steps * batch, 6 * 48)
        assert all_steps.final.shape == (steps * batch, 2 * 48)
        for i in range(steps):
            one = all_steps.rows(slice(i * batch, (i + 1) * batch))
            close(model.forward_modulated(x, one), model(x, times[i].expand(batch), y), 1e-12)


def test_label_dropout() -> None:
    model = build(SiT, tokens=4, label_dropout=0.25)
    embedder = model.y_embedder
    y = torch.zeros(4000, dtype=torch.int64)
    null = embedder.embedding_table.weight[10]
    assert not (embedder(y) == null).all(1).any()
    torch.manual_seed(0)
    rate = (embedder.train()(y) == null).all(1).double().mean()
    assert abs(rate - 0.25) < 0.03
    assert build(SiT, tokens=4, label_dropout=0.0).y_embedder.embedding_table.weight.shape == (10, 48)


def test_positions_equal_the_published_tables() -> None:
    """MAE's 2-D table from its definition (the mesh puts columns first), and Vaswani's 1-D one."""
    dim, (h, w) = 16, (3, 5)
    columns, rows = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))

    def axis(pos: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
        out = pos.reshape(-1, 1) * omega
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    expected = np.concatenate([axis(columns), axis(rows)], axis=1)
    np.testing.assert_allclose(sincos_2d(dim, (h, w)).numpy(), expected, atol=1e-7)
    table = sincos_1d(8, 4)
    assert table[2, 0] == pytest.approx(math.sin(2))
    assert table[2, 1] == pytest.approx(math.cos(2))
    assert table[3, 4] == pytest.approx(math.sin(3 / 10000 ** (4 / 8)), rel=1e-5)
    with pytest.raises(ValueError, match="even"):
        sincos_1d(7, 2)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(6, (2, 2))


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [
        ("sit-xl-1", 675_000_608, 292),
        ("sit-l-1", 457_988_128, 252),
        ("sit-b-1", 130_426_400, 132),
        ("lightningdit-xl-1", 675_256_736, None),
    ],
)
def test_parameter_counts(name: str, count: int, tensors: int | None) -> None:
    with torch.device("meta"):
        model = models.create(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert tensors is None or len(model.state_dict()) == tensors


def test_public_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.create("sit-xl-1").state_dict().items()}
    assert shapes["pos_embed"] == (1, 128, 1152)
    assert shapes["x_embedder.weight"] == (1152, 32)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["t_embedder.mlp.2.weight"] == (1152, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2304, 1152)
    names = {k.split(".", 2)[2] for k in shapes if k.startswith("blocks.")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert names == {f"{n}.{k}" for n, k in itertools.product(layers, ("weight", "bias"))}
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.create("lightningdit-xl-1").state_dict().items()}
    assert shapes["feat_rope.freqs_cos"] == (256, 72)
    assert shapes["blocks.0.mlp.w12.weight"] == (6144, 1152)
    assert shapes["blocks.0.norm1.weight"] == (1152,)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.create("sit-xl-2").state_dict().items()}
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["pos_embed"] == (1, 1024, 1152)


def test_fresh_weights_start_at_zero_velocity() -> None:
    torch.manual_seed(0)
    model = SiT(SiTConfig(**{**TINY, "tokens": 4}))
    x, t, y = inputs(model.config, dtype=torch.float32)
    assert not model(x, t, y).any()
    assert not model.pos_embed.requires_grad
    assert not model.blocks[0].adaLN_modulation[1].weight.any()
    bound = math.sqrt(6 / (48 + 3 * 48))
    assert 0.9 * bound < model.blocks[0].attn.qkv.weight.abs().max() <= bound
    assert 0.015 < model.y_embedder.embedding_table.weight.std() < 0.025


BAD_INPUTS = [
    (lambda m, x, t, y: m(x[0], t, y), ValueError, r"t: expected shape \(4,\)|x: expected shape"),
    (lambda m, x, t, y: m(x[:, :3], t, y), ValueError, r"x: expected shape \(B, 4, 5\), got \(3, 3, 5\)"),
    (lambda m, x, t, y: m(x.double(), t, y), TypeError, r"x: .*torch.float64"),
    (lambda m, x, t, y: m(x, t[:2], y), ValueError, r"t: expected shape \(3,\), got \(2,\)"),
    (lambda m, x, t, y: m(x, t.long(), y), TypeError, r"t: expected a floating dtype"),
    (lambda m, x, t, y: m(x, 0.5, y), TypeError, r"t: expected a torch.Tensor of shape \(3,\), got float"),
    (lambda m, x, t, y: m(x, t, y[:1]), ValueError, r"y: expected shape \(3,\), got \(1,\)"),
    (lambda m, x, t, y: m(x, t, y + 1), ValueError, r"y: class labels must be 0 \.\. 10 \(10 = no class\); got 11"),
    (lambda m, x, t, y: m(x, t, y - 1), ValueError, r"y: class labels .*; got -1"),
    (lambda m, x, t, y: m(x[:0], t[:0], y[:0]), ValueError, r"t: expected shape \(B,\), no size 0, got \(0,\)"),
    (lambda m, x, t, y: m(x, t, y.float()), TypeError, r"y: expected torch.int64 class labels, got torch.float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUTS)
def test_bad_inputs(call: Any, error: type, message: str) -> None:
    model = build(SiT, torch.float32, tokens=4)
    with pytest.raises(error, match=message):
        call(model, *inputs(model.config, dtype=torch.float32))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SiTConfig, {"tokens": 4, "patch": 2}, "1-D latents need"),
        (SiTConfig, {"tokens": (5, 4), "patch": 2}, "multiples of patch 2"),
        (SiTConfig, {"heads": 7}, "multiple of heads"),
        (SiTConfig, {"time": "dit"}, "time 'dit'"),
        (SiTConfig, {"depth": "2"}, "SiTConfig: depth must be an integer, got '2'"),
        (SiTConfig, {"heads": 16.0}, "heads must be an integer, got 16.0"),
        (SiTConfig, {"label_dropout": 2}, r"label_dropout must be a probability in \[0, 1\], got 2"),
        (SiTConfig, {"label_dropout": -1}, "label_dropout must be"),
        (SiTConfig, {"label_dropout": "0.1"}, "label_dropout must be"),
        (SiTConfig, {"tokens": "128"}, "the latent grid 128 must be"),
        (SiTConfig, {"tokens": (16, 16.0)}, "the latent grid .* must be"),
        (SiTConfig, {"tokens": [16, 16]}, r"the latent grid \[16, 16\] must be a tuple"),
        (SiTConfig, {"mlp_ratio": 0}, "SiTConfig: mlp_ratio must be a number with dim"),
        (SiTConfig, {"mlp_ratio": math.nan}, "mlp_ratio must be"),
        (SiTConfig, {"mlp_ratio": math.inf}, "mlp_ratio must be"),
        (SiTConfig, {"label_dropout": math.nan}, "label_dropout must be"),
        (SiTConfig, {"label_dropout": True}, "label_dropout must be"),
        (SiTConfig, {"tokens": True}, "tokens must be an integer, got True"),
        (SiTConfig, {"tokens": 0}, "tokens must be at least 1, got 0"),
        (SiTConfig, {"tokens": (True, 4)}, "the latent grid .* must be"),
        (LightningDiTConfig, {"mlp_ratio": 1 / 1152}, "leaves SwiGLU no hidden width"),
        (LightningDiTConfig, {"mlp_ratio": math.nan}, "LightningDiTConfig: mlp_ratio must be"),
        (LightningDiTConfig, {"dim": 24, "heads": 4}, "divisible by 4 for 2-D RoPE"),
    ],
)
def test_bad_configs(kind: type, fields: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**fields)


def test_presets() -> None:
    table = models.presets()
    for name in ("maetok-b-128", "maetok-b-128-512", "sit-xl-1", "sit-l-1", "sit-b-1", "sit-s-1", "sit-xl-2"):
        assert name in table
    assert table["maetok-b-128-512"].image_size == 512
    assert table["sit-xl-2"].tokens == (64, 64)
    with torch.device("meta"):
        for name in ("maetok-s-64-plain", "maetok-b-0", "sit-s-2-256", "lightningdit-s-1d"):
            assert models.create(name).config == table[name]
        assert models.create("sit-b-1", qk_norm=True).config.qk_norm
    with pytest.raises(ValueError, match="no preset 'sit-xl'; choose one of"):
        models.create("sit-xl")
    with pytest.raises(ValueError, match="SiTConfig has no field width"):
        models.create("sit-b-1", width=3)


def test_import_is_lazy_and_needs_neither_timm_nor_torchvision() -> None:
    code = """
import sys
import maetok_fast.models
assert "maetok_fast.models.tokenizer" not in sys.modules
for name in ("timm", "torchvision", "huggingface_hub", "safetensors"):
    sys.modules[name] = None  # any import of them now fails
import torch
from maetok_fast import models
assert "MAETok" in dir(models)
size = models.ViTSize(32, 1, 2)
model = models.MAETok(models.MAETokConfig(image_size=32, encoder=size, decoder=size))
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = models.Nothing
