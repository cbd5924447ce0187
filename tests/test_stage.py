# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.tokenizer: one step against its losses written out, and every configuration of it at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import bare, small_run, write_images

from maetok_fast.config import ConfigError, read
from maetok_fast.data.loader import Batch
from maetok_fast.layers import EMA
from maetok_fast.models import MAETok
from maetok_fast.training.adversarial import DiscriminatorTraining
from maetok_fast.training.build import train
from maetok_fast.training.build_tokenizer import make_stage, make_tokenizer
from maetok_fast.training.configs import DecoderRun, MaskConfig, TokenizerRun
from maetok_fast.training.targets import hog_loss
from maetok_fast.training.tokenizer import TokenizerStage
from maetok_fast.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "both_stages" not in request.node.name:
        bare(monkeypatch.setattr)


def run_of(*overrides: str, kind: Any = TokenizerRun) -> Any:
    """A small run, with pixels and HOG alone unless the overrides say more."""
    base = small_run(Path("unused"), Path("unused"))
    if kind is DecoderRun:
        given = {
            name: getattr(base, name) for name in ("out", "model", "data", "loss", "adversarial", "optimizer", "loop")
        }
        base = DecoderRun(**given)
    base = replace(base, adversarial=replace(base.adversarial, weight=0.0))
    return read(base, {}, overrides)


def stage_of(run: TokenizerRun, awake: bool = True) -> TokenizerStage:
    stage = make_stage(run, torch.device("cpu"))
    for network in stage.networks:
        network.called = network.module.train()
    if awake:  # no gate of zero, behind which nothing would show
        torch.manual_seed(3)
        with torch.no_grad():
            for p in stage.model.parameters():
                if p.numel() and p.abs().max() < 1e-3:
                    p.normal_(0, 0.2)
    stage.begin(World("cpu"), EMA(stage.averaged))
    return stage


def batch_of(count: int = 3, size: int = 32, captions: tuple[str, ...] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, None, captions, tuple(range(count)), 0, 0)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


NO_DROP = ("model.encoder_drop_path=0", "model.decoder_drop_path=0")
ADVERSARIAL = ("adversarial.weight=0.4", "adversarial.start=2", "adversarial.augment=false")


class _Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).tanh().sum(1)


def test_one_backward_pass_makes_the_gradients_of_all_losses() -> None:
    """Pixels, LPIPS at half weight, the adversarial loss at its adaptive weight, HOG: autograd over their plain sum,
    the adaptive weight by two more passes as Esser et al. have it."""
    run = run_of(*NO_DROP, *ADVERSARIAL, "loss.perceptual=0.7", "loss.perceptual_warmup=8", "auxiliary.weights.hog=0.3",
                 "loss.vgg=random", "loss.heads=random")  # fmt: skip
    stage, batch = stage_of(run), batch_of()
    stage.discriminator.discriminator = judge = _Judge()  # type: ignore[union-attr]
    values = stage.backward(batch, 4, 0, 1)
    found = gradients(stage.model)

    stage.model.zero_grad()
    images = batch.images.float() / 127.5 - 1
    drawn = stage.masks.draw(4, 3, 16)
    out = stage.model(images, drawn.mask)
    perceptual = stage.perceptual(out.images, images).mean()
    nll = F.mse_loss(out.images, images) + 0.7 * 0.5 * perceptual
    generator = -judge(out.images).mean()
    last = stage.averaged.decoder.to_pixel.model.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, generator)]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    hog = hog_loss(out.predictions["hog"], stage.targets.compute(batch.images)["hog"], drawn.mask)
    (nll + 0.4 * weight * generator + 0.3 * hog).backward()
    expected = gradients(stage.model)
    assert found.keys() == expected.keys() == {n for n, p in stage.model.named_parameters() if p.requires_grad}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6 * value.abs().max().item() + 1e-7, rtol=2e-4)
    torch.testing.assert_close(values["adaptive_weight"], weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["perceptual"], perceptual.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["hog"], hog.detach())


def test_parts_of_a_step_add_up_to_it() -> None:
    run = run_of(*NO_DROP, *ADVERSARIAL, "adversarial.adaptive=false", "adversarial.consistency=0",
                 "adversarial.lecam=0", "mask.low=0.5", "mask.high=0.5", "loop.accumulate=2")  # fmt: skip
    whole, halves = stage_of(run), stage_of(run)
    for stage in (whole, halves):
        torch.manual_seed(0)
        stage.discriminator.discriminator = _Judge()  # type: ignore[union-attr]
    batch = batch_of(4)
    whole.backward(batch, 3, 0, 1)
    for part in range(2):
        images = batch.images[2 * part : 2 * part + 2]
        halves.backward(batch._replace(images=images), 3, part, 2)
    for a, b in zip((whole.model, whole.discriminator), (halves.model, halves.discriminator)):
        first, second = gradients(a), gradients(b)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, atol=1e-5 * value.abs().max().item() + 1e-8, rtol=1e-3)


def calls(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    real: Callable[..., Any] = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return seen


def test_nothing_is_computed_before_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(*ADVERSARIAL, "loss.perceptual=1", "loss.perceptual_warmup=10", "loss.vgg=random", "loss.heads=random")
    stage = stage_of(run)
    encoder = calls(stage.averaged.encoder, "forward", monkeypatch)
    vgg = calls(stage.perceptual, "features", monkeypatch)
    judged = calls(stage.discriminator.discriminator, "forward", monkeypatch)  # type: ignore[union-attr]
    counts = []
    for step in range(3):
        stage.backward(batch_of(), step, 0, 1)
        counts.append((len(encoder), len(vgg), len(judged)))
    # a step: the encoder once; VGG twice from step 1 on; the discriminator 1 + 4 times from step 2 on
    assert counts == [(1, 0, 0), (2, 2, 0), (3, 4, 5)]


def test_a_step_asks_the_host_for_nothing() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func), "a value was read on the host"
            return func(*args, **(kwargs or {}))

    stage = stage_of(run_of(*ADVERSARIAL, "loss.perceptual=1", "loss.vgg=random", "loss.heads=random"))
    stage.backward(batch_of(), 5, 0, 1)
    with NoReading():
        stage.backward(batch_of(), 6, 0, 1)


ABLATIONS = [
    [],
    ["mask.low=0", "mask.high=0"],
    ["model.num_latent_tokens=0"],
    ["auxiliary.targets=[]"],
    ["mask.low=0", "mask.high=0", "model.num_latent_tokens=0"],
    ["mask.low=0", "mask.high=0", "auxiliary.targets=[]"],
    ["model.num_latent_tokens=0", "auxiliary.targets=[]"],
]
OTHERS = [
    ["mask.mode=drop"],
    ["mask.mode=drop", "model.num_latent_tokens=0"],
    ["model.bottleneck=kl"],
    ["model.bottleneck=softvq", "model.codebook_size=16"],
    ["model.position=absolute"],
    ["model.position=axial"],
    ["model.decoder_kind=plain"],
    ["model.decoder_patch=4"],
    ["auxiliary.masked_only=false"],
    ["adversarial.weight=0.4", "adversarial.start=0", "adversarial.discriminator=patchgan"],
    [
        "adversarial.weight=0.4",
        "adversarial.start=0",
        "adversarial.discriminator=stylegan",
        "adversarial.consistency=0",
    ],
]


@pytest.mark.parametrize("overrides", ABLATIONS + OTHERS, ids=lambda o: "-".join(o) or "all")
def test_every_configuration_trains_all_its_parameters(overrides: list[str]) -> None:
    """No parameter that DistributedDataParallel would wait for in vain, and a loss that falls."""
    stage = stage_of(run_of(*NO_DROP, *overrides))
    batch = batch_of()
    first = stage.backward(batch, 1, 0, 1)["reconstruction"]
    for network in stage.networks:
        left = [n for n, p in network.module.named_parameters() if p.requires_grad and p.grad is None]
        assert left == [], left
        assert all(g.isfinite().all() for g in gradients(network.module).values())
    if "stylegan" in str(overrides):
        return  # a step of it takes a second
    optimizer = torch.optim.AdamW([p for p in stage.model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(8):
        optimizer.step()
        optimizer.zero_grad()
        last = stage.backward(batch, 1, 0, 1)["reconstruction"]
    assert last < first


def test_captions_are_a_target_too() -> None:
    pytest.importorskip("open_clip")
    stage = stage_of(run_of(*NO_DROP, "auxiliary.targets=[hog, caption]"))
    captions = ("a red fox", "two dogs in the snow on a hill", "")
    values = stage.backward(batch_of(captions=captions), 0, 0, 1)
    assert 0 < values["caption"] < 20
    assert [n for n, p in stage.model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_masks_follow_a_teachers_saliency() -> None:
    pytest.importorskip("timm")
    run = run_of(*NO_DROP, "auxiliary.targets=[hog, test_vit]", "mask.semantic=true", "mask.temperature=1e-6",
                 "mask.low=0.25", "mask.high=0.25", "model.patch=16", "model.encoder.depth=1")  # fmt: skip
    run = replace(run, teachers=replace(run.teachers, weights={"test_vit": "random"}))
    stage, batch = stage_of(run), batch_of(size=64)
    seen: list[Tensor] = []
    stage.model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    values = stage.backward(batch, 0, 0, 1)
    features = F.normalize(stage.targets.compute(batch.images)["test_vit"].float(), dim=-1)
    saliency = (features * features.mean(1, keepdim=True)).sum(-1)
    expected = saliency.argsort(1, descending=True).argsort(1) < 4  # the four of sixteen that show the most
    assert torch.equal(seen[0], expected)
    assert 0 < values["test_vit"] < 2


def test_a_compiled_stage_computes_the_same() -> None:
    run = run_of(*NO_DROP, "model.encoder.depth=1", "model.decoder.depth=1")
    plain, compiled = stage_of(run), stage_of(run)
    compiled.networks[0].called.compile(backend="aot_eager")
    for stage in (plain, compiled):
        stage.backward(batch_of(), 0, 0, 1)
    for (name, a), (_, b) in zip(gradients(plain.model).items(), gradients(compiled.model).items(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * a.abs().max().item() + 1e-8, rtol=1e-3, msg=name)


def test_semantic_masks_need_a_teacher() -> None:
    with pytest.raises(ConfigError, match="add dino to auxiliary"):
        make_stage(run_of("mask.semantic=true"), torch.device("cpu"))


def test_stage_two_leaves_the_encoder_alone_and_ends_without_masks() -> None:
    run = run_of("loop.steps=20", kind=DecoderRun)
    run = replace(run, mask=MaskConfig(low=0.6, high=0.6, final=0.0, over=10))
    stage = stage_of(run)
    frozen = {n for n, p in stage.model.named_parameters() if not p.requires_grad}
    assert all(n in frozen for n, _ in stage.model.named_parameters() if ".encoder." in n or ".quant_conv." in n)
    assert not stage.model.train().tokenizer.encoder.training  # no drop path in what is frozen
    stage.backward(batch_of(), 0, 0, 1)
    trained = {n for n, p in stage.model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in stage.model.named_parameters() if p.requires_grad}
    shares = [stage.masks.draw(step, 2, 16).mask for step in (0, 5, 9, 10, 15)]
    assert [None if m is None else int(m[0].sum()) for m in shares] == [10, 5, 1, None, None]


def test_the_average_is_written_as_its_users_load_it(tmp_path: Path) -> None:
    stage = stage_of(run_of())
    average = dict(stage.averaged.state_dict())
    average |= {n: p.detach() + 1 for n, p in stage.averaged.named_parameters() if p.requires_grad}
    stage.save_average(tmp_path, average)
    loaded = MAETok.from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        own = stage.averaged.get_parameter(name)
        assert torch.equal(p, average.get(name, own)), name
    assert all(torch.equal(average[n], v) for n, v in stage.load_average(tmp_path).items() if n in average)


def test_a_run_goes_through_both_stages_and_resolutions(tmp_path: Path) -> None:
    """Stage 1 with everything on, mixed sizes; stage 2 from its folder; the average reconstructs better than before."""
    images = write_images(tmp_path / "images")
    first = small_run(tmp_path / "one", images, validate_every=6, picture_every=12)
    first = replace(first, data=replace(first.data, sizes=(32, 48), validation=str(images), validation_images=4))
    newest = train(first, quiet=True)
    assert (tmp_path / "one" / "report.html").stat().st_size > 1000
    assert (tmp_path / "one" / "samples" / "0000012.png").exists()
    second = DecoderRun(
        out=str(tmp_path / "two"), start=str(tmp_path / "one"), model=first.model, data=first.data, loss=first.loss,
        adversarial=replace(first.adversarial, weight=0.0), optimizer=first.optimizer, ema=first.ema, loop=first.loop,
    )  # fmt: skip
    two = MAETok.from_pretrained(train(second, quiet=True) / "tokenizer")
    one = MAETok.from_pretrained(newest / "tokenizer")
    assert all(torch.equal(a, b) for a, b in zip(one.encoder.parameters(), two.encoder.parameters()))
    assert not torch.equal(one.decoder.to_pixel.model.weight, two.decoder.to_pixel.model.weight)


@pytest.mark.parametrize("kind", [TokenizerRun, DecoderRun])
def test_a_sharded_tokenizer_trains_like_a_whole_one(tmp_path: Path, kind: Any) -> None:
    """FSDP2, block by block; the frozen half of stage 2 is in its checkpoint, whole. And with a discriminator it runs:
    its augmentation draws other numbers then."""
    images = write_images(tmp_path / "images")
    run = run_of(*NO_DROP, "loop.steps=4", kind=kind)
    run = replace(run, data=replace(run.data, path=str(images)))
    judged = replace(run.adversarial, weight=0.4, start=1)
    files, first = [], make_tokenizer(run).state_dict()
    for parallel in ("ddp", "fsdp"):
        loop = replace(run.loop, parallel=parallel, picture_every=2)
        files.append(train(replace(run, out=str(tmp_path / parallel), loop=loop), quiet=True))
    loop = replace(run.loop, parallel="fsdp")
    assert (
        train(replace(run, out=str(tmp_path / "judged"), loop=loop, adversarial=judged), quiet=True).name == "0000004"
    )
    for name in ("networks.safetensors", "tokenizer/model.safetensors"):
        one, other = (load_file(path / name) for path in files)
        assert one.keys() == other.keys()
        for key, value in one.items():
            start = first.get(key.removeprefix("tokenizer.tokenizer."))
            if start is not None and start.is_floating_point():  # Adam turns noise at a gradient of zero into a step
                assert (other[key] - value).norm() <= 0.05 * (value - start).norm() + 1e-6, key


def test_learned_positions_are_resampled_for_another_resolution(tmp_path: Path) -> None:
    run = run_of("model.position=absolute")
    model = make_tokenizer(run)
    model.save_pretrained(tmp_path / "32")
    larger = read(run, {}, [f"start={tmp_path / '32'}", "model.image_size=64", "model.base_image_size=64"])
    made = make_tokenizer(larger)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(made.encode(images), model.encode(images))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.latent_dim=9"], "does not fit model"),
        (["start=/nowhere/at/all"], "nowhere"),
    ],
)
def test_a_start_that_does_not_fit_is_named(tmp_path: Path, overrides: list[str], said: str) -> None:
    make_tokenizer(run_of()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        make_tokenizer(run_of(f"start={tmp_path}", *overrides))


def test_a_run_that_was_changed_is_refused_and_what_may_change_is_taken(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    run = small_run(tmp_path / "run", images, steps=2)
    run = replace(run, adversarial=replace(run.adversarial, weight=0.0))
    train(run, quiet=True)
    with pytest.raises(ConfigError) as error:
        train(replace(run, optimizer=replace(run.optimizer, clip=0.5)), quiet=True)
    assert "optimizer.clip=1.0, and this one has 0.5" in str(error.value)
    longer = replace(run, loop=replace(run.loop, steps=4, log_every=1))
    assert train(longer, quiet=True).name == "0000004"


def test_a_discriminator_keeps_its_averages_in_the_checkpoint() -> None:
    stage = stage_of(run_of(*ADVERSARIAL))
    assert isinstance(stage.discriminator, DiscriminatorTraining)
    stage.backward(batch_of(), 2, 0, 1)
    assert stage.networks[1].module.state_dict()["lecam"].abs().sum() > 0
