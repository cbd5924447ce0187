# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Measuring: what the benchmarks share, and the benchmark of the ops behind `maetok-fast bench ops`.

    records of kernels.ops() ── cases ──┬── ops, table     every real shape against reference, torch.compile, ceilings
                     (callables, bytes) └── gate           few cases against a floor, paired samples, a verdict each
    timing: interleaved rounds, paired samples, peak memory          machine: what it is, how fast it can be

Importing this package measures nothing and loads no optional package.
"""
