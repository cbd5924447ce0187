# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Measuring: what the benchmarks share, and the benchmark of the ops behind `maetok-fast bench ops`.

    records of kernels.ops() ── cases ── ops ── table    every real shape against reference, torch.compile, ceilings
                     (callables, bytes)
    timing: interleaved rounds, paired samples, peak memory          machine: what it is, how fast it can be
    budget: what fits into a time, by calibration and prediction     (the gate's statistics: benchmarks/_gate.py)

Importing this package measures nothing and loads no optional package.
"""
