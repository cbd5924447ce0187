# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Sources of training images: folders, lists and tars, their rules, and damaged tars."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from maetok_fast.data.images import ImageError
from maetok_fast.data.sources import DataError, open_source
from maetok_fast.data.tars import expand


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar(path, members, kind=tarfile.USTAR_FORMAT):
    """members: (name, bytes) or TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_class_folders_are_labels_by_their_sorted_names(tmp_path):
    for name in ("b/2.jpg", "b/deep/1.PNG", "a/9.webp", "c/x.gif", "c/x.txt", ".hidden/1.jpg", "c/.1.jpg"):
        write(tmp_path / name, name.encode())
    source = open_source(tmp_path)
    assert names(source) == ["a/9.webp", "b/2.jpg", "b/deep/1.PNG", "c/x.gif"]
    assert [source.label(i) for i in range(4)] == [0, 1, 1, 2]
    assert source.classes == ("a", "b", "c")
    assert [source.read(i) for i in range(4)] == [name.encode() for name in names(source)]
    assert [source.caption(i) for i in range(4)] == [None, None, None, "c/x.txt"]
    write(tmp_path / "aa" / "notes.md")
    with pytest.raises(DataError, match="class folder aa has no images and would shift the labels; remove it"):
        open_source(tmp_path)


def test_a_flat_folder_has_no_labels_and_a_mixed_one_is_refused(tmp_path):
    write(tmp_path / "b.jpg", b"B")
    write(tmp_path / "a.jpg", b"A")
    write(tmp_path / "a.txt", " ein Bild é \n".encode())
    source = open_source(str(tmp_path))
    assert names(source) == ["a.jpg", "b.jpg"]
    assert (source.label(0), source.classes, source.labelled) == (None, (), False)
    assert (source.caption(0), source.caption(1)) == ("ein Bild é", None)
    write(tmp_path / "a.txt", b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"the caption of a\.jpg is no UTF-8"):
        open_source(tmp_path).caption(0)
    write(tmp_path / "folder" / "c.jpg")
    with pytest.raises(DataError, match=r"images lie in it \(a\.jpg\) and in folders \(folder\)"):
        open_source(tmp_path)


def test_links_are_followed_and_circles_refused(tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg", b"1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    assert names(open_source(tmp_path / "data")) == ["cat/1.jpg"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    with pytest.raises(DataError, match="a link to a folder that holds it"):
        open_source(tmp_path / "data")


def test_a_list_gives_paths_and_labels(tmp_path):
    for name in ("x/1.jpg", "2 with space.png"):
        write(tmp_path / name, name.encode())
    write(tmp_path / "x" / "1.txt", b"one")
    outside = write(tmp_path / "outside" / "3.jpg", b"3")
    file = tmp_path / "x" / "list.txt"
    file.write_bytes(f"\ufeff1.jpg\t7\r\n\n../2 with space.png\t0\n{outside}\t12\n".encode())
    source = open_source(file)
    assert names(source) == ["1.jpg", "../2 with space.png", str(outside)]
    assert [source.label(i) for i in range(3)] == [7, 0, 12]
    assert source.read(1) == b"2 with space.png"
    assert source.caption(0) == "one"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2.jpg", r"line 3: .*2\.jpg is no file"),
        ("1.jpg\tcat", r"line 3: expected a path, or a path, a TAB and a label of at least 0, got '1\.jpg\\tcat'"),
        ("1.jpg\t-1", "line 3: expected"),
        ("1.jpg\t1\t2", "line 3: expected"),
        ("1.jpg\t٣", "line 3: expected"),
        ("0.jpg", r"line 3: 0\.jpg stands in line 1 already"),
        ("a\0b", "line 3: "),
    ],
)
def test_a_bad_line_of_a_list_is_named_by_its_number(tmp_path, line, message):
    write(tmp_path / "0.jpg")
    write(tmp_path / "1.jpg")
    (tmp_path / "list.txt").write_text(f"0.jpg\n\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "list.txt")


def test_labels_are_of_all_samples_or_of_none(tmp_path):
    write(tmp_path / "0.jpg")
    write(tmp_path / "1.jpg")
    (tmp_path / "list.txt").write_text("0.jpg\t3\n1.jpg\n")
    with pytest.raises(DataError, match=r"1\.jpg has no label and others have; label all of them or none"):
        open_source(tmp_path / "list.txt")


def test_what_is_nothing_of_this_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no images in it; expected files ending in"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no such folder, list"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such folder"):
        open_source("a\0b")
    write(tmp_path / "a.bin", b"123")
    with pytest.raises(DataError, match="is no tar, it has 3 bytes"):
        open_source(tmp_path / "a.bin")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_a_tar_are_what_lies_in_it_by_key_and_field(tmp_path, kind):
    long = "folder/" * (12 if kind == tarfile.USTAR_FORMAT else 40) + "long"
    members = [
        ("./a/b.c/img.JPG", b"one"),
        ("notes", b"no dot"),
        ("a/b.c/other.cls", b" 12\n"),  # neither adjacent nor sorted
        ("a/.img.jpg", b"starts with a dot"),
        (f"{long}.png", b"two"),
        ("a//b.c/other.webp", b"three"),
        ("a/b.c/img.cls", b"7"),
        (f"{long}.cls", b"0"),
        ("alone/x.cls", b"3"),
        ("a/b.c/img.seg.png", b"a field of its own"),
        ("a/b.c/img.txt", "Käse\n".encode()),
        ("empty/e.jpg", b""),
        ("empty/e.cls", b"1"),
    ]
    source = open_source(tar(tmp_path / "s.tar", members, kind))
    assert names(source) == ["s.tar/a/b.c/img.JPG", "s.tar/a/b.c/other.webp", f"s.tar/{long}.png", "s.tar/empty/e.jpg"]
    assert [source.read(i) for i in range(4)] == [b"one", b"three", b"two", b""]
    assert [source.label(i) for i in range(4)] == [7, 12, 0, 1]
    assert [source.caption(i) for i in range(4)] == ["Käse", None, None, None]
    assert source.passed_over == 1


def test_keys_and_fields_are_the_webdataset_librarys(tmp_path):
    base_plus_ext = pytest.importorskip("webdataset.tariterators").base_plus_ext
    for name in ("a/b.c/img.v2.final.jpg", "img.jpg", "a.b/c/d.JPG", "x/y.z.png", "deep/er/i.jpg"):
        key, field = base_plus_ext(name)
        path = tar(tmp_path / "s.tar", [(name, b"1"), (f"{key}.txt", b"caption"), (f"{key}.PNG", b"image")])
        if field.lower() == "jpg":
            with pytest.raises(DataError, match=f"{key}.PNG is a second image of {name}"):
                open_source(path)
        else:
            source = open_source(path)
            assert (names(source), source.caption(0)) == ([f"s.tar/{key}.PNG"], "caption")


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "a.jpg"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("./a.jpg", b"")], r"member \./a\.jpg is there twice \(a\.jpg\)"),
        ([("a.jpg", b""), ("a.JPG", b"")], r"member a\.JPG is there twice"),
        ([("a.txt", b""), ("a.jpg", b""), ("a.png", b"")], r"member a\.png is a second image of a\.jpg"),
        ([("/etc/a.jpg", b"")], r"member /etc/a\.jpg lies outside"),
        ([("b/../../a.jpg", b"")], r"member b/\.\./\.\./a\.jpg lies outside"),
        ([("a.jpg", b""), link("b.jpg")], r"member b\.jpg is a link, a device or sparse"),
        ([("a.jpg", b""), link("b.jpg", tarfile.LNKTYPE)], r"member b\.jpg is a link"),
        ([("a.jpg", b""), link("b.jpg", tarfile.CHRTYPE)], r"member b\.jpg is a link, a device"),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"member a\.cls holds b'cat', expected a label"),
        ([("a.cls", b"1"), ("b.txt", b"1")], r"no images in it \(2 samples have none\)"),
        ([("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b"")], r"s\.tar/b\.jpg has no label and others have"),
    ],
)
def test_what_a_tar_may_not_hold_is_refused_naming_the_member(tmp_path, members, message):
    with pytest.raises(DataError, match=rf"s\.tar.*{message}"):
        open_source(tar(tmp_path / "s.tar", members))


def test_every_cut_of_a_tar_is_refused(tmp_path):
    path = tar(tmp_path / "s.tar", [(f"{i}.jpg", bytes([i + 1]) * 700) for i in range(3)])
    whole = path.read_bytes()
    end = 3 * (512 + 1024)
    for length in [*range(0, end + 512, 100), *range(0, end + 512, 512), end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"s\.tar"):
            open_source(path)
    path.write_bytes(whole[: end + 512])  # one block of zeros says that nothing is missing
    assert len(open_source(path)) == 3


def test_a_damaged_header_a_second_tar_behind_and_compression_are_refused(tmp_path):
    path = tar(tmp_path / "s.tar", [(f"{i}.jpg", b"123") for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])  # tarfile ends here without a word
    with pytest.raises(DataError, match=r"s\.tar: has no header where one should be, at byte 1024"):
        open_source(path)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="goes on behind its end marker"):
        open_source(path)
    import gzip

    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"is compressed \(gzip\)"):
        open_source(path)


def test_only_data_errors_come_out_of_a_damaged_tar(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    long = "very/" * 30 + "long"
    wholes = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [("a.jpg", b"1" * 600), ("a.cls", b"1"), ("b/ä.png", b"2"), ("b/ä.cls", b"2")]
        members += [(f"{long}.jpg", b"3"), (f"{long}.cls", b"3")]
        wholes.append(tar(tmp_path / "s.tar", members, kind).read_bytes())
    path = tmp_path / "s.tar"
    change = st.tuples(st.integers(0, 12000), st.integers(0, 511), st.binary(min_size=1, max_size=12))

    def summed(content):  # right checksums: the fields themselves are what is damaged
        out = bytearray(content)
        for start in range(0, len(out) - 511, 512):
            if out[start + 257 : start + 262] == b"ustar":
                header = out[start : start + 148] + b" " * 8 + out[start + 156 : start + 512]
                out[start + 148 : start + 156] = b"%06o\0 " % (sum(header) % 8**6)
        return bytes(out)

    @hypothesis.settings(max_examples=400, deadline=None)
    @hypothesis.given(st.sampled_from(wholes), st.lists(change, max_size=4), st.booleans(), st.integers(0, 4000))
    def check(whole, changes, sums, cut):
        content = bytearray(whole)
        for start, offset, new in changes:
            at = (start // 512 * 512 + offset) % len(content)
            content[at : at + len(new)] = new
        content = summed(content) if sums else bytes(content)
        path.write_bytes(content[: len(content) - cut] if cut % 3 == 0 else content)
        try:
            source = open_source(path)
        except DataError:
            return
        for i in range(len(source)):
            source.read(i)
            source.label(i)
            source.name(i)

    check()


def test_sizes_below_zero_do_not_read_in_a_circle(tmp_path):
    """CVE-2025-8194: tarfile goes back by a size below 0, for ever."""
    path = tar(tmp_path / "s.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"1")])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256
    header = content[:148] + b" " * 8 + content[156:512]
    content[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar"):
        open_source(path)


def test_several_tars_by_folder_pattern_and_range(tmp_path):
    for i in range(3):
        tar(tmp_path / "data" / f"train-{i:04d}.tar", [("0.jpg", b"%d" % i), ("1.jpg", b"%d" % (10 + i))])
    write(tmp_path / "data" / "readme.md")
    folder = tmp_path / "data"
    wanted = [f"train-{i:04d}.tar/{j}.jpg" for i in range(3) for j in range(2)]
    for path in (folder, folder / "train-*.tar", folder / "train-{0000..0002}.tar"):
        source = open_source(path)
        assert names(source) == wanted
        assert [source.read(i) for i in range(6)] == [b"0", b"10", b"1", b"11", b"2", b"12"]
    assert names(open_source(folder / "train-{0001..0002}.tar")) == wanted[2:]
    with pytest.raises(DataError, match=r"train-0003\.tar does not exist, the range asks for 4 files"):
        open_source(folder / "train-{0000..0003}.tar")
    with pytest.raises(DataError, match="expected a range"):
        expand("{3..1}.tar")
    write(folder / "a.jpg")
    with pytest.raises(DataError, match=r"holds tars \(train-0000\.tar\) and images \(a\.jpg\)"):
        open_source(folder)


def test_the_fingerprint_follows_names_sizes_and_labels(tmp_path):
    write(tmp_path / "data" / "a" / "1.jpg", b"1")
    write(tmp_path / "data" / "b" / "1.jpg", b"2")
    first = open_source(tmp_path / "data").fingerprint()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved").fingerprint() == first
    write(tmp_path / "moved" / "b" / "1.jpg", b"22")
    second = open_source(tmp_path / "moved").fingerprint()
    (tmp_path / "moved" / "b").rename(tmp_path / "moved" / "c")
    third = open_source(tmp_path / "moved").fingerprint()
    assert len({first, second, third}) == 3


def test_a_source_is_small_to_send_and_reads_the_same_there(tmp_path):
    count = 2000
    path = tar(tmp_path / "s.tar", [(f"{i:06d}.jpg", b"%d" % i) for i in range(count)])
    source = open_source(path)
    sent = pickle.dumps(source)
    assert len(sent) < count * (len("s.tar/000000.jpg") + 8 * 9)  # a name, and numbers
    there = pickle.loads(sent)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there.read, range(count))) == [b"%d" % i for i in range(count)]
    assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]


def test_a_file_that_went_away_or_became_shorter_is_an_image_error(tmp_path):
    write(tmp_path / "data" / "a.jpg")
    source = open_source(tmp_path / "data")
    (tmp_path / "data" / "a.jpg").unlink()
    with pytest.raises(ImageError, match=r"image a\.jpg does not exist"):
        source.read(0)
    path = tar(tmp_path / "s.tar", [("a.jpg", b"1" * 600)])
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match=r"s\.tar/a\.jpg: .* ends 412 bytes too early"):
        source.read(0)


def test_overviews_that_commands_write_beside_images_are_no_samples(tmp_path):
    from PIL import Image

    for name in ("000.png", "001.png", "grid.png", "compare.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(open_source(tmp_path)) == 4  # of somebody else: pictures like others
    (tmp_path / "run.json").write_text("{}")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["000.png", "001.png", "compare.png"]
