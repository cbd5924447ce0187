# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast doctor`: what is installed, what may be used here, and the switches that change it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer


@dataclass
class Report:
    """What `doctor` found. facts: name -> value; switches: environment variable -> its value and effect; packages: name
    -> Status; ops: op -> {device: [(backend, reason)]}; races: what was measured once on this machine, what -> {choice,
    milliseconds}. refused: an impossible switch in words; then ops and races stay empty."""

    facts: dict[str, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    packages: dict[str, dict[str, str]] = field(default_factory=dict)
    ops: dict[str, dict[str, list[tuple[str, str | None]]]] = field(default_factory=dict)
    races: dict[str, dict[str, Any]] = field(default_factory=dict)


# What they change when they are set; docs/environment.md has them all.
SWITCHES = {
    "MAETOK_FAST_CPU": "the native library, oneDNN, MKL and torch's loops use no instructions above this level",
    "ONEDNN_MAX_CPU_ISA": "oneDNN uses no instructions above this; a word that it does not know it passes over",
    "DNNL_MAX_CPU_ISA": "the older name of ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS": "MKL uses no instructions above this (Intel's processors only)",
    "ATEN_CPU_CAPABILITY": "torch's own loops use no instructions above this",
    "MAETOK_FAST_TUNE": "0: linear layers run on the native GEMM, whatever would be faster here",
    "MAETOK_FAST_CACHE": "the folder in which the results of races are kept",
    "MAETOK_FAST_STRICT": "unless it is 0, false, no or off: what would fall back to the reference raises",
    "MAETOK_FAST_CUDA_EMULATOR": "the CUDA C++ kernels run emulated, on CPU tensors",
    "TRITON_INTERPRET": "unless it is 0: Triton kernels run on the CPU, in its interpreter",
}


def _processor_facts(facts: dict[str, str]) -> None:
    """What the processor has, what each library may use of it, and what follows for precision="auto"."""
    import os

    import torch

    from maetok_fast import precision
    from maetok_fast.kernels import _native, _processor
    from maetok_fast.kernels.packed_linear import why_not

    own, cpu = _native.own_level(), torch.device("cpu")
    held = f", held to {_native.level()} by {_processor.SWITCH}" if _native.level() != own else ""
    facts["processor"] = f"{own}{held}"
    if _native.why_missing() is None:
        facts["AMX"] = _native.lib().amx_status() or "there, with its tile palette and Linux's permission"
        amx = " and AMX tiles (bf16 attention)" if _native.lib().attention_tiles() else ""
        facts["native library"] = f"CPU kernels for {_native.lib().cpu_variant()}{amx}"
    facts["oneDNN"] = f"may use {_processor.onednn_level(own)}" + "".join(
        f"; {name} linear layers: {why_not('onednn', dtype, dtype, cpu) or 'packed'}"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    )
    if not torch.backends.mkl.is_available():
        facts["MKL"] = "not in this torch"
    else:
        facts["MKL"] = f"may use {os.environ.get('MKL_ENABLE_INSTRUCTIONS') or 'what it finds'}"
    facts["torch's loops"] = torch.backends.cpu.get_cpu_capability()
    facts["bf16"] = precision.why_bf16_is_emulated(cpu) or "computed at full rate"
    facts["bf16"] += f": on the CPU a linear layer takes {precision.bf16_cost(cpu):.2g}x of fp32's time"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts["precision auto"] = precision.resolve("auto", device).why.removeprefix("precision auto: ")


def diagnose() -> Report:
    """Look at this machine: versions, device, native library, optional packages, the backends of every op."""
    import os
    import platform
    import sys
    from importlib import metadata

    import torch

    import maetok_fast
    from maetok_fast import kernels
    from maetok_fast._optional import PACKAGES, probe
    from maetok_fast.kernels import _native, _tune

    report = Report()
    facts = report.facts
    facts["maetok-fast"] = str(maetok_fast.__version__)
    facts["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    facts["torch"] = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    for name in ("triton", "apache-tvm-ffi"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "missing"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads (no CUDA device)"
    report.switches = {
        name: f"{os.environ[name]}: {effect}" for name, effect in SWITCHES.items() if os.environ.get(name)
    }
    try:
        missing = _native.why_missing()
    except ValueError as error:  # MAETOK_FAST_CPU asks for what cannot be: every op would say this
        report.refused = str(error)
        facts["native library"] = report.refused
        return report
    if missing is not None:
        facts["native library"] = missing
    else:
        archs = _native.lib().cuda_archs()
        status = _native.lib().cuda_status() if archs else "built without nvcc"
        facts["native CUDA"] = f"code for {archs}" if archs else "none"
        if status:
            facts["native CUDA"] += f" ({status})"
    try:
        _processor_facts(facts)
    except ValueError as error:  # the same, found only by comparing with the processor
        report.refused = str(error)
        return report
    report.packages = {name: asdict(probe(name)) for name in PACKAGES}
    report.ops = {
        name: {device: op.usable(device) for device in ("cpu", "cuda")} for name, op in sorted(kernels.ops().items())
    }
    report.races = _tune.results()
    return report


def _first_usable(backends: list[tuple[str, str | None]]) -> str:
    return next(name for name, reason in backends if reason is None)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in report.facts.items():
        facts.add_row(f"[bold]{escape(name)}[/]", escape(value))
    console.print(facts)
    if report.switches:
        switches = Table("switch", "value and effect", title="environment", title_justify="left")
        for name, effect in report.switches.items():
            switches.add_row(name, escape(effect))
        console.print(switches)
    if report.refused:
        console.print(f"[red]{escape(report.refused)}[/]")
        return
    packages = Table("package", "state", "version", "why", title="optional packages", title_justify="left")
    colours = {"found": "green", "missing": "yellow", "unusable": "red"}
    for name, status in report.packages.items():
        state = status["state"]
        packages.add_row(name, f"[{colours[state]}]{state}[/]", status["version"], escape(status["reason"]))
    console.print(packages)
    table = Table("op", "on the CPU", "on CUDA", "not used here, and why", title="backends", title_justify="left")
    for name, devices in report.ops.items():
        reasons = [f"{b} on {d}: {r}" for d, rows in devices.items() for b, r in rows if r is not None]
        table.add_row(name, *(_first_usable(rows) for rows in devices.values()), escape("\n".join(reasons)))
    console.print(table)
    if report.races:
        races = Table("what", "taken", "milliseconds", title="raced on this machine", title_justify="left")
        for what, race in sorted(report.races.items()):
            times = ", ".join(f"{name} {ms:.2f}" for name, ms in race["milliseconds"].items())
            races.add_row(escape(what), escape(race["choice"]), escape(times))
        console.print(races)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """What is installed, what can be used, and which backend every op would take on this machine.

    Exit code 1 where a switch asks for what this machine cannot do.
    """
    report = diagnose()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(asdict(report), indent=2))
    else:
        _print(report)
    if report.refused:
        raise typer.Exit(1)
