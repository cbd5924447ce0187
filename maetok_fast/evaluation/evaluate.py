# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One comparison: a set of samples against a reference, in the features of one extractor or several.

    comparison = Comparison(samples, reference, extractors, folder)
    comparison.extract(process, processes)      what is missing of the features, this process's share (not needed alone)
    comparison.measure() -> dict                by one process, once all features are there; JSON values
    comparison.save_statistics(path)            moments of the reference (of the samples, without one), as ADM's file

    of each extractor      Frechet distance (FID of Inception), KID, MIND, precision, recall
    of Inception           sFID, IS
    over several           FDr: mean of FD / FD of a set of real images (`floor`), or the geometric mean of the FDs

Stored statistics of a .npz stand in for its images where they are of the same extractor, as in ADM's evaluator; what
needs rows (KID, MIND, precision, recall) is of its images, where it has some. A set needs no network where its
statistics are all that is asked for. The result holds no times, so that a run that was stopped gives the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok_fast.evaluation.distances import frechet_distance, geometric_mean, inception_score, kid, mind
from maetok_fast.evaluation.extractor import Extractor
from maetok_fast.evaluation.features import Features, collect, extract_parts
from maetok_fast.evaluation.moments import Moments, load_about, save_statistics
from maetok_fast.evaluation.neighbours import precision_recall
from maetok_fast.evaluation.result import BIAS_FREE, Facts, describe_set, traps
from maetok_fast.evaluation.sets import ImageSet, SetError

__all__ = ["METRICS", "Comparison"]

METRICS = ("fd", "sfid", "is", "prec", "kid", "mind")
SPLIT, NEIGHBOURS, SUBSETS, SUBSET, DIRECTIONS = 5000, 3, 100, 1000, 1000
Tick = Callable[[int], None]
Bar = Callable[[str, int], AbstractContextManager[Tick]]


def _silent(what: str, total: int) -> AbstractContextManager[Tick]:
    return nullcontext(lambda count: None)


@dataclass
class Comparison:
    """folder: of feature parts, None: in memory. floor: real images that the reference does not hold. metrics: of
    METRICS. kind: "r" of reconstructions, "g" of generated images, "": not said. bar(what, total): shows progress."""

    samples: ImageSet
    reference: ImageSet | None
    extractors: Sequence[Extractor]
    folder: Path | None = None
    floor: ImageSet | None = None
    metrics: Sequence[str] = METRICS
    batch: int = 64
    device: torch.device | str = "cpu"
    kind: str = ""
    bar: Bar = _silent
    _features: dict[tuple[str, str], Features] = field(default_factory=dict, repr=False)
    _moments: dict[tuple[str, str, str], Moments] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"unknown metric {', '.join(unknown)}: expected some of {', '.join(METRICS)}")
        if not self.metrics:
            raise ValueError(f"no metrics to measure: give some of {', '.join(METRICS)}")
        names = [e.name for e in self.extractors]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected one extractor or several, each once, got {', '.join(names) or 'none'}")
        for images in self._sets:
            for extractor in self.extractors:
                if not len(images) and not self._stored(images, extractor):
                    raise SetError(f"{images.path}: has no images, and {self._why_not(images, extractor)}")

    # ---- features ----

    @property
    def _sets(self) -> list[ImageSet]:
        return [s for s in (self.samples, self.reference, self.floor) if s is not None]

    def extract(self, process: int = 0, processes: int = 1) -> None:
        """Needs a folder."""
        assert self.folder is not None
        for images, extractor in self._wanted:
            with self.bar(f"{extractor.name}: {Path(images.path).name}", len(images) // processes) as tick:
                extract_parts(
                    images,
                    extractor,
                    self.folder,
                    batch=self.batch,
                    process=process,
                    processes=processes,
                    tick=tick,
                )

    @property
    def _wanted(self) -> list[tuple[ImageSet, Extractor]]:
        """Whose features something asks for."""
        rows = {"is", "prec", "kid", "mind"} & set(self.metrics)
        return [
            (images, extractor)
            for images in self._sets
            for extractor in self.extractors
            if len(images) and ((rows and images is not self.floor) or not self._stored(images, extractor))
        ]

    def _rows(self, images: ImageSet, extractor: Extractor) -> Features:
        key = (images.fingerprint, extractor.fingerprint)
        if key not in self._features:
            with self.bar(f"{extractor.name}: {Path(images.path).name}", len(images)) as tick:
                self._features[key] = collect(images, extractor, self.folder, batch=self.batch, tick=tick)
        return self._features[key]

    def moments(self, images: ImageSet, extractor: Extractor, output: str = "features") -> Moments:
        """Stored ones where they are of this extractor, else of the images' features."""
        key = (images.fingerprint, extractor.fingerprint, output)
        if key not in self._moments:
            self._moments[key] = self._measured(images, extractor, output)
        return self._moments[key]

    def _measured(self, images: ImageSet, extractor: Extractor, output: str) -> Moments:
        stored = self._stored(images, extractor)
        name = stored + "_s" if output == "spatial" else stored
        if stored and images.stored is not None and name in images.stored.names:
            return Moments.load(images.stored, name)
        if not len(images):
            raise SetError(f"{images.path}: has no images and no statistics of {extractor.name}'s {output} features")
        return self._rows(images, extractor).moments(output)

    def _stored(self, images: ImageSet, extractor: Extractor) -> str:
        """The name of a file's means that are this extractor's; "" where there are none."""
        if images.stored is None:
            return ""
        said = load_about(images.stored).get("extractors", {})
        for name, fingerprint in said.items():
            if fingerprint == extractor.fingerprint:
                return name
        # a file of ADM's says nothing and is of the published Inception
        return "mu" if not said and extractor.name == "inception" and not extractor.random else ""

    def _why_not(self, images: ImageSet, extractor: Extractor) -> str:
        assert images.stored is not None
        said = load_about(images.stored).get("made_of")
        whose = ", ".join(said) if said else "the published Inception weights (ADM's file)"
        return f"its statistics are not of {extractor.about_in_short}: they are of {whose}"

    # ---- results ----

    def measure(self) -> dict[str, Any]:
        """{"samples", "reference", "extractors", "metrics": [{"name", "value", ...}], "traps": [sentences]}"""
        if self.reference is None:
            raise SetError("nothing to compare with: give a reference")
        found: list[dict[str, Any]] = []
        halves: dict[str, tuple[float, float]] = {}
        for extractor in self.extractors:
            found += self._of_moments(extractor, self.reference, halves)
            found += self._of_rows(extractor, self.reference)
        found += self._over_extractors(self.reference, found)
        facts = Facts(self.samples, self.reference, self.extractors, found, halves, self._ignored, self.kind)
        result = {
            "samples": describe_set(self.samples),
            "reference": describe_set(self.reference),
            "statistics": {e.name: self._source(self.reference, e) for e in self.extractors},
            "extractors": [{**e.about, "fingerprint": e.fingerprint} for e in self.extractors],
            "metrics": found,
            "traps": traps(facts),
        }
        if self.floor is not None:
            result["floor"] = describe_set(self.floor)
        return result

    @property
    def _ignored(self) -> list[str]:
        """Stored statistics that lie beside images and were not used."""
        return [
            f"{images.path}: its stored statistics were not used, because {self._why_not(images, extractor)}; its "
            "images were measured instead"
            for images in self._sets
            for extractor in self.extractors
            if images.stored is not None and len(images) and not self._stored(images, extractor)
        ]

    def _source(self, images: ImageSet, extractor: Extractor) -> str:
        return f"stored in {Path(images.path).name}" if self._stored(images, extractor) else "of its images"

    def _of_moments(
        self, extractor: Extractor, reference: ImageSet, halves: dict[str, tuple[float, float]]
    ) -> list[dict[str, Any]]:
        found, about = [], {"extractor": extractor.name}
        if "fd" in self.metrics:
            one, two = (self.moments(images, extractor) for images in (self.samples, reference))
            name = self._named(extractor)
            value = frechet_distance(one, two)
            found.append({"name": name, "value": value, **about, **_sizes(one, two)})
            if (
                len(self.samples) >= 4
                and one.count
                and one.count < BIAS_FREE
                and not self._stored(self.samples, extractor)
            ):
                halves[name] = (value, self._of_halves(extractor, two))
        if "sfid" in self.metrics and "spatial" in extractor.outputs:
            try:
                one, two = (self.moments(images, extractor, "spatial") for images in (self.samples, reference))
            except SetError as error:
                return [*found, {"name": f"{self.kind}sFID", "value": None, **about, "why": str(error)}]
            value = frechet_distance(one, two)
            found.append({"name": f"{self.kind}sFID", "value": value, **about, **_sizes(one, two)})
        return found

    def _named(self, extractor: Extractor) -> str:
        return f"{self.kind}FID" if extractor.name == "inception" else f"{self.kind}FD {extractor.name}"

    def _of_halves(self, extractor: Extractor, reference: Moments) -> float:
        """The mean FD of the samples' even and odd rows: how much fewer samples raise it."""
        rows = self._rows(self.samples, extractor)
        halves = [
            Moments.of_blocks(part for block in rows.blocks() if len(part := block[first::2])) for first in (0, 1)
        ]
        return sum(frechet_distance(half, reference) for half in halves) / 2

    def _of_rows(self, extractor: Extractor, reference: ImageSet) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        about = {"extractor": extractor.name, "samples": len(self.samples)}
        if "is" in self.metrics and extractor.name == "inception" and not len(self.samples):
            found.append({"name": "IS", "value": None, **about, "why": f"{self.samples.path} has no images"})
        elif "is" in self.metrics and extractor.name == "inception":
            logits = extractor.logits(torch.from_numpy(self._rows(self.samples, extractor).array()))
            assert logits is not None
            mean, std = inception_score(logits, SPLIT)
            found.append({"name": "IS", "value": mean, "std_of_splits": std, **about})
        also = "" if extractor.name == "inception" else f" {extractor.name}"
        few = min(len(self.samples), len(reference))
        lacks = next((images for images in (self.samples, reference) if not len(images)), None)
        compared = {"prec": (self._precision_recall, NEIGHBOURS + 1), "kid": (self._kid, 4), "mind": (self._mind, 10)}
        arrays: list[Tensor] = []
        for metric, (compare, least) in compared.items():
            if metric not in self.metrics:
                continue
            if few < least:
                why = f"{lacks.path} has no images" if lacks else f"it needs {least} images of each set, got {few}"
                names = ("precision", "recall") if metric == "prec" else (metric.upper(),)
                found += [{"name": name + also, "value": None, **about, "why": why} for name in names]
                continue
            arrays = arrays or [
                torch.from_numpy(self._rows(images, extractor).array()).to(self.device)
                for images in (self.samples, reference)
            ]
            about["reference"] = len(reference)
            found += [{"name": v["name"], **about, **v} for v in compare(arrays[0], arrays[1], also)]
        return found

    def _precision_recall(self, samples: Tensor, reference: Tensor, also: str) -> list[dict[str, Any]]:
        with self.bar(f"precision, recall{also}", len(samples) + 2 * len(reference)) as tick:
            values = precision_recall(reference, samples, NEIGHBOURS, device=self.device, tick=tick)
        return [{"name": name + also, "value": value} for name, value in zip(("precision", "recall"), values)]

    def _kid(self, samples: Tensor, reference: Tensor, also: str) -> list[dict[str, Any]]:
        few = min(len(samples), len(reference))
        with self.bar(f"KID{also}", few) as tick:
            value = kid(samples, reference, subsets=SUBSETS, size=SUBSET)
            tick(few)
        return [{"name": f"KID{also}", **value._asdict(), "subset": min(SUBSET, few // 2)}]

    def _mind(self, samples: Tensor, reference: Tensor, also: str) -> list[dict[str, Any]]:
        few = min(len(samples), len(reference))
        with self.bar(f"MIND{also}", few) as tick:
            value = mind(samples, reference, directions=DIRECTIONS)
            tick(few)
        return [{"name": f"MIND{also}", **value._asdict(), "samples": few, "reference": few}]

    def _over_extractors(self, reference: ImageSet, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if "fd" not in self.metrics:
            return []
        names = {self._named(e): e for e in self.extractors}
        values = {names[m["name"]].name: m["value"] for m in found if m["name"] in names}
        about = {"extractor": ", ".join(values)}
        if self.floor is not None:
            floors = {
                e.name: frechet_distance(self.moments(self.floor, e), self.moments(reference, e))
                for e in self.extractors
            }
            ratios = [values[name] / floors[name] for name in values if floors[name] > 0]
            if len(ratios) < len(values):
                return [{"name": "FDr", "value": None, **about, "why": "the FD of the floor set is 0"}]
            return [{"name": "FDr", "value": sum(ratios) / len(ratios), **about, "floors": floors}]
        if len(values) < 2:
            return []
        return [{"name": "FD, geometric mean", "value": geometric_mean(list(values.values())), **about}]

    def save_statistics(self, path: Path) -> ImageSet:
        """See the module. Inception's are "mu", the first extractor's otherwise; others "mu/NAME". Returns whose."""
        images = self.reference or self.samples
        first = next((e for e in self.extractors if e.name == "inception"), self.extractors[0])
        found: dict[str, Moments] = {}
        names: dict[str, str] = {}
        for extractor in self.extractors:
            name = "mu" if extractor is first else f"mu/{extractor.slug}"
            found[name], names[name] = self.moments(images, extractor), extractor.fingerprint
            if "spatial" in extractor.outputs:
                found[f"{name}_s"] = self.moments(images, extractor, "spatial")
        about = {
            "count": found["mu"].count,
            "extractors": names,
            "made_of": [e.about_in_short for e in self.extractors],
            "set": describe_set(images),
        }
        save_statistics(path, found, about)
        return images


def _sizes(samples: Moments, reference: Moments) -> dict[str, int | None]:
    return {"samples": samples.count, "reference": reference.count, "dimensions": samples.size}
