# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The measurements behind throughput.py: one `Job` per run, one method per thing measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _claims as claims_
import _workload
import torch
from _claims import COMPUTED, MEASURED, Claim
from _report import Row, Value
from baselines.sit import guided_step

from maetok_fast.bench import machine
from maetok_fast.bench.timing import Timing, held_bytes, interleave, release_memory
from maetok_fast.data import bundled_photographs, find_images, load_images, to_uint8
from maetok_fast.diffusion import sample
from maetok_fast.inference import prepare

TRAIN_BATCH = 256  # images that share one optimizer step, as in published SiT training
BUDGET = {"full": 240.0, "quick": 25.0}  # seconds; once spent, a group's first calls are its samples
OUR_STEPS = 2  # sampling steps in one timed call of ours


class Job:
    """One run: each method measures one thing and adds its values to the rows."""

    def __init__(self, args: argparse.Namespace, tick: Callable[[str], None] = lambda text: None) -> None:
        self.args, self.tick = args, tick
        self.device = torch.device(args.device)
        self.dtype = machine.DTYPES[args.dtype]
        self.size = _workload.SIZES[args.model]
        self.many = (args.res // 16) ** 2
        self.batch = {"few": args.batch, "many": max(1, args.batch * args.tokens // self.many)}
        self.start, self.budget = time.perf_counter(), BUDGET["quick" if args.quick else "full"]
        self.rounds = 2 if args.quick else 5
        self.matmul_size = 256 if args.model == "tiny" else 4096
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

    def _row(self, key: str, label: str, tokens: int, dtype: str, style: str = "public") -> None:
        row = Row(key, f"{label}, {tokens} tokens, {dtype}", tokens, dtype, style)
        row.values["gflops"] = Value(self.counts[key.split("-")[1]], "GFLOPs/image", COMPUTED)
        self.rows[key] = row

    def tokenizer(self) -> dict[str, Any]:
        """Photographs in, latents, photographs out; encode and decode rates of the peers and ours."""
        args = self.args
        files = find_images(args.images) if args.images else bundled_photographs()
        files = files[: 2 if args.quick else 12]
        self.tick(f"reading {len(files)} photographs")
        start = time.perf_counter()
        photographs = load_images(files, args.res).to(self.device)
        read_seconds = time.perf_counter() - start
        model = _workload.make_tokenizer(self.size, args.tokens, args.res, args.checkpoint, self.device)
        fast = prepare(model, self.dtype)
        images = photographs[: 1 if args.quick else 4]
        with torch.no_grad():
            latents = fast.encode(photographs.to(self.dtype))
            reconstructions = fast.decode(latents)
            cases = self._tokenizer_peers(model, images, latents[: len(images)])
            cases[f"ours-few-{args.dtype} encode"] = _bind(fast.encode, images.to(self.dtype))
            cases[f"ours-few-{args.dtype} decode"] = _bind(fast.decode, latents[: len(images)])
            times = interleave(cases, self.device, until=self._until(0.2), rounds=self.rounds, tick=self.tick)
        for name, timing in times.items():
            key, part = name.split()
            self.rows[key].values[part] = Value(
                len(images) / timing.seconds, "images/s", MEASURED, timing.samples, len(images)
            )
        error = (reconstructions.float().clamp(-1, 1) - photographs).square().mean().item()
        self.pictures = to_uint8(photographs), to_uint8(reconstructions)
        weights = f"checkpoint {args.checkpoint}" if args.checkpoint else "random"
        return {
            "files": [path.name for path in files],
            "read_images_per_s": len(files) / read_seconds,
            "latents": list(latents.shape),
            "psnr_db": -10 * torch.log10(torch.tensor(error / 4)).item(),
            "tokenizer_weights": weights,
            "generator_weights": "random",
        }

    def _tokenizer_peers(self, model: Any, images: torch.Tensor, latents: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """The plain tokenizer's cases, and how far its and our latents are from its fp32 ones."""
        cases: dict[str, Callable[[], Any]] = {}
        try:
            exact = _workload.plain_tokenizer(model, torch.float32).encode(images[:1])
        except ValueError as error:
            self.notes.append(f"No tokenizer peer for this checkpoint: {error}.")
            return cases
        for name in dict.fromkeys(("fp32", self.args.dtype)):
            dtype = machine.DTYPES[name]
            peer = _workload.plain_tokenizer(model, dtype)
            cases[f"public-few-{name} encode"] = _bind(peer.encode, images.to(dtype))
            cases[f"public-few-{name} decode"] = _bind(peer.decode, latents.to(dtype))
            if name != "fp32":
                latent = peer.encode(images[:1].to(dtype))
                self.agreement[f"encode public {name}"] = _workload.relative_error(latent, exact)
        self.agreement[f"encode ours {self.args.dtype}"] = _workload.relative_error(latents[:1], exact)
        return cases

    def sampling(self, models: _workload.Generators) -> None:
        """One guided step per row, and ours without guidance (what it runs outside the interval)."""
        args, dt = self.args, -1 / self.args.steps
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
        weights["ours"] = after - before if before is not None and after is not None else _bytes(low)
        noise, y = models.inputs("few", self.batch["few"], self.dtype)
        for name, scale in (("", _workload.GUIDANCE), (" unguided", 1.0)):
            options = {"steps": OUR_STEPS, "method": "euler", "guidance": scale}
            cases[f"ours-few-{fast}{name}"] = _bind(sample, ours, noise, y, **options)
        self._agree(models, low, ours)
        products = {}
        for name in dict.fromkeys(("fp32", fast)):
            # in the same rounds as the steps that are held against it
            cases[f"matmul {name}"], products[name] = machine.matmul(self.device, name, self.matmul_size)
        with torch.no_grad():
            times = self._compilable(cases)
        self.rates = {f"gemm_{name}_tflops": n / times[f"matmul {name}"].seconds / 1e12 for name, n in products.items()}
        self.rates["copy_gb_s"] = machine.copy_bandwidth(self.device)
        for key, timing in times.items():
            if key in self.rows:
                self._sampling_values(key, timing, times, weights)

    def _compilable(self, cases: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Time the cases; without a working compiler the torch.compile row is dropped and the reason noted."""
        for key in [key for key in cases if key.startswith("compiled")]:
            self.tick("torch.compile of the public code")
            try:
                cases[key]()
            except Exception as error:  # dynamo wraps whatever the back end raised
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.notes.append(f"No torch.compile row: {reason}")
                del cases[key], self.rows[key]
        return interleave(cases, self.device, until=self._until(0.55), rounds=self.rounds, tick=self.tick)

    def _sampling_values(self, key: str, timing: Timing, times: dict[str, Timing], weights: dict[str, int]) -> None:
        row, nfe = self.rows[key], self.args.steps
        batch = self.batch[key.split("-")[1]]
        guided = timing.seconds
        if row.style == "ours":
            guided /= OUR_STEPS
            plain = times[f"{key} unguided"].seconds / OUR_STEPS
            inside = guided_steps(nfe, self.args.interval)
            run = inside * guided + (nfe - inside) * plain
        else:
            run = nfe * guided
        rate = self.rates[f"gemm_{row.dtype}_tflops"] * 1e12
        row.values["step"] = Value(1e3 * guided / batch, "ms/image", MEASURED, timing.samples, batch)
        flops = 2 * batch * row.values["gflops"].value * 1e9
        row.values["gemm"] = Value(100 * flops / guided / rate, "% of the matmul rate", COMPUTED)
        row.values["sample"] = Value(batch / run, "images/s", COMPUTED, note=f"{nfe} evaluations, from timed steps")
        if timing.extra_bytes is not None:
            held = weights["ours" if row.style == "ours" else row.dtype]
            row.values["memory_sample"] = Value((held + timing.extra_bytes) / 2**30, "GiB", MEASURED)

    def _agree(self, models: _workload.Generators, low: dict[str, torch.Tensor], ours: Any) -> None:
        """Relative errors of one velocity against the public code in fp32: a fast row must not be a wrong one."""
        self.tick("comparing outputs")
        x, y = models.inputs("few", 1, torch.float32)
        t = torch.full((1,), 0.5, device=self.device)
        with torch.no_grad():
            exact = models.plain("few")(x, t, y)
            public = models.plain("few", self.dtype, low)(x.to(self.dtype), t, y)
            fast = ours(x.to(self.dtype), t, y)
        self.agreement[f"velocity public {self.args.dtype}"] = _workload.relative_error(public, exact)
        self.agreement[f"velocity ours {self.args.dtype}"] = _workload.relative_error(fast, exact)

    def training(self, models: _workload.Generators) -> None:
        """Forward + backward per row and an optimizer step each way; fp32 masters, autocast for the fast dtype."""
        few, many, ours = models.plain("few"), models.plain("many"), models.ours.train()
        parameters = models.parameters
        cases: dict[str, Callable[[], Any]] = {}
        for key, row in self.rows.items():
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
            model = ours if row.style == "ours" else (many if which == "many" else few)
            x, y = models.inputs(which, batch, torch.float32)
            step = _workload.train_step(model, x, y, None if row.dtype == "fp32" else self.dtype)
            cases[key] = _with_attention(step, model, "naive" if naive else "sdpa") if row.style != "ours" else step
        times = interleave(
            cases, self.device, until=self._until(0.9), rounds=self.rounds, tick=lambda k: self.tick(f"{k} training")
        )
        optimizers = {}
        free = machine.available_memory_gb() if self.device.type == "cpu" else None
        if free is not None and 12 * parameters / 2**30 > 0.9 * free:
            self.notes.append("No optimizer step: not enough free memory; training rates are forward + backward alone.")
        else:
            for name, fused in (("public", False), ("ours", True)):
                step = _workload.optimizer_step(few, fused)
                timing = interleave(
                    {name: step}, self.device, until=self._until(1.0), rounds=1, tick=lambda k: self.tick(f"AdamW, {k}")
                )
                optimizers[name] = timing[name].seconds
                del step
                for parameter in few.parameters():
                    parameter.grad = None
                release_memory(self.device)
        for key, timing in times.items():
            row = self.rows[key]
            batch = self.batch[key.split("-")[1]]
            optimizer = optimizers.get("ours" if row.style == "ours" else "public", 0.0)
            rate = 1 / (timing.seconds / batch + optimizer / TRAIN_BATCH)
            row.values["train"] = Value(
                rate, "images/s", COMPUTED, note=f"optimizer step shared by {TRAIN_BATCH} images"
            )
            row.values["train_forward_backward"] = Value(timing.seconds, "s", MEASURED, timing.samples, batch)
            if optimizer:
                row.values["train_optimizer"] = Value(optimizer, "s", MEASURED)
            if timing.extra_bytes is not None:
                held = 12 * parameters + timing.extra_bytes  # weights, two moments; the rest was measured
                row.values["memory_train"] = Value(held / 2**30, "GiB", COMPUTED)

    def _until(self, share: float) -> float:
        """When repetitions must end for this share of the run's time budget."""
        return self.start + share * self.budget

    def claims(self) -> list[Claim]:
        """The factor tables; a chain with a missing link is left out."""
        args, counts = self.args, self.counts
        counted = counts["many"] / counts["few"]
        keys = ["public-many-fp32", "public-few-fp32", f"public-few-{args.dtype}", f"ours-few-{args.dtype}"]
        links = [
            ("tokens", f"{self.many} -> {args.tokens} tokens, public code, fp32"),
            ("precision", f"fp32 -> {args.dtype}, public code"),
            ("kernels", "public code -> maetok_fast, same work asked for"),
        ]
        found = []
        sampled = [self._per_second(key, "step", 1e3) for key in keys]
        if all(sampled):
            inside = guided_steps(args.steps, args.interval)
            low, high = args.interval
            note = (
                f"both branches at all {args.steps} steps -> at the {inside} with t in [{low:g}, {high:g}]; public "
                "samplers that skip the unused branch (REPA's) have this already"
            )
            ratio = self.rows[keys[-1]].values["sample"].value * args.steps / sampled[-1]
            context = claims_.inference_context(
                counts["many"], counts["few"], (counts["vae_decode"], counts["decode"]), args.steps
            )
            factors = [*claims_.chain(links, sampled), claims_.Factor("guidance work", ratio, COMPUTED, note)]
            found.append(Claim("Sampling rate: the 31x claim", factors, context))
        trained = [self._per_second(key, "train_forward_backward", 1) for key in keys]
        if all(trained):
            factors = claims_.chain(links, trained)
            context = claims_.training_context(trained[-1] / trained[0], counted)
            claim = Claim("Training to equal quality: the 76x claim", [*factors, claims_.CONVERGENCE], context)
            found.append(claim)
        return found

    def _per_second(self, key: str, name: str, scale: float) -> float:
        """Images/s of one measured part; 0.0 where it was not measured."""
        value = self.rows[key].values.get(name)
        if value is None:
            return 0.0
        batch = value.batch if name == "train_forward_backward" else 1
        return scale * (batch or 1) / value.value


def expected_ticks(args: argparse.Namespace) -> int:
    """How many different things a run announces, for the progress bar."""
    dtypes = 1 if args.dtype == "fp32" else 2
    rows = 2 * dtypes + 2 + args.compile
    return 5 + dtypes + 2 * (dtypes + 1) + (rows + 1) + (rows - args.compile) + 2


def guided_steps(steps: int, interval: tuple[float, float]) -> int:
    """How many of `steps` Euler times 1, 1 - 1/n, ..., 1/n lie in the interval."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return int(((times >= interval[0]) & (times <= interval[1])).sum())


def _bind(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: fn(*args, **kwargs)


def _with_attention(step: Callable[[], None], model: Any, attention: str) -> Callable[[], None]:
    def run() -> None:
        model.set_attention(attention)
        step()

    return run


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
