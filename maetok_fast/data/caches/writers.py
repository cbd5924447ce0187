# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The layouts of readers.py, written item by item in flat memory.

A writer gets batches in order: `add(items, mirrored, labels, names)`, items (B, ...) fp32 of its `kind`; `close()` ends
it. It writes into the folder it was given, which somebody else names when it is whole (convert.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.caches.cache import CacheError
from maetok_fast.data.caches.readers import _h5py
from maetok_fast.data.caches.shards import SHARD, ChannelMoments, shard_name, write_shard, write_statistics

__all__ = ["WRITERS", "CacheWriter"]


class CacheWriter:
    """kind: of the items it takes. flips: whether the layout has a place for mirror images. needs_labels: whether its
    readers do without. folders: whether a label is a folder's place."""

    kind: ClassVar[str]
    flips: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    folders: ClassVar[bool] = False

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.count = folder, name, 0
        self.labels: list[list[Any]] = []

    def add(self, items: Tensor, mirrored: Tensor | None, labels: np.ndarray | None, names: Sequence[str]) -> None:
        for k, name in enumerate(names):
            label = None if labels is None else int(labels[k])
            self._item(items[k].numpy(), None if mirrored is None else mirrored[k].numpy(), label, name)
            self.count += 1

    def _item(self, item: np.ndarray, mirrored: np.ndarray | None, label: int | None, name: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """What is written once all items are there."""

    def _dataset_json(self) -> bytes:
        return json.dumps({"labels": self.labels or None}).encode()


class LightningDiTWriter(CacheWriter):
    """One rank, and latents_stats.pt, each channel's mean and standard deviation over all items."""

    kind, flips, needs_labels = "sample", True, True

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._held: dict[str, list[Tensor]] = {"latents": [], "latents_flip": [], "labels": []}
        self._moments: list[ChannelMoments] = []  # of each shard

    def add(self, items: Tensor, mirrored: Tensor | None, labels: np.ndarray | None, names: Sequence[str]) -> None:
        assert labels is not None
        self._held["latents"].append(items)
        self._held["labels"].append(torch.from_numpy(labels))
        if mirrored is not None:
            self._held["latents_flip"].append(mirrored)
        self._dims = items.ndim
        self.count += len(names)
        while sum(map(len, self._held["labels"])) >= SHARD:
            self._shard(SHARD)

    def _shard(self, rows: int) -> None:
        whole = {key: torch.cat(parts) for key, parts in self._held.items() if parts}
        self._held = {key: [whole[key][rows:]] if key in whole else [] for key in self._held}
        shard = {key: value[:rows].contiguous() for key, value in whole.items()}
        self._moments.append(write_shard(self.folder / shard_name(len(self._moments)), shard))

    def close(self) -> None:
        if any(len(part) for part in self._held["labels"]):
            self._shard(SHARD)
        write_statistics(self.folder / "latents_stats.pt", ChannelMoments.together(self._moments), self._dims)


class REPAWriter(CacheWriter):
    """In the folder `vae-sd`, numbered in order."""

    kind = "mean_std"

    def _item(self, item: np.ndarray, mirrored: np.ndarray | None, label: int | None, name: str) -> None:
        number = f"{self.count:08d}"
        place = f"{number[:5]}/img-mean-std-{number}.npy"
        _save(self.folder / "vae-sd" / place, item)
        if label is not None:
            self.labels.append([place, label])

    def close(self) -> None:
        (self.folder / "vae-sd" / "dataset.json").write_bytes(self._dataset_json())


class REPAEWriter(CacheWriter):
    """<name>.h5, its labels in it, and <name>_h5.json, in the folder."""

    kind = "mean_std"

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._h5 = _h5py().File(folder / f"{name}.h5", "w")
        self._names: list[str] = []

    def _item(self, item: np.ndarray, mirrored: np.ndarray | None, label: int | None, name: str) -> None:
        key = f"{name}.npy"
        self._h5.create_dataset(key, data=item)
        self._names.append(key)
        if label is not None:
            self.labels.append([key, label])

    def close(self) -> None:
        if self.labels:
            self._h5.create_dataset("dataset.json", data=np.frombuffer(self._dataset_json(), dtype=np.uint8))
        self._h5.close()
        (self.folder / f"{self.name}_h5.json").write_text(json.dumps(self._names))


class MARWriter(CacheWriter):
    kind, flips, needs_labels, folders = "mean_logvar", True, True, True

    def _item(self, item: np.ndarray, mirrored: np.ndarray | None, label: int | None, name: str) -> None:
        assert label is not None
        path = self.folder / f"{_in_class(name, label)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"moments": item} | ({} if mirrored is None else {"moments_flip": mirrored})
        np.savez(path, **arrays)


class DCAEWriter(CacheWriter):
    kind, folders = "scaled", True

    def _item(self, item: np.ndarray, mirrored: np.ndarray | None, label: int | None, name: str) -> None:
        _save(self.folder / f"{name if label is None else _in_class(name, label)}.npy", item)


WRITERS: dict[str, type[CacheWriter]] = {
    "lightningdit": LightningDiTWriter,
    "repa": REPAWriter,
    "repa-e": REPAEWriter,
    "mar": MARWriter,
    "dc-ae": DCAEWriter,
}


def _in_class(name: str, label: int) -> str:
    """Under a folder a class, whose sorted place is the label: the name's own folder, or the label's number."""
    return f"{label:06d}/{name.replace('/', '_')}"


def _save(path: Path, item: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.save(path, item, allow_pickle=False)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error})") from error
