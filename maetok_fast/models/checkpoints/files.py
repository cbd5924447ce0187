# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The files of a checkpoint: reading and writing them. No model and no layout is known here.

Read: safetensors, or pickles through `torch.load(weights_only=True)`, so that no code of a file ever runs. Written: all
files of one save or none. Each is complete on disk under a temporary name before the first gets its own; if one cannot,
those before it are put back. Only a process that is killed between two renames can leave files of two saves: they carry
an id for that (`save_id`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok_fast.models.checkpoints.layout import SAVE_ID, CheckpointError

# safetensors is imported where it is used: models are made and run without it

__all__ = [
    "folder_writers",
    "read_config",
    "read_weights",
    "save_id",
    "settle",
    "storable",
    "write_together",
    "write_weights",
]

# ---- reading -------------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json as a dictionary; CheckpointError naming the file if it is not a JSON object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object of model arguments, got {type(config).__name__}")
    return config


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """What a weights file holds, tensors on the CPU, and a safetensors file's metadata. CheckpointError names it."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals(_DATA):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # torch.load raises a dozen types on bad bytes
        raise CheckpointError(
            f"{path}: not loadable as weights only ({_refusal(error)}); a pickle that holds anything but tensors and "
            "plain values is refused, because loading it would run code"
        ) from error


class NoTensor:
    """Stands for a value that training files keep beside their weights (a command line, a path, a numpy scalar).

    Holds nothing: whatever a pickle passes to the real type, nothing of that type is called.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Arguments(NoTensor):
    """A command line that a training file keeps: `values`, those that are plain."""

    values: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        plain = (str, int, float, bool)
        self.values = {
            str(k): v
            for k, v in (state.items() if isinstance(state, dict) else ())
            if isinstance(v, plain) or (isinstance(v, (list, tuple)) and all(isinstance(i, plain) for i in v))
        }


_DATA: list[Any] = [
    (Arguments, "argparse.Namespace"),
    (Arguments, "types.SimpleNamespace"),
]
_DATA += [
    (NoTensor, name)
    for name in (
        *(f"pathlib{m}.{p}{k}Path" for m in ("", "._local") for p in ("", "Pure") for k in ("", "Posix", "Windows")),
        *(f"numpy.{core}.multiarray.{k}" for core in ("core", "_core") for k in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
    )
]


def _refusal(error: Exception) -> str:
    """Why torch.load refused, in one line: the global that the pickle asks for, where it is that."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    asked = re.search(r"GLOBAL ([\w.]+)", text)
    if asked:
        return f"it asks for the global {asked[1]}"
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return inner[1].strip() if inner else next(iter(text.splitlines()), type(error).__name__)


# ---- writing -------------------------------------------------------------------------------------------------------


def storable(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: on the CPU, contiguous, none sharing memory with another (each name gets
    its copy). CheckpointError names those that cannot be stored."""
    refused: dict[str, list[str]] = {}
    for key, value in state.items():
        if reason := _why_not_storable(value):
            refused.setdefault(reason, []).append(key)
    if refused:
        what = (", ".join(v[:4]) + (f" and {len(v) - 4} more" if len(v) > 4 else "") for v in refused.values())
        said = "; ".join(f"{keys}: {reason}" for keys, reason in zip(what, refused))
        raise CheckpointError(f"save_pretrained: cannot store {said}")
    out: dict[str, Tensor] = {}
    used: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in used:
            tensor = tensor.clone()
        used.add(place)
        out[key] = tensor
    return out


def _why_not_storable(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return "on the meta device and without values; load some first"
    if type(value.detach()) is not Tensor:
        return f"{type(value.detach()).__name__}; gather or convert to plain tensors first"
    if value.layout != torch.strided:
        return f"sparse ({value.layout}); call to_dense() first"
    from safetensors.torch import save

    try:
        save({"": torch.empty(0, dtype=value.dtype)})
    except Exception:  # a KeyError or a ValueError, by safetensors' version
        return f"{value.dtype}, which safetensors cannot hold"
    return None


def save_id(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits that name one configuration with one set of CPU tensors; the same whenever they are."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. OSError, also for what safetensors reports as its own kind of error (a full disk)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the metadata's entries in random order: one order, so that equal models make equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # the same characters, so the same length
            file.seek(8)
            file.write(text)


def folder_writers(
    directory: Path,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    weights: str = "model.safetensors",
    **named: Any,
) -> dict[Path, Callable[[Path], None]]:
    """For `write_together`: the weights and config.json of a folder, with one `save_id` in both. named: what the file
    says before the model's own `config`."""
    own = {SAVE_ID: save_id(config, tensors)}
    text = json.dumps({**named, **config, **own}, indent=2) + "\n"

    def write_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return {
        directory / weights: lambda path: write_weights(path, tensors, own),
        directory / "config.json": write_config,
    }


def write_together(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Writes all of these files of one directory, or leaves all as they were.

    writers: for each file a function that writes it to the path it is given. What they raise passes on.
    """
    temporary: dict[Path, Path] = {}
    replaced: dict[Path, Path | None] = {}
    try:
        for path, write in writers.items():
            temporary[path] = _reserve(path)
            write(temporary[path])
            settle(temporary[path])
        for path in writers:
            replaced[path] = _second_name(path)
            os.replace(temporary[path], path)
    except BaseException:
        for path, old in reversed(replaced.items()):
            renamed = not temporary[path].exists()
            if renamed and old is not None:
                os.replace(old, path)
            elif renamed:
                path.unlink()
            elif old is not None:
                old.unlink()
        raise
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)
    for old in replaced.values():
        if old is not None:
            old.unlink()


def _reserve(path: Path) -> Path:
    """A new empty file beside `path`, by a name that nobody reads."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return Path(name)


def settle(path: Path) -> None:
    """Makes the file readable as files usually are (mkstemp and safetensors make private ones), and waits until it is
    on disk: a rename may otherwise outlive its content."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _second_name(path: Path) -> Path | None:
    """Another name for what `path` holds, to put it back; None where there is nothing."""
    if not path.is_file():
        return None
    name = _reserve(path)
    name.unlink()
    try:
        os.link(path, name)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(path, name)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    return name
