# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a part of a comparison is given, and what it gives back: part(Work) -> Found.

measured.py  mixtures, probes, use of tokens        shown.py  UMAP, neighbours, decoded latents
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from maetok_fast._optional import probe as find
from maetok_fast.analysis.curves import Components
from maetok_fast.analysis.settings import Settings
from maetok_fast.analysis.sources import Subject
from maetok_fast.analysis.store import Store
from maetok_fast.inference import prepare
from maetok_fast.kernels import _native

__all__ = ["Found", "Work"]


@dataclass
class Found:
    """values: JSON by tokenizer. pictures: file name -> caption. how: it was computed, in a sentence. missing: why
    something is not there -> of which tokenizers ([] of all)."""

    how: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def lacks(self, why: str, name: str = "") -> None:
        self.missing.setdefault(why, []).extend([name] if name else [])

    def told(self) -> dict[str, Any]:
        """As analysis.json has it: missing as sentences."""
        said = [f"{', '.join(names)}: {why}" if names else why for why, names in self.missing.items()]
        return {"how": self.how, "values": self.values, "pictures": self.pictures, "missing": said}


@dataclass
class Work:
    """What every part is given."""

    subjects: list[Subject]
    settings: Settings
    out: Path
    store: Store
    tick: Callable[[str], None]

    @cached_property
    def components(self) -> Components:
        return Components(self.settings)

    @cached_property
    def why_no_curves(self) -> str:
        """Empty where matplotlib is there."""
        status = find("matplotlib")
        return "" if status.state == "found" else f"no curves are drawn: matplotlib is {status.state} ({status.reason})"

    def unit(
        self, where: Sequence[str], key: dict[str, Any], compute: Any, files: Sequence[str] = ()
    ) -> dict[str, Any]:
        name = " ".join(where)
        self.tick(name)
        return self.store.unit(where, key, partial(compute, lambda line: self.tick(f"{name}: {line}")),
                               [self.out / file for file in files])  # fmt: skip

    def decoder(self, subject: Subject) -> Callable[[Tensor], Tensor]:
        """latents (B, L, C) on the CPU -> images (B, 3, H, W) on the CPU."""
        tokenizer = subject.tokenizer
        assert tokenizer is not None
        device = next(tokenizer.parameters()).device
        alike = device.type == "cpu" and _native.why_missing() is None
        ready = prepare(tokenizer, self.settings.precision, reproducible=alike)
        told = subject.train.rows.cache.fingerprint or {}
        size = told.get("resolution")
        return lambda latents: ready.decode(latents.to(device), size).float().cpu()
