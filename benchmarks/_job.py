# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The measurements behind throughput.py: one `Job` per run, one method per thing measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import _workload
from benchmarks._claims import COMPUTED, MEASURED, Claim, claims_of
from benchmarks._report import Row, Value
from benchmarks.baselines.sit import guided_step
from maetok_fast.bench import machine
from maetok_fast.bench.budget import Budget, calibrate
from maetok_fast.bench.timing import Timing, held_bytes, interleave, release_memory
from maetok_fast.data import bundled_photographs, find_images, load_images, to_uint8
from maetok_fast.diffusion import sample
from maetok_fast.inference import prepare

TRAIN_BATCH = 256  # images that share one optimizer step, as in published SiT training
SHARES = {"tokenizer": 0.22, "sampling": 0.62, "training": 0.93, "optimizer": 1.0}  # of the budget, when each must end
OUR_STEPS = 2  # sampling steps in one timed call of ours
OPTIMIZER_BYTES = 28  # a parameter: weight, gradient and two moments read, all but the gradient written


class Job:
    """One run: each method measures one thing and adds its values to the rows. `plan` chooses sizes first; within a
    part the rows come in order of importance, and those that no time is left for are named by the budget."""

    def __init__(
        self,
        args: argparse.Namespace,
        tick: Callable[[str], None] = lambda text: None,
        budget: Budget | None = None,
    ) -> None:
        self.args, self.tick = args, tick
        self.budget = Budget(args.budget) if budget is None else budget
        self.device = torch.device(args.device)
        self.dtype = machine.DTYPES[args.dtype]
        self.size = _workload.SIZES[args.model]
        self.many = (args.res // 16) ** 2
        self.rounds = 2 if args.quick else 5
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        self.agreement: dict[str, float] = {}
        self.rates: dict[str, float] = {}  # the machine's ceilings
        self.counts = _workload.count_all(self.size, args.tokens, args.res)
        fast = args.dtype
        for tokens, which in ((self.many, "many"), (args.tokens, "few")):
            for dtype in dict.fromkeys(("fp32", fast)):
                self._row(f"public-{which}-{dtype}", "public", tokens, dtype)
            if which == "many":
                self._row(f"sdpa-{which}-{fast}", "public + SDPA", tokens, fast)
            elif args.compile:
                self._row(f"compiled-{which}-{fast}", "torch.compile", tokens, fast, "compiled")
        self._row(f"ours-few-{fast}", "maetok_fast", args.tokens, fast, "ours")
        self.important = [  # first what a claim needs
            f"ours-few-{fast}", "public-few-fp32", "public-many-fp32", f"public-few-{fast}", f"public-many-{fast}",
            f"sdpa-many-{fast}", f"compiled-few-{fast}",
        ]  # fmt: skip
        self.important = [key for key in dict.fromkeys(self.important) if key in self.rows]
        self.plan()

    def plan(self) -> None:
        """Calibrates, then chooses the batch, the images and the product's size; `batch` is images per forward."""
        args, budget = self.args, self.budget
        self.tick("measuring what this machine can do")
        self.speed = calibrate(self.device, ("fp32", args.dtype))
        if args.dtype == "fp32":
            budget.leave_out("Factor fp32 -> bf16", "fp32 is the precision that was asked for or is fastest here")

        def sampling(batch: int) -> float:
            return 2.0 * sum(self._ideal(key, "sample", self._batches(batch)) for key in self.important)

        most = args.batch or (64 if self.device.type == "cuda" else 2 if args.quick else 4)
        sizes = [most] if args.batch else [most >> i for i in range(most.bit_length())]
        batch = budget.largest(sizes, sampling, SHARES["sampling"] - SHARES["tokenizer"])
        if batch < most:
            budget.leave_out(f"{most} images per forward", f"{batch} instead, so that more rows fit the time")
        self.batch = self._batches(batch)
        image = self._tokenizer_ideal("encode", args.dtype) + self._tokenizer_ideal("decode", args.dtype)
        most = 1 if args.quick else 4
        self.images = budget.largest(range(most, 0, -1), lambda n: 8.0 * n * image, SHARES["tokenizer"])
        if args.model == "tiny":
            self.matmul_size = 256
        else:
            rate = min(self.speed.flops.values())
            self.matmul_size = budget.largest((4096, 2048, 1024), lambda n: 2.0 * n**3 / rate, 0.02)

    def _batches(self, batch: int) -> dict[str, int]:
        return {"few": batch, "many": max(1, batch * self.args.tokens // self.many)}

    def _ideal(self, key: str, what: str, batches: dict[str, int]) -> float:
        """Seconds of a row's timed call at the calibrated matmul rate: a guided step, or forward + backward."""
        style, which, dtype = key.split("-")
        forward = self.speed.seconds(dtype, 1e9 * self.counts[which] * batches[which])
        return forward * (3 if what == "train" else 2 * OUR_STEPS if style == "ours" else 2)

    def _tokenizer_ideal(self, part: str, dtype: str) -> float:
        """Seconds an image, in the same sense."""
        return self.speed.seconds(dtype, 1e9 * self.counts[part])

    def _row(self, key: str, label: str, tokens: int, dtype: str, style: str = "public") -> None:
        row = Row(key, f"{label}, {tokens} tokens, {dtype}", tokens, dtype, style)
        row.values["gflops"] = Value(self.counts[key.split("-")[1]], "GFLOPs/image", COMPUTED)
        self.rows[key] = row

    def tokenizer(self) -> dict[str, Any]:
        """Photographs in, latents, photographs out; encode and decode rates of the peers and ours."""
        args, budget, outputs = self.args, self.budget, {}
        budget.part(SHARES["tokenizer"])
        files = find_images(args.images) if args.images else bundled_photographs()
        files = files[: 2 if args.quick else 12]
        self.tick(f"reading {len(files)} photographs")
        start = time.perf_counter()
        photographs = load_images(files, args.res).to(self.device)
        read_seconds = time.perf_counter() - start
        model = _workload.make_tokenizer(self.size, args.tokens, args.res, args.checkpoint, self.device)
        fast = prepare(model, self.dtype)
        images = photographs[: self.images]
        cases: dict[str, Callable[[], Any]] = {}

        def add(key: str, tokenizer: Any, dtype: torch.dtype) -> None:
            """Encode and decode of one row; what the encoder made is what the decoder gets."""
            given, name = images.to(dtype), key.split("-")[2]
            for part in ("encode", "decode"):
                ideal = len(images) * self._tokenizer_ideal(part, name)
                words = f"{part} of '{self.rows[key].label}'"
                budget.expect(f"{key} {part}", ideal, _kind(key, "tokenizer"), words)

            def encode() -> None:
                outputs[key] = tokenizer.encode(given)

            def decode() -> None:
                latents = outputs.get(key, outputs[ours])  # where encoding it did not fit
                outputs[f"{key} decode"] = tokenizer.decode(latents.to(dtype))

            cases[f"{key} encode"], cases[f"{key} decode"] = encode, decode

        ours = f"ours-few-{args.dtype}"
        add(ours, fast, self.dtype)
        budget.expect(f"{ours} encode", 0.0, "")  # without one encoding and one decoding there is no picture
        budget.expect(f"{ours} decode", 0.0, "")
        try:
            for name in dict.fromkeys(("fp32", args.dtype)):
                dtype = machine.DTYPES[name]
                add(f"public-few-{name}", _workload.plain_tokenizer(model, dtype), dtype)
        except ValueError as error:
            self.notes.append(f"No tokenizer peer for this checkpoint: {error}.")
        with torch.no_grad():
            times = interleave(cases, self.device, rounds=self.rounds, tick=self.tick, budget=budget)
            for name, timing in times.items():
                key, part = name.split()
                rate = len(images) / timing.seconds
                self.rows[key].values[part] = Value(rate, "images/s", MEASURED, timing.samples, len(images))
            exact = outputs.get("public-few-fp32")
            for who in ("public", "ours"):
                latents = outputs.get(f"{who}-few-{args.dtype}")
                if exact is not None and latents is not None and (who == "ours" or args.dtype != "fp32"):
                    error = _workload.relative_error(latents[:1], exact[:1])
                    self.agreement[f"encode {who} {args.dtype}"] = error
            reconstructions = outputs[f"{ours} decode"]
            spent = times[f"{ours} encode"].seconds + times[f"{ours} decode"].seconds
            more = min(len(photographs) - len(images), int(budget.left / (1.2 * spent / len(images))))
            if more < len(photographs) - len(images):
                shown = len(images) + more
                budget.leave_out(f"{len(photographs) - shown} of {len(photographs)} photographs", "no time for them")
                photographs = photographs[:shown]
            if more:
                rest = photographs[len(images) :].to(self.dtype)
                reconstructions = torch.cat([reconstructions, fast.decode(fast.encode(rest))])
        error = (reconstructions.float().clamp(-1, 1) - photographs).square().mean().item()
        self.pictures = to_uint8(photographs), to_uint8(reconstructions)
        return {
            "files": [path.name for path in files[: len(photographs)]],
            "read_images_per_s": len(files) / read_seconds,
            "latents": [len(photographs), *outputs[ours].shape[1:]],
            "psnr_db": -10 * torch.log10(torch.tensor(error / 4)).item(),
            "tokenizer_weights": f"checkpoint {args.checkpoint}" if args.checkpoint else "random",
            "generator_weights": "random",
        }

    def sampling(self, models: _workload.Generators) -> None:
        """One guided step per row, and ours without guidance (what it runs outside the interval)."""
        args, dt, budget = self.args, -1 / self.args.steps, self.budget
        budget.part(SHARES["sampling"])
        fast = args.dtype
        low = {name: tensor.to(self.dtype) for name, tensor in models.state.items()}
        weights = {"fp32": _bytes(models.state), fast: _bytes(low)}
        cases: dict[str, Callable[[], Any]] = {}

        def public(key: str, model: Any, attention: str) -> None:
            which = key.split("-")[1]
            x, y = models.inputs(which, self.batch[which], torch.float64)

            def step() -> None:
                if attention != "compiled":
                    model.set_attention(attention)
                guided_step(model, x, 0.5, dt, y, _workload.GUIDANCE)

            cases[key] = step

        for which in ("many", "few"):
            public(f"public-{which}-fp32", models.plain(which), "naive")
            if fast != "fp32":
                peer = models.plain(which, self.dtype, low)
                public(f"public-{which}-{fast}", peer, "naive")
            else:
                peer = models.plain(which)
            if which == "many":
                public(f"sdpa-{which}-{fast}", peer, "sdpa")
        if args.compile:
            compiled = models.plain("few", self.dtype, low)
            compiled.set_attention("sdpa")
            for block in compiled.blocks:
                block.compile()
            public(f"compiled-few-{fast}", compiled, "compiled")
        self.tick("preparing the fast model")
        before = held_bytes(self.device)
        ours = prepare(models.ours, self.dtype)
        after = held_bytes(self.device)
        _workload.race_attention(ours, *models.inputs("few", 1, self.dtype))
        weights["ours"] = after - before if before is not None and after is not None else _bytes(low)
        noise, y = models.inputs("few", self.batch["few"], self.dtype)
        for name, scale in (("", _workload.GUIDANCE), (" unguided", 1.0)):
            options = {"steps": OUR_STEPS, "method": "euler", "guidance": scale}
            cases[f"ours-few-{fast}{name}"] = _bind(sample, ours, noise, y, **options)
        self._agree(models, low, ours)
        products: dict[str, float] = {}
        ordered: dict[str, Callable[[], Any]] = {}  # as `important`: the first calls in this order
        for name in dict.fromkeys(("fp32", fast)):
            # in the same rounds as the steps that are held against it
            ordered[f"matmul {name}"], products[name] = machine.matmul(self.device, name, self.matmul_size)
        for key in self.important:
            ideal, words = self._ideal(key, "sample", self.batch), f"sampling with '{self.rows[key].label}'"
            budget.expect(key, ideal, _kind(key, "step"), words)
            ordered[key] = cases[key]
            if f"{key} unguided" in cases:
                budget.expect(f"{key} unguided", ideal / 2, _kind(key, "step"), f"{words}, unguided")
                ordered[f"{key} unguided"] = cases[f"{key} unguided"]
        with torch.no_grad():
            times = self._compilable(ordered)
        self.rates = {f"gemm_{name}_tflops": n / times[f"matmul {name}"].seconds / 1e12 for name, n in products.items()}
        self.rates["copy_gb_s"] = machine.copy_bandwidth(self.device)
        for key, timing in times.items():
            if key in self.rows:
                self._sampling_values(key, timing, times, weights)

    def _compilable(self, cases: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Time the cases; without a working compiler the torch.compile row is dropped and the reason noted."""
        for key in [key for key in cases if key.startswith("compiled")]:
            if not self.budget.admit(key):
                del cases[key]
                continue
            self.tick("torch.compile of the public code")
            try:
                cases[key]()
            except Exception as error:  # dynamo wraps whatever the back end raised
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.notes.append(f"No torch.compile row: {reason}")
                del cases[key], self.rows[key]
        return interleave(cases, self.device, rounds=self.rounds, tick=self.tick, budget=self.budget)

    def _sampling_values(self, key: str, timing: Timing, times: dict[str, Timing], weights: dict[str, int]) -> None:
        row, nfe = self.rows[key], self.args.steps
        batch = self.batch[key.split("-")[1]]
        guided = timing.seconds
        if row.style == "ours":
            guided /= OUR_STEPS
            inside = guided_steps(nfe, self.args.interval)
            plain = times.get(f"{key} unguided")
            run = None if plain is None else inside * guided + (nfe - inside) * plain.seconds / OUR_STEPS
        else:
            run = nfe * guided
        rate = self.rates[f"gemm_{row.dtype}_tflops"] * 1e12
        row.values["step"] = Value(1e3 * guided / batch, "ms/image", MEASURED, timing.samples, batch)
        flops = 2 * batch * row.values["gflops"].value * 1e9
        row.values["gemm"] = Value(100 * flops / guided / rate, "% of the matmul rate", COMPUTED)
        if run is not None:
            note = f"{nfe} evaluations, from timed steps"
            row.values["sample"] = Value(batch / run, "images/s", COMPUTED, note=note)
        if timing.extra_bytes is not None:
            held = weights["ours" if row.style == "ours" else row.dtype]
            row.values["memory_sample"] = Value((held + timing.extra_bytes) / 2**30, "GiB", MEASURED)

    def _agree(self, models: _workload.Generators, low: dict[str, torch.Tensor], ours: Any) -> None:
        """Relative errors of one velocity against the public code in fp32: a fast row must not be a wrong one."""
        ideal = sum(self.speed.seconds(name, 1e9 * self.counts["few"]) for name in ("fp32", self.args.dtype))
        self.budget.expect("agree", 1.5 * ideal, "agree", "the comparison of the generators' outputs")
        if not self.budget.admit("agree"):
            return
        self.tick("comparing outputs")
        x, y = models.inputs("few", 1, torch.float32)
        t = torch.full((1,), 0.5, device=self.device)
        with torch.no_grad():
            exact = models.plain("few")(x, t, y)
            if self.args.dtype != "fp32":
                public = models.plain("few", self.dtype, low)(x.to(self.dtype), t, y)
                self.agreement[f"velocity public {self.args.dtype}"] = _workload.relative_error(public, exact)
            fast = ours(x.to(self.dtype), t, y)
        self.agreement[f"velocity ours {self.args.dtype}"] = _workload.relative_error(fast, exact)

    def training(self, models: _workload.Generators) -> None:
        """Forward + backward per row and an optimizer step each way; fp32 masters, autocast for the fast dtype."""
        few, many, ours = models.plain("few"), models.plain("many"), models.ours.train()
        parameters, budget = models.parameters, self.budget
        budget.part(SHARES["training"])
        cases: dict[str, Callable[[], Any]] = {}
        for key in self.important:
            row = self.rows[key]
            if row.style == "compiled":
                continue
            which = key.split("-")[1]
            batch = self.batch[which]
            naive = key.startswith("public")
            element = 4 if row.dtype == "fp32" else 2
            need = _workload.train_bytes(self.size, row.tokens, batch, parameters, element, naive) / 2**30
            free = machine.available_memory_gb() if self.device.type == "cpu" else None
            if free is not None and need > 0.9 * free:
                self.notes.append(
                    f"No training number for '{row.label}': needs about {need:.0f} GB, {free:.0f} GB free."
                )
                continue
            ideal = self._ideal(key, "train", self.batch)
            budget.expect(f"{key} training", ideal, _kind(key, "train"), f"training with '{row.label}'")
            model = ours if row.style == "ours" else (many if which == "many" else few)
            x, y = models.inputs(which, batch, torch.float32)
            step = _workload.train_step(model, x, y, None if row.dtype == "fp32" else self.dtype)
            if row.style != "ours":
                step = _with_attention(step, model, "naive" if naive else "sdpa")
            else:
                _workload.race_training(model, x, y, None if row.dtype == "fp32" else self.dtype)
            cases[f"{key} training"] = step
        times = interleave(cases, self.device, rounds=self.rounds, tick=self.tick, budget=budget)
        optimizers = {}
        free = machine.available_memory_gb() if self.device.type == "cpu" else None
        if free is not None and 12 * parameters / 2**30 > 0.9 * free:
            self.notes.append("No optimizer step: not enough free memory; training rates are forward + backward alone.")
        else:
            budget.part(SHARES["optimizer"])
            for name, fused in (("ours", True), ("public", False)):
                label = f"AdamW, {name}"
                budget.expect(label, parameters * OPTIMIZER_BYTES / self.speed.bytes, label, f"optimizer step ({name})")
                step = _workload.optimizer_step(few, fused)
                timing = interleave({label: step}, self.device, rounds=1, tick=self.tick, budget=budget)
                if label in timing:
                    optimizers[name] = timing[label].seconds
                del step
                for parameter in few.parameters():
                    parameter.grad = None
                release_memory(self.device)
        for name, timing in times.items():
            row = self.rows[name.removesuffix(" training")]
            batch = self.batch[row.key.split("-")[1]]
            optimizer = optimizers.get("ours" if row.style == "ours" else "public", 0.0)
            rate = 1 / (timing.seconds / batch + optimizer / TRAIN_BATCH)
            note = f"optimizer step shared by {TRAIN_BATCH} images" if optimizer else "forward + backward alone"
            row.values["train"] = Value(rate, "images/s", COMPUTED, note=note)
            row.values["train_forward_backward"] = Value(timing.seconds, "s", MEASURED, timing.samples, batch)
            if optimizer:
                row.values["train_optimizer"] = Value(optimizer, "s", MEASURED)
            if timing.extra_bytes is not None:
                held = 12 * parameters + timing.extra_bytes  # weights, two moments; the rest was measured
                row.values["memory_train"] = Value(held / 2**30, "GiB", COMPUTED)

    def claims(self) -> list[Claim]:
        """The factor tables; a chain with a missing link is left out."""
        return claims_of(self.rows, self.counts, self.args, guided_steps(self.args.steps, self.args.interval))


def guided_steps(steps: int, interval: tuple[float, float]) -> int:
    """How many of `steps` Euler times 1, 1 - 1/n, ..., 1/n lie in the interval."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return int(((times >= interval[0]) & (times <= interval[1])).sum())


def _kind(key: str, part: str) -> str:
    """Rows of one code and one precision need a like share of the matmul rate."""
    style, _, dtype = key.split("-")
    return f"{style} {dtype} {part}"


def _bind(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: fn(*args, **kwargs)


def _with_attention(step: Callable[[], None], model: Any, attention: str) -> Callable[[], None]:
    def run() -> None:
        model.set_attention(attention)
        step()

    return run


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
