"""Building the library: with and without a compiler, for this processor and, in an emulator, for another one."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bdm_cli.packed import build

PROGRAM = Path(__file__).with_name("native_test.c")
ARM = "aarch64-linux-gnu-gcc"

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for this machine."""
    made = tmp_path_factory.mktemp("native") / build.LIBRARY.name
    assert build.build(made) is None
    return made


def program(library: Path, compiler: list[str]) -> Path:
    """native_test.c, linked with the library."""
    made = library.with_name("native_test")
    sources = [str(PROGRAM), f"-I{build.NATIVE}", f"-L{library.parent}", "-lbdm", "-lm"]
    flags = ["-O1", "-Wall", "-Wextra", "-ffp-contract=off"]
    subprocess.run([*compiler, *flags, *sources, "-o", str(made)], check=True)
    return made


@needs_compiler
def test_the_paths_compute_what_the_definition_says(library: Path):
    made = program(library, build.compiler())
    places = {"LD_LIBRARY_PATH": str(library.parent), "DYLD_LIBRARY_PATH": str(library.parent)}
    run = [made, "210", "0"]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **places}, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "planes: 0 of 210 cases differ" in done.stdout


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"no {ARM} (Debian: gcc-aarch64-linux-gnu)")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64 (Debian: qemu-user)")
def test_the_paths_of_arm_in_an_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", ARM)
    library = tmp_path / "libbdm.so"
    assert build.build(library, "aarch64") is None
    made = program(library, [ARM])
    root = subprocess.run([ARM, "-print-sysroot"], capture_output=True, text=True, check=True).stdout.strip()
    root = root if root not in ("", "/") else "/usr/aarch64-linux-gnu"
    emulator = ["qemu-aarch64", "-L", root, "-E", f"LD_LIBRARY_PATH={tmp_path}"]
    done = subprocess.run([*emulator, made, "70", "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "neon: 0 of 70 cases differ\nplanes: 0 of 70 cases differ\n"


@needs_compiler
def test_the_library_needs_neither_torch_nor_python(library: Path):
    """Loaded by a Python that has no packages; every undefined symbol is found, since all are bound at once."""
    code = f"""if True:
        import ctypes, os
        library = ctypes.CDLL({str(library)!r}, mode=os.RTLD_NOW)
        print(bool(ctypes.c_void_p.in_dll(library, "bdm_paths")))
    """
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_every_processor_has_the_portable_path():
    assert all("planes.c" in sources for sources in build.SOURCES.values())


def test_no_compiler_is_said_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.compiler() is None
    assert build.build(tmp_path / "libbdm.so") == "no C compiler (cc, gcc, clang, or CC)"
    assert not (tmp_path / "libbdm.so").exists()


@pytest.mark.parametrize("command", ["/bin/false", "false --with options"])
def test_a_failing_compiler_is_said_and_leaves_the_old_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"no {command}")
    monkeypatch.setenv("CC", command)
    old = tmp_path / "libbdm.so"
    old.write_bytes(b"old")
    assert build.build(old).startswith("the C compiler failed:\n")
    assert old.read_bytes() == b"old"
    assert list(tmp_path.glob("*bdm*")) == [old]


def test_cc_with_options_is_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", f"{sys.executable} -m 'some compiler'")
    assert build.compiler() == [sys.executable, "-m", "some compiler"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.compiler() is None


@pytest.mark.parametrize(
    ("machine", "family"),
    [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm"), ("riscv64", "other")],
)
def test_the_family_of_a_machine(machine: str, family: str):
    assert build.family(machine) == family
    assert family in build.SOURCES


def test_every_c_file_is_built_for_some_family():
    listed = {name for sources in build.SOURCES.values() for name in sources}
    assert listed == {file.name for file in build.NATIVE.glob("*.c")}


def test_a_wheel_serves_every_python_of_its_platform():
    python, abi, machine = build.wheel_tag().split("-")
    assert (python, abi) == ("py3", "none")
    assert machine == sysconfig.get_platform().replace("-", "_").replace(".", "_")
