# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Tars of webdataset: their headers are read once, and any sample then by its place.

    a/b.c/000017.jpg, .cls, .txt  ->  key "a/b.c/000017", fields jpg (the image), cls (label), txt (caption)

The rules:
- names are normalised: "./a" and "a//b" are "a" and "a/b"; absolute names, "..", links, devices and sparse files are
  refused;
- the folder is never split: the key is the folder and the name up to its first dot, the field is the rest in lower
  case (webdataset's rule); what has no dot or starts with one is no sample's, and passed over as webdataset does;
- members of one sample stand anywhere in the tar, in any order;
- the same key and field twice, and two images of one key, are refused, naming the member;
- a sample without an image field (jpg, jpeg, png, webp, bmp, tif, tiff, gif) is passed over and counted;
- a tar has to be whole: one that ends inside a member, without the end marker (webdataset silently reads a shorter
  shard), or goes on behind it is refused, naming the tar; so is a compressed one, in which no sample has a place.

Only DataError is raised, whatever the bytes are. A member's name in messages is the one in the tar.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from maetok_fast.data.images import SUFFIXES, reading
from maetok_fast.data.samples import MAX_CAPTION, DataError, Names, Source, read_part

__all__ = ["TarSource", "expand"]

IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
_BLOCK = 512
_MOST = 1_000_000  # files of one pattern
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """Where a member's bytes lie."""

    name: str
    start: int
    size: int


class TarSource(Source):
    """Samples of one or more tars, in the order of the tars and of the images in them.

    Names are "<tar>/<member>", the tar as seen from the folder that all of them share.
    """

    def __init__(self, path: str, tars: Sequence[Path]) -> None:
        self._tars = Names(os.fspath(tar) for tar in tars)
        root = os.path.commonpath([os.path.abspath(tar.parent) for tar in tars])
        names: list[str] = []
        places: list[tuple[int, int, int, int, int]] = []  # tar; start and size of the image; of the caption
        labels: list[int | None] = []
        passed_over = 0
        for number, tar in enumerate(tars):
            short = os.path.relpath(os.path.abspath(tar), root)
            for image, fields in _samples(tar):
                if image is None:
                    passed_over += 1
                    continue
                text = fields.get("txt", Member("", 0, -1))
                names.append(f"{short}/{_normal(image.name)}")
                places.append((number, image.start, image.size, text.start, text.size))
                labels.append(_label(tar, fields["cls"]) if "cls" in fields else None)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 5)
        captioned = bool((self._places[:, 4] >= 0).any())
        super().__init__(path, names, self._places[:, 2].tolist(), labels, (), captioned, passed_over)

    def read(self, i: int) -> bytes:
        tar, start, size = self._places[i, :3].tolist()
        with reading(self.name(i)):
            return read_part(self._tars[tar], start, size)

    def _caption(self, i: int) -> bytes | None:
        tar, _, _, start, size = self._places[i].tolist()
        if size < 0:
            return None
        try:
            return read_part(self._tars[tar], start, min(size, MAX_CAPTION))
        except OSError as error:
            raise DataError(f"the caption of {self.name(i)} cannot be read ({error})") from error


def expand(pattern: str) -> list[str]:
    """The files of a pattern: ranges {0000..0012} with their zeros, else *, ? and [..], sorted. DataError: none."""
    if re.search(r"\{\d+\.\.\d+\}", pattern):
        files = list(_ranges(pattern))
        missing = next((file for file in files if not os.path.isfile(file)), None)
        if missing is not None:
            raise DataError(f"{pattern}: {missing} does not exist, the range asks for {len(files)} files")
        return files
    files = sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
    if not files:
        raise DataError(f"{pattern}: no such folder, list (.txt), tar or pattern of tars")
    return files


def _ranges(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MOST:
        raise DataError(f"{pattern}: expected a range {{first..last}} of at most {_MOST} files, got {match.group()}")
    for number in range(int(first), int(last) + 1):
        yield from _ranges(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _samples(tar: Path) -> Iterator[tuple[Member | None, dict[str, Member]]]:
    """(image or None, all fields) of each key, in the order of the keys' first members."""
    samples: dict[str, dict[str, Member]] = {}
    for member in _members(tar):
        name = _normal(member.name) or ""
        folder, _, base = name.rpartition("/")
        stem, dot, field = base.partition(".")
        if not stem or not dot:
            continue
        fields = samples.setdefault(f"{folder}/{stem}", {})
        field = field.lower()
        if field in fields:
            raise DataError(f"{tar}: member {member.name} is there twice ({fields[field].name})")
        fields[field] = member
        images = [f for f in fields if f in IMAGES] if field in IMAGES else []
        if len(images) > 1:
            raise DataError(f"{tar}: member {member.name} is a second image of {fields[images[0]].name}")
    for fields in samples.values():
        yield next((fields[f] for f in fields if f in IMAGES), None), fields


def _members(tar: Path) -> Iterator[Member]:
    """The regular files of a whole tar."""
    try:
        with open(tar, "rb") as stream:
            kind = _COMPRESSED.get(stream.read(2))
            if kind is not None:
                raise DataError(f"{tar}: is compressed ({kind}); samples are read by their place, so decompress it")
            yield from _read(tar, stream)
    except DataError:
        raise
    except Exception as error:  # tarfile raises a dozen types on bad bytes
        raise DataError(f"{tar}: is no whole tar ({error})") from error


def _read(tar: Path, stream: BinaryIO) -> Iterator[Member]:
    length = stream.seek(0, os.SEEK_END)
    if length < _BLOCK:
        raise DataError(f"{tar}: is no tar, it has {length} bytes")
    stream.seek(0)
    first = stream.read(_BLOCK)
    stream.seek(0)
    offset = 0
    if any(first):
        archive = tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            end = info.offset_data + info.size
            if info.size < 0 or archive.offset <= offset:  # numbers below 0: tarfile would read in a circle
                raise DataError(f"{tar}: member {info.name} has a size below 0")
            offset = archive.offset
            if _normal(info.name) is None:
                raise DataError(f"{tar}: member {info.name} lies outside the tar's folder")
            if info.isdir():
                continue
            if not info.isreg() or info.sparse is not None:
                raise DataError(f"{tar}: member {info.name} is a link, a device or sparse; expected a plain file")
            if end > length:
                raise DataError(f"{tar}: ends inside member {info.name}; copy it again")
            yield Member(info.name, info.offset_data, info.size)
        offset = archive.offset
    # tarfile stops without a word where the file does, and at a block that is no header
    stream.seek(offset)
    marker = stream.read(_BLOCK)
    if len(marker) < _BLOCK:
        raise DataError(f"{tar}: ends without its end marker; members are missing, copy it again")
    if any(marker):
        raise DataError(f"{tar}: has no header where one should be, at byte {offset}; copy it again")
    while rest := stream.read(1 << 20):
        if any(rest):
            raise DataError(f"{tar}: goes on behind its end marker; tars that were joined have to be given one by one")


def _normal(name: str) -> str | None:
    """'./a//b' as 'a/b'; None where it leads out of its folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts or "\0" in name else "/".join(parts)


def _label(tar: Path, member: Member) -> int:
    content = read_part(tar, member.start, min(member.size, 64))
    if member.size > 64 or not re.fullmatch(rb"\s*\d{1,18}\s*", content):
        raise DataError(f"{tar}: member {member.name} holds {content[:24]!r}, expected a label of at least 0 as text")
    return int(content)
