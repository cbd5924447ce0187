# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Files of checkpoints: what is refused, what a save leaves behind, the hub."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pkgutil
import re
import shutil
import types
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import TINY, random, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maetok_fast.models import CheckpointError, MAETok, SiT, SiTConfig


@pytest.fixture
def tiny() -> MAETok:
    return random(MAETok(TINY))


class Failing:
    """Stands for a function that fails at its n-th call."""

    def __init__(self, function: Any, at: int, error: BaseException) -> None:
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*args, **kwargs)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this code must not run",))


def test_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"x": Evil()}}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: .*refused, because loading it would run code"):
            MAETok.from_pretrained(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


MARK = "quant_conv.weight"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_names_what_the_pickle_asks_for(tmp_path: Path, zipped: bool, tiny: MAETok) -> None:
    file = tmp_path / "a.pt"
    for content, asked in (({"x": Evil()}, "print"), ({"model": tiny}, r"maetok_fast\.models\.tokenizer\.MAETok")):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=rf"a\.pt: .*it asks for the global {asked}\).*refused") as caught:
            MAETok.from_pretrained(file)
        assert str(caught.value).isprintable()  # no terminal codes, one line


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_refusal_for_another_reason_is_one_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": 1}, protocol=4))
    with pytest.raises(CheckpointError, match=r"weights only \(Unsupported operand \d+") as caught:
        MAETok.from_pretrained(tmp_path / "a.pt")
    assert str(caught.value).isprintable()
    told = pickle.UnpicklingError("Weights only load failed, \x1b[1mdo not trust it\x1b[0m.\n\tCheck the documentation")
    monkeypatch.setattr("torch.load", Failing(None, 1, told))
    with pytest.raises(CheckpointError, match=r"\(Weights only load failed, do not trust it\.\)"):
        MAETok.from_pretrained(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_beside_the_weights(tmp_path: Path, zipped: bool, tiny: MAETok) -> None:
    """What training files keep besides: read past, and nothing of its types is called."""
    values: list[Any] = [np.float64(1.5), np.int32(2), np.bool_(True), np.str_("x"), np.dtype("f4"), np.zeros(3)]
    values += [
        np.random.get_state(),  # noqa: NPY002 (what training files hold)
        Path("/data"),
        PurePosixPath("a"),
        PureWindowsPath("b"),
        types.SimpleNamespace(x=1),
    ]
    values += [argparse.Namespace(out=Path("x"), lr=np.float32(1e-4), more=argparse.Namespace()), np.array([{}, None])]
    content = {"ema": tiny.state_dict(), "rest": values, **{f"v{i}": v for i, v in enumerate(values)}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    same(MAETok.from_pretrained(tmp_path / "a.pt"), tiny)
    if not zipped:  # the names that numpy 1 wrote
        data = (tmp_path / "a.pt").read_bytes()
        assert b"cnumpy._core.multiarray\nscalar" in data
        (tmp_path / "a.pt").write_bytes(data.replace(b"cnumpy._core.", b"cnumpy.core."))
        same(MAETok.from_pretrained(tmp_path / "a.pt"), tiny)
    torch.save({"ema": tiny.state_dict() | {"x": np.float64(1)}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="key 'x' holds a NoTensor, expected a tensor"):
        MAETok.from_pretrained(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {MARK: torch.zeros(1), "x": 3}}, "key 'x' holds a int, expected a tensor"),
        ({"model": {MARK: torch.zeros(1), 3: torch.zeros(1)}}, "key 3 is a int, expected a string"),
        ({"ema": {}}, f"no MAETok checkpoint: key '{MARK}' is missing; it holds 'ema' with 0 keys"),
        ({"steps": 4}, "it holds 1 key (steps)"),
        ([torch.zeros(1)], "it holds a list"),
        (torch.zeros(1), "it holds a Tensor"),
        ({"model": {f"module.{MARK}": torch.zeros(1), MARK: torch.zeros(1)}}, "MAETok weights are there twice, as"),
        ({MARK: torch.zeros(1), "a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)}, "'a.b' is there twice"),
        ({"vae." + MARK: torch.zeros(1), "vae.x": torch.zeros(1)}, f"2 keys, all under 'vae.' (vae.{MARK}, vae.x)"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=re.escape("a.pt: ") + ".*" + re.escape(message)):
        MAETok.from_pretrained(tmp_path / "a.pt")


def test_paths_that_hold_no_checkpoint(tmp_path: Path, tiny: MAETok) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or exactly one weights file, found none"):
        MAETok.from_pretrained(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found a.pt, b.pt"):
        MAETok.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory, and not a hub repository id"):
        MAETok.from_pretrained(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a .safetensors, .pt"):
        MAETok.from_pretrained(tmp_path / "x.txt")
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        tiny.save_pretrained(tmp_path / "x.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model = random(MAETok(TINY))
    model.save_pretrained(path)
    torch.save({"ema": model.state_dict()}, path / "train.pt")
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_give_one_clear_error(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Truncated, flipped or random bytes: a model or a CheckpointError that names the file, never anything else."""
    name = data.draw(st.sampled_from(["model.safetensors", "train.pt", "config.json"]))
    for file in tmp_path.iterdir():
        file.unlink()
    raw = bytearray((saved / name).read_bytes())
    how = data.draw(st.sampled_from(["truncate", "flip", "random", "header"]))
    if how == "truncate":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif how == "random":
        raw = bytearray(data.draw(st.binary(max_size=200)))
    else:
        limit = min(len(raw), 3000) if how == "header" else len(raw)
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(bytes(raw))
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    try:
        MAETok.from_pretrained(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (some damage is harmless: no error either)


# ---- writing ---------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def no_links(*args: Any) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("safetensors.torch.save_file", 1),
        ("pathlib.Path.write_text", 1),
        ("os.fsync", 1),
        ("os.fsync", 2),
        ("os.replace", 1),
        ("os.replace", 2),
    ],
)
def test_a_failed_save_leaves_what_was_there(
    name: str, at: int, before: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails, with and without an older save, on file systems with and without hard links."""
    if not links:
        monkeypatch.setattr("os.link", no_links)
    fields: dict[str, Any] = {"tokens": 6, "channels": 5, "dim": 16, "depth": 1, "heads": 2}
    old, new = random(SiT(SiTConfig(**fields)), 1), random(SiT(SiTConfig(**fields, time="sit")), 2)
    if before:
        old.save_pretrained(tmp_path)
    was = content(tmp_path)
    module, _, attribute = name.rpartition(".")
    function = getattr(pkgutil.resolve_name(module), attribute)
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        failing = Failing(function, at, error)
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *a, f=failing, **k: f(*a, **k))
            with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
                new.save_pretrained(tmp_path)
        assert failing.calls >= at
        assert "No space left" in str(caught.value) or caught.type is KeyboardInterrupt
        assert content(tmp_path) == was
    if before:
        same(SiT.from_pretrained(tmp_path), old)
    new.save_pretrained(tmp_path)
    same(SiT.from_pretrained(tmp_path), new)
    assert sorted(content(tmp_path)) == ["config.json", "model.safetensors"]


def test_what_cannot_be_put_back_is_kept(tiny: MAETok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rename fails and so does the one that takes the first back: the old weights stay, by another name."""
    tiny.save_pretrained(tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    rename, calls = os.replace, []

    def first_only(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        rename(*args)

    monkeypatch.setattr("os.replace", first_only)
    with pytest.raises(CheckpointError, match="Input/output error"):
        random(MAETok(TINY), 1).save_pretrained(tmp_path)
    assert len(calls) == 3
    assert old in content(tmp_path).values()
    with pytest.raises(CheckpointError, match="of another save"):
        MAETok.from_pretrained(tmp_path)


def test_a_name_that_is_taken_by_a_folder(tiny: MAETok, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        with pytest.raises(CheckpointError, match=f"cannot write to .*{name}"):
            tiny.save_pretrained(folder)
        assert [p.name for p in folder.iterdir()] == [name]


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    """What a process leaves that is killed between the two renames; edited and foreign files are none of that."""
    fields: dict[str, Any] = {"tokens": 6, "channels": 5, "dim": 16, "depth": 1, "heads": 2}
    first, second = random(SiT(SiTConfig(**fields)), 1), random(SiT(SiTConfig(**fields)), 2)
    a, b = first.save_pretrained(tmp_path / "a"), second.save_pretrained(tmp_path / "b")
    shutil.copy(b / "model.safetensors", a)
    with pytest.raises(CheckpointError, match=r"config\.json beside it is of another save .*allow='config\.save_id'"):
        SiT.from_pretrained(a)
    same(SiT.from_pretrained(a, allow="config.save_id"), second)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(config | {"time_convention": "sit"}))
    assert SiT.from_pretrained(b).config.time == "sit"
    save_file(first.state_dict(), b / "model.safetensors")  # without our id, as other libraries write them
    assert torch.equal(SiT.from_pretrained(b).pos_embed, first.pos_embed)
    del config["save_id"]
    (a / "config.json").write_text(json.dumps(config))
    same(SiT.from_pretrained(a), second)


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    config = SiTConfig(tokens=6, channels=5, dim=16, depth=1, heads=2)
    saves = [content(random(SiT(config), seed).save_pretrained(tmp_path / str(i))) for i, seed in enumerate((1, 1, 2))]
    assert saves[0] == saves[1]
    assert saves[0]["config.json"] != saves[2]["config.json"]
    other = random(SiT(replace(config, time="sit")), 1).save_pretrained(tmp_path / "other")
    assert json.loads((other / "config.json").read_text())["save_id"] not in saves[0]["config.json"].decode()


def test_shared_memory_is_stored_once_per_name(tiny: MAETok, tmp_path: Path) -> None:
    tiny.decoder.mask_token = tiny.encoder.mask_token
    weights = torch.randn(2, 64)  # two parameters in one flat buffer, overlapping
    tiny.encoder.model.norm.weight = torch.nn.Parameter(weights.view(-1)[:64])
    tiny.encoder.model.norm.bias = torch.nn.Parameter(weights.view(-1)[32:96])
    tiny.quant_conv.bias = torch.nn.Parameter(torch.ones(1).expand(6))
    same(MAETok.from_pretrained(tiny.save_pretrained(tmp_path)), tiny)


def test_memory_order_does_not_change_values(tiny: MAETok, tmp_path: Path) -> None:
    """Transposed, strided and channels-last tensors hold in the file what they hold in the model."""
    tiny.quant_conv.weight = torch.nn.Parameter(torch.randn(64, 6).t())
    tiny.quant_conv.bias = torch.nn.Parameter(torch.randn(6, 2)[:, 0])
    tiny.to(memory_format=torch.channels_last)
    assert not tiny.quant_conv.weight.is_contiguous()
    assert not tiny.encoder.model.patch_embed.proj.weight.is_contiguous()
    same(MAETok.from_pretrained(tiny.save_pretrained(tmp_path)), tiny)


def test_tensors_that_cannot_be_stored_are_named(tiny: MAETok, tmp_path: Path) -> None:
    class Wrapped(torch.Tensor):
        pass

    def refused(value: Any, message: str) -> None:
        tiny.quant_conv.register_buffer("odd", value)
        with pytest.raises(CheckpointError, match=f"save_pretrained: cannot store quant_conv.odd: {message}"):
            tiny.save_pretrained(tmp_path / "new")

    refused(torch.empty(2, device="meta"), "on the meta device and without values")
    refused(torch.zeros(2, dtype=torch.complex128), r"torch\.complex128, which safetensors cannot hold")
    refused(torch.eye(2).to_sparse(), r"sparse .*to_dense")
    refused(torch.zeros(2).as_subclass(Wrapped), "Wrapped; gather or convert")
    assert not (tmp_path / "new").exists()


def test_weights_in_8_bits(tiny: MAETok, tmp_path: Path) -> None:
    state = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in tiny.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn, in which no model computes; pass dtype=torch\.bfloat16"):
        MAETok.from_pretrained(tmp_path / "a.safetensors")
    low = MAETok.from_pretrained(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert torch.equal(low.quant_conv.weight, state["quant_conv.weight"].to(torch.bfloat16))


def test_saving_where_or_what_cannot_be_saved(tiny: MAETok, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/folder"):
        tiny.save_pretrained(tmp_path / "file" / "folder")
    with torch.device("meta"):
        empty = MAETok(TINY)
    with pytest.raises(
        CheckpointError, match=r"cannot store encoder\..* and \d+ more: on the meta device and without values"
    ):
        empty.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saved_weights_are_plain_safetensors(tiny: MAETok, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == tiny.state_dict().keys()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == (tmp_path / "config.json").stat().st_mode & 0o444


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_push_to_hub(tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("create", (repo_id, kwargs)))

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            same(MAETok.from_pretrained(folder_path), tiny)
            calls.append(("upload", (repo_id, kwargs)))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert tiny.push_to_hub("me/model", private=True, token="t", message="hi") == "https://hub/commit"
    assert calls == [
        ("token", "t"),
        ("create", ("me/model", {"private": True, "exist_ok": True, "repo_type": "model"})),
        ("upload", ("me/model", {"revision": None, "commit_message": "hi"})),
    ]


class Hub:
    """Stands for the hub: `files` by name, and a cache that holds `cached` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Any, folder: Path, cached: Any = (), up: bool = True):
        self.files, self.folder, self.cached, self.up = files, folder, cached, up
        self.asked: list[Any] = []
        for name in ("hf_hub_download", "try_to_load_from_cache", "get_hf_file_metadata"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(self, name))

    def hf_hub_download(
        self, repo_id: str, name: str, revision: Any = None, token: Any = None, local_files_only: bool = False
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        self.asked.append((repo_id, name, revision))
        if local_files_only:
            if name not in self.cached:
                raise LocalEntryNotFoundError("not in the cache")
        elif name not in self.files:
            raise RemoteEntryNotFoundError("404", response=httpx_response(404))
        return str(self.folder / name)

    def try_to_load_from_cache(self, repo_id: str, name: str, revision: Any = None) -> Any:
        from huggingface_hub import _CACHED_NO_EXIST

        return None if name in self.files else _CACHED_NO_EXIST

    def get_hf_file_metadata(self, url: str, token: Any = None, timeout: Any = None) -> None:
        assert url.startswith("http")
        assert timeout == 5
        if not self.up:
            raise ConnectionError("name not known")


def httpx_response(code: int) -> Any:
    """A response as huggingface_hub's errors want one, whichever HTTP library it uses."""
    return type("Response", (), {"status_code": code, "headers": {}, "request": None, "url": "", "text": ""})()


WHOLE = ("model.safetensors", "config.json")


def test_from_the_hub(saved: Path, tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    hub = Hub(monkeypatch, WHOLE, saved)
    same(MAETok.from_pretrained("MAETok/maetok-b-128", revision="main"), tiny)
    assert hub.asked == [("MAETok/maetok-b-128", n, "main") for n in WHOLE]
    Hub(monkeypatch, WHOLE[:1], saved)
    same(MAETok.from_pretrained("MAETok/maetok-b-128"), tiny)
    Hub(monkeypatch, (), saved)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        MAETok.from_pretrained("MAETok/maetok-b-128")


def test_a_hub_that_does_not_answer(saved: Path, tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once; then its cache serves, but only one that holds all files that the repository has."""
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    Hub(monkeypatch, WHOLE, saved, cached=WHOLE, up=False)
    same(MAETok.from_pretrained("MAETok/none"), tiny)
    Hub(monkeypatch, WHOLE[:1], saved, cached=WHOLE[:1], up=False)  # it is known that there is no config.json
    same(MAETok.from_pretrained("MAETok/none"), tiny)
    for cached in ((), WHOLE[:1]):
        Hub(monkeypatch, WHOLE, saved, cached=cached, up=False)
        with pytest.raises(
            CheckpointError, match=r"MAETok/none: neither a local path .*does not answer .*name not known.*when offline"
        ):
            MAETok.from_pretrained("MAETok/none")


def test_paths_are_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, (), tmp_path)
    for path in (
        "runs/last.pt",
        "runs/model.safetensors",
        "./runs/last",
        "../runs",
        "~/runs",
        "/runs/last",
        "a/b/c",
        "a",
    ):
        with pytest.raises(CheckpointError, match="no such file or directory, and not a hub repository id"):
            MAETok.from_pretrained(path)
    assert not hub.asked
