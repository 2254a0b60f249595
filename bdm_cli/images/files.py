"""Image files in a folder or a tar, with classes and captions; and the reader of whatever lies at a path."""

import csv
import functools
import hashlib
import io
import json
import lzma
import os
import posixpath
import tarfile
import threading
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bdm_cli import output
from bdm_cli.errors import BdmError
from bdm_cli.images.lsun import Lmdb, database
from bdm_cli.images.readers import ALLOWED, SUFFIXES, Reader, as_json, cached, stamp, unreadable

SPLITS = {"train", "val", "valid", "validation", "test", "testing", "dev", "eval"}
"""Folder names that say what a part of a data set is for, not what is in its images."""
IN_MEMORY = 2**31
"""Bytes of a compressed tar's images that are held; a larger one must be unpacked."""


def find(path: Path, allowed: str = ALLOWED) -> Reader:
    """The reader of what lies at `path`. Raises: BdmError if there is nothing, or nothing that can be read."""
    try:
        if not path.exists():
            raise BdmError(f"there is nothing at {path}.\n  {allowed}")
        lsun = path.parent if path.name == "data.mdb" else database(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if lsun is not None:
        return Lmdb(lsun)
    return Folder(path, allowed) if path.is_dir() else Tar(path, allowed)


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

    def content(self, i: int) -> bytes:
        return self.read(self.names[i])

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
            raise unreadable(self.path / name, error) from None

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
            raise unreadable(path, error) from None
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
            raise unreadable(self.path, error) from None

    def digest(self) -> str:
        return stamp(self.path)

    def _index(self) -> dict[str, np.ndarray]:
        if self._packed:
            places = {name: (0, len(data)) for name, data in self._held.items()}
        else:
            places = {name: (member.offset_data, member.size) for name, member, _ in self._members(data=False)}
        start, size = np.array(list(places.values()), dtype=np.int64).reshape(-1, 2).T
        return {"names": as_json(list(places)), "start": start, "size": size}

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
            why = str(error).partition("\n")[0].rstrip(":")
            raise BdmError(f"{self.path} is not a whole tar file ({why}).\n  {self._allowed}") from None


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
            raise unreadable(Path(error.filename or top / below), error) from None


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


def _uncaptioned(path: Path, names: list[str], why: str) -> BdmError:
    return BdmError(
        f"{path}: {len(names)} images have no caption, the first is {names[0]} ({why}).\n"
        "  allowed: a caption for every image (metadata.csv or metadata.jsonl with file_name and text, or <name>.txt "
        "beside <name>.png), or none at all"
    )
