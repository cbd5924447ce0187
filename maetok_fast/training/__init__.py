# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Training: the tokenizer in its stages, one loop for all of them, crash-safe.

configuration (configs.py, runs.py) ── stage (what a step computes) ── loop (everything else) ── run directory
"""
