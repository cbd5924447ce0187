# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What is measured from a checkout; `maetok_fast.bench` holds what a wheel needs for `maetok-fast bench ops`.

    throughput.py   photographs to pictures, sampling and training, the paper's claims
                    (_job, _workload, _claims, _report, _chart)
    models.py       prepared models against plain PyTorch, eager and compiled
    measure.py      throughput, models and ops in one go -> docs/measured/<machine>.md (_page)
    compare.py      the gate: today's ops against those of a base commit (_base, _pairs, _gate, _floors)
    cost.py         what the GPU kernels cost, without a GPU (_cost_table, _nvcc)
    test_op_speed.py  the ops as a pytest-benchmark suite

One way of importing: everything here is `from benchmarks import _report`, in scripts, tests and among each other. A
script that is started as a file (`python benchmarks/throughput.py`) puts the checkout at the end of sys.path first; at
the end, so that an installed maetok_fast is found before the checkout's, which has no kernels in it.
"""
