# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`from_pretrained`, `save_pretrained` and `push_to_hub` of a model class that names its layout.

source: directory | .safetensors | .pt | hub repository id
  │ locate, files.read_*   -> config.json (optional), what the weights file holds
  │ copies.pick            -> {key: tensor}: a training file's `ema` (or `model`), wrappers' prefixes removed
  │ layout.fields          -> configuration, detected from the weights, cross-checked against config.json
  │ _compare               -> every missing, unexpected and mis-shaped key in one error, unless `allow` names it
  ▼ model in eval mode; teachers and auxiliary decoders in the file are passed over, never built or downloaded
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from maetok_fast.models.checkpoints.copies import pick
from maetok_fast.models.checkpoints.files import (
    Arguments,
    folder_writers,
    read_config,
    read_weights,
    storable,
    write_together,
)
from maetok_fast.models.checkpoints.layout import SAVE_ID, CheckpointError, Layout, matches
from maetok_fast.models.checkpoints.locate import locate

__all__ = ["Pretrained", "Stored"]

M = TypeVar("M", bound="Pretrained")


@dataclass(frozen=True)
class Stored:
    """A checkpoint's files, read once. config: of config.json, None where there is none; file: that of the weights;
    content: what it holds; metadata: a safetensors file's."""

    config: dict[str, Any] | None
    file: Path
    content: Any
    metadata: dict[str, str]

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the command line, or of the dictionary, that a training file keeps as `args` or `config`."""
        for name in ("args", "config"):
            kept = self.content.get(name) if isinstance(self.content, Mapping) else None
            if isinstance(kept, Arguments):
                return kept.values
            if isinstance(kept, Mapping):
                return {str(k): v for k, v in kept.items()}
        return {}

    @classmethod
    def read(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        token: str | bool | None = None,
        prefer: str = "ema",
    ) -> Stored:
        """See `Pretrained.from_pretrained`. CheckpointError naming what cannot be found or read."""
        config_file, weights_file = locate(source, revision, token, prefer)
        public = read_config(config_file) if config_file else None
        return cls(public, weights_file, *read_weights(weights_file))


class Pretrained(nn.Module):
    """A module that is made from one configuration, `cls(config)`, and stored as its `layout` says.

    A class sets config_class, a dataclass; layout; and, in __init__, self.config.
    """

    config_class: ClassVar[type[Any]]
    layout: ClassVar[Layout]
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
        Hugging Face repository id (`revision`, `token` as in huggingface_hub; its cache where the hub does not answer).
        allow: shell patterns of keys that may be missing, unexpected or mis-shaped ("encoder.freqs*"), and
        "config.NAME" for keys of config.json that are unknown or contradict the weights (the weights win).
        prefer: which copy of a training file, "ema" or "model"; the other one serves, with a warning, where it is
        absent. dtype: None keeps the stored one, the widest if there are several. changes: fields of the configuration
        that neither weights nor config.json tell (`heads=6`, `position="axial"`, `time="sit"`); what is assumed without
        a config.json is logged as a warning. Raises CheckpointError, naming the file and the keys.
        """
        _check_prefer(prefer)
        _layout(cls)  # before anything is downloaded
        stored = Stored.read(source, revision, token, prefer)
        return cls.from_stored(stored, allow=allow, prefer=prefer, dtype=dtype, device=device, **changes)

    @classmethod
    def from_stored(
        cls: type[M],
        stored: Stored,
        *,
        allow: str | Iterable[str] = (),
        prefer: str = "ema",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **changes: Any,
    ) -> M:
        """`from_pretrained` of files that have been read, which several classes may look at."""
        layout = _layout(cls)
        _check_prefer(prefer)
        allowed = (allow,) if isinstance(allow, str) else tuple(allow)
        unknown = sorted(set(changes) - set(cls.config_class.__dataclass_fields__))
        if unknown:
            raise ValueError(f"from_pretrained: {cls.config_class.__name__} has no field {', '.join(unknown)}")
        public, weights_file = stored.config, stored.file
        foreign = (public or {}).get("_class_name")  # diffusers' name of the class
        if foreign not in (None, cls.__name__):
            raise CheckpointError(
                f"{weights_file}: config.json says it is diffusers' {foreign}, which no {cls.__name__} is"
            )
        if public is not None and not matches(f"config.{SAVE_ID}", allowed):
            _check_one_save(public.get(SAVE_ID), stored.metadata.get(SAVE_ID), weights_file)
        state = pick(stored.content, layout.name, layout.mark, prefer, weights_file)
        state = {k: v for k, v in state.items() if not matches(k, layout.tolerated)}
        try:
            config = cls.config_class(**layout.fields(state, public, changes, allowed, stored.arguments))
        except CheckpointError as error:
            raise CheckpointError(f"{weights_file}: {error}") from None
        except (ValueError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{weights_file}: its shapes make no {cls.__name__}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        missing = _compare(model, state, layout.optional, allowed, f"{weights_file} as {cls.__name__}")
        expected = model.state_dict()
        state = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
        if missing:  # keys that the file may lack keep their initial values
            model = cls(config)
        model.load_state_dict(state, strict=False, assign=True)
        if dtype is None:
            dtype = _one_dtype({state[k].dtype for k, _ in model.named_parameters() if k in state}, weights_file)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `config.json` and `model.safetensors` in the public layout into `directory` (made if absent).

        Both files or neither: a failed save leaves what was there. They carry one id, `save_id` in config.json and in
        the metadata of the weights, so that files of two saves are not taken for one model. Tensors that share memory
        are stored once per name. Returns the directory. CheckpointError if nothing can be written there, or naming the
        tensors that cannot be stored (on the meta device, sharded, sparse).
        """
        layout = _layout(type(self))
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"save_pretrained: {directory} is a file; give a directory")
        tensors = storable(self.state_dict())
        writers = folder_writers(directory, layout.export(self.config), tensors)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_together(writers)
        except OSError as error:
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
        from huggingface_hub import HfApi  # 0.1 s to import

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        return str(commit)


def _check_prefer(prefer: str) -> None:
    if prefer not in ("ema", "model"):
        raise ValueError(f"from_pretrained: prefer {prefer!r} is not 'ema' or 'model'")


def _layout(model: type[Pretrained]) -> Layout:
    layout = getattr(model, "layout", None)
    if not isinstance(layout, Layout):
        raise TypeError(f"{model.__name__} has no checkpoint layout; set `layout = Layout(...)` in the class")
    return layout


def _check_one_save(config: Any, weights: str | None, file: Path) -> None:
    """Both files of a folder of ours come from one save; other people's carry no id."""
    if config is not None and weights is not None and config != weights:
        raise CheckpointError(
            f"{file}: config.json beside it is of another save (an interrupted one, or files of two were mixed); put "
            f"the two files of one save together, or pass allow='config.{SAVE_ID}' to take these as they are"
        )


def _compare(
    model: nn.Module, state: Mapping[str, Tensor], optional: Iterable[str], allow: Iterable[str], where: str
) -> list[str]:
    """Missing keys that are permitted; CheckpointError listing every other missing, unexpected or mis-shaped key."""
    expected = model.state_dict()
    allow = tuple(allow)
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    shapes = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    integers = [k for k in expected if k in state and expected[k].is_floating_point() != state[k].is_floating_point()]
    problems = {
        "missing": [k for k in missing if not matches(k, (*optional, *allow))],
        "unexpected": [k for k in unexpected if not matches(k, allow)],
        "mis-shaped": [
            f"{k} (expected {tuple(expected[k].shape)}, got {tuple(state[k].shape)})"
            for k in shapes
            if not matches(k, allow)
        ],
        "not floating point": [f"{k} ({state[k].dtype})" for k in integers if not matches(k, allow)],
    }
    lines = [f"  {what} ({len(keys)}): {', '.join(keys)}" for what, keys in problems.items() if keys]
    if lines:
        hint = "pass allow=[patterns] to accept them"
        raise CheckpointError("\n".join([f"{where}: the keys do not match; {hint}", *lines]))
    return missing + shapes


def _one_dtype(stored: set[torch.dtype], file: Path) -> torch.dtype | None:
    """The widest of the parameters' dtypes: a mixed model cannot be run."""
    try:
        dtype = functools.reduce(torch.promote_types, stored) if stored else None
    except RuntimeError:  # torch promotes no 8-bit floats
        dtype = min(stored, key=lambda d: d.itemsize)
    if dtype is not None and dtype.itemsize < 2:
        raise CheckpointError(
            f"{file}: holds weights in {dtype}, in which no model computes; pass dtype=torch.bfloat16 to convert them"
        )
    return dtype
