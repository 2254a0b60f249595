"""bdm report: the files it writes, and that the page stands alone and tells no more than was measured."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from bdm_cli import recipe, records, runs
from bdm_cli.errors import BdmError
from bdm_cli.jobs import report
from bdm_cli.paper import tables

COMPONENTS = {"digits-fp": 8.0, "digits-w1a4-baseline": 60.0, "digits-w1a4-ebb": 70.0, "digits-w1a4": 30.0}
"""A miniature in which EBB hurts and LRM helps."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(tmp_path))
    return tmp_path


def measure(name, metric, value, seed=0, **changed):
    digest = recipe.load(name).digest if name in recipe.names() else "v1"
    given = {"digest": digest, "n_images": 1797, "steps": 400, "wall_s": 1.0, "device": "cpu"} | changed
    run = f"{name}-s{seed}"
    records.append(records.make(run=run, recipe=name, seed=seed, metric=metric, value=value, **given))


def draw_grid(run_id, key, shade, size=(40, 40)):
    folder = runs.run_dir(run_id) / "samples" / key
    folder.mkdir(parents=True)
    Image.new("L", size, shade).save(folder / "grid.png")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A home with three seeds of Table 7's twin, two trained runs with logs and grids, a plot, and its report."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDM_HOME", str(folder))
        for name, fid in COMPONENTS.items():
            for seed in range(3):
                measure(name, "fid", fid + 0.1 * seed, seed)
        measure("digits-w1a4-mine", "sfid", 41.5)
        spec = recipe.load("digits-w1a4")
        for seed in range(2):
            run_id = spec.run_id(seed)
            runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json())
            for step in range(10, 401, 10):
                line = {"step": step, "loss": 2 / step, "loss_simple": 1 / step, "lr": 1e-4, "wall_s": step / 10}
                runs.append_line(runs.metrics_log(run_id), line)
            draw_grid(run_id, "ddim50-eta0-round", 100 + seed)
        plot = Image.new("RGB", (1500, 500), "red")
        runs.write_whole(runs.run_dir("digits-w1a4-s0") / "plots" / "weights.png", plot.save)
        report.run()
        yield folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.words = [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)

    def images(self):
        return [
            Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))
            for link in self.links
            if link.startswith("data:image/png;base64,")
        ]


def page(home):
    return Page((home / "results" / "report.html").read_text(encoding="utf-8"))


def test_every_table_as_markdown_and_csv(filled):
    folder = filled / "results" / "tables"
    ids = {*tables.specs(), "other"}
    assert {path.name for path in folder.iterdir()} == {f"table-{id}.{form}" for id in ids for form in ("md", "csv")}
    assert len(ids) == 22
    for id, spec in tables.specs().items():
        text = (folder / f"table-{id}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# Table {id}. {spec.title}\n")
        assert spec.source in text
        assert all(note in text for note in spec.notes)
        assert "not comparable to the paper's" in text
    markdown = (folder / "table-7.md").read_text(encoding="utf-8")
    assert re.search(r"\| \+LRM +\| 1/4 +\| 7\.74 +\| 30\.10 ± 0\.10 \(3\) +\|", markdown)
    with open(folder / "table-7.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 16
    fid = next(line for line in lines if line["row"] == "+LRM | 1/4" and line["column"] == "FID")
    assert (fid["paper"], fid["ours_mean"], fid["ours_n"], fid["twin_n"]) == ("7.74", "", "0", "3")
    assert float(fid["twin_mean"]) == pytest.approx(30.1)


def test_returns_what_is_asked_for(home):
    measure("digits-w1a4", "precision", 80.0)
    frame = report.run("7")
    assert list(frame.columns)[-3:] == ["Prec. paper", "Prec. digits", "Recall paper"]
    overview = report.run().set_index("table")
    assert list(overview.index) == list(tables.specs())
    assert list(overview.loc["7"][["paper", "ours", "digits"]]) == [16, 0, 1]


@pytest.mark.parametrize(
    ("table", "column", "texts"),
    [
        ("5", "Size (MB)", ["1045.4‡", "132.0‡", "132.0‡", "66.9‡", "34.4‡"]),
        ("5", "OPs (1e9)", ["96.0‡", "24.0‡", "24.0‡", "12.0‡", "6.0‡"]),
        ("6", "Size (MB)", ["132.0‡", "34.4‡", "142.1‡", "36.9‡"]),
        ("16", "Size (MB)", ["1045.4‡", "67.1‡", "34.4‡"]),
        ("16", "Theoretical OPs (1e9)", ["96.0‡", "12.0‡", "6.0‡"]),
        ("B4", "Size (MB)", ["111.6‡"]),
        ("B4", "OPs saving", ["10.3‡"]),
    ],
)
def test_sizes_and_operations_are_counted(home, table, column, texts):
    """With the recipes' 8-bit edges (BiDM: fp32, as released): docs/efficiency.md has the sizes by the paper's rule."""
    assert list(report.run(table)[f"{column} ours"]) == texts


def test_what_methods_add_to_the_network_is_counted(home):
    """The rows of W1A4 on Bedrooms are all printed at 35.8 MB."""
    frame = report.run("2")
    assert not frame["Size (MB) ours"].isna().any()
    rows = frame[(frame["Dataset"] == "LSUN-Bedrooms 256x256") & (frame["#Bits"] == "1/4")]
    assert dict(zip(rows["Method"], rows["Size (MB) ours"], strict=True)) == {
        "Baseline": "34.4‡",
        "TDQ": "34.4‡",
        "ReActNet": "35.3‡",
        "Q-DM": "34.4‡",
        "INSTA-BNN": "35.9‡",
        "BI-DiffSR": "38.7‡",
        "BinaryDM": "34.4‡",
    }


def test_unknown_table_is_refused_before_anything_is_written(home):
    with pytest.raises(BdmError, match=r"unknown table 'oter'\. Did you mean 'other'"):
        report.run("oter")
    assert not (home / "results").exists()


def test_the_page_stands_alone(filled):
    found = page(filled)
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert "@import" not in "".join(found.words)
    assert "url(" not in "".join(found.words)


def test_the_page_holds_grids_plots_and_curves(filled):
    found = page(filled)
    images = found.images()
    shades = {image.getpixel((0, 0)) for image in images if image.mode == "L"}
    assert shades == {100, 101}
    red = [image for image in images if image.mode == "RGB" and image.getpixel((0, 0)) == (255, 0, 0)]
    assert [image.size for image in red] == [(report.PLOT_PX, 333)]
    assert "digits-w1a4 · seed 0 · ddim50-eta0-round · FID 30" in found.text
    assert "Other seeds (1)" in found.text
    html = (filled / "results" / "report.html").read_text(encoding="utf-8")
    for alt in (
        "noise loss over training steps, digits-w1a4",
        "digits miniature: FID",
        "Table 7 on the digits miniature: FID",
        "Table 7, the paper&#39;s own numbers: FID",
    ):
        assert f'alt="{alt}"' in html
    assert "Table 7 at the paper&#39;s scale" not in html


def test_large_grids_are_scaled_down(home):
    draw_grid("digits-w1a4-s0", "ddim", 7, size=(2000, 1000))
    runs.write_text(runs.recipe_copy("digits-w1a4-s0"), recipe.load("digits-w1a4").model_dump_json())
    report.run()
    assert (report.GRID_PX, report.GRID_PX // 2) in [image.size for image in page(home).images()]


def test_the_page_says_what_contradicts_the_paper(filled, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(filled))
    verdicts = report.verdicts(tables.long(records.read()))
    told = {(line["Table"], line["Step"]): line["Verdict"] for line in verdicts.to_dict("records")}
    assert told == {
        ("7", "Vanilla → +EBB"): "contradicts the paper",
        ("7", "+EBB → +LRM"): "as the paper says",
        ("7", "Vanilla → +LRM"): "as the paper says",
    }
    assert "contradicts the paper" in page(filled).text


@pytest.mark.parametrize(
    ("baseline", "student", "verdict"),
    [
        ((60.0,), (30.0,), "same direction, too few seeds to tell"),
        ((30.0,), (60.0, 61.0), "opposite direction, too few seeds to tell"),
        ((50.0, 60.0), (48.0, 58.0), "no difference beyond the seeds' spread"),
        ((59.0, 61.0), (29.0, 31.0), "as the paper says"),
        # change -8; standard errors 3 and 3: 2 * sqrt(9 + 9) = 8.49
        ((57.0, 63.0), (49.0, 55.0), "no difference beyond the seeds' spread"),
        # change -9
        ((57.0, 63.0), (48.0, 54.0), "as the paper says"),
    ],
)
def test_verdicts_ask_for_two_standard_errors(home, baseline, student, verdict):
    for name, values in (("digits-w1a4-baseline", baseline), ("digits-w1a4", student)):
        for seed, value in enumerate(values):
            measure(name, "fid", value, seed)
    (line,) = report.verdicts(tables.long(records.read())).to_dict("records")
    assert (line["Step"], line["Verdict"]) == ("Vanilla → +LRM", verdict)


def test_verdicts_at_the_papers_scale_carry_the_dagger(home):
    for seed in range(2):
        measure("bedrooms-w1a32-ebb", "fid", 8.0 + 0.02 * seed, seed)
        measure("bedrooms-w1a32", "fid", 7.0 + 0.02 * seed, seed)
    report.run()
    (line,) = report.verdicts(tables.long(records.read())).to_dict("records")
    assert (line["Our scale"], line["Our FID"]) == ("paper's", "8.01 → 7.01†")


def test_text_from_files_is_escaped(home):
    evil = "digits-w1a4-<img src=x onerror=alert(1)>&"
    measure(evil, "fid", 9.0)
    draw_grid("digits-<b>-s0", "<i>", 5)
    report.run()
    html = (home / "results" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert evil in page(home).text


def test_provenance_of_every_run(filled, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(filled))
    text = page(filled).text
    (record, *_) = records.read()
    for part in (record.commit, record.machine, record.time[:10], f"torch {record.versions['torch']}"):
        assert part in text
    table = report._run_table(["digits-w1a4-s0", "digits-w1a4-s1"], records.read()).set_index("Run")
    trained = table.loc["digits-w1a4-s1"]
    assert (trained["Seed"], trained["Training steps"], trained["Training time (s)"]) == (1, 400, "40")
    assert trained["Batch"] == recipe.load("digits-w1a4").train.batch
    assert (trained["Images"], trained["Measured"], trained["Made with"]) == (1797, "fid", "A")
    assert table.loc["digits-fp-s0"]["Batch"] == ""


def test_measurements_without_a_place_are_shown(filled, home):
    assert "Other runs" in page(filled).text
    measure("digits-w1a4-mine", "sfid", 41.5)
    assert report.run("other").to_dict("records") == [{"recipe": "digits-w1a4-mine", "sfid": "41.50 (1)"}]


def test_a_recipe_that_changed_since_is_told(filled, tmp_path, monkeypatch, capsys):
    assert "Changed since" not in page(filled).text
    monkeypatch.setenv("BDM_HOME", str(tmp_path))
    measure("digits-w1a4", "sfid", 12.0, digest="older")
    report.run()
    assert "Changed since they were measured: the recipes digits-w1a4 ." in page(tmp_path).text
    assert "changed since they were measured: digits-w1a4\n" in capsys.readouterr().err


def test_nothing_measured_yet(home):
    overview = report.run()
    assert overview["ours"].sum() == overview["digits"].sum() == 0
    counted = overview.set_index("table")["counted"]
    assert counted[counted > 0].to_dict() == {"2": 41, "5": 10, "6": 4, "16": 6, "B4": 6}
    found = page(home)
    assert "Nothing has been measured yet" in found.text
    assert "bdm demo" in found.text
    assert "427.46" in found.text
    assert "Provenance" not in found.text
    assert not found.images()
    assert len(list((home / "results" / "tables").glob("*.md"))) == 21


def test_a_started_run_without_a_log(home):
    runs.write_text(runs.recipe_copy("digits-w1a4-s0"), recipe.load("digits-w1a4").model_dump_json())
    report.run()
    assert "nothing yet" in page(home).text


def test_a_recipe_that_cannot_be_read_is_named(home):
    runs.write_text(runs.recipe_copy("digits-w1a4-s0"), "{}")
    with pytest.raises(BdmError, match=r"digits-w1a4-s0/recipe\.json holds no recipe"):
        report.run()


def test_written_twice_is_the_same_page(home):
    measure("digits-w1a4", "fid", 30.0)
    report.run()
    first = (home / "results" / "report.html").read_bytes()
    report.run()
    assert (home / "results" / "report.html").read_bytes() == first
