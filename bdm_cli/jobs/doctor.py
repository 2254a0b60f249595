"""`bdm doctor`: what this machine has, and what each data set's recipes still miss."""

import importlib.util
import os
import platform
import shutil

import pandas as pd
import torch

from bdm_cli import inputs, places, recipe, records
from bdm_cli.errors import BdmError
from bdm_cli.metrics.inception import CLEAN, INCEPTION, VGG
from bdm_cli.packed import ops


def run() -> pd.DataFrame:
    """One row per part: what it is, its state, and what to do about it."""
    rows = [("Python", platform.python_version(), "")]
    rows += [(name, version, "") for name, version in records.provenance()["versions"].items() if name != "python"]
    rows.append(("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", ""))
    if torch.cuda.is_available():
        rows.append(("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}", ""))
    else:
        rows.append(("GPU", "none", "not needed; the recipes beyond digits are slow without one"))
    rows.append(("Packed inference", *_packed_inference()))
    home = places.home().resolve()
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())  # the home is made when needed
    rows.append(("Home", str(home), "set BDM_HOME to keep runs/ and results/ elsewhere"))
    writable = os.access(nearest, os.W_OK)
    rows.append(("Writable", "yes" if writable else "no", "" if writable else "choose another BDM_HOME"))
    free = shutil.disk_usage(nearest).free / 2**30
    rows.append(("Disk", f"{free:.0f} GiB free", ""))
    board = importlib.util.find_spec("tensorboard") is not None
    rows.append(("TensorBoard", "installed" if board else "not installed", "" if board else "pip install tensorboard"))
    for weights in (INCEPTION, CLEAN, VGG):
        try:
            path = weights.find()
            note = "" if path else f"downloaded when asked for; without a network:\n{weights.advice()}"
            rows.append((f"Weights of {weights.what}", str(path or "missing"), note))
        except BdmError as error:
            rows.append((f"Weights of {weights.what}", "not usable", str(error)))
    for name in (name for name, path in recipe.names().items() if name == path.parent.name):
        missing = inputs.missing(recipe.load(name), evaluation=True)
        rows.append((f"recipes {name}*", "ready" if not missing else f"{len(missing)} missing", "\n".join(missing)))
    return pd.DataFrame(rows, columns=["Part", "State", "Note"])


def _packed_inference() -> tuple[str, str]:
    """Which kernels compute a packed model, and what to do if there is no compiled one."""
    able = [name for name in ops.PATHS if name == "torch" or name in ops.library().paths]
    try:
        state = f"{ops.path()}; can run: {', '.join(able)}"
    except BdmError as error:
        return "not usable", str(error)
    if able != ["torch"]:
        return state, ""
    reason = ops.library().reason or "none is for this processor"
    return state, f"{reason};\ninstall a C compiler, then `python -m bdm_cli.packed.build` or bdm-cli again"
