#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torch 2.14.1: what was compiled under one torch._inductor.config runs on under another: the configuration is no guard. A
# benchmark that compiles a function twice, the second time inside `config.patch(freezing=True)`, times the first graph
# twice. `torch.compile(fn, options={"freezing": True})` compiles anew, and freezes nothing: parameters are made inputs of
# the graph while Dynamo traces, which the options do not reach. With the patch on and a backend of its own it is frozen.
# Seen (fp32 on x86-64; the frozen graph calls mkl_linear over packed weights):
#
#   torch.compile                                  1 graphs so far, packed: False
#   the same under config.patch(freezing=True)     1 graphs so far, packed: False
#   options={"freezing": True}                     2 graphs so far, packed: False
#   patched, with a backend of its own             3 graphs so far, packed: True
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch
import torch._inductor.config as config
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).eval()
x = torch.randn(40, 64)
seen = []


def show(name, fn, context=None):
    with torch.no_grad(), context or contextlib.nullcontext():
        fn(x)
        with torch.profiler.profile() as profile:
            fn(x)
    packed = any("mkl_linear" in event.name for event in profile.events())
    seen.append((counters["stats"]["unique_graphs"], packed))
    print(f"{name:46s} {seen[-1][0]} graphs so far, packed: {seen[-1][1]}")


show("torch.compile", torch.compile(model, dynamic=False))
show("the same under config.patch(freezing=True)", torch.compile(model, dynamic=False), config.patch(freezing=True))
show('options={"freezing": True}', torch.compile(model, dynamic=False, options={"freezing": True}))
own = torch.compile(model, dynamic=False, backend=lambda graph, inputs: compile_fx(graph, inputs))
show("patched, with a backend of its own", own, config.patch(freezing=True))
assert [graphs for graphs, _ in seen] == [1, 1, 2, 3], seen
assert [packed for _, packed in seen[:3]] == [False] * 3, seen
PYTHON
