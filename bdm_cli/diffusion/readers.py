"""Where images lie: a folder, a tar, LSUN's lmdb, arrays in memory. A reader numbers them and decodes what is asked."""

import array
import csv
import functools
import hashlib
import io
import json
import lzma
import os
import posixpath
import struct
import tarfile
import threading
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import lmdb
import numpy as np
from PIL import Image

from bdm_cli import output, runs
from bdm_cli.errors import BdmError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What is read, whatever the suffix says (one file of ImageNet is a PNG called .JPEG)."""

ALLOWED = (
    "give a folder of images (png, jpg, jpeg, webp, bmp; the folders in it are classes), a tar of such a folder, or an "
    "LSUN lmdb (the folder with data.mdb)"
)
SPLITS = {"train", "val", "valid", "validation", "test", "testing", "dev", "eval"}
"""Folder names that say what a part of a data set is for, not what is in its images."""
WORKERS = min(16, os.cpu_count() or 1)
BLOCK = 1024
"""How many images are handed to the threads at a time."""
IN_MEMORY = 2**31
"""Bytes of a compressed tar's images that are held; a larger one must be unpacked."""

T = TypeVar("T")


class CorruptImage(ValueError):  # noqa: N818
    """An image that cannot be decoded; the text is the reason."""


class Reader(ABC):
    """Images by number.

    path: where they lie. labels: class of each image int64 [N], or None; then `unlabelled` says why there are none.
    classes: the names of the classes 0, 1, ... left_out: images that are there and not read (beside train/).
    """

    kind: str
    path: Path
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    unlabelled: str = ""
    left_out: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """The image's name below path."""

    @abstractmethod
    def open(self, i: int) -> Image.Image:
        """The decoded image. Raises: CorruptImage; BdmError if its bytes cannot be read."""

    @abstractmethod
    def digest(self) -> str:
        """Identity of the images' content, the same wherever they lie. Captions are no part of it."""

    @property
    def captions(self) -> list[str] | None:
        """The text of each image, or None if there are none. Raises: BdmError if only some images have one."""
        return None


def find(path: Path, allowed: str = ALLOWED) -> Reader:
    """The reader of what lies at `path`. Raises: BdmError if there is nothing, or nothing that can be read."""
    try:
        if not path.exists():
            raise BdmError(f"there is nothing at {path}.\n  {allowed}")
        database = path.parent if path.name == "data.mdb" else _database(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if database is not None:
        return Lmdb(database)
    return Folder(path, allowed) if path.is_dir() else Tar(path, allowed)


def decode(data: bytes) -> Image.Image:
    """The decoded image of a file's bytes. Raises: CorruptImage if it is empty, cut short, or none of FORMATS.

    A PNG that lacks only bytes behind its pixels (its checksum) is whole to PIL.
    """
    if not data:
        raise CorruptImage("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise CorruptImage(f"{image.width}x{image.height} are more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        image.load()
    except Image.UnidentifiedImageError:
        raise CorruptImage(f"it is no {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, LookupError, struct.error, Image.DecompressionBombError) as error:
        raise CorruptImage(str(error) or type(error).__name__) from None
    return image


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # decode refuses what PIL only warns of


def parallel(work: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """work(number) for each, in order, by threads (PIL sets the interpreter free while it decodes)."""
    return list(_threads(os.getpid()).map(work, numbers)) if len(numbers) > 1 else [work(number) for number in numbers]


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Those of this process: a fork inherits the pool, but not its threads."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")


class Survey(NamedTuple):
    """What every image is: width, height int32 [N] and mode [N]; of those that are corrupt (0, 0, ''), the reason."""

    width: np.ndarray
    height: np.ndarray
    mode: np.ndarray
    corrupt: dict[int, str]


def survey(reader: Reader) -> Survey:
    """Every image decoded once; the result is cached by the reader's digest. Raises: BdmError if one cannot be read."""
    found = cached(f"survey-{reader.digest()[:16]}", lambda: _surveyed(reader))
    corrupt = {int(i): reason for i, reason in json.loads(found["corrupt"].tobytes()).items()}
    return Survey(found["width"], found["height"], found["mode"], corrupt)


def _surveyed(reader: Reader) -> dict[str, np.ndarray]:
    def look(i: int) -> tuple[int, int, str, str]:
        try:
            image = reader.open(i)
        except CorruptImage as error:
            return 0, 0, "", str(error)
        return *image.size, image.mode, ""

    n, corrupt = len(reader), {}
    width, height, mode = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, "U6")
    with output.progress(f"checking {reader.path.name}", n, "images") as advance:
        for start in range(0, n, BLOCK):
            numbers = range(start, min(start + BLOCK, n))
            for i, (*size, name, reason) in zip(numbers, parallel(look, numbers), strict=True):
                (width[i], height[i]), mode[i] = size, name
                if reason:
                    corrupt[i] = reason
            advance(len(numbers))
    return {"width": width, "height": height, "mode": mode, "corrupt": _json(corrupt)}


def cached(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of runs/cache/<name>.npz; made and written if there is no such file."""
    path = runs.cache_dir() / f"{name}.npz"
    if not path.exists():
        arrays = make()
        runs.write_whole(path, lambda temporary: np.savez(temporary, **arrays))
        return arrays
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _json(content: object) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


class Arrays(Reader):
    """Images that are in memory: uint8 [N, H, W, C]."""

    kind = "arrays"

    def __init__(self, path: Path, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.path, self.images, self.labels, self.classes = path, images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i}"

    def open(self, i: int) -> Image.Image:
        image = self.images[i]
        return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)

    def digest(self) -> str:
        return hashlib.sha256(str(self.images.shape).encode() + np.ascontiguousarray(self.images).data).hexdigest()


class _Files(Reader):
    """Image files with relative names 'a/b/c.png', among other files, in the order of their names.

    Of a train/ folder that stands alone or beside other splits (val/, test/ ...) only its images are read.
    Labels: the sorted names of the folders that hold the images are the classes 0, 1, ... (ImageNet: the wnids, in
    ILSVRC's order); where all of these have one name (n01443537/images/), the folders above them.
    Captions: metadata.csv or metadata.jsonl with file_name and text, or <name>.txt beside <name>.png.
    """

    def __init__(self, path: Path, names: Iterable[str], allowed: str) -> None:
        self.path = path
        files = sorted(name for name in names if not name.startswith(".") and "/." not in name)
        images = [name for name in files if name.lower().endswith(SUFFIXES)]
        self._texts = {name for name in files if name.lower().endswith((".txt", ".csv", ".jsonl"))}
        classes = _below_train({posixpath.dirname(name) for name in images})
        self.names = [name for name in images if posixpath.dirname(name) in classes]
        self._not_read = set(images) - set(self.names)
        self.left_out = len(self._not_read)
        if not self.names:
            raise BdmError(f"{path} holds no images{_instead(files)}.\n  {allowed}")
        self._label([classes[posixpath.dirname(name)] for name in self.names])

    def _label(self, folders: list[list[str]]) -> None:
        """folders: those that each image lies in, the outermost first."""
        bare = next((name for name, above in zip(self.names, folders, strict=True) if not above), None)
        if bare is not None:
            self.unlabelled = f"{bare} lies in no class folder"
            return
        depth, shallowest = 1, min(map(len, folders))
        while depth < shallowest and len({above[-depth] for above in folders}) == 1:
            depth += 1
        classes, labels = np.unique([above[-depth] for above in folders], return_inverse=True)
        self.classes, self.labels = classes.tolist(), labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def open(self, i: int) -> Image.Image:
        return decode(self.read(self.names[i]))

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises: BdmError"""

    @functools.cached_property
    def captions(self) -> list[str] | None:
        tables = sorted(n for n in self._texts if posixpath.basename(n) in ("metadata.csv", "metadata.jsonl"))
        if tables:
            return self._tabled(tables)
        beside = [posixpath.splitext(name)[0] + ".txt" for name in self.names]
        lacking = [name for name, text in zip(self.names, beside, strict=True) if text not in self._texts]
        if len(lacking) == len(beside):
            return None
        if lacking:
            raise _uncaptioned(self.path, lacking, "no .txt beside it")
        return [self._text(name).strip() for name in beside]

    def _tabled(self, tables: list[str]) -> list[str]:
        found: dict[str, str] = {}
        for table in tables:
            for name, text in self._rows(table):
                name = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
                if found.setdefault(name, text) != text:
                    raise BdmError(f"{self.path / table} has two captions of {name}.\n  keep one row per image")
        strangers = found.keys() - set(self.names) - self._not_read
        if strangers:
            raise BdmError(
                f"{self.path}: {', '.join(tables)} names {len(strangers)} images that are not there, the first is "
                f"{min(strangers)}.\n"
                "  file_name is relative to the folder of the table; remove the rows or add the images"
            )
        lacking = [name for name in self.names if name not in found]
        if lacking:
            raise _uncaptioned(self.path, lacking, f"no row in {', '.join(tables)}")
        return [found[name] for name in self.names]

    def _rows(self, table: str) -> Iterator[tuple[str, str]]:
        """(file_name, text) of a table's rows."""
        text = self._text(table)
        try:
            if table.endswith("csv"):
                rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
                    raise BdmError(
                        f"{self.path / table}: row {number} has no file_name and text: {str(row)[:100]}\n"
                        "  allowed: a table with the columns file_name and text, as Hugging Face's imagefolder has"
                    )
                yield row["file_name"], row["text"]
        except (json.JSONDecodeError, csv.Error) as error:
            raise BdmError(f"cannot read {self.path / table} ({error}).\n  mend it, or remove it") from None

    def _text(self, name: str) -> str:
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BdmError(f"{self.path / name} is not UTF-8 text ({error}).\n  mend it, or remove it") from None


class Folder(_Files):
    """Image files below a folder, at any depth."""

    kind = "folder"

    def __init__(self, path: Path, allowed: str = ALLOWED) -> None:
        self._stats = dict(_walk(path))
        super().__init__(path, self._stats, allowed)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise _unreadable(self.path / name, error) from None

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            size, time = self._stats[name]
            digest.update(f"{name}\t{size}\t{time}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Tar(_Files):
    """Image files in a tar, which is read where it lies; of a compressed one the files are held in memory.

    Raises: BdmError if the tar is damaged or cut short.
    """

    kind = "tar"

    def __init__(self, path: Path, allowed: str = ALLOWED) -> None:
        self.path, self._allowed, self._lock = path, allowed, threading.Lock()
        try:
            tarfile.open(path, "r:").close()
            self._packed = False
        except tarfile.ReadError:
            self._packed = True
        except OSError as error:
            raise _unreadable(path, error) from None
        index = cached(f"index-{self.digest()[:16]}", self._index)
        places = zip(index["start"].tolist(), index["size"].tolist(), strict=True)
        self._places = dict(zip(json.loads(index["names"].tobytes()), places, strict=True))
        super().__init__(path, self._places, allowed)

    def read(self, name: str) -> bytes:
        if self._packed:
            with self._lock:  # so that only one thread unpacks
                return self._held[name]
        start, size = self._places[name]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def digest(self) -> str:
        return _stamp(self.path)

    def _index(self) -> dict[str, np.ndarray]:
        if self._packed:
            places = {name: (0, len(data)) for name, data in self._held.items()}
        else:
            places = {name: (member.offset_data, member.size) for name, member, _ in self._members(data=False)}
        start, size = np.array(list(places.values()), dtype=np.int64).reshape(-1, 2).T
        return {"names": _json(list(places)), "start": start, "size": size}

    @functools.cached_property
    def _held(self) -> dict[str, bytes]:
        held, total = {}, 0
        for name, _, data in self._members(data=True):
            held[name] = data
            total += len(data)
            if total > IN_MEMORY:
                raise BdmError(
                    f"{self.path} is compressed and holds more than {IN_MEMORY // 2**30} GiB, too much to keep.\n"
                    "  unpack it (tar -xf) and give the folder, or give the tar uncompressed"
                )
        return held

    def _members(self, data: bool) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
        """The files in the tar, with their bytes if asked for.

        tarfile takes a header that it cannot read for the end; the true end is a block of zeros.
        """
        try:
            with (
                open(self.path, "rb") as file,
                output.progress(f"reading {self.path.name}", self.path.stat().st_size >> 20, "MiB") as advance,
                tarfile.open(fileobj=file) as tar,
            ):
                seen = 0
                for member in tar:
                    if (member.issym() or member.islnk()) and member.name.lower().endswith(SUFFIXES):
                        raise BdmError(
                            f"{self.path}: {member.name} is a link to {member.linkname}.\n"
                            "  allowed: a tar of files; make it with tar --dereference --hard-dereference"
                        )
                    if member.isfile():
                        content = tar.extractfile(member).read() if data else b""
                        yield posixpath.normpath(member.name), member, content
                    advance((file.tell() >> 20) - seen)
                    seen = file.tell() >> 20
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it ends in the middle")
                while data and tar.fileobj.read(2**20):  # to the end, where a compressed stream carries its checksum
                    pass
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise BdmError(f"{self.path} is not a whole tar file ({error}).\n  {self._allowed}") from None


class Lmdb(Reader):
    """An LSUN lmdb (fyu/lsun): the values are webp or jpeg files, in the order of their keys.

    It is opened read-only and without a lock file, so it may lie on a read-only disk.
    Raises: BdmError if data.mdb is damaged or shorter than its header says: reading it would kill the process.
    """

    kind = "lmdb"
    unlabelled = "an lmdb has no class folders"

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_whole(path / "data.mdb")
        self._environment = _environment(path)
        keys = cached(f"keys-{self.digest()[:16]}", self._keys)
        self._text, self._ends = keys["text"].tobytes(), keys["ends"]
        if not len(self._ends):
            raise BdmError(f"{path} is an empty lmdb.\n  copy or unpack it again; {ALLOWED}")

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        return self._key(i).decode("utf-8", "backslashreplace")

    def open(self, i: int) -> Image.Image:
        try:
            with self._environment.begin() as transaction:
                return decode(transaction.get(self._key(i)))
        except lmdb.Error as error:
            raise self._damaged(error) from None

    def digest(self) -> str:
        return _stamp(self.path / "data.mdb")

    def _key(self, i: int) -> bytes:
        start = self._ends[i - 1] if i else 0
        return self._text[start : self._ends[i]]

    def _keys(self) -> dict[str, np.ndarray]:
        """All keys as one text and where each ends in it (a list of 3 million would take more than the images)."""
        text, ends = bytearray(), array.array("q")
        try:
            with (
                output.progress(f"listing {self.path.name}", self._environment.stat()["entries"], "images") as advance,
                self._environment.begin() as transaction,
            ):
                for key in transaction.cursor().iternext(keys=True, values=False):
                    text += key
                    ends.append(len(text))
                    if len(ends) % BLOCK == 0:
                        advance(BLOCK)
        except lmdb.Error as error:
            raise self._damaged(error) from None
        return {"text": np.frombuffer(text, np.uint8), "ends": np.array(ends, dtype=np.int64)}

    def _damaged(self, error: lmdb.Error) -> BdmError:
        return BdmError(f"{self.path / 'data.mdb'} is damaged ({error}).\n  copy or unpack it again")


_open_environments: weakref.WeakValueDictionary[tuple[Path, str], lmdb.Environment] = weakref.WeakValueDictionary()


def _environment(folder: Path) -> lmdb.Environment:
    """The lmdb, open. A process may open one only once; the readers of one share it, and it closes with the last."""
    key = folder.resolve(), _stamp(folder / "data.mdb")
    found = _open_environments.get(key)
    if found is None:
        try:
            found = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_spare_txns=WORKERS)
        except lmdb.Error as error:
            raise BdmError(f"{folder / 'data.mdb'} cannot be opened ({error}).\n  copy or unpack it again") from None
        _open_environments[key] = found
    return found


MAGIC, PAGE_HEADER, PAGES = 0xBEEFC0DE, 16, [2**k for k in range(8, 17)]
META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
"""LMDB's MDB_meta on a 64-bit machine: magic, version, address, map size; two MDB_db records, the first of which begins
with the page size; last page, transaction."""


def _check_whole(path: Path) -> None:
    """Raises: BdmError if data.mdb is no lmdb, or shorter than its newest header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = _meta(file.read(PAGE_HEADER + META.size))
            file.seek(first.page if first else 0)
            second = _meta(file.read(PAGE_HEADER + META.size))
    except OSError as error:
        raise _unreadable(path, error) from None
    if first is None or second is None:
        raise BdmError(f"{path} ({size:,} bytes) is not an lmdb, or only its beginning.\n  copy or unpack it again")
    newest = max(first, second, key=lambda meta: meta.transaction)
    needed = (newest.last + 1) * first.page
    if size < needed:
        raise BdmError(
            f"{path} is cut short: it has {size:,} bytes, its header says {needed:,}.\n"
            "  copy or unpack it again (nothing was read)"
        )


class _Meta(NamedTuple):
    page: int
    last: int
    transaction: int


def _meta(page: bytes) -> _Meta | None:
    """The header in LMDB's page 0 or 1; None if it is none."""
    if len(page) < PAGE_HEADER + META.size:
        return None
    values = META.unpack_from(page, PAGE_HEADER)
    return _Meta(values[4], *values[-2:]) if values[0] == MAGIC and values[4] in PAGES else None


def _database(path: Path) -> Path | None:
    """The folder with data.mdb: path itself, or the only *_lmdb folder in it (of several: the *_train_lmdb)."""
    if (path / "data.mdb").exists():
        return path
    found = sorted(folder for folder in path.glob("*_lmdb") if (folder / "data.mdb").exists())
    chosen = [folder for folder in found if folder.name.endswith("_train_lmdb")] if len(found) > 1 else found
    if len(found) > 1 and len(chosen) != 1:
        names = ", ".join(folder.name for folder in found)
        raise BdmError(f"{path} holds several lmdbs: {names}.\n  say which: --set data.path={found[0]}")
    return chosen[0] if chosen else None


def _walk(top: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names of the files below a folder, and size and time of the images. Links are followed, but not in circles."""
    todo: list[tuple[str, tuple]] = [("", ())]
    while todo:
        below, above = todo.pop()
        try:
            stat = os.stat(top / below)
            if (stat.st_dev, stat.st_ino) in above:
                continue
            with os.scandir(top / below) as entries:
                for entry in entries:
                    name = below + entry.name
                    if entry.is_dir():
                        todo.append((f"{name}/", (*above, (stat.st_dev, stat.st_ino))))
                    elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
                        found = entry.stat()
                        yield name, (found.st_size, found.st_mtime_ns)
                    else:
                        yield name, (0, 0)
        except OSError as error:
            raise _unreadable(Path(error.filename or top / below), error) from None


def _below_train(folders: set[str]) -> dict[str, list[str]]:
    """The folders to read, each with its parts below train/ if there is such a folder beside none but other splits."""
    parts = {folder: folder.split("/") if folder else [] for folder in folders}

    def top(above: list[str]) -> tuple[str, ...]:
        return tuple(above[: above.index("train") + 1]) if "train" in above else ()

    def alone(train: tuple[str, ...]) -> bool:
        n = len(train) - 1
        return {above[n] for above in parts.values() if len(above) > n and tuple(above[:n]) == train[:-1]} <= SPLITS

    tops = {train for train in map(top, parts.values()) if train and alone(train)}
    if not tops:
        return parts
    return {folder: above[len(top(above)) :] for folder, above in parts.items() if top(above) in tops}


def _instead(files: list[str]) -> str:
    """What is there in place of images."""
    kinds = Counter(posixpath.splitext(name)[1].lower() or "other" for name in files).most_common(3)
    told = ", ".join(f"{n} {kind}" for kind, n in kinds)
    return f", but {told} (are they to be unpacked?)" if told else ""


def _stamp(path: Path) -> str:
    """Identity of a large file: size, time, and its ends (archives may come with a time of 0)."""
    stat, part = path.stat(), 2**16
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(part))
        file.seek(max(0, stat.st_size - part))
        digest.update(file.read(part))
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> BdmError:
    return BdmError(
        f"cannot read {path} ({error.strerror or error}).\n  mend its permissions or link, or copy it again"
    )


def _uncaptioned(path: Path, names: list[str], why: str) -> BdmError:
    return BdmError(
        f"{path}: {len(names)} images have no caption, the first is {names[0]} ({why}).\n"
        "  allowed: a caption for every image (metadata.csv or metadata.jsonl with file_name and text, or <name>.txt "
        "beside <name>.png), or none at all"
    )
