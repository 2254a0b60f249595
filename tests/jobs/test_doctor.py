"""`bdm doctor` on kernels: its other rows are read through the command in tests/test_cli.py."""

from pathlib import Path

import pytest

from bdm_cli.jobs import doctor
from bdm_cli.packed import build, ops


@pytest.fixture(autouse=True)
def _choose_again():
    yield
    ops.library.cache_clear()
    ops.path.cache_clear()


def packed() -> tuple[str, str]:
    """State and note of the row on packed inference."""
    ops.library.cache_clear()
    ops.path.cache_clear()
    table = doctor.run().set_index("Part")
    return tuple(table.loc["Packed inference", ["State", "Note"]])


def test_the_kernels_that_can_run_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BDM_KERNEL", raising=False)
    state, note = packed()
    able = [name for name in ops.PATHS if name == "torch" or name in ops.library().paths]
    assert state == f"{able[0]}; can run: {', '.join(able)}"
    assert (note == "") == (able != ["torch"])
    monkeypatch.setenv("BDM_KERNEL", "torch")
    assert packed()[0] == f"torch; can run: {', '.join(able)}"


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("BDM_KERNEL", raising=False)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libbdm.so")
    state, note = packed()
    assert state == "torch; can run: torch"
    assert note.startswith("there is no libbdm.so: it was installed without a C compiler;\n")
    assert "install a C compiler, then `python -m bdm_cli.packed.build`" in note


def test_a_broken_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("BDM_KERNEL", raising=False)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libbdm.so")
    build.LIBRARY.write_bytes(b"no library")
    state, note = packed()
    assert state == "torch; can run: torch"
    assert note.startswith("libbdm.so cannot be loaded (")


@pytest.mark.skipif(not build.LIBRARY.is_file(), reason="no C compiler")
def test_a_library_of_other_sources_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BDM_KERNEL", raising=False)
    monkeypatch.setattr(build, "fingerprint", lambda: "0123456789abcdef")
    state, note = packed()
    assert state == "torch; can run: torch"
    assert note.startswith(f"{build.LIBRARY.name} is not of these sources: python -m bdm_cli.packed.build")


def test_a_wrong_choice_is_a_row_not_an_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDM_KERNEL", "sse9")
    state, note = packed()
    assert state == "not usable"
    assert note.startswith("unknown BDM_KERNEL 'sse9'.")
