"""Sets of images to score: ADM-style npz (`arr_0`, uint8, NHWC), folders, tars. Only what is asked for is held."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from bdm_cli.errors import BdmError
from bdm_cli.images import files, readers
from bdm_cli.images.prepare import in_colour
from bdm_cli.images.readers import NAMED, cached, stamp

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
ALLOWED = (
    "an npz with arr_0 (uint8, [N, H, W, 1 or 3]), a folder, tar or LSUN lmdb of images (png, jpg, jpeg, webp, bmp) of "
    "one size"
)
GREY = ("1", "L", "LA", "I", "F")
LOSSY = (".jpg", ".jpeg")
BLOCK = 2**24
"""Bytes read at a time."""


class Pixels(Protocol):
    """Images uint8 [N, H, W, C] that are read when a slice is asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, which: slice) -> np.ndarray: ...
    def content(self) -> str:
        """SHA-256 of what they are, wherever they lie."""


@dataclass(frozen=True)
class ImageSet:
    """Images, and the statistics that their file carries, if any (mu, sigma, mu_s, sigma_s: of which they are a part).

    source: what they are called in messages. notes: what was done to them, or should be known of them. labels: the
    class of each, if that is told.
    """

    source: str
    pixels: Pixels
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    @property
    def class_run(self) -> float | None:
        """How many images of one class follow each other, on average, if that is far more than by chance."""
        n_classes = 0 if self.labels is None else len(np.unique(self.labels))
        if n_classes < 2:
            return None
        mean = len(self.labels) / (1 + np.count_nonzero(np.diff(self.labels)))
        return mean if mean > 2 / (1 - 1 / n_classes) else None


class NpzImages:
    """arr_0 of an npz, read where it lies: by memory map, of a compressed one from its stream, from front to back.

    Raises: BdmError if it is not uint8 [N, H, W, 1 or 3].
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entry = archive.getinfo("arr_0.npy")
                with archive.open(entry) as stream:
                    self.shape, dtype = _header(stream)
                    self._start = stream.tell()
                    if dtype != np.uint8:
                        raise self._not_bytes(stream, dtype)
                if entry.file_size != self._start + math.prod(self.shape):
                    raise ValueError(f"arr_0 has not as many bytes as {list(self.shape)} says")
                self._mapped = _mapped(path, entry, self._start, self.shape)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._unreadable(error) from None
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or 0 in self.shape:
            raise BdmError(f"arr_0 of {path} is {dtype} {list(self.shape)}.\n  allowed: {ALLOWED}")
        self._stream: IO[bytes] | None = None
        self._position = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> np.ndarray:
        start, stop, step = which.indices(len(self))
        stop = max(start, stop)
        if step != 1:
            raise ValueError(f"images are taken in order, not by {which!r}")
        if self._mapped is not None:
            return np.array(self._mapped[start:stop])
        size = math.prod(self.shape[1:])
        try:
            if self._stream is None or start < self._position:
                self._stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  read on
                self._position, skip = 0, self._start + start * size
            else:
                skip = (start - self._position) * size
            while skip:
                skip -= len(self._stream.read(min(skip, BLOCK)))
            data = self._stream.read((stop - start) * size)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise self._unreadable(error) from None
        self._position = stop
        return np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])

    def content(self) -> str:
        """Read once; then known by the file's size, time and ends. Raises: BdmError if the file is damaged."""
        return cached(f"npz-{stamp(self.path)[:16]}", self._content)["content"].tobytes().hex()

    def _content(self) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(str(self.shape).encode())
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                _header(stream)
                while block := stream.read(BLOCK):  # to the end, where the archive's checksum is compared
                    digest.update(block)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self._unreadable(error) from None
        return {"content": np.frombuffer(digest.digest(), np.uint8)}

    def _not_bytes(self, stream: IO[bytes], dtype: np.dtype) -> BdmError:
        found = ""
        if dtype.kind == "f" and len(self.shape) == 4:
            some = min(self.shape[0], 64) * math.prod(self.shape[1:])
            values = np.frombuffer(stream.read(some * dtype.itemsize), dtype)
            nan = int(np.isnan(values).sum())
            found = (
                f", its first images from {np.nanmin(values):g} to {np.nanmax(values):g}" if nan < len(values) else ""
            )
            found += f", {nan} values NaN" if nan else ""
        return BdmError(
            f"arr_0 of {self.path} is {dtype} {list(self.shape)}{found}.\n  allowed: {ALLOWED}\n"
            "  of images in [-1, 1]: ((x + 1) * 127.5).clip(0, 255).astype(np.uint8); there must be no NaN"
        )

    def _unreadable(self, error: Exception) -> BdmError:
        return BdmError(f"cannot read {self.path} as an npz file ({error}).\n  allowed: {ALLOWED}")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the npy file that begins here. Raises: ValueError."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = read[version](stream)
    if fortran and len(shape) > 1:
        raise ValueError("its arrays are in Fortran order; save np.ascontiguousarray(images)")
    return shape, dtype


def _mapped(path: Path, entry: zipfile.ZipInfo, start: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array where it lies in the archive; None if it is compressed."""
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of the extra field, which follow
    offset = entry.header_offset + 30 + int(lengths.sum()) + start
    return np.memmap(path, np.uint8, "r", offset, shape) if 0 not in shape else np.empty(shape, np.uint8)


class FileImages:
    """The images of a reader as they are, in the order of their names: RGB, or grey if all of them are.

    Raises: BdmError that names them if some cannot be decoded or differ in size.
    """

    def __init__(self, reader: readers.Reader) -> None:
        self.reader, seen = reader, readers.survey(reader)
        require_whole(reader, seen)
        sizes, first, n = np.unique(
            np.stack([seen.height, seen.width], 1), axis=0, return_index=True, return_counts=True
        )
        if len(sizes) > 1:
            kinds = [
                f"{count} of {w}x{h} ({reader.name(int(i))} ...)"
                for (h, w), i, count in sorted(zip(sizes.tolist(), first, n, strict=True), key=lambda kind: -kind[2])
            ]
            more = f" and {len(kinds) - NAMED} other sizes" if len(kinds) > NAMED else ""
            raise BdmError(
                f"{reader.path} holds images of several sizes (width x height): {', '.join(kinds[:NAMED])}{more}.\n"
                "  allowed: images of one size; prepare them alike (of a reference: --prepare)"
            )
        self.channels = channels(seen)
        self.shape = (len(reader), int(sizes[0][0]), int(sizes[0][1]), self.channels)
        self._content = f"{seen.content} {self.channels}"
        self.notes = notes(reader, seen)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> np.ndarray:
        numbers = range(*which.indices(len(self)))
        if not numbers:
            return np.empty((0, *self.shape[1:]), np.uint8)
        return np.stack(readers.parallel(self._decoded, numbers)).reshape(-1, *self.shape[1:])

    def _decoded(self, number: int) -> np.ndarray:
        return np.asarray(in_colour(self.reader.open(number), self.channels))

    def content(self) -> str:
        return self._content


def require_whole(reader: readers.Reader, seen: readers.Survey) -> None:
    """Raises: BdmError that names the images that cannot be decoded."""
    if not seen.corrupt:
        return
    named = [f"    {reader.name(i)}: {reason}" for i, reason in list(seen.corrupt.items())[:NAMED]]
    more = [f"    and {len(seen.corrupt) - NAMED} more"] if len(seen.corrupt) > NAMED else []
    raise BdmError(
        "\n".join([f"{reader.path}: {len(seen.corrupt)} of {len(reader)} images cannot be used:", *named, *more])
        + "\n  mend, copy again or remove them; nothing was computed"
    )


def channels(seen: readers.Survey) -> int:
    """1 if all images are grey, else 3."""
    return 1 if all(mode.split(";")[0] in GREY for mode in np.unique(seen.mode)) else 3


def notes(reader: readers.Reader, seen: readers.Survey) -> tuple[str, ...]:
    """What happens to images that are not plain 8-bit grey or RGB, and what to know of their format."""
    told = {
        "CMYK": "converted to RGB without a colour profile",
        "16-bit grey": "their upper 8 bits kept",
        "with alpha": "alpha dropped",
        "grey": "repeated to RGB",
    }
    n = dict.fromkeys(told, 0)
    for mode, count in zip(*np.unique(seen.mode, return_counts=True), strict=True):
        n["CMYK"] += count * (mode == "CMYK")
        n["16-bit grey"] += count * mode.startswith("I")
        n["with alpha"] += count * mode.endswith("A")
        n["grey"] += count * (channels(seen) == 3 and mode.split(";")[0] in GREY)
    found = [f"{count} of {len(reader)} images are {kind}: {told[kind]}" for kind, count in n.items() if count]
    lossy = sum(reader.name(i).lower().endswith(LOSSY) for i in range(len(reader)))
    if lossy:
        found.append(f"{lossy} of {len(reader)} images are JPEG, whose losses move FID; png or npz keep every pixel")
    if reader.left_out:
        found.append(f"{reader.left_out} images beside train/ are not read")
    return tuple(f"{reader.path}: {note}" for note in found)


def load(path: Path) -> ImageSet:
    """The images at `path`: an npz file, a folder, a tar or an lmdb. Raises: BdmError for anything else."""
    if path.is_file() and (path.suffix == ".npz" or zipfile.is_zipfile(path)):
        return _npz(path)
    if not path.exists():
        raise BdmError(f"there are no images at {path}.\n  allowed: {ALLOWED}\n  `bdm sample` makes them")
    pixels = FileImages(files.find(path, f"allowed: {ALLOWED}"))
    return ImageSet(str(path), pixels, notes=pixels.notes, labels=pixels.reader.labels)


def _npz(path: Path) -> ImageSet:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip archive, or cut short")
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                names = ", ".join(file.files) or "(nothing)"
                raise BdmError(f"{path} has no arr_0; it holds: {names}.\n  allowed: {ALLOWED}")
            stored = {name: file[name] for name in STATISTICS if name in file} if "mu" in file else {}
            labels = _labels(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BdmError(f"cannot read {path} as an npz file ({error}).\n  allowed: {ALLOWED}") from None
    _check_stored(path, stored)
    pixels = NpzImages(path)
    if labels is not None and labels.shape != (len(pixels),):
        labels = None
    return ImageSet(str(path), pixels, stored, labels=labels)


def _labels(file: np.lib.npyio.NpzFile) -> np.ndarray | None:
    """arr_1 of an npz, if these are integers: np.savez(path, images, labels)."""
    try:
        found = file.get("arr_1")
    except ValueError:  # objects, which are not read
        return None
    return found if found is not None and found.dtype.kind in "iu" else None


def _check_stored(path: Path, stored: Mapping[str, np.ndarray]) -> None:
    """ADM reads mu_s and sigma_s as soon as there is a mu."""
    if not stored:
        return
    shapes = {name: stored[name].shape for name in STATISTICS if name in stored}
    pairs = [(shapes.get(mu), shapes.get(sigma)) for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))]
    if not all(mu and sigma and len(mu) == 1 and sigma == mu * 2 for mu, sigma in pairs):
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise BdmError(
            f"{path} carries incomplete statistics: {given}.\n"
            "  allowed: mu [D], sigma [D, D], mu_s [S], sigma_s [S, S] together, or none of them"
        )
    for name, values in stored.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise BdmError(f"{name} of {path} is not finite numbers ({values.dtype}).\n  make the file again")
