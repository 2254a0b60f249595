"""LSUN's lmdb: values are webp or jpeg files. A damaged one is found from its header, since reading it kills."""

import array
import struct
import weakref
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np

from bdm_cli import output
from bdm_cli.errors import BdmError
from bdm_cli.images.readers import ALLOWED, BLOCK, WORKERS, Reader, cached, stamp, unreadable


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

    def content(self, i: int) -> bytes:
        try:
            with self._environment.begin() as transaction:
                return transaction.get(self._key(i))
        except lmdb.Error as error:
            raise self._damaged(error) from None

    def digest(self) -> str:
        return stamp(self.path / "data.mdb")

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
    key = folder.resolve(), stamp(folder / "data.mdb")
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
        raise unreadable(path, error) from None
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


def database(path: Path) -> Path | None:
    """The folder with data.mdb: path itself, or the only *_lmdb folder in it (of several: the *_train_lmdb)."""
    if (path / "data.mdb").exists():
        return path
    found = sorted(folder for folder in path.glob("*_lmdb") if (folder / "data.mdb").exists())
    chosen = [folder for folder in found if folder.name.endswith("_train_lmdb")] if len(found) > 1 else found
    if len(found) > 1 and len(chosen) != 1:
        names = ", ".join(folder.name for folder in found)
        raise BdmError(f"{path} holds several lmdbs: {names}.\n  say which (data.path): {found[0]}")
    return chosen[0] if chosen else None
