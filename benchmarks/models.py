# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Prepared models against plain PyTorch, eager and compiled, in one interleaved run.

    python benchmarks/models.py sit --batch 1 4 16      SiT-XL/1, 128 tokens: one forward, and one step of a plan
    python benchmarks/models.py tokenizer --batch 4     MAETok-B: encode, decode
    python benchmarks/models.py train --batch 4 16      SiT-XL/1 and MAETok-B: forward and backward of a training step
    python benchmarks/models.py linear                  packed linear layers at both models' shapes
    python benchmarks/models.py accelerate --batch 8    others' models, accelerated: timm's ViT-B/16, DiT blocks

Every peer computes the same outputs from the same weights; medians, the peers in turn, the ceilings among them: large
products, and on a CPU the peak, multiply-adds of registers alone (csrc/cpu/peak.cpp). Under a table on a CPU stands
where the time of our prepared models goes.
Tables come in the order asked for, each within its share of --budget: what does not fit is left out and named.
`--json FILE` writes the numbers with the machine's description.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks._where import Prepared, where
from benchmarks.baselines import load_needed
from benchmarks.baselines.maetok import MAETok as PlainMAETok
from benchmarks.baselines.sit import SiT as PlainSiT
from maetok_fast.bench.budget import Budget, Speed, calibrate
from maetok_fast.bench.cases import each
from maetok_fast.bench.machine import DTYPES, copy_bandwidth, describe, headline, matmul
from maetok_fast.bench.timing import interleave
from maetok_fast.kernels import _native
from maetok_fast.kernels.packed_linear import BACKENDS, PackedLinear, why_not
from maetok_fast.precision import resolve

Cases = dict[str, Callable[[], Any]]
Row = dict[str, Any]
GEMM_SIZES = (4096, 2048, 1024)
COMPILE_SECONDS = 15.0  # of a whole model at best; what this machine needs is learnt
PLAIN = "plain torch, eager"
INT8 = "ours, prepared in int8"
AHEAD = "  modulations of 8 steps ahead"
PEAK = "peak, registers alone"
NO_RATE = (AHEAD,)  # other work than the table's
# model -> tokens per image, (layer, in, out)
LINEAR_SHAPES = {
    "sit-xl": (128, [("qkv", 1152, 3456), ("proj", 1152, 1152), ("fc1", 1152, 4608), ("fc2", 4608, 1152)]),
    "maetok-b 256": (385, [("qkv", 768, 2304), ("proj", 768, 768), ("fc1", 768, 3072), ("fc2", 3072, 768)]),
    "maetok-b 512": (1153, [("qkv", 768, 2304), ("proj", 768, 768), ("fc1", 768, 3072), ("fc2", 3072, 768)]),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["sit", "tokenizer", "train", "linear", "accelerate"])
    add("--batch", type=_cli.count, nargs="+", default=[4])
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="default: the fastest at full rate here")
    add("--device", default="cpu")
    add("--size", type=_cli.count, default=256, help="image size of the tokenizer, a multiple of 16 (default 256)")
    add("--depth", type=_cli.count, help="fewer blocks, for a quick look")
    add("--rounds", type=_cli.count, default=9)
    add("--budget", type=_cli.seconds, default=240.0, metavar="SECONDS", help="time for all tables (default 240)")
    add("--no-compile", action="store_true", help="leave torch.compile's rows out")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"--size must be a multiple of 16 (the patch), got {args.size}")
    args.dtype = _cli.dtype(args.dtype, _cli.device(parser, args.device))
    if args.dtype == "fp16":
        parser.error("--dtype auto: this device computes fp16 at full rate and not bf16; give --dtype bf16 or fp32")
    _cli.output(parser, "--json", args.json)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    device, budget = torch.device(args.device), Budget(args.budget)
    machine = describe(device) | {"copy_gb_s": copy_bandwidth(device)}
    print(f"{headline(machine)}; copy {machine['copy_gb_s']:.1f} GB/s; {args.dtype}")
    speed = calibrate(device, (args.dtype,))
    suites = {"sit": sit, "tokenizer": tokenizer, "train": train, "linear": linear, "accelerate": accelerated}
    made = suites[args.what](args, device)
    tables = {"sit": len(args.batch), "tokenizer": 3 * len(args.batch)}
    tables |= dict.fromkeys(("train", "accelerate"), 2 * len(args.batch))
    count = tables.get(args.what, 5 + 12 * len(args.batch))
    rows: list[Row] = []
    with torch.set_grad_enabled(args.what == "train"):
        for i, (title, gmacs, cases) in enumerate(made):
            budget.end = budget.clock() + (budget.start + budget.total - budget.clock()) / max(1, count - i)
            rows += measure(title, gmacs, cases, args, device, budget, speed)
    for line in budget.left_out:
        print(f"Left out: {line}.")
    if args.json:
        document = {"benchmark": "models", "machine": machine, "arguments": vars(args), "rows": rows}
        args.json.write_text(json.dumps(document | {"left_out": budget.left_out}, indent=1, default=str))


def measure(
    title: str,
    gmacs: float,
    cases: Cases,
    args: argparse.Namespace,
    device: torch.device,
    budget: Budget,
    speed: Speed,
) -> list[Row]:
    """One table, printed as it is measured: warmed up as far as the budget admits, then in turn until its deadline."""
    # the ceilings take their turns among the cases, so that a slow phase of the machine hits both
    flops = speed.flops[args.dtype]
    size = budget.largest(GEMM_SIZES, lambda n: 2.0 * n**3 / flops, 0.01)
    limits = gemms(device, args.dtype, size)
    peak_operations = 0.0
    if device.type == "cpu" and _native.why_missing() is None:
        limits[PEAK], peak_operations = peak(args.dtype, 0.02)
    cases = limits | important_first(cases)
    for name in cases:
        compiling = name.startswith("torch.compile")
        ideal = 2e9 * gmacs / flops + (COMPILE_SECONDS if compiling else 0.0)
        if name not in limits and name not in NO_RATE:
            budget.expect(name, ideal, "compile" if compiling else "eager", f"{title}: {name}")
    # compiles what is to be compiled, outside the clock that counts
    end, budget.end = budget.end, budget.clock() + 0.7 * budget.left
    warm = interleave(cases, device, rounds=0, budget=budget)
    budget.end = end
    if not any(name not in limits and name not in NO_RATE for name in warm):
        return []  # ceilings alone are no table
    timings = interleave(
        {name: cases[name] for name in warm}, device, until=budget.end, rounds=args.rounds, once=math.inf
    )
    ceiling_tflop = dict.fromkeys(limits, 2e-12 * size**3) | {PEAK: peak_operations / 1e12}
    ceiling = max(ceiling_tflop[name] / timings[name].seconds for name in limits if name != PEAK)
    print(f"\n{title}   ({gmacs:.1f} GMAC)")
    first = timings.get(PLAIN)
    rows: list[Row] = []
    for name in (*(name for name in timings if name not in limits), *limits):
        timing = timings[name]
        work = ceiling_tflop[name] if name in limits else 2e-3 * gmacs if name not in NO_RATE else float("nan")
        rate = work / timing.seconds
        row = {"table": title, "case": name, "seconds": timing.seconds, "samples": timing.samples}
        row |= {"of_first": timing.seconds / first.seconds if first else None}
        row |= {"tflops": rate, "of_ceiling": rate / ceiling}
        rows.append(row)
        label = f"{size}^3 {name}" if name in limits and name != PEAK else name
        relative = f"{row['of_first']:5.2f} x" if first else "      -"
        line = f"  {label:34s} {timing.seconds * 1e3:9.2f} ms   {relative}   n={timing.samples}"
        if name not in NO_RATE:
            line += f"   {rate:5.2f} TFLOP/s   {100 * row['of_ceiling']:4.0f} % of the ceiling"
        print(line, flush=True)
    for name in timings:
        case = cases[name]
        if isinstance(case, Prepared) and device.type == "cpu":
            print(f"  where the time of '{name}' goes:", *where(case), sep="\n    ", flush=True)
    return rows


def gemms(device: torch.device, dtype: str, size: int) -> Cases:
    """The ceilings: a size^3 product, plain and, where weights are packed, packed."""
    cases: Cases = {"matmul": matmul(device, dtype, size)[0]}
    if why_not("onednn", DTYPES[dtype], DTYPES[dtype], device) is None:
        packed = PackedLinear(torch.randn(size, size), dtype=DTYPES[dtype], backend="onednn")
        x = torch.randn(size, size, dtype=DTYPES[dtype])
        cases["matmul, packed by oneDNN"] = lambda: packed(x)
    return cases


def peak(dtype: str, seconds: float) -> tuple[Callable[[], Any], float]:
    """Multiply-adds of registers on every thread for about so long, and how many operations that is."""
    library, kind, steps = _native.lib(), int(dtype == "bf16"), 10_000
    taken = 0.0
    while taken < seconds:
        steps *= 2
        started = time.perf_counter()
        operations = library.peak(kind, steps)
        taken = time.perf_counter() - started
    return partial(library.peak, kind, steps), operations


def compiled(fn: Callable[..., Any], freezing: bool) -> Callable[..., Any]:
    """torch.compile of fn; with `freezing` (on while it compiles) Inductor packs the weights as constants.

    By a backend of its own: Inductor's configuration is no guard, and what was compiled of fn without freezing would be
    found and run (findings/torch_compile_config_is_no_guard.sh)."""
    from torch._inductor.compile_fx import compile_fx

    backend: Any = (lambda graph, inputs: compile_fx(graph, inputs)) if freezing else "inductor"
    made = torch.compile(fn, dynamic=False, backend=backend)

    def call(*inputs: Any) -> Any:
        with torch._inductor.config.patch(freezing=freezing):
            return made(*inputs)

    return call


def important_first(cases: Cases) -> Cases:
    """Plain torch, ours prepared, ours as a module, what has to be compiled: as a budget admits them."""
    order = (PLAIN, "ours, p", "ours", "torch.compile")
    return dict(
        sorted(cases.items(), key=lambda case: next((i for i, s in enumerate(order) if case[0].startswith(s)), 9))
    )


def peers(plain: Callable[..., Any], inputs: tuple[Any, ...], compile_: bool) -> Cases:
    cases: Cases = {PLAIN: lambda: plain(*inputs)}
    if compile_:
        torch._dynamo.reset()
        for name, freezing in [("torch.compile", False), ("torch.compile + freezing", True)]:
            fast = compiled(plain, freezing)
            cases[name] = lambda fast=fast: fast(*inputs)
    return cases


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Zero-initialised gates would hide branches from a check of the outputs."""
    for p in model.parameters():
        if p.requires_grad and not p.any():
            p.normal_(0, 0.02)
    return model.eval()


def bytes_(device: torch.device) -> bool:
    """Whether this processor multiplies int8."""
    return device.type == "cpu" and why_not("native int8", torch.float32, torch.int8, device) is None


def check_same(name: str, got: Tensor, want: Tensor, tell: bool = False) -> None:
    """A benchmark of two different computations is worth nothing. tell: how different, for what is meant to differ."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    limit = 0.25 if tell else 0.05
    if tell:
        print(f"{name}: outputs differ from plain torch's by {error:.2%} in relative norm (random weights)")
    if not error < limit:
        raise SystemExit(f"{name}: outputs differ from plain torch's by {error:.3f} in relative norm")


def sit(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, Cases]]:
    from maetok_fast.inference import prepare
    from maetok_fast.models import SiT, SiTConfig

    dtype = DTYPES[args.dtype]
    config = SiTConfig(**({} if args.depth is None else {"depth": args.depth}))
    ours = randomised(SiT(config)).to(device, dtype)
    plain = PlainSiT((128, 32), depth=config.depth, attention="sdpa").to(device, dtype).eval()
    load_needed(plain, ours.state_dict(), assign=True)
    fast, of_bytes = prepare(ours, dtype), prepare(ours, dtype, torch.int8) if bytes_(device) else None
    tokens, dim = 128, config.dim
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    for batch in args.batch:
        x = torch.randn(batch, tokens, 32, device=device, dtype=dtype)
        t, y = torch.full((batch,), 0.5, device=device), torch.randint(0, 1000, (batch,), device=device)
        plan = fast.plan(torch.linspace(1, 0, 9)[:-1], y)
        ahead = plan_ahead(fast, y)
        check_same("SiT", fast(x, t, y), plain(x, t, y))
        cases = peers(plain, (x, t, y), not args.no_compile)
        cases["ours, as a module"] = lambda x=x, t=t, y=y: ours(x, t, y)
        cases["ours, prepared"] = lambda x=x, t=t, y=y: fast(x, t, y)
        cases["ours, prepared, step of a plan"] = Prepared(fast.model, partial(fast.step, plan, 4, x))
        if of_bytes is not None:
            check_same("SiT in int8", of_bytes(x, t, y), plain(x, t, y), tell=True)
            steps = of_bytes.plan(plan.ts, y)
            cases[f"{INT8}, step of a plan"] = Prepared(of_bytes.model, partial(of_bytes.step, steps, 4, x))
        cases[AHEAD] = ahead
        gmacs = batch * (config.depth * (block + 6 * dim * dim)) / 1e9
        yield f"SiT-XL/1, 128 tokens, depth {config.depth}, batch {batch}, {args.dtype}", gmacs, cases


def plan_ahead(fast: Any, y: Tensor) -> Callable[[], Any]:
    """What a plan costs before its first step: the modulations of 8 steps at once."""
    ts = torch.linspace(1, 0, 9, device=y.device)[:-1].repeat_interleave(len(y))
    labels = y.repeat(8)
    return lambda: fast.model.modulations(fast.model.condition(ts, labels))


def tokenizer(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, Cases]]:
    from maetok_fast.inference import prepare
    from maetok_fast.models import MAETok, MAETokConfig

    dtype = DTYPES[args.dtype]
    for kind in ("movqv2", "plain"):
        ours = randomised(MAETok(MAETokConfig(image_size=args.size, decoder_kind=kind))).to(device, dtype)
        for name, p in ours.named_parameters():
            if name.endswith("gamma"):
                p.uniform_(0.5, 1.0)
        plain = PlainMAETok(args.size, movq=kind == "movqv2").to(device, dtype).eval()
        load_needed(plain, ours.state_dict(), assign=True)
        fast, of_bytes = prepare(ours, dtype), prepare(ours, dtype, torch.int8) if bytes_(device) else None
        patches, dim = (args.size // 16) ** 2, 768
        for batch in args.batch:
            images = torch.rand(batch, 3, args.size, args.size, device=device, dtype=dtype) * 2 - 1
            latents = plain.encode(images)
            check_same("encode", fast.encode(images), latents)
            check_same("decode", fast.decode(latents, args.size), plain.decode(latents))
            halves = [("encode", "encode", images, patches + 129)] if kind == "plain" else []
            halves.append((f"decode ({kind})", "decode", latents, patches + 128))
            for name, method, value, tokens in halves:
                cases = peers(getattr(plain, method), (value,), not args.no_compile)
                cases["ours, as a module"] = partial(getattr(ours, method), value)
                for way, made in {"ours, prepared": fast, INT8: of_bytes}.items():
                    if made is not None:
                        cases[way] = Prepared(made.model, partial(getattr(made, method), value))
                if of_bytes is not None:
                    want = getattr(plain, method)(value)
                    check_same(f"{name} in int8", getattr(of_bytes, method)(value), want, tell=True)
                macs = 12 * (tokens * 12 * dim * dim + 2 * tokens * tokens * dim) + patches * dim * dim
                yield f"MAETok-B, {args.size} px, {name}, batch {batch}, {args.dtype}", batch * macs / 1e9, cases


def train(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, Cases]]:
    """Forward and backward under the precision's autocast over fp32 weights; three products for each of a forward."""
    from maetok_fast.models import MAETok, MAETokConfig, SiT, SiTConfig

    precision = resolve(args.dtype, device)
    config = SiTConfig(**({} if args.depth is None else {"depth": args.depth}))
    ours = randomised(SiT(config)).train().to(device)
    plain = PlainSiT((128, 32), depth=config.depth, attention="sdpa").train().to(device)
    load_needed(plain, ours.state_dict())
    tokens, dim = 128, config.dim
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    for batch in args.batch:
        x = torch.randn(batch, tokens, 32, device=device)
        t, y = torch.full((batch,), 0.5, device=device), torch.randint(0, 1000, (batch,), device=device)
        gmacs = 3 * batch * (config.depth * (block + 6 * dim * dim)) / 1e9
        cases = training_cases(plain, ours, (x, t, y), precision, not args.no_compile)
        yield f"SiT-XL/1 training, 128 tokens, depth {config.depth}, batch {batch}, {args.dtype}", gmacs, cases
    del ours, plain
    size, dim = args.size, 768
    tokenizer = randomised(MAETok(MAETokConfig(image_size=size))).train().to(device)
    plain_tokenizer = PlainMAETok(size, movq=True).train().to(device)
    load_needed(plain_tokenizer, tokenizer.state_dict())
    patches = (size // 16) ** 2
    for batch in args.batch:
        images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
        macs = sum(12 * (n * 12 * dim * dim + 2 * n * n * dim) for n in (patches + 129, patches + 128))
        cases = training_cases(plain_tokenizer, tokenizer, (images,), precision, not args.no_compile)
        yield f"MAETok-B training, {size} px, batch {batch}, {args.dtype}", 3 * batch * macs / 1e9, cases


def training_cases(plain: nn.Module, ours: nn.Module, inputs: tuple[Any, ...], precision: Any, compile_: bool) -> Cases:
    cases: Cases = {PLAIN: partial(training_step, plain, plain, inputs, precision)}
    cases["ours, as a module"] = partial(training_step, ours, ours, inputs, precision)
    if compile_:
        torch._dynamo.reset()
        cases["torch.compile"] = partial(training_step, torch.compile(plain, dynamic=False), plain, inputs, precision)
    return cases


def training_step(forward: Callable[..., Tensor], model: nn.Module, inputs: tuple[Any, ...], precision: Any) -> None:
    """forward: the model, or what was compiled of it."""
    with precision.autocast(inputs[0].device.type):
        forward(*inputs).square().mean().backward()
    model.zero_grad(set_to_none=True)


def accelerated(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, Cases]]:
    """timm's ViT-B/16 at 224 px (where timm is installed) and SiT-XL's blocks in plain PyTorch, one line applied."""
    from maetok_fast import accelerate

    dtype, tokens, dim = DTYPES[args.dtype], 197, 768
    models: dict[str, tuple[nn.Module, Callable[[int], tuple[Any, ...]], float]] = {}
    try:
        import timm
    except ImportError:
        print("Left out: ViT-B/16, timm is not installed.")
    else:
        vit = timm.create_model("vit_base_patch16_224", depth=args.depth or 12)
        macs = (args.depth or 12) * (tokens * 12 * dim**2 + 2 * tokens**2 * dim) + (tokens - 1) * dim * 3 * 16**2
        models["timm ViT-B/16, 224 px"] = (
            vit,
            lambda n: (torch.randn(n, 3, 224, 224, device=device, dtype=dtype),),
            macs,
        )
    tokens, dim, depth = 128, 1152, args.depth or 6
    macs = depth * (tokens * 12 * dim**2 + 2 * tokens**2 * dim + 6 * dim**2)
    labels = [torch.randint(0, 1000, (n,), device=device) for n in args.batch]

    def of_dit(n: int) -> tuple[Any, ...]:
        y = labels[args.batch.index(n)]
        return torch.randn(n, tokens, 32, device=device, dtype=dtype), torch.full((n,), 0.5, device=device), y

    models[f"{depth} DiT blocks, 1152 wide, 128 tokens"] = (
        PlainSiT((tokens, 32), depth=depth, attention="sdpa"),
        of_dit,
        macs,
    )
    for name, (model, inputs, macs) in models.items():
        plain = randomised(model).to(device, dtype)
        module, packed = copy.deepcopy(plain), copy.deepcopy(plain)
        accelerate(module, quiet=True)
        print(accelerate(packed, for_inference=True, quiet=True))
        for batch in args.batch:
            given = inputs(batch)
            check_same(name, packed(*given), plain(*given))
            cases = peers(plain, given, not args.no_compile)
            cases["ours, accelerate(model)"] = partial(module, *given)
            cases["ours, prepared: for_inference=True"] = partial(packed, *given)
            yield f"{name}, batch {batch}, {args.dtype}", batch * macs / 1e9, cases


def linear(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, float, Cases]]:
    dtype = DTYPES[args.dtype]
    for model, (tokens, shapes) in LINEAR_SHAPES.items():
        act = "gelu_tanh" if model == "sit-xl" else "gelu"
        for batch in args.batch:
            for name, inner, outer in shapes:
                yield linear_cases(args, batch * tokens, inner, outer, name, act, dtype, device)
    for rows in (1, 4, 16, 64, 512):
        yield linear_cases(args, rows, 1152, 6912, "adaLN", "none", dtype, device)


def dynamic_int8(layers: Sequence[nn.Linear], gelu: str | None) -> list[Callable[[Tensor], Tensor]]:
    """torch's own layers of int8, whose activations have one scale a tensor; gelu: "none", "tanh" or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of another package
        made = torch.ao.quantization.quantize_dynamic(nn.ModuleList(layers), {nn.Linear}, dtype=torch.qint8)
    return [layer if gelu is None else lambda x, of=layer: F.gelu(of(x), approximate=gelu) for layer in made]


def linear_cases(
    args: argparse.Namespace,
    rows: int,
    inner: int,
    outer: int,
    name: str,
    act: str,
    dtype: Any,
    device: Any,
) -> tuple[str, float, Cases]:
    # Several weights in turn: a model never finds one layer's weights in the cache of the layer before.
    layers = [nn.Linear(inner, outer, device=device, dtype=dtype) for _ in range(4)]
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    act = act if name == "fc1" else "none"
    approximate = "tanh" if act == "gelu_tanh" else "none"

    def plain(x: Tensor, i: int) -> Tensor:
        y = F.linear(x, layers[i].weight, layers[i].bias)
        return F.gelu(y, approximate=approximate) if act != "none" else y

    def all_plain(x: Tensor) -> list[Tensor]:
        return [plain(x, i) for i in range(4)]

    cases = peers(all_plain, (x,), not args.no_compile)
    for way in BACKENDS[:-1]:
        weights = torch.int8 if way == "native int8" else dtype
        if why_not(way, dtype, weights, device) is None:
            fast = [PackedLinear.of(layer, act, weights=weights, backend=way) for layer in layers]
            cases[f"packed, {way}" if way == "onednn" else f"ours, packed, {way}"] = partial(each, fast, x)
    if bytes_(device) and dtype == torch.float32:
        cases["torch, dynamic int8"] = partial(each, dynamic_int8(layers, approximate if act != "none" else None), x)
    suffix = f" + {act}" if act != "none" else ""
    return f"4 x {name}{suffix}: ({rows}, {inner}) -> {outer}, {args.dtype}", 4 * rows * inner * outer / 1e9, cases


if __name__ == "__main__":
    main()
