# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Bottlenecks of the tokenizer, drop mode and auxiliary decoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maetok_fast.kernels import visible_index
from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.models.auxiliary import AuxiliaryDecoders, CaptionDecoder
from maetok_fast.models.bottlenecks import SoftVQ, gaussian, kl_loss

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = ViTSize(32, 2, 2)
CONFIG = MAETokConfig(
    image_size=32, base_image_size=32, patch=8, num_latent_tokens=5, latent_dim=6, encoder=SIZE, decoder=SIZE,
    codebook_size=20,
)  # fmt: skip


def awake(model: nn.Module) -> nn.Module:
    """No gate, scale or modulation of zero, behind which nothing would show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and p.abs().max() < 1e-3:
                p.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["ae", "kl", "softvq"])
def test_a_bottleneck_comes_back_from_its_files(tmp_path: Path, kind: str) -> None:
    model = awake(MAETok(replace(CONFIG, bottleneck=kind))).eval()
    model.save_pretrained(tmp_path)
    again = MAETok.from_pretrained(tmp_path)
    assert again.config.bottleneck == kind
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(again.encode(images), model.encode(images))
    assert model.encode(images).shape == (2, 5, 6)


def test_kl_is_torchs_own_divergence() -> None:
    model = awake(MAETok(replace(CONFIG, bottleneck="kl"))).double().eval()
    images = torch.rand(3, 3, 32, 32).double()
    mean, log_variance = gaussian(model.quant_conv(model.encoder(images)))
    torch.testing.assert_close(model.encode(images), mean)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).sum() / 3
    torch.manual_seed(5)
    latents, losses = model.latents_and_loss(images)
    torch.testing.assert_close(losses["kl"], expected.float())
    torch.manual_seed(5)
    torch.testing.assert_close(latents, mean + (0.5 * log_variance).exp() * torch.randn_like(mean))


def test_kl_of_a_standard_normal_is_zero() -> None:
    assert kl_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)) == 0


def test_softvq_is_its_formula() -> None:
    layer, h = SoftVQ(20, 6).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    latents, loss = layer(h)
    assert loss.dtype == torch.float32
    codes = layer.embedding.weight / layer.embedding.weight.norm(dim=1, keepdim=True)
    cosine = torch.stack([torch.stack([F.cosine_similarity(t, c, 0) for c in codes]) for t in h.flatten(0, 1)])
    p = torch.exp(cosine / 0.07) / torch.exp(cosine / 0.07).sum(1, keepdim=True)
    torch.testing.assert_close(latents.flatten(0, 1), p @ codes, atol=1e-7, rtol=1e-6)
    q = (cosine.float() / 0.01).softmax(1)
    entropy = torch.distributions.Categorical(q).entropy().mean()
    expected = entropy - torch.distributions.Categorical(q.mean(0)).entropy()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_softvq_is_as_sure_under_autocast() -> None:
    layer, h = SoftVQ(50, 6), torch.randn(2, 5, 6).bfloat16()
    latents, loss = layer(h.float())
    with torch.autocast("cpu", torch.bfloat16):
        low, low_loss = layer(h)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, latents.bfloat16())
    assert torch.equal(low_loss, loss)


def test_softvqs_loss_wants_sure_tokens_and_all_codes() -> None:
    layer = SoftVQ(4, 4)
    layer.embedding.weight.data.copy_(torch.eye(4))
    sure_and_all, sure_of_one = torch.eye(4)[None], torch.eye(4)[:1].expand(1, 4, 4)
    assert layer(sure_and_all)[1] < layer(sure_of_one)[1] - 1


@pytest.mark.parametrize("position", ["mixed", "axial", "absolute"])
@pytest.mark.parametrize("latents", [5, 0])
def test_dropped_patches_are_as_if_they_had_never_been(position: str, latents: int) -> None:
    """Against the blocks with all keys of dropped patches masked away, in fp64; gradients too."""
    config = replace(CONFIG, position=position, num_latent_tokens=latents)
    model = awake(MAETok(config)).double().eval()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 16).argsort(1) < 7
    kept = visible_index(mask, 9)
    result = model.encode(images, mask, kept)

    # the same by hand: every block over all tokens, dropped ones invisible to all others
    encoder = model.encoder
    x = encoder.embed(images, None)
    visible = torch.ones(3, x.shape[1], dtype=torch.bool)
    visible[:, 1:17] = ~mask
    for block, table in zip(encoder.model.blocks, encoder.rope((4, 4))):
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if table is not None:
            cos, sin = table.double()
            q, k = (_rotated(t, cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
        x = x + block.ls1.gamma * block.attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    x = encoder.model.norm(x)
    if latents:
        expected = model.quant_conv(x[:, -latents:])
    else:
        tokens = torch.where(mask[..., None], encoder.mask_token, x[:, 1:17])
        expected = model.quant_conv(tokens)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    (a,) = torch.autograd.grad((result * weights).sum(), images, retain_graph=True)
    (b,) = torch.autograd.grad((expected * weights).sum(), images)
    torch.testing.assert_close(a, b)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, heads, N, D): tokens 1 .. 16 turned, pairs (2j, 2j + 1)."""
    even, odd = x[:, :, 1:17, 0::2], x[:, :, 1:17, 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([x[:, :, :1], turned, x[:, :, 17:]], 2)


def test_auxiliary_decoders_have_the_public_names_and_shapes() -> None:
    config = MAETokConfig()
    with torch.device("meta"):
        model = AuxiliaryDecoders(config, {"hog": 108, "dino": 1024, "clip": 1152})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, width in (("hog", 108), ("dino", 1024), ("clip", 1152)):
        assert shapes[f"to_pixel_{name}.weight"] == (width, 192)
        assert shapes[f"post_quant_conv_{name}.weight"] == (192, 32)
        assert shapes[f"decoder_{name}.model.blocks.2.adaLN_modulation.1.weight"] == (4 * 192, 32)
        assert shapes[f"decoder_{name}.freqs"] == (2, 3, 96)
        assert f"decoder_{name}.to_pixel.model.weight" not in shapes


@pytest.mark.parametrize("latents", [5, 0])
def test_an_auxiliary_decoder_is_the_tokenizers_with_another_last_layer(latents: int) -> None:
    """Equal weights, equal results: the decoder of the tokenizer itself, patches instead of pixels."""
    config = replace(CONFIG, num_latent_tokens=latents)
    model = awake(MAETok(config)).double().eval()
    auxiliary = AuxiliaryDecoders(config, {"hog": 192}, SIZE).double().eval()
    auxiliary.decoder_hog.load_state_dict(
        {k: v for k, v in model.decoder.state_dict().items() if not k.startswith("to_pixel")}
    )
    auxiliary.post_quant_conv_hog.load_state_dict(model.post_quant_conv.state_dict())
    auxiliary.to_pixel_hog.load_state_dict(model.decoder.to_pixel.model.state_dict())
    z = torch.randn(2, latents or 16, 6, dtype=torch.float64)
    found = auxiliary(z, (4, 4))["hog"]
    images = model.decode(z, 32)
    patches = images.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 192)
    torch.testing.assert_close(found, patches)


def test_every_parameter_of_an_auxiliary_decoder_is_trained() -> None:
    auxiliary = awake(AuxiliaryDecoders(CONFIG, {"hog": 108, "vit_tiny.x": 7}, SIZE))
    found = auxiliary(torch.randn(2, 5, 6), (4, 6))
    assert found["vit_tiny.x"].shape == (2, 24, 7)
    sum(t.square().sum() for t in found.values()).backward()  # type: ignore[union-attr]
    assert [n for n, p in auxiliary.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_caption_is_told_from_its_other_words_and_the_latents() -> None:
    model = awake(CaptionDecoder(6, 50, 9, SIZE)).eval()
    ids, z = torch.randint(0, 50, (2, 9)), torch.randn(2, 5, 6)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 3] = True
    base = model(z, ids, mask)
    assert base.shape == (2, 9, 50)
    hidden = ids.clone()
    hidden[:, 3] = (ids[:, 3] + 1) % 50
    assert torch.equal(model(z, hidden, mask), base)  # what is hidden does not show
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 50
    assert not torch.allclose(model(z, other, mask)[:, 3], base[:, 3])
    assert not torch.allclose(model(z + 1, ids, mask)[:, 3], base[:, 3])
