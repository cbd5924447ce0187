# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Everything there is, one after the other, on a small set of images: what the commands do, done by one.

plan.py          the runs and numbers of a demo, whole or quick
fashion.py       its parts, each in a folder of its own, each done once (ledger.py)
classifier.py    who judges samples
page.py          what comes out: pictures, and a page of them
shared.py        images and classes, bars, how a demo stops
claims/          the paper's claims on a small scale, by the same parts
"""

from __future__ import annotations

from maetok_fast.demos.fashion import run_demo
from maetok_fast.demos.shared import DemoStopped

__all__ = ["DemoStopped", "run_demo"]
