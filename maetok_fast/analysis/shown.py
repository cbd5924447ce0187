# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The parts of a comparison that are pictures: UMAP, nearest neighbours, decoded latents; with the numbers to them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from maetok_fast.analysis import figures
from maetok_fast.analysis.neighbours import KS, chance, class_agreement, nearest
from maetok_fast.analysis.probe import error_of_share, standardise
from maetok_fast.analysis.projection import project
from maetok_fast.analysis.sources import Side, Subject
from maetok_fast.analysis.traversal import Strip, along_components, between, exchanged
from maetok_fast.analysis.work import Found, Work
from maetok_fast.data.images import to_uint8

__all__ = ["neighbours", "traversal", "umap"]

COLOURED, PURITY = len(figures.CLASSES), 10  # classes that have a colour; neighbours of purity
BASE, QUERIES = 50_000, 2000  # rows that are searched, rows whose neighbours are looked for
SHOWN, BESIDE = 6, 7  # queries in the picture, neighbours of each
COMPONENTS = 4  # in a traversal


def umap(work: Work) -> Found:
    settings = work.settings
    found = Found(
        f"at most {settings.picture_rows:,} held-out rows, of more than {COLOURED} classes half of them of {COLOURED} "
        f"evenly spaced ones, standardised; UMAP (cosine, 15 neighbours, min_dist 0.1, seed {settings.seed}); purity: "
        f"of the coloured rows, the share of the {PURITY} (or as many as the smallest class allows) nearest others "
        "that are of the same class, in the latents by cosine and in the picture. A picture proves nothing: sizes and "
        "distances of groups have no meaning in it"
    )
    points: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray | None] = {}
    chosen: dict[str, np.ndarray] = {}
    for s in work.subjects:
        some, chosen[s.name] = _rows_of_picture(s.held, settings.picture_rows, settings.seed)
        labels[s.name] = None if s.held.labels is None else s.held.labels[some]
        key = {"rows": s.digest, "seed": settings.seed, "count": settings.picture_rows, "umap": _umap_is_there()}

        def compute(tick: Callable[[str], None], s: Subject = s, some: np.ndarray = some) -> dict[str, Any]:
            x = s.held.latents(some)
            shown = project(x, settings.seed)
            told: dict[str, Any] = {"rows": len(some), "method": shown.method, "why": shown.why, "umap": shown.version}
            if (y := labels[s.name]) is not None:
                (flat,) = standardise(x.reshape(len(x), -1))
                told |= _purities(flat, shown.points, y, chosen[s.name])
            return told | {"points": shown.points.round(3).tolist()}

        told = found.values[s.name] = work.unit(("umap", s.name), key, compute)
        points[s.name] = np.asarray(told.pop("points"), dtype=np.float32)
        if told["why"]:
            found.lacks(f"{told['why']}; the picture shows principal components", s.name)
        if labels[s.name] is None:
            found.lacks("no labels, so points have no colours, and purity is unknown", s.name)
    if work.why_no_curves:
        found.lacks(work.why_no_curves)
        return found
    known = [y for y in labels.values() if y is not None]
    together = len(known) == len(labels) and all(np.array_equal(y, known[0]) for y in known)
    for group in [work.subjects] if together else [[s] for s in work.subjects]:
        first, where = group[0].name, {s.name: points[s.name] for s in group}
        methods = ["UMAP" if found.values[name]["method"] == "umap" else "principal components" for name in where]
        file = "umap.png" if together else f"umap-{first}.png"
        figures.draw_embeddings(work.out / file, where, labels[first], chosen[first], group[0].classes, methods)
        of = "The same held-out rows for each tokenizer." if together else f"{first}: its own held-out rows."
        rest = (y := labels[first]) is not None and not np.isin(y, chosen[first]).all()
        found.pictures[file] = of + (
            f" {len(chosen[first])} of its classes are coloured, the others grey." if rest else ""
        )
    return found


def _umap_is_there() -> bool:
    """Not imported, which takes seconds."""
    return importlib.util.find_spec("umap") is not None


def _rows_of_picture(side: Side, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(places of at most so many rows, ascending; the classes that are coloured)."""
    if side.labels is None:
        return side.some(count, seed), np.zeros(0, dtype=np.int64)
    classes = np.unique(side.labels)
    if len(classes) <= COLOURED:
        return side.some(count, seed), classes
    chosen = classes[np.linspace(0, len(classes) - 1, COLOURED).astype(int)]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(side))
    mine = np.isin(side.labels[order], chosen)
    first = order[mine][: count // 2]
    return np.sort(np.concatenate([first, order[~mine][: count - len(first)]])), chosen


def _purities(x: np.ndarray, points: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Of the rows of the chosen classes, in the latents and in the plane, and by chance."""
    mine = np.isin(labels, chosen)
    least = np.unique(labels[mine], return_counts=True)[1].min()
    k = max(1, min(PURITY, int(least) - 1))
    plane = torch.cdist(torch.from_numpy(points), torch.from_numpy(points))
    plane.fill_diagonal_(torch.inf)
    ways = {"purity": nearest(x, x, k, itself=False), "purity_of_picture": plane.topk(k, largest=False).indices.numpy()}
    told = {name: class_agreement(places[mine], labels, labels[mine], (k,))[k] for name, places in ways.items()}
    shares = np.unique(labels, return_inverse=True, return_counts=True)
    return {**told, "neighbours": k, "chance": float((shares[2][shares[1]] / len(labels))[mine].mean())}


def neighbours(work: Work) -> Found:
    settings = work.settings
    found = Found(
        f"{QUERIES:,} held-out rows at most, their nearest among {BASE:,} training rows at most by cosine of "
        "standardised latents; agreement @k: the share of the k nearest that are of the row's class"
    )
    strips: list[list[Strip]] = []
    for s in work.subjects:
        key = {"rows": s.digest, "seed": settings.seed, "base": BASE, "queries": QUERIES, "shown": [SHOWN, BESIDE]}

        def compute(tick: Callable[[str], None], s: Subject = s) -> dict[str, Any]:
            base, asked = s.train.some(min(BASE, s.train.fits), settings.seed), s.held.some(QUERIES, settings.seed)
            x, queries = standardise(s.train.flat(base), s.held.flat(asked))
            places = nearest(queries, x, min(max(*KS, BESIDE), len(x)))
            told: dict[str, Any] = {"base": len(base), "queries": len(asked)}
            if s.train.labels is not None and s.held.labels is not None:
                labels = s.train.labels[base]
                told["agreement"] = class_agreement(places, labels, s.held.labels[asked])
                # neighbours of one row are no independent draws, the rows are
                told["agreement_error"] = {k: error_of_share(v, len(asked)) for k, v in told["agreement"].items()}
                told["chance"] = chance(labels)
            shown = _one_of_each(None if s.held.labels is None else s.held.labels[asked], SHOWN, len(asked))
            told["shown"] = [{"query": int(asked[q]), "near": base[places[q, :BESIDE]].tolist()} for q in shown]
            return told

        told = found.values[s.name] = work.unit(("neighbours", s.name), key, compute)
        if "agreement" not in told:
            found.lacks("no labels, so nobody knows whether neighbours are of one class", s.name)
        images = _images_of(work, s)
        if images is None:
            found.lacks(
                f"neighbours are not shown: {s.train.why or s.held.why}, and no tokenizer to decode with", s.name
            )
        else:
            strips.append([_strip(s, one, images) for one in told["shown"]])
    if strips and len({strip.images.shape[1:] for rows in strips for strip in rows}) == 1:
        shown = [strip for together in zip(*strips) for strip in together]  # the same query of every tokenizer
        figures.sheet(work.out / "neighbours.png", shown, 72)
        found.pictures["neighbours.png"] = (
            "Left the held-out image, beside it the training images that are nearest in latent space; framed blue "
            "where they are of its class, orange where not."
        )
    return found


def _one_of_each(labels: np.ndarray | None, count: int, rows: int) -> list[int]:
    """Places of at most `count` of so many rows to show: the first of each of evenly spaced classes, then others."""
    if labels is None:
        return list(range(min(count, rows)))
    firsts = np.unique(labels, return_index=True)[1]
    if len(firsts) >= count:
        return [int(firsts[i]) for i in np.linspace(0, len(firsts) - 1, count).astype(int)]
    others = np.setdiff1d(np.arange(rows), firsts)
    return [int(i) for i in np.concatenate([firsts, others])[:count]]


def _images_of(work: Work, s: Subject) -> Callable[[Side, list[int]], np.ndarray] | None:
    """(side, places) -> images (n, H, W, 3) uint8: the true ones, else those that latents decode to; None: neither."""
    if s.train.source is not None and s.held.source is not None:
        return lambda side, places: to_uint8(side.images(np.array(places)))
    if s.tokenizer is None:
        return None
    decode = work.decoder(s)
    return lambda side, places: to_uint8(decode(torch.from_numpy(side.latents(np.array(places)))))


def _strip(s: Subject, one: dict[str, Any], images: Callable[[Side, list[int]], np.ndarray]) -> Strip:
    pictures = np.concatenate([images(s.held, [one["query"]]), images(s.train, one["near"])])
    if s.held.labels is None or s.train.labels is None:
        return Strip(s.name, pictures, ["query", *[""] * len(one["near"])])
    label, near = int(s.held.labels[one["query"]]), s.train.labels[one["near"]].tolist()
    frames = [None, *(figures.SAME if other == label else figures.OTHER for other in near)]
    names = [s.classes[c] if c < len(s.classes) else f"class {c}" for c in (label, *near)]
    return Strip(s.name, pictures, [name[:12] for name in names], frames)


def traversal(work: Work) -> Found:
    found = Found(
        "decoded latents: the training mean and 3 deviations either way along principal components of the training "
        "latents; a line between two held-out latents; a held-out latent with one token of another, for the tokens "
        "that change most"
    )
    for s in work.subjects:
        if s.tokenizer is None:
            found.lacks("no tokenizer (--tokenizer NAME=PATH) to decode with", s.name)
            continue
        picture = f"traversal-{s.name}.png"
        key = {"rows": s.digest, "weights": s.weights, "precision": work.settings.precision, "components": COMPONENTS}

        def compute(tick: Callable[[str], None], s: Subject = s, picture: str = picture) -> dict[str, Any]:
            decode, pca = work.decoder(s), work.components.of(s)
            tick("decoding")
            strips = along_components(decode, pca, s.shape, COMPONENTS)
            places = _one_of_each(s.held.labels, 4, len(s.held))
            a, b, c, d = torch.from_numpy(s.held.latents(np.array([places[i % len(places)] for i in range(4)])))
            strips += [between(decode, a, b, "AB"), between(decode, c, d, "CD")]
            told: list[dict[str, Any]] = []
            for first, second, names in ((a, b, "AB"), (b, a, "BA")):
                rows, numbers = exchanged(decode, first, second, names)
                strips += rows
                told.append(numbers)
            figures.sheet(work.out / picture, strips)
            return {"variance": (pca.spectrum / pca.spectrum.sum())[:COMPONENTS].tolist(), "exchanges": told}

        found.values[s.name] = work.unit(("traversal", s.name), key, compute, [picture])
        found.pictures[picture] = (
            f"{s.name}: along principal components, between two images, and one image with one token of another."
        )
    return found
