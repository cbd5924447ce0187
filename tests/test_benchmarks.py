# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The benchmark's own arithmetic, its honest peers, and one tiny run from photographs to pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _claims
import _report
import _workload
import throughput
from _claims import CITED, COMPUTED, MEASURED, Claim, Factor
from _job import Job, expected_ticks, guided_steps
from baselines import load_needed
from baselines.sit import SiT as PlainSiT
from baselines.sit import guided_step

from maetok_fast.bench import machine
from maetok_fast.bench.timing import PeakMemory, interleave
from maetok_fast.diffusion import sample
from maetok_fast.models import MAETok, MAETokConfig, SiT, SiTConfig, ViTSize

CPU = torch.device("cpu")


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "gamma" in name else 0.2))
    return model.eval()


# ---- the peers compute what ours computes


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"tokens": 16, "channels": 32}, (16, 32)),
        ({"tokens": (8, 8), "channels": 4, "patch": 2}, (4, 8, 8)),
    ],
)
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_plain_sit_equals_ours(config, shape, attention):
    torch.manual_seed(0)
    ours = randomize(SiT(SiTConfig(dim=64, depth=2, heads=4, **config)))
    plain = PlainSiT(shape, 2, 64, 4, attention=attention)
    torch.testing.assert_close(plain.pos_embed, ours.pos_embed)  # made by two codes, not loaded
    load_needed(plain, ours.state_dict())
    x, t, y = torch.randn(3, *shape), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([3, 999, 1000])
    torch.testing.assert_close(ours(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["movqv2", "plain"])
@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_plain_maetok_equals_ours(kind, cls, attention):
    torch.manual_seed(0)
    vit = ViTSize(dim=128, depth=2, heads=2)
    config = MAETokConfig(
        image_size=64, num_latent_tokens=8, encoder=vit, decoder=vit, decoder_kind=kind, decoder_cls_token=cls
    )
    ours = randomize(MAETok(config))
    plain = _workload.plain_tokenizer(ours, torch.float32)
    plain.set_attention(attention)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = ours.encode(images)
    torch.testing.assert_close(plain.encode(images), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.decode(latents), ours.decode(latents), atol=1e-5, rtol=1e-5)


def test_plain_tokenizer_refuses_variants_that_it_lacks():
    vit = ViTSize(dim=128, depth=1, heads=2)
    ours = MAETok(MAETokConfig(image_size=64, num_latent_tokens=8, encoder=vit, decoder=vit, position="absolute"))
    with pytest.raises(ValueError, match="mixed RoPE"):
        _workload.plain_tokenizer(ours, torch.float32)
    with pytest.raises(ValueError, match="not of the same variant"):
        load_needed(PlainSiT((4, 8), 1, 64, 4), {})


def test_public_guided_steps_are_our_sampler():
    models = _workload.Generators(_workload.SIZES["tiny"], 8, 64, CPU)
    plain, (x, y) = models.plain("few"), models.inputs("few", 2, torch.float32)
    interval = (0.25, 0.7)  # no time lies on its ends, where 1 - i / 5 may round either way
    with torch.no_grad():
        state = x.double()
        for i in range(5):
            t = 1 - i / 5
            state = guided_step(plain, state, t, -1 / 5, y, 3.0, guided=interval[0] <= t <= interval[1])
    ours = sample(models.ours.eval(), x, y, steps=5, method="euler", guidance=3.0, interval=interval)
    torch.testing.assert_close(ours.latents, state.float(), atol=1e-5, rtol=1e-5)
    assert ours.rows < 5 * 4  # the same result for less work


def test_generators_share_one_set_of_weights():
    models = _workload.Generators(_workload.SIZES["tiny"], 8, 64, CPU)
    pointers = {models.plain(which).blocks[0].mlp.fc1.weight.data_ptr() for which in ("few", "many")}
    assert pointers == {models.ours.blocks[0].mlp.fc1.weight.data_ptr()}
    assert all(p.count_nonzero() for p in models.plain("many").parameters())


def test_training_peers_have_the_same_gradients():
    models = _workload.Generators(_workload.SIZES["tiny"], 8, 64, CPU)
    x, y = models.inputs("few", 2, torch.float32)
    t = torch.tensor([0.2, 0.9])
    gradients = []
    for model in (models.ours.eval(), models.plain("few")):
        model(x, t, y).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


# ---- counts


@pytest.mark.parametrize(
    ("model", "tokens", "gmac"),
    [
        ("sit-xl", 32, 14.6),
        ("sit-xl", 64, 29.0),
        ("sit-xl", 128, 58.4),
        ("sit-xl", 256, 118.6),
        ("sit-l", 128, 39.6),
        ("sit-b", 128, 11.2),
    ],
)
def test_counted_work(model, tokens, gmac):
    counts = _workload.count_all(_workload.SIZES[model], tokens, 512)
    assert counts["few"] / 2 == pytest.approx(gmac, abs=0.05)
    if model == "sit-xl":
        assert counts["many"] / 2 == pytest.approx(524.5, abs=0.05)


def test_parameter_counts():
    with torch.device("meta"):
        assert sum(p.numel() for p in PlainSiT((128, 32)).parameters()) == 675_000_608
        from baselines.sdvae import SDVAEDecoder

        assert sum(p.numel() for p in SDVAEDecoder().parameters()) == 49_490_199


# ---- claims


def test_chain_telescopes():
    rates = [0.1, 0.9, 2.0, 3.1]
    factors = _claims.chain([("tokens", ""), ("precision", ""), ("kernels", "")], rates)
    claim = Claim("title", factors)
    assert claim.ratio == pytest.approx(31.0)
    assert claim.mark == "measured"
    assert Claim("title", [*factors, _claims.CONVERGENCE]).mark == "measured x cited"
    assert claim.to_json()["ratio"] == pytest.approx(31.0)


def test_cited_numbers_are_the_papers():
    assert pytest.approx(31.2) == _claims.CLAIMED_INFERENCE
    assert pytest.approx(8.44, abs=0.01) == _claims.CONVERGENCE.ratio
    assert _claims.CONVERGENCE.mark == CITED
    lines = {f.name: f for f in _claims.inference_context(1049.04, 116.74, (2514.5, 246.1), 250)}
    assert lines["generator FLOPs"].ratio == pytest.approx(8.99, abs=0.01)
    assert lines["left of the claim"].ratio == pytest.approx(3.47, abs=0.01)


def test_guided_steps():
    assert guided_steps(250, (0.0, 0.7)) == 175
    assert guided_steps(250, (0.0, 1.0)) == 250
    assert guided_steps(10, (0.5, 0.5)) == 1


# ---- timing and memory


def test_interleave_takes_turns():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleave(cases, CPU, rounds=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert times["a"].samples == 3
    assert times["a"].warm


def test_slow_cases_run_once():
    import time

    times = interleave({"slow": lambda: time.sleep(0.05)}, CPU, once=0.01)
    assert (times["slow"].samples, times["slow"].warm) == (1, False)
    assert times["slow"].seconds >= 0.05
    late = interleave({"late": lambda: None}, CPU, until=0.0)
    assert (late["late"].samples, late["late"].warm) == (1, False)


@pytest.mark.skipif(machine.available_memory_gb() is None, reason="needs /proc")
def test_peak_memory_sees_an_allocation():
    with PeakMemory(CPU) as peak:
        torch.ones(64 * 2**20 // 4).sum()
    assert 48 * 2**20 < peak.extra_bytes < 160 * 2**20


def test_machine():
    about = machine.describe(CPU)
    assert about["threads"] == torch.get_num_threads()
    assert "torch" in machine.headline(about)
    fn, flops = machine.matmul(CPU, "bf16", 64)
    assert fn().shape == (64, 64)
    assert flops == 2 * 64**3
    assert machine.copy_bandwidth(CPU, megabytes=1, seconds=0.01) > 0


# ---- reports


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.6, "1,235"), (99.96, "100.0"), (3.456, "3.46"), (0.01234, "0.0123"), (0.001234, "0.0012")],
)
def test_numbers(value, text):
    assert _report.number(value) == text


def test_computed_values_are_marked():
    assert _report.Value(1.0, "img/s", MEASURED).text() == "1.00"
    assert _report.Value(1.0, "img/s", COMPUTED).text() == "1.00†"
    assert _report.Value(1.0, "img/s", CITED).text() == "1.00‡"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_contact_sheet(tmp_path, count):
    from PIL import Image

    images = np.full((count, 8, 8, 3), (9, 7, 200), np.uint8)  # no text has this colour
    _report.contact_sheet(tmp_path / "sheet.png", images, images, ["one line"], cell=256)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    lines = math.ceil(count / 2)
    assert sheet.shape[0] == 12 + 26 * 2 + lines * 268 + 12
    assert sheet.shape[1] == (1084 if count > 1 else 700)
    assert (sheet == (9, 7, 200)).all(axis=-1).sum() == count * 2 * 256 * 256


def test_chart_without_training_rows(tmp_path):
    rows = [_report.Row("a", "public", 128, "fp32", "public", {"sample": _report.Value(2.0, "images/s")})]
    _report.bar_chart(tmp_path / "chart.png", rows, [Claim("c", [Factor("tokens", 2.0, MEASURED)])], "title", "sub")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def tiny(tmp_path, *more):
    return [
        "--model", "tiny", "--res", "64", "--tokens", "8", "--batch", "2", "--steps", "10", "--quick",
        "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def test_the_whole_job(tmp_path, capsys):
    throughput.main(tiny(tmp_path))
    printed = capsys.readouterr().out
    assert "the 31x claim" in printed
    assert "the 76x claim" in printed
    out = tmp_path / "out"
    document = json.loads((out / "throughput.json").read_text())
    assert document["benchmark"] == "throughput"
    assert document["schema"] == 1
    assert {"machine", "ceilings", "arguments", "images", "relative_errors", "counted_gflops"} <= document.keys()
    rows = {row["key"]: row["values"] for row in document["rows"]}
    assert set(rows) == {
        "public-many-fp32", "public-many-bf16", "sdpa-many-bf16", "public-few-fp32", "public-few-bf16", "ours-few-bf16",
    }  # fmt: skip
    for values in rows.values():
        assert {"gflops", "step", "sample", "gemm", "train"} <= values.keys()
        assert all(value["mark"] in (MEASURED, COMPUTED, CITED) for value in values.values())
        assert values["step"]["mark"] == MEASURED
        assert values["sample"]["mark"] == values["train"]["mark"] == COMPUTED
    assert {"encode", "decode"} <= rows["ours-few-bf16"].keys()
    # the factors multiply to the ratio of the rows that they connect
    sampling, training = document["claims"]
    ends = [rows[key]["sample"]["value"] for key in ("public-many-fp32", "ours-few-bf16")]
    assert sampling["ratio"] == pytest.approx(ends[1] / ends[0])
    assert math.prod(f["ratio"] for f in sampling["factors"]) == pytest.approx(sampling["ratio"])
    ends = [
        rows[key]["train_forward_backward"]["batch"] / rows[key]["train_forward_backward"]["value"]
        for key in ("public-many-fp32", "ours-few-bf16")
    ]
    assert training["ratio"] / _claims.CONVERGENCE.ratio == pytest.approx(ends[1] / ends[0])
    # a fast row that is wrong is worth nothing
    errors = document["relative_errors"]
    assert errors["velocity ours bf16"] <= 2 * errors["velocity public bf16"] + 2**-8
    assert errors["encode ours bf16"] <= 2 * errors["encode public bf16"] + 2**-8
    assert "RANDOM weights" in " ".join(throughput.caption(document))
    assert {p.name for p in out.iterdir()} == {"throughput.json", "throughput.png", "contact_sheet.png"}


def test_own_images_and_fp32(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.new("RGB", (80, 70), "red").save(tmp_path / "in" / "a.png")
    args = throughput.parse(tiny(tmp_path, "--images", str(tmp_path / "in"), "--dtype", "fp32"))
    ticks = set()
    job, fields, claims = throughput.run(args, ticks.add)
    assert fields["images"]["files"] == ["a.png"]
    assert {row.dtype for row in job.rows.values()} == {"fp32"}
    assert claims[0].factors[1].ratio == 1.0  # no precision was gained
    assert abs(len(ticks) - expected_ticks(args)) <= 2
    assert job.agreement["velocity ours fp32"] < 1e-5


def test_bad_arguments(tmp_path, capsys):
    for more, words in (
        (["--res", "100"], "multiple of 16"),
        (["--tokens", "0"], "at least 1"),
        (["--interval", "0.7", "0.1"], "LOW <= HIGH"),
    ):
        with pytest.raises(SystemExit):
            throughput.parse(more)
        assert words in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            throughput.parse(["--device", "cuda"])
        assert "use --device cpu" in capsys.readouterr().err


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_memory_gb", lambda: 0.0)
    job = Job(throughput.parse(tiny(tmp_path)))
    job.training(_workload.Generators(job.size, 8, 64, CPU))
    assert any("No training number" in note for note in job.notes)
    assert any("No optimizer step" in note for note in job.notes)
    assert not any("train" in row.values for row in job.rows.values())
