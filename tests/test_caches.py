# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Latent caches in the field's layouts, written here as the projects write them, read, converted, damaged."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.data.adm import AdmError, AdmFile
from maetok_fast.data.caches import FORMATS, CacheError, convert_cache, find_cache, open_cache
from maetok_fast.pipeline import LatentStatistics
from maetok_fast.pipeline.run import write_npz

C, SIDE, N = 3, 4, 7
LABELS = [0, 1, 2, 0, 1, 2, 1]


def items(halves: int = 1, seed: int = 0, count: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, halves * C, SIDE, SIDE)).astype(np.float32)


def moments(second: str, seed: int = 0) -> np.ndarray:
    found = items(2, seed)
    if second == "std":
        found[:, C:] = np.abs(found[:, C:]) + 0.1
    return found


# ---- as the projects write them -----------------------------------------------------------------------------------


def lightningdit(folder: Path, ranks: int = 1, extra: bool = False, flips: bool = True) -> np.ndarray:
    """Image i is item i // W of rank i % W; the sampler repeats the first images at the end."""
    folder.mkdir()
    data, mirrored = items(), items(seed=1)
    total = -(-N // ranks) * ranks
    order = [*range(N), *range(total - N)]
    for rank in range(ranks):
        mine = order[rank::ranks]
        for shard, rows in enumerate((mine[:2], mine[2:])):
            tensors = {"latents": torch.from_numpy(data[rows]), "labels": torch.tensor([LABELS[i] for i in rows])}
            if flips:
                tensors["latents_flip"] = torch.from_numpy(mirrored[rows])
            if extra:
                tensors |= {n: torch.from_numpy(data[rows][:, :2] * 2) for n in ("latents_sv", "latents_sv_flip")}
            about = {"total_size": str(len(rows)), "dtype": "torch.float32", "device": "cuda:0"}
            save_file(tensors, folder / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors", about)
    return data


def repa(folder: Path, second: str = "std", told: str = "latents") -> np.ndarray:
    data = moments(second)
    pairs = []
    for i, item in enumerate(data):
        name = f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, item)
        pairs.append([name if told == "latents" else f"00000/img{i:08d}.png", LABELS[i]])
    place = folder / "vae-sd" if told == "latents" else folder
    (place / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return data


def repa_e(folder: Path) -> np.ndarray:
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    data, names = moments("std"), [f"00000/img-mean-std-{i:08d}.npy" for i in range(N)]
    with h5py.File(folder / "vae.h5", "w") as file:
        for name, item in zip(names, data):
            file.create_dataset(name, data=item)
    (folder / "vae_h5.json").write_text(json.dumps(names))
    (folder / "dataset.json").write_text(json.dumps({"labels": [list(p) for p in zip(names, LABELS)]}))
    return data


def mar(folder: Path, second: str = "logvar", flips: bool = True) -> np.ndarray:
    data, mirrored = moments(second), moments(second, 1)
    for i, item in enumerate(data):
        path = folder / f"n{LABELS[i]:04d}" / f"photo_{i}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=item, **({"moments_flip": mirrored[i]} if flips else {}))
    return data


def dc_ae(folder: Path) -> np.ndarray:
    data = items()
    for i, item in enumerate(data):
        path = folder / f"n{LABELS[i]:04d}" / f"photo_{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, item)
    return data


WRITE: dict[str, Any] = {"lightningdit": lightningdit, "repa": repa, "repa-e": repa_e, "mar": mar, "dc-ae": dc_ae}
KINDS = {"lightningdit": "sample", "repa": "mean_std", "repa-e": "mean_std", "mar": "mean_logvar", "dc-ae": "scaled"}
formats = pytest.mark.parametrize("name", FORMATS)


def by_class(data: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """In the order of folders of classes and of names in them."""
    order = sorted(range(N), key=lambda i: (LABELS[i], f"photo_{i}"))
    return data[order], [LABELS[i] for i in order]


@formats
def test_every_layout_is_told_and_read(name: str, tmp_path: Path) -> None:
    data = WRITE[name](tmp_path / "cache")
    labels = LABELS
    if name in ("mar", "dc-ae"):
        data, labels = by_class(data)
    assert find_cache(tmp_path / "cache") == name
    cache = open_cache(tmp_path / "cache")
    assert (cache.format, cache.kind, cache.shape, len(cache)) == (name, KINDS[name], (C, SIDE, SIDE), N)
    assert cache.labels is not None
    assert cache.labels.tolist() == labels
    assert torch.equal(cache.read(slice(None)), torch.from_numpy(data))
    assert torch.equal(cache.read([4, 1]), torch.from_numpy(data[[4, 1]]))
    batches = list(cache.batches(3))
    assert [len(where) for where, _ in batches] == [3, 3, 1]
    assert cache.flips == (name in ("lightningdit", "mar"))
    if not cache.flips:
        with pytest.raises(CacheError, match="without the mirror images"):
            cache.read([0], flip=True)
    assert f"{N} x (3, 4, 4), {KINDS[name]}, 3 classes" in repr(cache)
    again = pickle.loads(pickle.dumps(cache))  # in a worker of a DataLoader
    assert torch.equal(again.read([2]), cache.read([2]))


def test_ranks_are_put_in_order_and_what_the_sampler_repeated_is_dropped_when_asked(tmp_path: Path) -> None:
    data = lightningdit(tmp_path / "cache", ranks=3)
    whole = open_cache(tmp_path / "cache")
    assert len(whole) == 9  # nothing in the files says which
    assert torch.equal(whole.read(slice(0, N)), torch.from_numpy(data))
    exact = open_cache(tmp_path / "cache", images=N)
    assert torch.equal(exact.read(slice(None)), torch.from_numpy(data))
    assert exact.labels is not None
    assert exact.labels.tolist() == LABELS
    for wrong in (6, 10):
        with pytest.raises(CacheError, match=f"{wrong} images cannot be in its 9 items of 3 ranks"):
            open_cache(tmp_path / "cache", images=wrong)
    repa(tmp_path / "other")
    with pytest.raises(CacheError, match="is for lightningdit caches"):
        open_cache(tmp_path / "other", images=3)


def test_what_else_lies_beside_latents_is_kept(tmp_path: Path) -> None:
    data = lightningdit(tmp_path / "cache", extra=True)
    cache = open_cache(tmp_path / "cache")
    assert cache.extras == ("latents_sv",)
    assert np.array_equal(cache.extra("latents_sv", 3), data[3, :2] * 2)
    done = convert_cache(cache, tmp_path / "out", "dc-ae", scale=0.5)
    assert done.lost == ("latents_sv: no place for it", "mirror images: no place for them")


def test_labels_of_images_pair_in_sorted_order(tmp_path: Path) -> None:
    repa(tmp_path / "cache", told="images")
    labels = open_cache(tmp_path / "cache").labels
    assert labels is not None
    assert labels.tolist() == LABELS


# ---- std or logvar ------------------------------------------------------------------------------------------------


def test_moments_that_contradict_their_layout_are_asked_about(tmp_path: Path) -> None:
    repa(tmp_path / "r", second="logvar")
    with pytest.raises(CacheError, match=r"values <= 0, which no standard deviation has.*--moments std or --moments l"):
        open_cache(tmp_path / "r")
    assert open_cache(tmp_path / "r", moments="logvar").kind == "mean_logvar"
    with pytest.raises(CacheError, match="which no std has; not --moments std"):
        open_cache(tmp_path / "r", moments="std")
    mar(tmp_path / "m", second="std")
    with pytest.raises(CacheError, match=r"only positive values in the second half .* a mar cache has logvar"):
        open_cache(tmp_path / "m")
    assert open_cache(tmp_path / "m", moments="std").kind == "mean_std"
    with pytest.raises(ValueError, match="moments must be 'std', 'logvar' or None"):
        open_cache(tmp_path / "m", moments="variance")
    dc_ae(tmp_path / "d")
    with pytest.raises(CacheError, match="holds scaled latents, no moments"):
        open_cache(tmp_path / "d", moments="std")


def test_a_deviation_that_is_none_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Not only in the items that tell std from logvar: a conversion would write its logarithm, NaN."""
    folder = tmp_path / "r" / "vae-sd" / "00000"
    folder.mkdir(parents=True)
    names = [f"img-mean-std-{i:08d}.npy" for i in range(40)]
    for i, name in enumerate(names):
        item = moments("std", i)[0]
        item[C, 0, 0] = 0.0 if i == 33 else 1.0
        np.save(folder / name, item)
    (folder.parent / "dataset.json").write_text(json.dumps({"labels": [[f"00000/{name}", 0] for name in names]}))
    cache = open_cache(tmp_path / "r")
    assert cache.kind == "mean_std"
    with pytest.raises(CacheError, match="img-mean-std-00000033 holds a standard deviation that is not > 0"):
        convert_cache(cache, tmp_path / "m", "mar", flips=False)
    assert not (tmp_path / "m").exists()


def test_names_of_repa_e_in_any_order_pair_with_images_in_the_sorted_one(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "e").mkdir()
    data, order = moments("std"), [3, 0, 6, 1, 5, 2, 4]
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in order]
    with h5py.File(tmp_path / "e" / "vae.h5", "w") as file:
        for i, name in zip(order, names):
            file.create_dataset(name, data=data[i])
        told = json.dumps({"labels": [[name, LABELS[i]] for i, name in zip(order, names)]})
        file.create_dataset("dataset.json", data=np.array(told.encode(), dtype="S"))  # as its extraction writes it
    (tmp_path / "e" / "vae_h5.json").write_text(json.dumps([*names, "dataset.json"]))
    cache = open_cache(tmp_path / "e")
    assert cache.labels is not None
    assert cache.labels.tolist() == LABELS
    convert_cache(cache, tmp_path / "r", "repa")
    assert np.array_equal(open_cache(tmp_path / "r").read(slice(None)).numpy(), data)


# ---- converted ----------------------------------------------------------------------------------------------------


@formats
def test_a_layout_written_by_us_is_the_same_to_its_readers(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path / "cache")
    first = open_cache(tmp_path / "cache")
    done = convert_cache(first, tmp_path / "out" / "again", name, batch=2)
    second = open_cache(tmp_path / "out" / "again")
    assert (done.images, done.lost) == (N, ())
    assert (second.format, second.kind, second.shape) == (first.format, first.kind, first.shape)
    assert torch.equal(second.read(slice(None)), first.read(slice(None)))
    assert second.labels is not None
    assert second.labels.tolist() == first.labels.tolist()  # type: ignore[union-attr]
    if first.flips:
        assert torch.equal(second.read(slice(None), flip=True), first.read(slice(None), flip=True))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["again"]  # nothing half-written beside it


def test_moments_there_and_back_and_draws(tmp_path: Path) -> None:
    data = repa(tmp_path / "cache")
    source = open_cache(tmp_path / "cache")
    convert_cache(source, tmp_path / "mar", "mar", flips=False)
    logged = open_cache(tmp_path / "mar")
    assert logged.kind == "mean_logvar"
    order = [i for c in range(3) for i in range(N) if LABELS[i] == c]
    torch.testing.assert_close(logged.read([0])[0, C:], torch.from_numpy(2 * np.log(data[order[0], C:])))
    convert_cache(logged, tmp_path / "back", "repa")
    torch.testing.assert_close(open_cache(tmp_path / "back").read(slice(None)), torch.from_numpy(data[order]))
    for seed, batch in ((3, 2), (3, 5), (4, 5)):
        convert_cache(source, tmp_path / f"s{seed}{batch}", "lightningdit", seed=seed, batch=batch, flips=False)
    drawn = {k: open_cache(tmp_path / k).read(slice(None)) for k in ("s32", "s35", "s45")}
    assert torch.equal(drawn["s32"], drawn["s35"])  # whatever the batches
    assert not torch.equal(drawn["s32"], drawn["s45"])
    eps = (drawn["s32"] - torch.from_numpy(data[:, :C])) / torch.from_numpy(data[:, C:])
    assert abs(eps.mean()) < 0.3
    assert abs(eps.std() - 1) < 0.2


def test_statistics_of_a_written_lightningdit_cache(tmp_path: Path) -> None:
    dc_ae(tmp_path / "cache")
    convert_cache(open_cache(tmp_path / "cache"), tmp_path / "out", "lightningdit", scale=0.25, flips=False, batch=3)
    stored = load_file(tmp_path / "out" / "latents_rank00_shard000.safetensors")
    stats = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, C, 1, 1)
    torch.testing.assert_close(stats["mean"], stored["latents"].mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(stats["std"], stored["latents"].std((0, 2, 3), keepdim=True))
    LatentStatistics.load(tmp_path / "out" / "latents_stats.pt").check((C, SIDE, SIDE))


def test_what_cannot_be_known_is_asked_for_or_refused(tmp_path: Path) -> None:
    for name in ("lightningdit", "repa", "dc-ae", "mar"):
        WRITE[name](tmp_path / name)
    caches = {name: open_cache(tmp_path / name) for name in ("lightningdit", "repa", "dc-ae", "mar")}
    wrong = [
        ("lightningdit", "repa", {}, "were drawn once.*encode the images again"),
        ("dc-ae", "mar", {}, "were drawn once"),
        ("repa", "lightningdit", {"flips": False}, "what to draw from: --seed"),
        ("repa", "lightningdit", {"seed": 1}, "no mirror images.*--no-flips"),
        ("repa", "dc-ae", {"seed": 1}, "--scale"),
        ("lightningdit", "dc-ae", {}, "--scale"),
    ]
    for source, to, options, said in wrong:
        with pytest.raises(CacheError, match=said):
            convert_cache(caches[source], tmp_path / "out", to, **options)
    with pytest.raises(ValueError, match="unknown cache format 'lmdb'"):
        convert_cache(caches["repa"], tmp_path / "out", "lmdb")
    with pytest.raises(ValueError, match="scale must be > 0"):
        convert_cache(caches["lightningdit"], tmp_path / "out", "dc-ae", scale=-1.0)
    (tmp_path / "there").mkdir()
    with pytest.raises(CacheError, match="is there already"):
        convert_cache(caches["repa"], tmp_path / "there", "repa")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    repa(tmp_path / "cache")

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_cache(open_cache(tmp_path / "cache"), tmp_path / "out", "repa", tick=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["convert", *words])

    repa(tmp_path / "cache")
    done = run(str(tmp_path / "cache"), str(tmp_path / "out"), "--to", "lightningdit", "--seed", "5", "--no-flips")
    assert done.exit_code == 0, done.output
    assert f"{N} images as a lightningdit cache" in done.output
    assert len(open_cache(tmp_path / "out")) == N
    refused = run(str(tmp_path / "cache"), str(tmp_path / "x"), "--to", "timm")
    assert refused.exit_code == 2
    assert "is a repa cache, which becomes one of lightningdit, repa" in refused.output
    refused = run(str(tmp_path / "out"), str(tmp_path / "x"), "--to", "repa")
    assert refused.exit_code == 2
    assert "encode the images again" in refused.output


def test_the_file_of_statistics_is_found_where_its_layout_has_it(tmp_path: Path) -> None:
    stats = {"mean": torch.zeros(1, C, 1, 1), "std": torch.ones(1, C, 1, 1)}
    for name, file in (("lightningdit", "latents_stats.pt"), ("repa-e", "vae-latents-stats.pt"), ("mar", "stat.pt")):
        WRITE[name](tmp_path / name)
        assert open_cache(tmp_path / name).statistics_file is None
        torch.save(stats, tmp_path / name / file)
        found = open_cache(tmp_path / name).statistics_file
        assert found == tmp_path / name / file
        LatentStatistics.load(found).check((C, SIDE, SIDE))
    torch.save(stats, tmp_path / "repa-e" / "other-latents-stats.pt")
    assert open_cache(tmp_path / "repa-e").statistics_file == tmp_path / "repa-e" / "vae-latents-stats.pt"
    (tmp_path / "repa-e" / "vae-latents-stats.pt").rename(tmp_path / "repa-e" / "third-latents-stats.pt")
    with pytest.raises(CacheError, match=r"several files of statistics \(other-latents-stats.pt, third-lat.*which one"):
        _ = open_cache(tmp_path / "repa-e").statistics_file


# ---- damaged ------------------------------------------------------------------------------------------------------


@formats
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_one_clear_error(name: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
    WRITE[name](folder)
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    content = file.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "text"]))
    damaged = {
        "cut": content[:cut],
        "flip": content[:cut] + bytes([content[cut] ^ 0x55]) + content[cut + 1 :],
        "text": b"<html>",
    }
    file.write_bytes(damaged[how])
    try:
        cache = open_cache(folder)
        cache.read(slice(None))
        if cache.flips:
            cache.read(slice(None), flip=True)
    except CacheError as error:
        assert str(folder) in str(error)  # noqa: PT017


def test_objects_shapes_and_types_are_refused(tmp_path: Path) -> None:
    repa(tmp_path / "cache")
    file = tmp_path / "cache" / "vae-sd" / "00000" / "img-mean-std-00000002.npy"
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CacheError, match="no array file that can be read"):
        open_cache(tmp_path / "cache").read(slice(None))
    for wrong, said in (
        (np.zeros((2, 2), np.float32), r"item 00000/img-mean-std-00000002 is float32 \(2, 2\), the first one float"),
        (np.zeros((2 * C, SIDE, SIDE), np.int32), "int32"),
    ):
        np.save(file, wrong)
        with pytest.raises(CacheError, match=said):
            open_cache(tmp_path / "cache", moments="std").read(slice(None))
    np.save(file, np.full((2 * C, SIDE, SIDE), np.nan, np.float32))
    with pytest.raises(CacheError, match="00000002 holds values that are not finite"):
        open_cache(tmp_path / "cache", moments="std").read(slice(None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="no latent cache of a known layout"):
        open_cache(tmp_path / "empty")
    with pytest.raises(CacheError, match="no mar cache"):
        open_cache(tmp_path / "cache", "mar")


def test_links_out_of_an_h5_file_are_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    repa_e(tmp_path / "cache")
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file.create_dataset("x", data=items(2)[0])
    with h5py.File(tmp_path / "cache" / "vae.h5", "a") as file:
        del file["00000/img-mean-std-00000003.npy"]
        file["00000/img-mean-std-00000003.npy"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "x")
    with pytest.raises(CacheError, match=r"00000003.npy', which vae_h5.json lists, is not in it"):
        open_cache(tmp_path / "cache")
    with h5py.File(tmp_path / "cache" / "vae.h5", "a") as file:
        del file["00000/img-mean-std-00000003.npy"]
        layout = h5py.VirtualLayout((2 * C, SIDE, SIDE), "f4")
        layout[...] = h5py.VirtualSource(str(tmp_path / "elsewhere.h5"), "x", (2 * C, SIDE, SIDE))
        file.create_virtual_dataset("00000/img-mean-std-00000003.npy", layout)
    with pytest.raises(CacheError, match="its values lie in other files, which are not followed"):
        open_cache(tmp_path / "cache").read([3])


# ---- ADM ----------------------------------------------------------------------------------------------------------


def test_adm_files_are_read_in_parts(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)
    sigma = np.eye(4, dtype=np.float32)
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", arr_0=images, mu=np.arange(4.0), sigma=sigma, mu_s=np.ones(2), sigma_s=np.eye(2))
        file = AdmFile(tmp_path / f"{name}.npz")
        assert (len(file), file.shape, file.labels()) == (9, (9, 6, 5, 3), None)
        parts = list(file.images(4))
        assert [len(p) for p in parts] == [4, 4, 1]
        assert (np.concatenate(parts) == images).all()
        found = file.statistics()
        assert found is not None
        assert (found[1] == sigma).all()
        assert file.statistics(spatial=True)[0].tolist() == [1, 1]  # type: ignore[index]


def test_adm_reads_what_sample_writes(tmp_path: Path) -> None:
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:06d}.png")
    write_npz(tmp_path / "s.npz", [tmp_path / f"{i:06d}.png" for i in range(3)], [5, None, 6])
    file = AdmFile(tmp_path / "s.npz")
    assert (np.concatenate(list(file.images())) == images).all()
    assert file.labels().tolist() == [5, -1, 6]  # type: ignore[union-attr]
    assert file.statistics() is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_adm_files_give_one_clear_error(data: st.DataObject, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros((3, 4, 4, 3), np.uint8), mu=np.zeros(3), sigma=np.eye(3))
    content = bytearray(buffer.getvalue())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "x.npz"
    path.write_bytes(bytes(content))
    try:
        file = AdmFile(path)
        if file.shape is not None:
            list(file.images(2))
        file.statistics()
    except AdmError as error:
        assert "x.npz" in str(error)  # noqa: PT017


def test_what_is_no_adm_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(AdmError, match=r"arr_0 is uint8 \(3, 4, 4\), expected uint8 \(N, H, W, 3\)"):
        AdmFile(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    with pytest.raises(AdmError, match="holds x; expected arr_0"):
        AdmFile(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(AdmError, match="are no mean and covariance"):
        AdmFile(tmp_path / "c.npz").statistics()
    np.savez(tmp_path / "d.npz", arr_0=np.array([None]), allow_pickle=True)
    with pytest.raises(AdmError, match="arr_0"):
        AdmFile(tmp_path / "d.npz")
