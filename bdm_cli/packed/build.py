"""Compiles native/*.c into one shared library with the machine's C compiler; needs neither torch nor Python headers.

Runs as a build hook of the package (pyproject.toml), and as `python bdm_cli/packed/build.py` after a change of the C
files. Without a compiler the package is built all the same, and computes with plain torch.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NATIVE = Path(__file__).resolve().parent / "native"
LIBRARY = NATIVE / ("libbdm.dylib" if sys.platform == "darwin" else "libbdm.so")

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off")
FUSED = ("-ffp-contract=fast",)
"""For sums that are not exact anyway. Everywhere else a product is rounded before it is added, on every processor."""
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vpopcntdq"),
    *("-mavx2", "-mfma", "-mpopcnt"),
)
AVX2 = ("-mavx2", "-mfma", "-mpopcnt")
SOURCES = {
    "x86": {
        "bdm.c": (),
        "norm.c": (),
        "planes.c": (),
        "avx2.c": AVX2,
        "avx2_binary.c": AVX2,
        "avx2_real.c": (*AVX2, *FUSED),
        "avx512.c": AVX512,
        "avx512_binary.c": AVX512,
        "avx512_attention.c": AVX512,
    },
    "arm": {"bdm.c": (), "norm.c": (), "planes.c": (), "neon.c": (), "neon_binary.c": (), "neon_real.c": FUSED},
    "other": {"bdm.c": (), "norm.c": (), "planes.c": ()},
}
"""The files for each kind of processor, each with the instruction sets that it alone may use: which of them runs is
decided at run time."""


def family(machine: str) -> str:
    """The key of SOURCES for a machine's name."""
    name = machine.lower()
    return "x86" if name in ("x86_64", "amd64") else "arm" if name in ("arm64", "aarch64") else "other"


def fingerprint() -> str:
    """Of the C files and how they are compiled, which the library carries: one that was made of others may read its
    arguments differently, or round otherwise."""
    found = hashlib.sha256(repr((FLAGS, SOURCES)).encode())
    for path in sorted(NATIVE.glob("*.[ch]")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The C compiler's command: CC, or the first of cc, gcc and clang there is."""
    given = shlex.split(os.environ.get("CC", ""))
    found = [shutil.which(name) for name in (given[:1] or ["cc", "gcc", "clang"])]
    first = next((path for path in found if path), None)
    return [first, *given[1:]] if first else None


def build(library: Path = LIBRARY, machine: str | None = None) -> str | None:
    """Compile, link and put in place; returns None, or why there is no library."""
    command = compiler()
    if command is None:
        return "no C compiler (cc, gcc, clang, or CC)"
    sources, told = SOURCES[family(machine or platform.machine())], f'-DBDM_SOURCES="{fingerprint()}"'
    with tempfile.TemporaryDirectory() as folder:
        reason = ""
        for threads in (["-fopenmp"], []):  # a compiler without OpenMP still gives one thread
            objects = [str(Path(folder) / f"{name}.o") for name in sources]
            steps = [
                [*command, *FLAGS, *flags, *threads, told, "-c", str(NATIVE / name), "-o", target]
                for (name, flags), target in zip(sources.items(), objects, strict=True)
            ]
            made = Path(folder) / library.name
            steps.append([*command, "-shared", *threads, *objects, "-o", str(made), "-lm"])
            for step in steps:
                done = subprocess.run(step, capture_output=True, text=True)
                if done.returncode:
                    reason = done.stderr.strip()[-2000:]
                    break
            else:
                beside = library.with_suffix(".new")
                shutil.copy(made, beside)
                beside.replace(library)
                return None
    return f"the C compiler failed:\n{reason}"


def wheel_tag() -> str:
    """One wheel serves every Python and torch of a platform."""
    return f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class NativeHook(BuildHookInterface):
        """Adds the library to a wheel, or builds it in place for an editable installation."""

        def initialize(self, version: str, build_data: dict) -> None:
            reason = build()
            if reason:
                self.app.display_warning(f"bdm: packed inference will use plain torch: {reason}")
                return
            build_data["pure_python"] = False
            build_data["tag"] = wheel_tag()
            build_data["artifacts"].append(str(LIBRARY.relative_to(self.root)))


if __name__ == "__main__":
    sys.exit(build())
