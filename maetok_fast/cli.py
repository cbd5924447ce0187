"""The command `maetok-fast`. Every command imports what it needs when it runs, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="MAETok and its generators, made fast.")


@dataclass
class Report:
    """What `doctor` found. facts: name -> value; packages: name -> Status; ops: op -> [(device, backend, reason)]."""

    facts: dict[str, str] = field(default_factory=dict)
    packages: dict[str, dict[str, str]] = field(default_factory=dict)
    ops: dict[str, dict[str, list[tuple[str, str | None]]]] = field(default_factory=dict)


def diagnose() -> Report:
    """Look at this machine: versions, device, native library, optional packages, the backends of every op."""
    import platform
    import sys
    from importlib import metadata

    import torch

    import maetok_fast
    from maetok_fast import kernels
    from maetok_fast._optional import PACKAGES, probe
    from maetok_fast.kernels import _native

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
    missing = _native.why_missing()
    if missing is not None:
        facts["native library"] = missing
    else:
        library = _native.lib()
        amx = " and AMX (bf16 attention)" if library.attention_bf16_usable() else ""
        facts["native library"] = f"CPU kernels for {library.cpu_variant()}{amx}"
        archs = library.cuda_archs()
        status = library.cuda_status() if archs else "built without nvcc"
        facts["native CUDA"] = f"code for {archs}" if archs else "none"
        if status:
            facts["native CUDA"] += f" ({status})"
    report.packages = {name: asdict(probe(name)) for name in PACKAGES}
    report.ops = {
        name: {device: op.backends(device) for device in ("cpu", "cuda")} for name, op in sorted(kernels.ops().items())
    }
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


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """What is installed, what can be used, and which backend every op would take on this machine."""
    report = diagnose()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(asdict(report), indent=2))
    else:
        _print(report)


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """Measure on this machine."""


@bench.command("ops")
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16; default fp32 and bf16.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, forward+backward; default both.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default cuda where there is one.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The first shape of each op, few rounds.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Seconds that measuring may take; default 240 with --quick, else no limit.")
    ] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the numbers, with the machine.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table into this page, between its markers.")] = None,
    load: Annotated[Path | None, typer.Option(help="Measure nothing, show what --json wrote.")] = None,
) -> None:
    """Every op at the models' shapes against plain torch, torch.compile and the machine's ceilings."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from maetok_fast.bench import cases, ops, table
    from maetok_fast.bench.budget import Budget

    try:
        if budget is not None and not 0 < budget < float("inf"):
            raise ValueError(f"--budget expects a number of seconds above 0, got {budget}")
        if load is not None:
            document = ops.load(load)
        else:
            found = cases.all_cases(
                op=op or (),
                dtype=dtype or ("fp32", "bf16"),
                direction=direction or cases.DIRECTIONS,
                samples=1 if quick else None,
            )
            where = _device(device)
            columns = TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=len(found), completed=-1)

                def tick(case: cases.Case) -> None:
                    bar.update(task, advance=1, description=case.key)

                document = ops.run(
                    found,
                    where,
                    compile_=not no_compile,
                    seconds=0.1 if quick else 0.4,
                    tick=tick,
                    budget=Budget(budget or (240.0 if quick else float("inf"))),
                )
    except (ValueError, OSError) as error:
        typer.echo(f"maetok-fast bench ops: {error}", err=True)
        raise typer.Exit(2) from None
    console = Console()
    console = Console(width=max(console.width, 150))
    console.print(table.rich_table(document))
    for note in (*table.NOTES, *table.remarks(document)):
        console.print(note, markup=False, highlight=False)
    if json is not None:
        ops.save(document, json)
    if markdown is not None:
        page = markdown.read_text() if markdown.exists() else ""
        markdown.write_text(table.put(page, table.markdown(document)))


def _device(name: str) -> Any:
    """The torch device of this name, by default the first GPU; ValueError where torch does not find it."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here: use --device cpu")
    return torch.device(name)


def _version(value: bool) -> None:
    if value:
        import maetok_fast

        typer.echo(f"maetok-fast {maetok_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(**options: Any) -> None:
    """Entry point of the `maetok-fast` script."""
    app(**options)
