"""Tensors on disk: safetensors with metadata in the header, written whole or not at all. No code runs on load."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from bdm_cli import runs
from bdm_cli.errors import BdmError


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Raises: BdmError if the file cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # its form of a full disk
            raise OSError(str(error)) from None

    runs.write_whole(path, save)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises: BdmError if the file is missing, cut short or not safetensors."""
    if not path.is_file():
        raise BdmError(f"there is no file {path}.\n  give the path of a .safetensors file that bdm wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise BdmError(
            f"{path} is not a whole safetensors file ({error}).\n  copy it again or make it again; nothing was loaded"
        ) from None
