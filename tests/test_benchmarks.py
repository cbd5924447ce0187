# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The benchmark's own arithmetic, its honest peers, and one tiny run from photographs to pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    _chart,
    _claims,
    _cli,
    _page,
    _report,
    _workload,
    compare,
    cost,
    measure,
    models,
    pipeline,
    throughput,
)
from benchmarks._claims import CITED, COMPUTED, MEASURED, Claim, Factor
from benchmarks._job import Job, guided_steps
from benchmarks._where import Prepared, where
from benchmarks.baselines import load_needed
from benchmarks.baselines.sit import SiT as PlainSiT
from benchmarks.baselines.sit import guided_step
from maetok_fast.bench import machine
from maetok_fast.bench.budget import Budget, Speed, calibrate
from maetok_fast.bench.timing import PeakMemory, held_bytes, interleave
from maetok_fast.diffusion import sample
from maetok_fast.inference import prepare
from maetok_fast.models import MAETok, MAETokConfig, SiT, SiTConfig, ViTSize

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


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
        from benchmarks.baselines.sdvae import SDVAEDecoder

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


def test_convergence_is_cited_unless_the_claims_demo_measured_what_can_be_reached(tmp_path: Path):
    path = tmp_path / "claims.json"
    assert _claims.convergence(path) == (_claims.CONVERGENCE, [])
    seeds = [{"factor": 2.0, "bound": ""}, {"factor": 8.0, "bound": "at least"}]
    equal = {"fast": "a", "slow": "b", "reachable": True, "classifier": {"seeds": seeds}}
    equal["classifier_own"] = {"seeds": [{"factor": 9.0, "bound": ""}]}
    variants = {"a": {"tokens": 16}, "b": {"tokens": 64}}
    found = {"quick": False, "data": "d", "settings": {"generated": 1000}, "variants": variants}
    path.write_text(json.dumps(found | {"steps_to_equal": equal}))
    factor, context = _claims.convergence(path)
    assert (factor.ratio, factor.mark) == (pytest.approx(4.0), _claims.SMALL)
    assert [line.ratio for line in context] == [_claims.CONVERGENCE.ratio]
    assert Claim("c", [Factor("tokens", 2.0, MEASURED), factor]).mark == "measured x small scale"
    path.write_text(json.dumps(found | {"steps_to_equal": equal | {"reachable": False}}))
    factor, context = _claims.convergence(path)
    assert factor == _claims.CONVERGENCE
    assert [(round(line.ratio, 6), line.mark) for line in context] == [(4, _claims.SMALL), (9, _claims.SMALL)]
    path.write_text(json.dumps(found | {"quick": True, "steps_to_equal": equal}))
    assert _claims.convergence(path) == (_claims.CONVERGENCE, [])


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
    _chart.chart(tmp_path / "chart.png", rows, [Claim("c", [Factor("tokens", 2.0, MEASURED)])], "title", "sub")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    _chart.chart(tmp_path / "none.png", rows, [], "title", "sub")
    assert (tmp_path / "none.png").stat().st_size > 10_000


def drawn(claim):
    """The chart's axes of one claim: [(marker, x, edge, filled)] of its dots, all its texts, its bars."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _chart._factors(axes, claim)
    dots = [line for line in axes.lines if line.get_marker() in "oD"]
    texts = [text.get_text() for text in axes.texts] + axes.get_xlabel().splitlines()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    shapes = [(d.get_marker(), d.get_xdata()[0], d.get_markeredgecolor(), d.get_markerfacecolor()) for d in dots]
    return axes, shapes, texts, labels


def test_the_chart_has_dots_and_marks_what_was_not_measured():
    loss, cited = Factor("kernels", 0.855, MEASURED), Factor("convergence", 8.44, CITED)
    claim = Claim("c", [Factor("tokens", 14.0, MEASURED), loss, cited], [Factor("the paper's", 76.0, CITED)])
    axes, dots, texts, labels = drawn(claim)
    assert not axes.patches  # no bars: on a log axis their lengths mean nothing
    assert axes.get_xscale() == "log"
    by_place = {round(x, 3): (marker, edge, face) for marker, x, edge, face in dots}
    assert by_place[14.0] == ("o", _chart.GAIN, _chart.GAIN)
    assert by_place[0.855] == ("o", _chart.LOSS, _chart.LOSS)
    assert by_place[8.44] == ("D", _chart.NEUTRAL, "white")
    assert max(by_place) == 14.0  # the product with a cited factor has no dot, the measured one has
    assert round(14.0 * 0.855, 3) in by_place
    assert "8.44x‡" in texts
    assert "all factors together: 101x‡ (measured x cited)" in texts
    assert "the paper's claim: 76.0x‡" in texts
    assert labels == [
        "tokens\n(measured)", "kernels\n(measured)", "convergence\n(cited)", "product of the measured\n(measured)",
    ]  # fmt: skip


def tiny(tmp_path, *more):
    return [
        "--model", "tiny", "--res", "64", "--tokens", "8", "--batch", "2", "--steps", "10", "--quick", "--budget", "60",
        "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def test_the_whole_job(tmp_path, capsys):
    throughput.main(tiny(tmp_path, "--dtype", "bf16"))
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
    assert [factor.name for factor in claims[0].factors] == ["tokens", "kernels", "guidance work"]
    assert any(line.startswith("Factor fp32 -> bf16: fp32 is the precision") for line in fields["left_out"])
    assert len(ticks) > 10
    assert job.agreement["velocity ours fp32"] < 1e-5


# ---- the budget


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def call(self, seconds):
        return lambda: setattr(self, "now", self.now + seconds)


def test_budget_admits_what_fits_and_names_the_rest():
    clock = Clock()
    budget = Budget(60.0, clock)
    budget.part(0.5)
    budget.expect("small", 14.0, "gemm", "a small thing")
    budget.expect("large", 16.0, "gemm", "a large thing")
    assert budget.admit("small")
    assert not budget.admit("large")
    assert budget.left_out == ["a large thing: would take about 32 s of the 30 s left"]
    assert budget.admit("never announced")
    budget.took("small", 14.0)  # its kind is faster than feared
    assert budget.seconds("large") == pytest.approx(1.1 * 16.0)
    assert budget.admit("large")
    clock.now += 31
    assert budget.left == 0.0
    budget.part(1.0)  # the next part may use what is left of the whole
    assert budget.left == pytest.approx(29.0)


def test_budget_picks_the_largest_that_fits():
    clock = Clock()
    budget = Budget(10.0, clock)
    assert budget.largest([8, 4, 2, 1], lambda n: 2.0 * n) == 4
    assert budget.largest([8, 4, 2, 1], lambda n: 2.0 * n, 0.5) == 2
    assert budget.largest([8, 4], lambda n: 1e9) == 4


def test_calibration_reads_its_clock():
    speed = calibrate(CPU, ("fp32", "bf16", "fp32"), size=16)
    assert set(speed.flops) == {"fp32", "bf16"}
    assert Speed({"fp32": 100.0, "bf16": 400.0}, 10.0).seconds("fp32", 200.0, 30.0) == 5.0
    assert Speed({"fp32": 100.0, "bf16": 400.0}, 10.0).seconds("fp16", 200.0) == 2.0  # the slowest that is known


def test_interleave_starts_nothing_that_would_not_end():
    clock = Clock()
    budget = Budget(10.0, clock)
    cases = {"a": clock.call(1.0), "b": clock.call(2.0), "c": clock.call(2.0)}
    for name, ideal in (("a", 1.0), ("b", 2.0), ("c", 5.0)):
        budget.expect(name, ideal, name, f"row {name}")
    times = interleave(cases, CPU, rounds=5, budget=budget)
    assert set(times) == {"a", "b"}
    assert times["a"].samples == 2  # two rounds of 3 s after the first calls; a third would end at 12
    assert clock.now == 109.0
    assert budget.left_out == ["row c: would take about 10 s of the 7.0 s left"]


def slow_machine(monkeypatch, flops):
    """Jobs that believe that this machine has these FLOP/s and whose clock stands still."""
    monkeypatch.setattr("benchmarks._job.calibrate", lambda device, dtypes: Speed(dict.fromkeys(dtypes, flops), 1e10))


@pytest.mark.parametrize(("flops", "batch", "images"), [(2e13, 4, 4), (1.2e11, 2, 1), (1e9, 1, 1)])
def test_the_plan_follows_the_machine(tmp_path, monkeypatch, flops, batch, images):
    """SiT-XL at 512 px: all of it on a fast machine, fewer images on 2 cores with AVX2, the least on a hopeless one."""
    slow_machine(monkeypatch, flops)
    args = throughput.parse(["--dtype", "fp32", "--out", str(tmp_path)])
    job = Job(args, budget=Budget(args.budget, Clock()))
    assert (job.batch["few"], job.images) == (batch, images)
    assert any("images per forward" in line for line in job.budget.left_out) == (batch < 4)


def test_no_number_without_time(tmp_path, monkeypatch):
    """On a machine far too slow every row is named and has no rate; the pictures are there all the same."""
    slow_machine(monkeypatch, 10.0)
    args = throughput.parse(tiny(tmp_path, "--dtype", "bf16"))
    job, fields, claims = throughput.run(args, lambda text: None)
    assert claims == []
    ours = job.rows["ours-few-bf16"]
    assert {"encode", "decode"} <= ours.values.keys()
    for row in job.rows.values():
        assert row is ours or set(row.values) == {"gflops"}
    left_out = " ".join(fields["left_out"])
    for row in job.rows.values():
        assert f"sampling with '{row.label}': would take" in left_out
        assert f"training with '{row.label}': would take" in left_out
    assert fields["relative_errors"] == {}
    assert "none was taken" in " ".join(throughput.notes(job, fields))


# ---- wrong values


def one_line(capsys, main, options):
    """What a wrong command line prints; it must be one line, exit status 2, before anything was measured."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(options))
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.endswith("\n")
    return printed.err


WRONG = [
    (throughput, ["--res", "100"], "multiple of 16"),
    (throughput, ["--tokens", "0"], "at least 1"),
    (throughput, ["--batch", "-1"], "at least 1"),
    (throughput, ["--steps", "many"], "at least 1, got 'many'"),
    (throughput, ["--interval", "0.7", "0.1"], "LOW <= HIGH"),
    (throughput, ["--interval", "nan", "0.1"], "LOW <= HIGH"),
    (throughput, ["--budget", "0"], "above 0"),
    (throughput, ["--budget", "nan"], "above 0"),
    (throughput, ["--device", "tpu"], "expected cpu or cuda"),
    (throughput, ["--device", "cpu:3"], "expected cpu"),
    (throughput, ["--dtype", "fp8"], "invalid choice"),
    (throughput, ["--model", "huge"], "invalid choice"),
    (throughput, ["--images", "/nonexistent"], "does not exist or is not a folder"),
    (throughput, ["--checkpoint", "/nonexistent.safetensors"], "nonexistent.safetensors"),
    (throughput, ["--out", "/dev/null/x"], "cannot be written"),
    (throughput, ["--sideways"], "unrecognized arguments"),
    (models, [], "required"),
    (models, ["vae"], "invalid choice"),
    (models, ["sit", "--batch", "0"], "at least 1"),
    (models, ["sit", "--depth", "0"], "at least 1"),
    (models, ["sit", "--rounds", "x"], "at least 1"),
    (models, ["sit", "--budget", "-3"], "above 0"),
    (models, ["sit", "--device", "xyz"], "expected cpu or cuda"),
    (models, ["tokenizer", "--size", "100"], "multiple of 16"),
    (models, ["sit", "--json", "/dev/null/x.json"], "cannot be written"),
    (models, ["sit", "--json", "/"], "this is a folder"),
    (compare, ["--prove", "0"], "at least 1"),
    (compare, ["--seconds", "0"], "above 0"),
    (compare, ["--dtype", "x"], "invalid choice"),
    (compare, ["--device", "gpu"], "expected cpu or cuda"),
    (compare, ["--plant", "adaln"], "OP=FACTOR"),
    (compare, ["--cache", "/dev/null"], "cannot be written"),
    (compare, ["--base", "no-such-commit"], "no-such-commit"),
    (compare, ["--add", "no-such-op"], "no such op"),
    (compare, ["--add", "adaln", "--write"], "not both"),
    (measure, ["--budget", "0"], "above 0"),
    (measure, ["--device", "x"], "expected cpu or cuda"),
    (measure, ["--from", "/nonexistent"], "no such folder"),
    (measure, ["--from", "/dev"], "nothing that --keep wrote"),
    (measure, ["--out", "/dev/null/page.md"], "cannot be written"),
    (cost, ["--write", "--only", "x"], "leave --only and --op-file out"),
    (cost, ["--only", "no_such_kernel"], "no kernel"),
    (cost, ["--what"], "unrecognized arguments"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "options", "words"), WRONG, ids=lambda value: str(value)[-60:])
def test_wrong_values_end_in_one_line(capsys, monkeypatch, script, options, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in one_line(capsys, script.main, options)


def test_cuda_is_refused_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for main in (throughput.main, lambda options: models.main(["sit", *options]), compare.main):
        assert "use --device cpu" in one_line(capsys, main, ["--device", "cuda"])


def test_a_broken_image_is_said(capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert "a.png" in one_line(capsys, throughput.main, ["--images", str(tmp_path)])


def test_precision_auto():
    assert _cli.dtype("fp32", CPU) == "fp32"
    assert _cli.dtype("auto", CPU) == machine.fast_dtype(CPU)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert machine.fast_dtype(CPU) == "fp32"


@pytest.mark.parametrize("script", ["throughput", "models", "compare", "cost", "measure"])
def test_scripts_start_as_files(script, tmp_path):
    run = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--help"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


# ---- the page of a machine


ABOUT = {
    "cpu": "AMD EPYC", "cpu_vendor": "AuthenticAMD", "cpu_family": 26,
    "cpu_features": ["avx2", "avx512f", "avx512_bf16"], "cores": 2, "threads": 2,
    "memory_gb": 8.0, "torch": "2.14.1", "python": "3.11.2", "system": "Linux x86_64",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "amd-zen5-avx512bf16-2c"),
        ({"cpu_family": 25, "cpu_features": ["avx2"], "cores": 8}, "amd-zen3-avx2-8c"),
        ({"cpu_family": 25}, "amd-zen4-avx512bf16-2c"),
        ({"cpu_vendor": "GenuineIntel", "cpu_family": 6, "cpu_features": ["avx512f", "amx_bf16"]}, "intel-amx-2c"),
        ({"cpu_vendor": "", "cpu": "Neoverse(R) V2", "cpu_features": ["asimd"]}, "neoverse-v2-neon-2c"),
        ({"limited_by": ["MAETOK_FAST_CPU=avx2"]}, "amd-zen5-avx512bf16-2c-limited"),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_pages_are_named_after_the_processor(changes, name):
    assert _page.file_name(ABOUT | changes) == name


def fake_parts(failing=()):
    """What the parts would do: writes documents as they do, says `out of memory` where it fails."""
    spread = {"median": 0.1, "low": 0.1, "high": 0.1, "samples": 3}
    ops = {
        "op": "adaln", "sample": "SiT-XL", "dtype": "bf16", "direction": "forward", "backend": "native", "bytes": 10**9,
        "flops": 1, "times": {"ours native": spread, "reference": spread}, "ratios": {"reference": spread},
        "ceiling": "copy", "ceiling_seconds": 0.05, "reasons": {}, "notes": [],
    }  # fmt: skip
    forward = {"table": "SiT, batch 4", "case": "ours, prepared", "seconds": 0.25, "samples": 7, "of_first": 0.5}
    rows = [
        forward | {"tflops": 0.4, "of_ceiling": 0.8},
        forward | {"case": "ahead", "tflops": math.nan, "of_ceiling": 0},
    ]
    seen = []

    def run(command):
        seen.append(command)
        part = next(p for p in ("throughput", "tokenizer", "sit", "ops") if p in command[1:5] or p in command[1])
        if part in failing:
            return 1, "first line\nout of memory\n"
        if part == "throughput":
            out = Path(command[command.index("--out") + 1])
            out.mkdir()
            row = _report.Row("ours", "maetok_fast, 128 tokens", 128, "bf16", "ours")
            row.values["sample"] = _report.Value(0.5, "images/s", COMPUTED)
            claim = Claim("The 31x claim", [Factor("tokens", 11.0, MEASURED, "a | b")], [])
            _report.write_json(
                out / "throughput.json", [row], [claim], machine=ABOUT, seconds=200.0, notes=["a note"],
                ceilings={"gemm_bf16_tflops": 0.7, "copy_gb_s": 30.0}, left_out=["training: no time"],
                arguments={"model": "sit-xl", "tokens": 128, "res": 512, "dtype": "bf16", "precision": "auto"},
                batch={"few": 4, "many": 1},
            )  # fmt: skip
            (out / "throughput.png").write_bytes(b"picture")
            return 0, ""
        document = {"benchmark": "models", "machine": ABOUT, "rows": rows, "left_out": ["torch.compile: no time"]}
        if part == "ops":
            document = {"benchmark": "ops", "schema": 2, "machine": ABOUT, "rows": [ops], "left_out": []}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(document))
        return 0, ""

    return run, seen


def test_the_page_of_a_machine(tmp_path, capsys):
    run, seen = fake_parts()
    page = tmp_path / "page" / "m.md"
    assert measure.main(["--out", str(page), "--budget", "400", "--keep", str(tmp_path / "kept")], run) == 0
    budgets = [float(command[command.index("--budget") + 1]) for command in seen]
    assert len(seen) == 4
    assert sum(budgets) + 4 * measure.START_UP == pytest.approx(400, abs=4)
    text = page.read_text()
    assert text.startswith("# Measured on AMD EPYC, avx512bf16\n")
    for words in (
        "torch 2.14.1, Python 3.11.2", "bf16 matmul 0.700 TFLOP/s, copy 30.0 GB/s", "0.500†", "### The 31x claim",
        "| tokens | 11.0x | measured | a \\| b |", "- Left out: training: no time.", "![a dot", "](m.png)",
        "| ours, prepared | 250 | 0.50 x | 0.40 | 80% | 7 |", "| ahead | 250 | 0.50 x | – | – | 7 |",
        "- Left out: torch.compile: no time.", "| adaln | bf16 | forward | 0.10 (1 shape) |", "bf16 (chosen)",
    ):  # fmt: skip
        assert words in text, words
    assert (page.parent / "m.png").read_bytes() == b"picture"
    again = tmp_path / "again.md"
    assert measure.main(["--from", str(tmp_path / "kept"), "--out", str(again)]) == 0
    assert again.read_text() == text.replace("m.png", "again.png")


def test_a_part_that_failed_is_named_on_the_page(tmp_path, capsys):
    run, _ = fake_parts(failing=("throughput",))
    assert measure.main(["--out", str(tmp_path / "m.md")], run) == 1
    text = (tmp_path / "m.md").read_text()
    assert "**throughput failed**: out of memory" in text
    assert "Sampling, training" not in text
    assert "out of memory" in capsys.readouterr().err
    run, _ = fake_parts(failing=("throughput", "sit", "tokenizer", "ops"))
    assert measure.main(["--out", str(tmp_path / "none.md")], run) == 1
    assert not (tmp_path / "none.md").exists()


def test_too_little_memory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_memory_gb", lambda: 0.0)
    job = Job(throughput.parse(tiny(tmp_path)))
    job.training(_workload.Generators(job.size, 8, 64, CPU))
    assert any("No training number" in note for note in job.notes)
    assert any("No optimizer step" in note for note in job.notes)
    assert not any("train" in row.values for row in job.rows.values())


# ---- where time and memory go


def test_where_the_time_goes_adds_up():
    fast = prepare(MAETok(MAETokConfig(encoder=ViTSize(64, 2, 2), decoder=ViTSize(64, 1, 2))), "fp32")
    images = torch.rand(1, 3, 256, 256)
    lines = where(Prepared(fast.model, lambda: fast.encode(images)))
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.1 * len(lines))
    named = {line.split("%")[1].strip().split("   ")[0] for line in lines}
    products = {f"products {shape}" for shape in ("64 -> 192", "64 -> 64", "64 -> 256", "256 -> 64")}
    assert named == products | {"attention", "the rest"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fast.model.modules())


@pytest.mark.skipif(held_bytes(CPU) is None, reason="this system does not show a process's memory")
def test_memory_of_a_model():
    """In a process of its own, as the table has it: this one has memory that it freed and kept."""
    script = ROOT / "benchmarks" / "memory.py"
    command = [sys.executable, str(script), "--form", "plain fp32", "--depth", "1"]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = 4 * sum(p.numel() for p in SiT(SiTConfig(depth=1)).parameters())
    assert weights < 1.1 * row["kept"]
    assert row["kept"] <= row["peak"] < 1.5 * weights


def test_factors_of_a_whole_picture_multiply_to_its_ratio() -> None:
    args = pipeline.parse(["--steps", "10", "--dtype", "bf16"])
    steps = {"step many fp32": 9.0, "step many bf16": 4.0, "step few fp32": 1.0, "step few bf16": 0.5}
    decoders = {"vae fp32": 6.0, "vae bf16": 3.0, "decode fp32": 2.0, "decode bf16": 1.0}
    seconds = {**steps, **decoders, "ours bf16": 2.5, "ours int8": 2.0}
    inside = guided_steps(10, (0.0, 0.7))
    exact = pipeline.factors(seconds, args, "ours bf16")
    assert [after for _, after, _ in exact] == [96, 43, 8, 6, 1 + 0.5 * (inside + (10 - inside) / 2), 2.5]
    int8 = pipeline.factors(seconds, args, "ours int8")  # against fp32: there is no public int8
    assert [after for _, after, _ in int8] == [96, 16, 12, 2 + 1.0 * (inside + (10 - inside) / 2), 2.0]


def test_a_tiny_whole_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    tiny = ["--model", "tiny", "--res", "64", "--tokens", "4", "--steps", "2", "--batch", "2", "--rounds", "1"]
    pipeline.main([*tiny, "--dtype", "fp32", "--whole", "--out", str(file)])
    found = json.loads(file.read_text())
    ours = found["ratios"]["ours fp32"]
    assert ours["against fp32"] == ours["at the same precision"] > 0
    assert found["seconds_an_image"]["whole fp32"] > 0
    said = capsys.readouterr().out
    assert "guidance work" in said
    assert "every step run" in said


# ---- models.py


def test_the_frozen_peer_is_compiled_frozen():
    """Not what was compiled of the same function without freezing."""
    from torch._dynamo.utils import counters

    model, x = torch.nn.Linear(16, 16).eval(), torch.randn(4, 16)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        for freezing in (False, True):
            fast = models.compiled(model, freezing)
            torch.testing.assert_close(fast(x), model(x))
            assert counters["stats"]["unique_graphs"] == 1 + freezing
            fast(x)
    assert counters["stats"]["unique_graphs"] == 2


def test_accelerated_models_are_a_table_each(tmp_path, capsys, monkeypatch):
    """Those whose libraries are installed; the others are named."""
    monkeypatch.setitem(sys.modules, "timm", None)
    out = tmp_path / "rows.json"
    options = ["accelerate", "--depth", "1", "--batch", "1", "--no-compile", "--rounds", "1", "--dtype", "fp32"]
    models.main([*options, "--budget", "120", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {row["table"] for row in rows} == {"1 DiT blocks, 1152 wide, 128 tokens, batch 1, fp32"}
    said = capsys.readouterr().out
    assert "timm is not installed" in said
    cases = {row["case"] for row in rows}
    assert {models.PLAIN, "ours, accelerate(model)", "ours, prepared: for_inference=True"} <= cases
    assert "Block -> " in said
