# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The paper's claims in direction, on real images, at home: `maetok-fast demo claims`.

variants.py   what is compared          parts.py     what is done for one of them
judge.py      what samples are judged by     findings.py  which claims hold          page.py   claims.html, claims.png
"""

from __future__ import annotations

from maetok_fast.demos.claims.run import run_claims

__all__ = ["run_claims"]
