"""Who may import whom, read from the source; and what importing the command does not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bdm_cli"

BASE = {
    "errors",
    "places",
    "pretrained",
    "recipe",
    "records",
    "runs",
    "registry",
    "inputs",
    "output",
    "measure",
    "__init__",
}
CHAINS = (
    ("base", "quant", "packed", "diffusion", "methods", "student", "jobs", "cli"),
    ("base", "images", "diffusion"),
    ("base", "images", "metrics", "jobs"),
)
"""base <- quant <- packed, diffusion <- methods <- student <- jobs <- cli; base <- images <- diffusion, metrics."""

ALLOWED = {
    "base": {"base"},
    "tensorfile": {"base"},
    "images": {"base", "images"},
    "quant": {"base", "quant", "tensorfile"},
    "packed": {"base", "quant", "packed", "tensorfile"},
    "diffusion": {"base", "images", "quant", "diffusion", "tensorfile"},
    "methods": {"base", "quant", "diffusion", "methods", "tensorfile"},
    "student": {"base", "quant", "packed", "diffusion", "methods", "tensorfile"},
    "metrics": {"base", "images", "metrics", "tensorfile"},
    "paper": {"base", "paper", "tensorfile"},
    "jobs": {
        *("base", "images", "quant", "packed", "diffusion", "methods", "student", "metrics", "paper"),
        *("tensorfile", "jobs"),
    },
    "cli": {"base", "jobs", "tensorfile"},
    "__main__": {"cli"},
}
EXTRA = {"metrics.cost": {"quant", "packed"}}
MAY_IMPORT_JOBS = {"jobs.ablate", "jobs.demo"}
HEAVY = ("torch", "torchvision", "diffusers", "accelerate", "pandas", "torch_fidelity")
LIGHT = ["cli", *sorted(BASE - {"__init__"}), "methods.__init__", "metrics.__init__", "paper.ablations"]


@cache
def modules() -> dict[str, Path]:
    """Dotted names below bdm_cli ('jobs.train', 'methods.__init__') and their files."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def layer(module: str) -> str:
    first = module.split(".")[0]
    return "base" if first in BASE else first


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """(imported dotted name, whether on import) of a module; what only type checkers see counts as not on import."""
    return tuple(_walk(ast.parse(modules()[module].read_text()), loaded=True, package=module.split(".")[:-1]))


def _walk(node: ast.AST, loaded: bool, package: list[str]) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, loaded) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"relative import in {package}"
            yield from ((f"{child.module}.{alias.name}", loaded) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, False, package)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(child.body, []), False, package)
            yield from _walk(ast.Module(child.orelse, []), loaded, package)
        else:
            yield from _walk(child, loaded, package)


def own(name: str) -> str | None:
    """The module of ours that an imported dotted name stands for; None for others' modules."""
    parts = name.split(".")
    if parts[0] != "bdm_cli":
        return None
    for end in range(len(parts), 0, -1):
        dotted = ".".join(parts[1:end])
        for candidate in (dotted, f"{dotted}.__init__" if dotted else "__init__"):
            if candidate in modules():
                return candidate
    raise AssertionError(f"there is no module {name}")


def test_the_layers_of_this_test_are_the_packages_folders():
    assert {layer(module) for module in modules()} == set(ALLOWED)
    assert set(LIGHT) <= set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_who_imports_whom(module: str):
    for name, _ in imports(module):
        target = own(name)
        if target is None:
            continue
        allowed = ALLOWED[layer(module)] | EXTRA.get(module, set())
        assert layer(target) in allowed, f"{module} ({layer(module)}) imports {target} ({layer(target)})"


@pytest.mark.parametrize("chain", CHAINS)
def test_the_chains_go_one_way(chain: tuple[str, ...]):
    for upper in chain:
        below = chain[: chain.index(upper)]
        assert all(upper not in ALLOWED[lower] for lower in below)


def test_neither_diffusion_nor_metrics_knows_the_other():
    assert "metrics" not in ALLOWED["diffusion"]
    assert "diffusion" not in ALLOWED["metrics"] | EXTRA["metrics.cost"]


@pytest.mark.parametrize("module", [m for m in sorted(modules()) if m.startswith("jobs.")])
def test_a_job_imports_no_job(module: str):
    jobs = {own(name) for name, _ in imports(module)} & {m for m in modules() if m.startswith("jobs.")}
    assert not jobs - {"jobs.__init__"} or module in MAY_IMPORT_JOBS, f"{module} imports {jobs}"


@pytest.mark.parametrize("module", [m for m in sorted(modules()) if m.startswith("methods.")])
def test_a_method_imports_no_method(module: str):
    found = {own(name) for name, _ in imports(module)}
    others = {target for target in found if target and target.startswith("methods.")} - {"methods.base"}
    assert others == set()


def loaded_by(module: str) -> dict[str, str]:
    """Every module name that importing `module` runs, ours and others', each with who imports it."""
    reached: dict[str, str] = {}
    todo = [(module, "")]
    while todo:
        name, by = todo.pop()
        if name in reached:
            continue
        reached[name] = by
        parts = name.split(".")[:-1]
        todo += [(".".join((*parts[:i], "__init__")), name) for i in range(len(parts) + 1)]
        for imported, on_import in imports(name):
            if on_import:
                target = own(imported)
                if target is None:
                    reached.setdefault(f"<{imported.split('.')[0]}>", name)
                else:
                    todo.append((target, name))
    return reached


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_heavy_is_imported_at_module_level(module: str):
    reached = loaded_by(module)
    heavy = {name: reached[f"<{name}>"] for name in HEAVY if f"<{name}>" in reached}
    assert heavy == {}


def test_the_walk_finds_what_is_there():
    """Guards the test above against seeing nothing."""
    assert "<torch>" in loaded_by("jobs.train")
    assert "<diffusers>" in loaded_by("student")
    assert "bdm_cli.jobs.train" in {name.rsplit(".", 1)[0] for name, _ in imports("cli")} | {
        n for n, _ in imports("cli")
    }
    assert "<lmdb>" in loaded_by("metrics.extraction")  # through images
    assert any(not on_import for _, on_import in imports("methods.__init__"))
    assert {"recipe", "places", "errors"} <= set(loaded_by("inputs"))


@pytest.mark.parametrize("module", sorted(modules()))
def test_click_is_never_imported(module: str):
    assert [name for name, _ in imports(module) if name.split(".")[0] == "click"] == []


def test_base_needs_only_the_standard_library_pydantic_and_rich():
    for module in BASE:
        others = {name.split(".")[0] for name, on_import in imports(module) if on_import and own(name) is None}
        assert others - set(sys.stdlib_module_names) <= {"pydantic", "rich"}, module


@pytest.mark.parametrize("module", [m for m in sorted(modules()) if m.startswith("images.")])
def test_images_need_only_numpy_pil_and_lmdb(module: str):
    others = {name.split(".")[0] for name, _ in imports(module) if own(name) is None}
    assert others - set(sys.stdlib_module_names) <= {"numpy", "PIL", "lmdb"}


@pytest.mark.parametrize(
    "module",
    [
        "bdm_cli.cli, bdm_cli.inputs",
        "bdm_cli.methods, bdm_cli.metrics, bdm_cli.records, bdm_cli.paper.ablations",
        "bdm_cli.images.sets, bdm_cli.images.prepare",
    ],
)
def test_importing_loads_no_torch(module: str, tmp_path: Path):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
