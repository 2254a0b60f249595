"""`bdm bench inference`: every contender runs, rows say what was measured, and the report finds the speed-up."""

import json
import math
from pathlib import Path

import pytest
from conftest import RECIPES

from bdm_cli import measure, recipe, records, runs
from bdm_cli.jobs import bench_inference as job
from bdm_cli.jobs.bench_inference import Conv
from bdm_cli.paper import tables

SMALL = (Conv(8, 12, 3, 8), Conv(6, 5, 1, 4))


def lines() -> list[dict]:
    return [json.loads(line) for line in (runs.bench_dir() / "inference.jsonl").read_text().splitlines()]


def test_layers_and_their_means():
    table = job.layers([4, 1], SMALL, rounds=2, threads=1, bases=(1, 2))
    assert table["W/A"].tolist() == ["1/4", "2x1/4", "1/1", "2x1/1"] * 2 + ["1/4", "2x1/4", "1/1", "2x1/1"]
    assert table["Layer"].tolist()[:1] + table["Layer"].tolist()[-1:] == ["8 to 12, 3x3 at 8", "geometric mean of 2"]
    found = lines()
    assert len(found) == len(table)
    single = [row["last_ratio"] for row in found if (row["bits"], row["bases"]) == (4, 1)]
    assert single[2] == pytest.approx(math.sqrt(single[0] * single[1]), abs=0.01)
    for row in found[:-4]:
        assert row["threads"] == 1
        assert row["full_ms"] == min(row[f"{name}, ms"] for name in job.FULL if f"{name}, ms" in row)
        assert {"commit", "machine", "cpu", "time", "path"} <= row.keys()
    assert records.read() == []  # the report's speed-up is of the paper's layers alone


def test_the_report_shows_the_speed_up_of_the_main_layers():
    job._record(job.SPEEDUPS[1], 11.5)
    job._record(job.SPEEDUPS[2], 6.25)
    found = tables.table("16", records.read()).set_index("Method")
    assert found.loc["BinaryDM", ["Speed-up paper", "Speed-up ours"]].tolist() == ["4.62", "11.50 (1)"]
    assert found.loc["High-Order", ["Speed-up paper", "Speed-up ours"]].tolist() == ["3.11", "6.25 (1)"]


def test_the_shapes_of_ldm_4():
    found = job.network_shapes(recipe.load(job.NETWORK))
    assert set(job.MAIN) <= set(found)
    assert Conv(448, 448, 3, 32, 2) in found  # a downsampling conv
    assert all(conv.side // conv.stride > 1 for conv in found)
    assert len(found) == len(set(found)) > 20


def test_macs():
    assert Conv(224, 224, 3, 64).macs == 64 * 64 * 224 * 224 * 9
    assert Conv(4, 6, 3, 8, 2).macs == 4 * 4 * 4 * 6 * 9


def test_a_whole_step():
    table, split = job.step(4, rounds=1, threads=1, network=str(RECIPES / "tiny-w1a4.toml"))
    assert table.iloc[:, 0].tolist() == ["packed", "packed, blocks not fused", "PyTorch", "PyTorch, channels last"]
    assert (table["ms"] > 0).all()
    assert table["x fp32"].tolist()[2:].count(1.0) >= 1  # the faster fp32 is the measure
    assert table["x fp32"].tolist()[0] == pytest.approx(min(table["ms"][2:]) / table["ms"][0], abs=0.1)
    assert table["Peak MiB"].notna().tolist() == [True, False, True, False]
    parts = split.set_index("Part")["Share (%)"]
    assert parts["all"] == 100
    assert parts[list(job.PARTS)].sum() + parts["edges and the rest"] == pytest.approx(100, abs=0.5)
    assert parts["1-bit convolutions, with what they fuse"] > 0
    assert [row["contender"] for row in lines()] == table.iloc[:, 0].tolist()


@pytest.mark.parametrize("text", ["", "0", "9", "4,x", "4,,8", "16", "-4"])
def test_activations_that_are_refused(text: str, bdm):
    code, out, err = bdm("bench", "inference", f"--activations={text}")
    assert (code, out) == (2, "")
    assert "allowed: 1..8 or 32" in err


def test_the_command(bdm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job, "MAIN", SMALL)
    code, out, _ = bdm("bench", "inference", "--activations", "4", "--no-step", "--rounds", "1", "--format", "csv")
    assert code == 0
    assert out.startswith("Layer,W/A,")
    assert len(out.splitlines()) == 4


def hold(path: Path) -> None:
    path.write_text("here")


def test_work_alone_says_its_time_and_memory(tmp_path: Path):
    found = measure.alone(hold, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "here"
    assert found.wall_s >= 0
    assert found.peak_mib > 1
