# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint's files are: on this machine, on the Hugging Face hub, or in its cache."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from maetok_fast.models.checkpoints.layout import CheckpointError

__all__ = ["STATISTICS", "locate"]

log = logging.getLogger("maetok_fast")

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
# what lies beside a generator and holds how its latents are normalised, no model: ours, LightningDiT's, REPA-E's, RAE's
STATISTICS = ("latent_statistics.safetensors", "latents_stats.pt", "*-latents-stats.pt", "stat.pt")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# seconds for the one question that shows whether the hub answers; HF_HUB_ETAG_TIMEOUT overrides it
_PATIENCE = 5.0


def locate(
    source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None, prefer: str = "ema"
) -> tuple[Path | None, Path]:
    """(config.json or None, weights file) of a directory, a file or a hub repository id. prefer: of 1d-tokenizer's
    checkpoint-{step}/, which keep the averaged weights in `ema_model`, the raw ones in `unwrapped_model`.

    The hub is asked only for what is no local path and looks like none: "owner/name" without a weights file's ending.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise CheckpointError(f"{path}: expected a .safetensors, .pt, .pth, .bin, .ckpt or .pth.tar file")
        beside = path.with_name("config.json")
        return (beside if beside.is_file() else None), path
    if path.is_dir():
        inner = [path / name for name in ("ema_model", "unwrapped_model") if (path / name).is_dir()]
        path = path if not inner else inner[0 if prefer == "ema" else -1]
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            found = sorted(
                p for p in path.iterdir() if p.name.endswith(_SUFFIXES) and p.is_file() and not _statistics(p)
            )
            if len(found) != 1:
                names = ", ".join(p.name for p in found) or "none"
                raise CheckpointError(f"{path}: expected model.safetensors or exactly one weights file, found {names}")
        config = path / "config.json"
        return (config if config.is_file() else None), found[0]
    name = os.fspath(source)
    if not _REPO_ID.fullmatch(name) or path.name.endswith(_SUFFIXES):
        raise CheckpointError(
            f"{source}: no such file or directory, and not a hub repository id like 'MAETok/maetok-b-128'"
        )
    return _download(name, revision, token)


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path | None, Path]:
    """The files from the hub, or from its cache where the hub does not answer."""
    # 0.1 s to import, and most checkpoints are local
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    silence = _silence(repo_id, revision, token)
    if silence is not None:
        log.info("%s: the hub does not answer (%s); its cache is asked", repo_id, silence)

    def fetch(name: str) -> Path | None:
        """The file, None if the repository has none of this name. LocalEntryNotFoundError: nobody knows."""
        try:
            local = silence is not None
            return Path(hf_hub_download(repo_id, name, revision=revision, token=token, local_files_only=local))
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(repo_id, name, revision=revision) is not _CACHED_NO_EXIST:
                raise
        except EntryNotFoundError:
            pass
        return None

    try:
        weights, absent = None, FileNotFoundError(f"the repository has no {' and no '.join(WEIGHTS)}")
        try:
            weights = fetch(WEIGHTS[0])
        except LocalEntryNotFoundError as error:
            if silence is None:
                raise
            absent = error
        weights = weights or fetch(WEIGHTS[1])
        if weights is None:
            raise absent
        return fetch("config.json"), weights
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
        if isinstance(error, LocalEntryNotFoundError) and silence is not None:
            reason = f"it does not answer ({silence}), and its cache does not hold the files"
        raise CheckpointError(
            f"{repo_id}: neither a local path nor downloadable from the Hugging Face hub ({reason}); "
            "when offline, download the repository elsewhere and give its directory"
        ) from error


def _silence(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """Why the hub does not answer, or None if it does, be it with a refusal.

    One question without repetitions: huggingface_hub repeats its own five times over 23 s before it gives up.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _PATIENCE
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, WEIGHTS[0], revision=revision), token=token, timeout=timeout)
    except HfHubHTTPError as error:
        # 4xx is an answer, which the download itself will explain; 5xx would be repeated
        code = getattr(error.response, "status_code", 0)
        return f"HTTP {code}" if code >= 500 else None
    except Exception as error:  # the HTTP library's own, which changes with huggingface_hub's version
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
    return None


def _statistics(path: Path) -> bool:
    return any(path.match(pattern) for pattern in STATISTICS)
