# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast bench`: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _said

app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")


@app.callback()
def _bench() -> None:
    """Measure on this machine."""


@app.command("ops")
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16; default fp32 and bf16.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, forward+backward; default both.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default cuda where there is one.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The first shape of each op, few rounds.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Seconds that measuring may take; default 240 with --quick, else no limit.")
    ] = None,
    op_file: Annotated[list[Path] | None, typer.Option(help="The op records of this file, not the library's.")] = None,
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
    from maetok_fast.kernels._drive import load as load_ops

    try:
        if budget is not None and not 0 < budget < float("inf"):
            raise ValueError(f"--budget expects a number of seconds above 0, got {budget}")
        others = [record.name for path in op_file or () for record in load_ops(path)]
        if load is not None:
            document = ops.load(load)
        else:
            found = cases.all_cases(
                op=op or others,
                dtype=dtype or ("fp32", "bf16"),
                direction=direction or cases.DIRECTIONS,
                samples=1 if quick else None,
            )
            where = _said.device(device)
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
