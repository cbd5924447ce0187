# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The things that throughput.py times: models that share one set of weights, and one step of each kind.

Generators: `ours` holds fp32 masters; the peers' parameters ARE those tensors (or one bf16 copy of them), and the
1024-token peer shares the 128-token one's blocks. So SiT-XL fits once, and everyone computes with the same weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import load_needed
from benchmarks.baselines import maetok as plain_maetok
from benchmarks.baselines import sit as plain_sit
from benchmarks.baselines.sdvae import SDVAEDecoder
from maetok_fast.diffusion import LINEAR, sample_times

CLASSES = 1000
GUIDANCE = 1.5


@dataclass(frozen=True)
class Size:
    """Sizes of the generator (depth, dim, heads) and of both halves of the tokenizer."""

    generator: tuple[int, int, int]
    tokenizer: tuple[int, int, int] = (12, 768, 12)


SIZES = {f"sit-{name}": Size(sizes) for name, sizes in plain_sit.SIZES.items()} | {
    "tiny": Size((2, 64, 4), (2, 128, 2))
}


def fill(tensors: Iterable[Tensor], *, only_zeros: bool = False, std: float = 0.02) -> None:
    """Small normal values, quickly (one tile of noise repeated). Nothing stays zero: zero gates would let a kernel
    work on zeros and denormals, which is not what it will meet."""
    tile: Tensor | None = None
    with torch.no_grad():
        for tensor in tensors:
            if only_zeros and tensor.count_nonzero():
                continue
            if tile is None or tile.device != tensor.device:
                generator = torch.Generator(tensor.device).manual_seed(0)
                tile = torch.randn(2**22 + 1, generator=generator, device=tensor.device) * std
            for part in tensor.view(-1).split(len(tile)):
                part.copy_(tile[: len(part)])


def grid_shape(resolution: int) -> tuple[int, int, int]:
    """Latents of the f8 VAE that token-heavy generators use: (4, res/8, res/8), cut into 2x2 patches."""
    return 4, resolution // 8, resolution // 8


class Generators:
    """SiT of one size: ours on `tokens` latents, the plain peers on the same and on the VAE's grid."""

    def __init__(self, size: Size, tokens: int, resolution: int, device: torch.device) -> None:
        from maetok_fast.models import SiT, SiTConfig

        depth, dim, heads = size.generator
        self.size, self.device = size, device
        self.shapes: dict[str, tuple[int, ...]] = {"few": (tokens, 32), "many": grid_shape(resolution)}
        with torch.device("meta"):
            ours = SiT(SiTConfig(tokens=tokens, channels=32, dim=dim, depth=depth, heads=heads, num_classes=CLASSES))
        self.ours = ours.to_empty(device=device)
        fill(self.ours.state_dict().values())
        self.state = {name: tensor.detach() for name, tensor in self.ours.state_dict().items()}
        with torch.device("meta"):
            extra = plain_sit.SiT(self.shapes["many"], 0, dim, heads, classes=CLASSES).to_empty(device=device)
        names = ("x_embedder.", "pos_embed", "final_layer.linear.")
        self.grid_state = {k: v.detach() for k, v in extra.state_dict().items() if k.startswith(names)}
        fill(self.grid_state.values())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.ours.parameters())

    def plain(self, which: str, dtype: torch.dtype | None = None, state: dict[str, Tensor] | None = None) -> Any:
        """The peer on "few" or "many" tokens, sharing `state`'s tensors (the masters by default)."""
        state = self.state if state is None else state
        if which == "many":
            grid = self.grid_state if dtype is None else {k: v.to(dtype) for k, v in self.grid_state.items()}
            state = state | grid
        depth, dim, heads = self.size.generator
        with torch.device("meta"):
            model = plain_sit.SiT(self.shapes[which], depth, dim, heads, classes=CLASSES)
        load_needed(model, state, assign=True)
        return model

    def inputs(self, which: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Latents ~ N(0, 1) and labels."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, *self.shapes[which], generator=generator)
        y = torch.randint(CLASSES, (batch,), generator=generator)
        return x.to(self.device, dtype), y.to(self.device)


def train_step(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of the velocity loss under autocast (None: fp32); gradients are dropped afterwards."""

    def step() -> None:
        t = sample_times(len(x), device=x.device)
        noise = torch.randn_like(x)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            v = model(LINEAR.mix(x, noise, t), t, y)
        (v.float() - LINEAR.velocity(x, noise, t)).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


# Ours measures once on a machine which kernels are the fastest, in the first call of each shape. One block's worth of
# that ahead of the clock: a step that is timed once would hold the race.


@contextlib.contextmanager
def _first_block(model: Any) -> Iterator[None]:
    blocks = model.blocks
    model.blocks = blocks[:1]
    try:
        yield
    finally:
        model.blocks = blocks


def race_training(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None) -> None:
    """The products and the attention of `train_step`."""
    with _first_block(model):
        train_step(model, x, y, autocast)()


def race_attention(fast: Any, x: Tensor, y: Tensor) -> None:
    """Of a prepared generator, whose products were raced when it was prepared."""
    with _first_block(fast.model):
        fast(x, torch.full((len(x),), 0.5, device=x.device), y)


def optimizer_step(model: nn.Module, fused: bool) -> Callable[[], None]:
    """AdamW on all parameters with gradients in place; fused=False is what `AdamW(parameters)` does by default."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)
    options: dict[str, Any] = {"fused": True} if fused else {}
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, **options).step


def make_tokenizer(size: Size, tokens: int, resolution: int, checkpoint: str | None, device: torch.device) -> Any:
    """Our MAETok in fp32, from a checkpoint or randomly initialised."""
    from maetok_fast.models import MAETok, MAETokConfig, ViTSize

    if checkpoint is not None:
        model = MAETok.from_pretrained(checkpoint)
    else:
        torch.manual_seed(0)
        depth, dim, heads = size.tokenizer
        vit = ViTSize(dim=dim, depth=depth, heads=heads)
        model = MAETok(MAETokConfig(image_size=resolution, num_latent_tokens=tokens, encoder=vit, decoder=vit))
        fill(model.parameters(), only_zeros=True)
    return model.to(device).eval().requires_grad_(False)


def plain_tokenizer(ours: Any, dtype: torch.dtype) -> Any:
    """The plain peer of our tokenizer with the same weights. Raises ValueError for variants it does not have."""
    config = ours.config
    if config.position != "mixed" or config.encoder != config.decoder or config.size[0] != config.size[1]:
        raise ValueError("the plain tokenizer knows square images, mixed RoPE and equal halves only")
    if config.out_patch != config.patch or not config.num_latent_tokens:
        raise ValueError("the plain tokenizer knows one patch size and at least one latent token only")
    with torch.device("meta"):
        model = plain_maetok.MAETok(
            config.size[0],
            config.num_latent_tokens,
            config.latent_dim,
            config.encoder.dim,
            config.encoder.depth,
            config.encoder.heads,
            config.patch,
            movq=config.decoder_kind == "movqv2",
            decoder_cls=config.decoder_cls_token,
        )
    state = {name: tensor.to(dtype) for name, tensor in ours.state_dict().items()}
    load_needed(model, state, assign=True)
    return model.eval().requires_grad_(False)


def count_gflops(fn: Callable[[], Any]) -> float:
    """GFLOPs (MAC x 2) of the matrix products and convolutions that `fn` runs on meta tensors."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fn()
    return counter.get_total_flops() / 1e9


def count_all(size: Size, tokens: int, resolution: int, latent_dim: int = 32) -> dict[str, float]:
    """GFLOPs per image of one forward of each part, counted on the plain peers, naive attention included."""
    depth, dim, heads = size.generator
    counts = {}
    with torch.device("meta"):
        for which, shape in {"few": (tokens, 32), "many": grid_shape(resolution)}.items():
            model = plain_sit.SiT(shape, depth, dim, heads, classes=CLASSES)
            args = torch.empty(1, *shape), torch.empty(1), torch.empty(1, dtype=torch.int64)
            counts[which] = count_gflops(lambda: model(*args))  # noqa: B023
        t_depth, t_dim, t_heads = size.tokenizer
        tokenizer = plain_maetok.MAETok(resolution, tokens, latent_dim, t_dim, t_depth, t_heads)
        tokenizer.set_attention("naive")
        counts["encode"] = count_gflops(lambda: tokenizer.encode(torch.empty(1, 3, resolution, resolution)))
        counts["decode"] = count_gflops(lambda: tokenizer.decode(torch.empty(1, tokens, latent_dim)))
        vae = SDVAEDecoder()
        counts["vae_decode"] = count_gflops(lambda: vae(torch.empty(1, *grid_shape(resolution))))
    return counts


def train_bytes(size: Size, tokens: int, batch: int, parameters: int, element: int, naive: bool) -> float:
    """Rough memory of forward + backward above the weights: gradients and what autograd keeps."""
    depth, dim, heads = size.generator
    kept = batch * tokens * dim * 36 + (3 * batch * heads * tokens * tokens if naive else 0)
    copies = parameters * element if element < 4 else 0  # autocast's cached weights
    return 4 * parameters + copies + depth * kept * element


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||, in fp64."""
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm().clamp_min(math.ulp(0.0)))
