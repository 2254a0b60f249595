"""Folders, tars and lmdbs that the tests write; their labels and captions; and all ways in which they can be broken."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from bdm_cli import recipe, runs
from bdm_cli.diffusion.data import find, reference_images, require_condition, training_images
from bdm_cli.errors import BdmError
from bdm_cli.images import files, readers
from bdm_cli.recipe import Recipe


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def write(path: Path, content: bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    return path


def small(path: Path | str, *overrides: str, name: str = "churches") -> Recipe:
    """A recipe at 16 pixels: as many latents as pixels."""
    fitting = ["data.image_size=16", "first_stage.arguments.block_out_channels=[8]"]
    fitting += ["unet.arguments.sample_size=16", f"data.path={path}", *overrides]
    return recipe.load(name, fitting)


def write_lmdb(folder: Path, values: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


@pytest.fixture
def church(home: Path) -> Path:
    """An lmdb as LSUN's: keys of 40 hexadecimal digits, values webp, one of them jpeg."""
    values = {b"%040x" % (7 * i): encoded(picture(i), "WEBP", lossless=True) for i in range(5)}
    values[b"%040x" % 35] = JPEG5
    return write_lmdb(home / "data" / "churches" / "church_outdoor_train_lmdb", values)


JPEG5 = encoded(picture(5), "JPEG")


def centre(i: int) -> np.ndarray:
    return np.asarray(picture(i))[:, 2:18]


# lmdb


@pytest.mark.parametrize("where", ["", "church_outdoor_train_lmdb", "church_outdoor_train_lmdb/data.mdb"])
def test_lmdb(church: Path, where: str):
    images = training_images(small(church.parent / where))
    assert images.shape == (6, 16, 16, 3)
    assert np.array_equal(images[:5], np.stack([centre(i) for i in range(5)]))
    assert np.array_equal(images[[5]][0], np.asarray(Image.open(io.BytesIO(JPEG5)))[:, 2:18])
    assert images.name(1) == f"{7:040x}"
    assert images.labels is None
    assert images.captions is None


def test_lmdb_without_its_lock_in_a_folder_that_cannot_be_written(church: Path):
    (church / "lock.mdb").unlink()
    os.chmod(church / "data.mdb", 0o444)
    os.chmod(church, 0o555)
    try:
        assert len(training_images(small(church))) == 6
        assert os.listdir(church) == ["data.mdb"]
    finally:
        os.chmod(church, 0o755)


def test_training_and_reference_share_an_lmdb(church: Path):
    """A process may open an lmdb only once."""
    spec = small(church, "evaluate.prepare=box-crop")
    training, reference = training_images(spec), reference_images(spec)
    assert np.array_equal(training[:], reference[:])
    del training
    assert np.array_equal(reference.reader.open(0), picture(0))


def test_an_lmdb_that_was_replaced_is_read_anew(church: Path):
    first = training_images(small(church))
    shutil.rmtree(church)
    write_lmdb(church, {b"a": encoded(picture(9), "PNG")})
    again = training_images(small(church))
    assert np.array_equal(again[:], centre(9)[None])
    assert first.digest() != again.digest()


def test_of_several_lmdbs_the_training_set_is_read(church: Path):
    write_lmdb(church.parent / "church_outdoor_val_lmdb", {b"a": b""})
    assert len(training_images(small(church.parent))) == 6
    church.rename(church.parent / "other_lmdb")
    with pytest.raises(
        BdmError, match=r"several lmdbs: church_outdoor_val_lmdb, other_lmdb(.|\n)*say which \(data\.path\): "
    ):
        training_images(small(church.parent))


def test_an_lmdb_without_images(home: Path):
    with pytest.raises(BdmError, match="is an empty lmdb"):
        training_images(small(write_lmdb(home / "empty", {})))
    write_lmdb(home / "text", {b"a": b"hello"})
    with pytest.raises(BdmError, match=r"cannot decode a \(it is no PNG, JPEG, WEBP, BMP\)"):
        training_images(small(home / "text"))


READ = """
import sys
from pathlib import Path
from bdm_cli.images import files, lsun, readers
from bdm_cli.errors import BdmError

if sys.argv[1] == "unchecked":
    lsun._check_whole = lambda path: None
for folder in sys.argv[2:]:
    try:
        reader = files.find(Path(folder))
        print("whole", [reader.open(i).size for i in range(len(reader))][0])
    except BdmError as error:
        print(str(error).splitlines()[0])
"""


def read_in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    """Reading beyond the end of a mapped file kills the process (SIGBUS), and with it the test that does it."""
    return subprocess.run([sys.executable, "-c", READ, *map(str, arguments)], capture_output=True, text=True)


def test_a_data_mdb_cut_short_anywhere_is_an_error(church: Path, home: Path):
    whole = (church / "data.mdb").read_bytes()
    beginnings = [0, 1, 100, 4095, 4096]
    cuts = [5000, 8191, 8192, 12288, len(whole) // 2, len(whole) - 4096, len(whole) - 1]
    lengths = [*beginnings, *cuts, len(whole)]
    for length in lengths:
        write(home / str(length) / "data.mdb", whole[:length])
    done = read_in_a_process("checked", *(home / str(length) for length in lengths))
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert all(line.endswith("is not an lmdb, or only its beginning.") for line in found[: len(beginnings)])
    for length, line in zip(cuts, found[len(beginnings) : -1], strict=True):
        assert line.endswith(f"is cut short: it has {length:,} bytes, its header says {len(whole):,}.")
    assert found[-1] == "whole (20, 16)"


def test_the_cut_that_is_caught_would_kill(church: Path, home: Path):
    """Guards the test above against cuts that do no harm."""
    write(home / "cut" / "data.mdb", (church / "data.mdb").read_bytes()[:-4096])
    assert read_in_a_process("unchecked", home / "cut").returncode == -signal.SIGBUS


@pytest.mark.parametrize("damage", [b"\0" * 16384, b"x" * 16384])
def test_a_file_that_is_no_lmdb(home: Path, damage: bytes):
    write(home / "data" / "data.mdb", damage)
    with pytest.raises(BdmError, match="is not an lmdb, or only its beginning"):
        files.find(home / "data")


def test_an_lmdb_whose_tail_was_never_written(church: Path):
    """As of a download that reserved the space: some pages are zeros."""
    content = bytearray((church / "data.mdb").read_bytes())
    content[8192:] = bytes(len(content) - 8192)
    (church / "data.mdb").write_bytes(content)
    with pytest.raises(BdmError, match=r"data\.mdb is damaged|cannot be opened|empty lmdb"):
        files.find(church)


# folders


@pytest.fixture
def faces(home: Path) -> Path:
    """FFHQ's folders of thousands."""
    for i in range(4):
        write(home / "data" / "ffhq" / f"{i // 2 * 1000:05d}" / f"{i:05d}.png", picture(i))
    write(home / "data" / "ffhq" / "LICENSE.txt", b"text")
    write(home / "data" / "ffhq" / "00000" / "._00000.png", b"")  # what a Mac leaves
    return home / "data" / "ffhq"


def test_folder(faces: Path):
    images = training_images(small("data/ffhq", name="ffhq"))
    assert np.array_equal(images[:], np.stack([centre(i) for i in range(4)]))
    assert [images.name(i) for i in (0, 3)] == ["00000/00000.png", "01000/00003.png"]


def test_images_are_taken_as_from_an_array(faces: Path):
    images = training_images(small(faces, name="ffhq"))
    whole = images[:]
    for which in (slice(1, 3), slice(None, None, -2), [3, 0, 0], np.array([2]), np.array([-1], dtype=np.int32), []):
        expected = whole[np.array(which, dtype=int)] if not isinstance(which, slice) else whole[which]
        assert np.array_equal(images[which], expected)
        assert images[which].dtype == np.uint8
        assert np.array_equal(images.views(which, np.random.default_rng(0)), expected)
    with pytest.raises(IndexError, match=r"there are 4 images; asked for 0\.\.4"):
        images[[0, 4]]
    for which in (0, [True, False], [[0]], [0.5]):
        with pytest.raises(TypeError, match="a slice or a list of numbers"):
            images[which]


def test_large_sets_are_decoded_when_asked_for(faces: Path, monkeypatch: pytest.MonkeyPatch):
    held = training_images(small(faces, name="ffhq"))
    monkeypatch.setattr("bdm_cli.diffusion.data.IN_MEMORY", 0)
    asked = training_images(small(faces, name="ffhq"))
    assert held._held is not None
    assert asked._held is None
    for which in (slice(None), [3, 1], slice(0, 0)):
        assert np.array_equal(held[which], asked[which])
    assert held.digest() == asked.digest()


def test_prepared_images_are_cached_by_their_files_and_their_preparation(faces: Path):
    first = training_images(small(faces, name="ffhq"))
    assert len(list(runs.cache_dir().glob("images-*"))) == 1
    training_images(small(faces, name="ffhq"))
    reference_images(small(faces, "evaluate.prepare=bilinear-crop", name="ffhq"))
    assert len(list(runs.cache_dir().glob("images-*"))) == 1
    assert training_images(small(faces, "data.prepare=box-crop", name="ffhq")).digest() != first.digest()
    write(faces / "00000" / "00000.png", picture(8))
    os.utime(faces / "00000" / "00000.png", ns=(1, 1))
    changed = training_images(small(faces, name="ffhq"))
    assert changed.digest() != first.digest()
    assert np.array_equal(changed[:1], centre(8)[None])


def test_the_digest_does_not_depend_on_where_the_images_lie(faces: Path, home: Path):
    first = training_images(small(faces, name="ffhq")).digest()
    faces.rename(home / "elsewhere")
    moved = training_images(small("elsewhere", name="ffhq"))
    assert moved.digest() == first


def test_the_content_does_not_depend_on_names_and_times(faces: Path, home: Path):
    first = training_images(small(faces, name="ffhq"))
    (home / "copy").mkdir()
    for i in range(4):
        write(home / "copy" / f"{i}.png", (faces / f"{i // 2 * 1000:05d}" / f"{i:05d}.png").read_bytes())
        os.utime(home / "copy" / f"{i}.png", ns=(i, i))
    copy = training_images(small("copy", name="ffhq"))
    assert copy.content() == first.content()
    assert copy.digest() != first.digest()
    assert training_images(small("copy", "data.prepare=box-crop", name="ffhq")).content() != first.content()
    write(home / "copy" / "3.png", picture(8))
    assert training_images(small("copy", name="ffhq")).content() != first.content()


def test_random_crops(faces: Path):
    images = training_images(small(faces, "data.crop=random", name="ffhq"))
    views = images.views([0] * 40, np.random.default_rng(0))
    assert np.array_equal(views, images.views([0] * 40, np.random.default_rng(0)))
    crops = {np.asarray(picture(0))[:, left : left + 16].tobytes() for left in range(4)}
    assert {view.tobytes() for view in views} == crops  # drawn anew for each
    assert np.array_equal(images[[0, 1]], np.stack([centre(0), centre(1)]))
    random = np.random.default_rng(1)
    assert len({images.views([0], random).tobytes() for _ in range(40)}) == 4
    reference = reference_images(small(faces, "data.crop=random", "evaluate.prepare=box-crop", name="ffhq"))
    assert np.array_equal(reference.views([0], random), centre(0)[None])


def test_every_suffix_and_every_mode(home: Path):
    """Images at 16x16 of one colour, as they become RGB. Suffixes may be in capitals, and may lie."""
    colour = Image.new("RGB", (16, 16), (204, 102, 51))
    cases = {
        "a.png": encoded(colour, "PNG"),
        "b.JPEG": encoded(colour, "JPEG", quality=100),
        "c.JPG": encoded(colour, "PNG"),
        "d.webp": encoded(colour, "WEBP", lossless=True),
        "e.bmp": encoded(colour, "BMP"),
        "f.png": encoded(colour.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "g.png": encoded(colour.convert("RGBA"), "PNG"),
        "h.jpg": encoded(Image.new("CMYK", (16, 16), (51, 153, 204, 0)), "JPEG", quality=100),
        "i.jpg": encoded(Image.new("L", (16, 16), 77), "JPEG"),
        "j.png": encoded(Image.fromarray(np.full((16, 16), 77 * 256 + 200, np.uint16)), "PNG"),
        "k.png": encoded(Image.new("LA", (16, 16), (77, 3)), "PNG"),
        "l.png": encoded(Image.new("1", (16, 16), 1), "PNG"),
    }
    for name, content in cases.items():
        write(home / "data" / name, content)
    images = training_images(small("data", "data.prepare=none", name="ffhq"))
    assert images.shape == (12, 16, 16, 3)
    expected = [(204, 102, 51)] * 8 + [(77, 77, 77)] * 3 + [(255, 255, 255)]
    assert abs(images[:].astype(int) - np.array(expected)[:, None, None]).max() <= 2
    assert sorted(set(readers.survey(images.reader).mode)) == ["1", "CMYK", "I;16", "L", "LA", "P", "RGB", "RGBA"]


def test_links_are_followed_but_not_in_circles(faces: Path, home: Path):
    (home / "linked").symlink_to(faces)
    (faces / "00000" / "up").symlink_to(faces)
    assert len(training_images(small("linked", name="ffhq"))) == 4
    (faces / "00000" / "00009.png").symlink_to(home / "nowhere.png")
    with pytest.raises(BdmError, match=r"cannot read .*00009\.png \(No such file"):
        training_images(small(faces, name="ffhq"))


@pytest.mark.parametrize("kind", ["", "gz"])
def test_a_tar_is_read_like_its_folder(faces: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    path = faces.parent / "ffhq.tar"
    with tarfile.open(path, f"w:{kind}") as tar:
        for file in sorted(faces.rglob("*"), reverse=True):
            tar.add(file, f"./top/{file.relative_to(faces)}", recursive=False)
    monkeypatch.setattr("bdm_cli.diffusion.data.IN_MEMORY", 0)
    images = training_images(small(path, name="ffhq"))
    assert images.reader.kind == "tar"
    assert np.array_equal(images[:], training_images(small(faces, name="ffhq"))[:])
    assert images.name(3) == "top/01000/00003.png"
    again = training_images(small(path, name="ffhq"))  # by the cached index
    assert np.array_equal(again[:], images[:])
    assert again.digest() == images.digest()


def test_a_tar_with_links_is_refused(faces: Path):
    (faces / "00000" / "00009.png").symlink_to("00000.png")
    path = faces.parent / "ffhq.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(faces, "ffhq")
    with pytest.raises(BdmError, match=r"00009\.png is a link to 00000\.png(.|\n)*--dereference"):
        files.find(path)


def test_two_files_of_one_size_and_time_are_told_apart(home: Path):
    """Archives are often packed with the time 0."""
    for i in range(2):
        with tarfile.open(home / f"{i}.tar", "w") as tar:
            tar.add(write(home / "data" / "a.bmp", picture(i)), "a.bmp")
        os.utime(home / f"{i}.tar", ns=(0, 0))
    first, second = (training_images(small(home / f"{i}.tar"))[:] for i in range(2))
    assert np.array_equal(first[0], centre(0))
    assert np.array_equal(second[0], centre(1))


def test_a_large_compressed_tar_must_be_unpacked(faces: Path, monkeypatch: pytest.MonkeyPatch):
    path = faces.parent / "ffhq.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(faces, "ffhq")
    monkeypatch.setattr(files, "IN_MEMORY", 2000)
    with pytest.raises(BdmError, match=r"is compressed and holds more than(.|\n)*unpack it"):
        files.find(path)


def test_what_is_there_in_place_of_images(home: Path):
    for i in range(3):
        write(home / "data" / f"n0144076{i}.tar", b"")
    write(home / "data" / "readme.md", b"")
    with pytest.raises(BdmError, match=r"holds no images, but 3 \.tar, 1 \.md \(are they to be unpacked\?\)"):
        training_images(small("data", name="imagenet"))
    with pytest.raises(BdmError, match=r"there is nothing at .*elsewhere(.|\n)*an LSUN lmdb(.|\n)*get it: https://"):
        training_images(small("elsewhere"))
    with pytest.raises(BdmError, match=r"data\.path is empty: where are the images of 'churches'"):
        training_images(small(""))


# classes


@pytest.fixture
def wnids(home: Path) -> Path:
    """ILSVRC's folders: train/ with three classes, val/ beside it."""
    top = home / "data" / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    for i, wnid in enumerate(["n02000000", "n01440764", "n10000000", "n01440764"]):
        write(top / "train" / wnid / f"{wnid}_{i}.JPEG", encoded(picture(i), "PNG"))
    write(top / "val" / "ILSVRC2012_val_00000001.JPEG", encoded(picture(9), "PNG"))
    write(home / "data" / "imagenet" / "ILSVRC" / "Annotations" / "CLS-LOC" / "train" / "a.xml", b"")
    return top


def classes_of(spec: Recipe) -> tuple[list[str], list[int]]:
    images = training_images(spec)
    assert images.labels.dtype == np.int64
    return list(images.reader.classes), images.labels.tolist()


@pytest.mark.parametrize("where", ["", "train"])
def test_sorted_class_folders_are_the_classes(wnids: Path, where: str, capsys: pytest.CaptureFixture[str]):
    spec = small(wnids / where if where else "data/imagenet", name="imagenet")
    assert classes_of(spec) == (["n01440764", "n02000000", "n10000000"], [0, 0, 1, 2])
    assert training_images(spec).reader.left_out == (0 if where else 1)
    assert np.array_equal(training_images(spec)[[2]], centre(0)[None])
    assert "has 3 class folders and the network 'ldm4-imagenet' knows 1000 classes" in capsys.readouterr().err


def test_folders_of_one_name_are_no_classes(home: Path):
    """Tiny ImageNet: train/n01443537/images/n01443537_0.JPEG"""
    for i, wnid in enumerate(["n2", "n1"]):
        write(home / "data" / "train" / wnid / "images" / f"{i}.JPEG", encoded(picture(i), "JPEG"))
        write(home / "data" / "train" / wnid / f"{wnid}_boxes.txt", b"")
    assert classes_of(small("data", name="imagenet")) == (["n1", "n2"], [0, 1])


def test_a_class_may_be_called_train(home: Path):
    for i, name in enumerate(["car", "train", "test"]):
        write(home / "data" / name / f"{i}.png", picture(i))
    assert classes_of(small("data", name="imagenet")) == (["car", "test", "train"], [0, 1, 2])


def test_more_classes_than_the_network_knows(wnids: Path):
    spec = small(wnids, "unet.n_classes=4", name="imagenet")
    assert training_images(spec).labels.max() == 2
    with pytest.raises(
        BdmError, match=r"has 3 class folders \(n01440764, n02000000, .*'ldm4-imagenet' knows 2 classes"
    ):
        training_images(small(wnids, "unet.n_classes=3", name="imagenet"))


def test_a_class_conditional_network_needs_class_folders(faces: Path, church: Path):
    write(faces / "loose.png", picture(0))
    with pytest.raises(BdmError, match=r"have none \(loose\.png lies in no class folder\)(.|\n)*one folder per class"):
        training_images(small(faces, name="imagenet"))
    with pytest.raises(BdmError, match="an lmdb has no class folders"):
        training_images(small(church, name="imagenet"))
    assert reference_images(small(church, "evaluate.prepare=box-crop", name="imagenet")).shape == (6, 16, 16, 3)


# captions


@pytest.fixture
def captioned(home: Path) -> Callable[[dict[str, str]], list[str] | None]:
    """captioned({file: content}): the captions of a.png and train/b.png with such files."""
    for i, name in enumerate(["a.png", "sub/b.png"]):
        write(home / "data" / name, picture(i))

    def read(files: dict[str, str]) -> list[str] | None:
        for name, content in files.items():
            write(home / "data" / name, content.encode())
        return training_images(small("data")).captions

    return read


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


A, B = {"file_name": "a.png", "text": "a cat, asleep"}, {"file_name": "sub/b.png", "text": "Öl auf Holz"}


@pytest.mark.parametrize(
    "files",
    [
        {"metadata.csv": 'file_name,text\nsub/b.png,Öl auf Holz\na.png,"a cat, asleep"\n'},
        {"metadata.csv": '\ufeffid,text,file_name\r\n1,"a cat, asleep",a.png\r\n2,Öl auf Holz,./sub/b.png\r\n'},
        {"metadata.jsonl": lines(A, B | {"more": 1})},
        {"metadata.jsonl": lines(A), "sub/metadata.jsonl": lines(B | {"file_name": "b.png"})},
        {"a.txt": "a cat, asleep\n", "sub/b.txt": "Öl auf Holz", "notes.txt": "x"},
    ],
)
def test_captions(captioned: Callable, files: dict[str, str]):
    assert captioned(files) == ["a cat, asleep", "Öl auf Holz"]


def test_captions_may_have_several_lines(captioned: Callable, home: Path):
    rows = 'file_name,text\r\na.png,"one\r\ntwo"\r\nsub/b.png,"say ""x""\u2028"\r\n'
    assert captioned({"metadata.csv": rows}) == ["one\r\ntwo", 'say "x"\u2028']
    (home / "data" / "metadata.csv").unlink()
    assert captioned({"metadata.jsonl": lines(A) + '{"file_name": "sub/b.png", "text": "\u2028"}'})[1] == "\u2028"


def test_no_captions(captioned: Callable):
    assert captioned({"notes.txt": "x"}) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.jsonl": lines(A)},
            r"1 images have no caption, the first is sub/b\.png \(no row in metadata\.jsonl",
        ),
        ({"a.txt": "x"}, r"1 images have no caption, the first is sub/b\.png \(no \.txt beside it\)"),
        ({"metadata.jsonl": lines(A, B, B | {"file_name": "c.png"})}, r"names 1 images that are not there, .*c\.png"),
        ({"metadata.jsonl": lines(A, B, A | {"text": "a dog"})}, r"metadata\.jsonl has two captions of a\.png"),
        ({"metadata.csv": "file,caption\na.png,x\n"}, r"metadata\.csv: row 1 has no file_name and text"),
        ({"metadata.csv": "file_name,text\na.png\n"}, r"metadata\.csv: row 1 has no file_name and text"),
        ({"metadata.jsonl": lines(A) + "[1]\n"}, r"metadata\.jsonl: row 2 has no file_name and text"),
        ({"metadata.jsonl": "{"}, r"cannot read .*metadata\.jsonl \("),
        ({"metadata.csv": 'file_name,text\na.png,"x'}, r"cannot read .*metadata\.csv \("),
    ],
)
def test_captions_that_are_refused(captioned: Callable, files: dict[str, str], message: str):
    with pytest.raises(BdmError, match=message):
        captioned(files)


def test_text_that_is_not_utf8(captioned: Callable, home: Path):
    write(home / "data" / "metadata.csv", b"file_name,text\na.png,\xff\n")
    with pytest.raises(BdmError, match=r"metadata\.csv is not UTF-8 text"):
        captioned({})


def test_a_text_conditional_network_is_told_nothing_where_there_are_no_captions(captioned: Callable, capsys):
    texts = recipe.load("imagenet").unet.model_copy(update={"n_classes": 0})
    assert texts.condition == "text"
    images = training_images(small("data"))
    require_condition(images, texts)
    said = " ".join(capsys.readouterr().err.split())
    assert "is told captions, and the images of" in said
    assert "each gets the empty text" in said
    assert "metadata.csv" in said
    captioned({"metadata.jsonl": lines(A, B)})
    require_condition(training_images(small("data")), texts)


# corrupt images


def animated(form: str) -> bytes:
    return encoded(picture(0), form, save_all=True, append_images=[picture(1), picture(2)], lossless=True)


JPEG, PNG, WEBP = (encoded(picture(0), form) for form in ("JPEG", "PNG", "WEBP"))
CORRUPT = {
    "empty": (b"", "it is empty"),
    "text": (b"<html>not found</html>", "it is no PNG, JPEG, WEBP, BMP"),
    "gif": (encoded(picture(0), "GIF"), "it is no PNG"),
    "jpeg-header": (JPEG[:200], "trunc|Trunc|it is no"),
    "jpeg-half": (JPEG[: len(JPEG) // 2], "[Tt]runcated"),
    "jpeg-end": (JPEG[:-1], "truncated"),
    "png-half": (PNG[: len(PNG) // 2], "truncated"),
    "png-chunk": (PNG[:60] + b"\0\0\0\0" + PNG[64:], "."),
    "webp-half": (WEBP[: len(WEBP) // 2], "."),
    "png-animated": (animated("PNG"), r"it is animated \(3 frames\)"),
    "webp-animated": (animated("WEBP"), r"it is animated \(3 frames\)"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_image_is_an_error_that_names_it(faces: Path, kind: str):
    content, reason = CORRUPT[kind]
    write(faces / "00000" / "00001.jpg", content)
    with pytest.raises(BdmError, match=rf"cannot decode 00000/00001\.jpg \(.*({reason})") as error:
        training_images(small(faces, name="ffhq"))
    assert "bdm data check --recipe ffhq" in str(error.value)
    assert "--set data.corrupt=skip" in str(error.value)


def test_a_corrupt_image_of_a_large_set_is_an_error_when_it_is_used(faces: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bdm_cli.diffusion.data.IN_MEMORY", 0)
    write(faces / "01000" / "00009.jpg", b"")
    images = training_images(small(faces, name="ffhq"))
    assert images[:4].shape == (4, 16, 16, 3)
    with pytest.raises(BdmError, match=r"cannot decode 01000/00009\.jpg"):
        images[3:]


def test_corrupt_images_can_be_left_out(faces: Path, capsys: pytest.CaptureFixture[str]):
    whole = training_images(small(faces, name="ffhq"))
    kinds = sorted(CORRUPT)[:10]  # as many as are named
    for kind in kinds:
        write(faces / "00000" / f"{kind}.jpg", CORRUPT[kind][0])
    spec = small(faces, "data.corrupt=skip", name="ffhq")
    images = training_images(spec)
    told = capsys.readouterr().err
    assert "left out, cannot be decoded: " in told
    assert all(f"00000/{kind}.jpg (" in told for kind in kinds)
    assert f"10 of 14 images of {faces} are left out\n" in told
    assert np.array_equal(images[:], whole[:])
    assert images.name(3) == "01000/00003.png"
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.digest() != whole.digest()
    assert len(list(runs.cache_dir().glob("seen-*"))) == 1
    for content in (b"", b"x"):  # a file that changes is looked at again
        write(faces / "00000" / "00000.png", content)
        assert len(training_images(spec)) == 3


def test_only_the_first_corrupt_images_are_named(faces: Path, capsys: pytest.CaptureFixture[str]):
    for i in range(25):
        write(faces / "00000" / f"empty{i:02d}.jpg", b"")
    training_images(small(faces, "data.corrupt=skip", name="ffhq"))
    told = capsys.readouterr().err
    assert "empty09.jpg" in told
    assert "empty10.jpg" not in told
    assert "25 of 29 images of" in told
    assert "; 15 more are not named" in told


def test_no_image_can_be_decoded(home: Path):
    write(home / "data" / "a.jpg", b"")
    with pytest.raises(BdmError, match="none of its 1 images can be decoded"):
        training_images(small("data", "data.corrupt=skip"))


def test_corrupt_values_of_an_lmdb(home: Path):
    values = {b"a": encoded(picture(0), "PNG"), b"b": JPEG[:300], b"c": b""}
    path = write_lmdb(home / "db", values)
    with pytest.raises(BdmError, match=r"cannot decode b \("):
        training_images(small(path))
    assert np.array_equal(training_images(small(path, "data.corrupt=skip"))[:], centre(0)[None])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 300])
def test_images_of_too_many_pixels(faces: Path, limit: int, monkeypatch: pytest.MonkeyPatch):
    """Of 320 pixels: more than the limit, for which PIL warns, and more than twice the limit, for which it raises."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BdmError, match=r"cannot decode 00000/00000\.png \(.*(320 pixels|20x16)"):
        training_images(small(faces, name="ffhq"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_never_skipped(faces: Path):
    (faces / "00000" / "00000.png").chmod(0)
    with pytest.raises(BdmError, match=r"cannot read .*00000\.png \(Permission denied\)"):
        training_images(small(faces, "data.corrupt=skip", name="ffhq"))


def test_images_smaller_or_of_another_size_with_no_preparation(faces: Path):
    with pytest.raises(
        BdmError, match=r"ffhq: 00000/00000\.png is 20x16 .*, 16x16 is wanted(.|\n)*--set data\.prepare="
    ):
        training_images(small(faces, "data.prepare=none", name="ffhq"))


def test_the_reader_of_a_recipe(church: Path, faces: Path):
    assert find(small(church).data).kind == "lmdb"
    assert find(small(faces).data).kind == "folder"
    assert find(recipe.load("digits").data).kind == "arrays"
