# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading and writing model weights in the public layout.

    source: directory | .safetensors | .pt | hub repository id
      │ locate         -> config.json (optional), weights file
      │ read_state     -> {key: tensor}; training files give their `ema` (or `model`); `module.`, `_orig_mod.` stripped
      │ layouts.*      -> configuration, detected from the keys and shapes, cross-checked against config.json
      │ compare        -> every missing, unexpected and mis-shaped key in one error, unless `allow` names it
      ▼ model in eval mode; teachers and auxiliary decoders in the file are passed over, never built or downloaded

Weights come from safetensors or from `torch.load(weights_only=True)` only: a pickle that would run code is refused.
`save_pretrained` writes config.json and model.safetensors through temporary files and renames, so a reader never meets
half a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["CheckpointError", "Pretrained", "locate", "read_config", "read_state"]

M = TypeVar("M", bound="Pretrained")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the file, the keys and the way out."""


class Pretrained:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a model class with `config_class` and `self.config`."""

    config_class: Any
    config: Any

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    @classmethod
    def from_pretrained(
        cls: type[M],
        source: str | os.PathLike[str],
        *,
        allow: str | Iterable[str] = (),
        prefer: str = "ema",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        **changes: Any,
    ) -> M:
        """The model stored at `source`, in eval mode.

        source: a directory (config.json + model.safetensors, or one training .pt), a .safetensors or .pt file, or a
        Hugging Face repository id (`revision`, `token` as in huggingface_hub). allow: shell patterns of keys that may
        be missing, unexpected or mis-shaped ("encoder.freqs*"), and "config.NAME" for keys of config.json that are
        unknown or contradict the weights (the weights win). prefer: which copy of a training file, "ema" or "model";
        the other one serves where it is absent. dtype: None keeps the stored one, the widest if there are several.
        changes: fields of the configuration that neither weights nor config.json tell (`heads=6`, `position="axial"`,
        `time="sit"`); what is assumed without a config.json is logged as a warning.
        Raises CheckpointError, naming the file and the keys.
        """
        from maetok_fast.models.layouts import layout_of

        if prefer not in ("ema", "model"):
            raise ValueError(f"from_pretrained: prefer {prefer!r} is not 'ema' or 'model'")
        allowed = (allow,) if isinstance(allow, str) else tuple(allow)
        unknown = sorted(set(changes) - set(cls.config_class.__dataclass_fields__))
        if unknown:
            raise ValueError(f"from_pretrained: {cls.config_class.__name__} has no field {', '.join(unknown)}")
        layout = layout_of(cls)
        config_file, weights_file = locate(source, revision, token)
        public = read_config(config_file) if config_file else None
        state = read_state(weights_file, prefer)
        tolerated = layout.tolerated
        state = {k: v for k, v in state.items() if not _matches(k, tolerated)}
        try:
            config = layout.detect({k: tuple(v.shape) for k, v in state.items()}, public, changes, allowed)
        except CheckpointError as error:
            raise CheckpointError(f"{weights_file}: {error}") from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{weights_file}: its shapes make no {cls.__name__}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        missing = compare(model, state, layout.optional, allowed, f"{weights_file} as {cls.__name__}")
        expected = model.state_dict()  # type: ignore[attr-defined]
        state = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
        if missing:  # keys that the file may lack keep their initial values
            model = cls(config)
        model.load_state_dict(state, strict=False, assign=True)  # type: ignore[attr-defined]
        stored = {state[k].dtype for k, _ in model.named_parameters() if k in state}  # type: ignore[attr-defined]
        if dtype is None and stored:  # one dtype: a mixed model cannot be run
            dtype = functools.reduce(torch.promote_types, stored)
        return model.to(device=device, dtype=dtype).eval()  # type: ignore[attr-defined]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `config.json` and `model.safetensors` in the public layout into `directory` (made if absent).

        Each file is complete before it gets its name. Returns the directory. CheckpointError if nothing can be written
        there, or if the weights are on the meta device.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        from maetok_fast.models.layouts import layout_of

        assert isinstance(self, nn.Module)
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"save_pretrained: {directory} is a file; give a directory")
        empty = [k for k, v in self.state_dict().items() if v.is_meta]
        if empty:
            raise CheckpointError(
                f"save_pretrained: {empty[0]} is on the meta device and has no values; load some first"
            )
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        text = json.dumps(layout_of(type(self)).export(self.config), indent=2) + "\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # weights first: a directory with a config but no weights would look complete to nobody
            _replace(directory / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
            _replace(directory / "config.json", lambda p: Path(p).write_text(text))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"save_pretrained: cannot write to {directory} ({error})") from error
        return directory

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        message: str = "Upload model",
    ) -> str:
        """Uploads what `save_pretrained` writes to the hub repository `repo_id` (made if absent), in one commit.

        Returns the commit's URL.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        return str(commit)


def locate(
    source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> tuple[Path | None, Path]:
    """(config.json or None, weights file) of a directory, a file or a hub repository id."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
            raise CheckpointError(f"{path}: expected a .safetensors, .pt, .pth, .bin or .ckpt file")
        beside = path.with_name("config.json")
        return (beside if beside.is_file() else None), path
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *_TORCH_SUFFIXES) and p.is_file())
            if len(found) != 1:
                names = ", ".join(p.name for p in found) or "none"
                raise CheckpointError(f"{path}: expected model.safetensors or exactly one weights file, found {names}")
        config = path / "config.json"
        return (config if config.is_file() else None), found[0]
    if not _REPO_ID.fullmatch(os.fspath(source)):
        raise CheckpointError(
            f"{source}: no such file or directory, and not a hub repository id like 'MAETok/maetok-b-128'"
        )
    return _download(os.fspath(source), revision, token)


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path | None, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))

    try:
        try:
            weights = fetch(WEIGHTS[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            weights = fetch(WEIGHTS[1])
        try:
            config: Path | None = fetch("config.json")
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            config = None
    except Exception as error:
        raise CheckpointError(
            f"{repo_id}: neither a local path nor downloadable from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}); "
            "when offline, download the repository elsewhere and give its directory"
        ) from error
    return config, weights


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json as a dictionary; CheckpointError naming the file if it is not a JSON object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object of model arguments, got {type(config).__name__}")
    return config


def read_state(path: str | os.PathLike[str], prefer: str = "ema") -> dict[str, Tensor]:
    """{key: CPU tensor} of a weights file, wrappers' prefixes removed. CheckpointError names the file (and key)."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
    else:
        try:
            # training files keep their command line as a Namespace, which holds data only
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises a dozen types on bad bytes
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{path}: not loadable as weights only ({reason}); a pickle that holds anything but tensors and plain "
                "values is refused, because loading it would run code"
            ) from error
        state = _unwrap(state, prefer, path)
    return _strip(state, path)


def _unwrap(state: Any, prefer: str, path: Path) -> Any:
    """The tensors of a training file {model, ema, optimizer, ...}; other dictionaries pass."""
    other = "model" if prefer == "ema" else "ema"
    for name in (prefer, other, "state_dict"):
        # an empty one is a placeholder: the trainer kept no averaged weights, say
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping) and state[name]:
            return state[name]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        what = f"keys {sorted(map(str, state))[:8]}" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{path}: expected a dictionary of tensors or one with 'ema' or 'model', got {what}")
    return state


def _strip(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Removes what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put into keys."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: key {key!r} is a {type(key).__name__}, expected a string")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: key {key!r} holds a {type(value).__name__}, expected a tensor")
        name = key.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name[len("module.") :]
        if name in out:
            raise CheckpointError(f"{path}: {key!r} is there twice once 'module.' and '_orig_mod.' are removed")
        out[name] = value
    return out


def compare(
    model: Any, state: Mapping[str, Tensor], optional: Iterable[str], allow: Iterable[str], where: str
) -> list[str]:
    """Missing keys that are permitted; CheckpointError listing every other missing, unexpected or mis-shaped key."""
    expected = model.state_dict()
    allow = tuple(allow)
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    integers = [k for k in expected if k in state and expected[k].is_floating_point() != state[k].is_floating_point()]
    problems = {
        "missing": [k for k in missing if not _matches(k, (*optional, *allow))],
        "unexpected": [k for k in unexpected if not _matches(k, allow)],
        "mis-shaped": [
            f"{k} (expected {tuple(expected[k].shape)}, got {tuple(state[k].shape)})"
            for k in shapes
            if not _matches(k, allow)
        ],
        "not floating point": [f"{k} ({state[k].dtype})" for k in integers if not _matches(k, allow)],
    }
    lines = [f"  {what} ({len(keys)}): {', '.join(keys)}" for what, keys in problems.items() if keys]
    if lines:
        hint = "pass allow=[patterns] to accept them"
        raise CheckpointError("\n".join([f"{where}: the keys do not match; {hint}", *lines]))
    return missing + shapes


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, p) for p in patterns)


def _replace(path: Path, write: Any) -> None:
    """Runs write(temporary path in the same directory), then renames over `path`; leaves nothing behind on failure."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
