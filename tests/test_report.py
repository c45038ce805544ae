"""The report of a study in any state: self-contained, escaped, complete, and reproducible."""

import csv
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atn_norms.ablation import report
from atn_norms.ablation.analysis.comparison import compare
from atn_norms.ablation.report import costs as report_costs
from atn_norms.ablation.report import curves, forest, heatmap, strip
from atn_norms.ablation.report.canvas import _compact, save
from atn_norms.ablation.report.csv_export import curves_csv, points_csv, results_csv
from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.report.heatmap import blocks, shade
from atn_norms.ablation.report.html import sections
from atn_norms.ablation.report.names import Layout, number
from atn_norms.ablation.report.sentences import answer
from atn_norms.ablation.report.tables import FITTED, latex, markdown
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord
from atn_norms.commands.studies import _levels
from atn_norms.errors import SpecError
from atn_norms.specs import read
from tests.recorded import METRIC, grid, score, study, verdict_text
from tests.test_decision import tuned

KINDS = ("forest", "heatmap", "curves", "strip", "steps-heatmap", "steps-strip")
EVIL = '<script>alert("x")</script> $x_1$ & {a}#|%`\\'
TASKS = {
    "adding": TaskFacts(METRIC, {"guessing one": 1 / 6}),
    "charlm": TaskFacts("bits per character", {"unigram": 4.5}),
}


class Page(HTMLParser):
    """The resources, scripts and names of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[StudyRecord, Path]:
    record = study(score, tasks=TASKS)
    folder = tmp_path_factory.mktemp("report")
    report.write(record, folder)
    return record, folder


def wreck(record: StudyRecord) -> StudyRecord:
    """Return the study with a diverged, a failed, a running and a pending trial."""
    trials = list(record.trials)
    trials[-1] = replace(trials[-1], status="diverged", result={"outcome": "diverged", "step": 137, "metrics": {}})
    error = {"error": "RuntimeError: out of memory", "traceback": "Traceback: deep <inside>"}
    trials[-2] = replace(trials[-2], status="failed", result=None, error=error)
    trials[-3] = replace(trials[-3], status="running", result=None)
    trials[-4] = replace(trials[-4], status="pending", result=None, run=None, curve=[])
    return replace(record, trials=tuple(trials))


def evil(record: StudyRecord) -> StudyRecord:
    """Return the study with a hostile name in place of every name that a file can set."""
    trials = tuple(
        replace(
            t,
            points=tuple({"task": EVIL, EVIL: EVIL, "window": point["window"]} for point in t.points),
            status="failed",
            error={"error": f"={EVIL}", "traceback": EVIL},
        )
        for t in record.trials
        if t.points[0]["norm"] == "layer"
    )
    axes = {EVIL: [EVIL], "window": record.axes["window"]}
    facts = {EVIL: TaskFacts(EVIL, {EVIL: 0.5})}
    return StudyRecord(EVIL, {EVIL: EVIL}, {EVIL: EVIL}, axes, facts, {EVIL: EVIL}, trials)


def test_everything_is_written(whole):
    _, folder = whole
    pictures = {f"{kind}-{task}.{ext}" for kind in KINDS for task in TASKS for ext in ("png", "svg")}
    texts = {"report.html", "results.csv", "points.csv", "curves.csv", "tables.md", "tables.tex"}
    texts |= {"study.yaml", "study.json"}
    assert {path.name for path in folder.iterdir()} == pictures | texts
    for name in pictures:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") if name.endswith("png") else ET.fromstring(content).tag.endswith("svg")


def test_building_again_gives_the_same_bytes_in_another_process(whole, tmp_path):
    _, folder = whole
    code = (
        "import sys; from pathlib import Path; from atn_norms.ablation import report; import tests.test_report as t;"
        "report.write(t.study(t.score, tasks=t.TASKS), Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("case", ["whole", "wrecked", "hostile", "tuned"])
def test_a_published_report_is_read_back_and_written_again_byte_for_byte(case, tmp_path):
    record = {
        "whole": study(score, tasks=TASKS),
        "wrecked": wreck(study(score)),
        "hostile": evil(study(score, seeds=2)),
        "tuned": tuned({(norm, rate): [(0.1, 0.2), (0.3, 0.1)] for norm in ("none", "layer") for rate in ("1", "2")}),
    }[case]
    record = replace(record, trials=tuple(map(as_stored, record.trials)))
    for path in report.write(record, tmp_path / "once"):
        assert path.is_file()
    assert report.is_report(tmp_path / "once")
    for path in report.write(report.read(tmp_path / "once"), tmp_path / "again"):
        assert path.read_bytes() == (tmp_path / "once" / path.name).read_bytes(), path.name


def as_stored(trial: TrialRecord) -> TrialRecord:
    """Return the trial without a result if it failed."""
    return replace(trial, result=None if trial.status == "failed" else trial.result)


def test_a_damaged_report_is_named(whole, tmp_path):
    record, _ = whole
    report.write(record, tmp_path)
    lines = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "results.csv").write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(StoreError, match="damaged, study.json and the CSV files do not fit"):
        report.read(tmp_path)


def test_only_the_formats_that_are_named_are_written_and_linked(whole, tmp_path):
    files = {path.name for path in report.write(whole[0], tmp_path, formats=["svg"])}
    assert not [name for name in files if name.endswith((".png", ".md", ".tex"))]
    assert "forest-adding.svg" in files
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a" and attributes.get("href")}
    assert {link for link in links if link and link[0] != "#"} == files - {"report.html", "study.json"}
    with pytest.raises(SpecError, match=r"formats: got unknown format 'pgn'; expected one of svg, png, md, tex.*'png'"):
        report.write(whole[0], tmp_path, formats=["pgn"])


def test_the_findings_of_a_report_are_computed_once(whole, tmp_path, monkeypatch):
    found = findings(whole[0])
    monkeypatch.setattr(report, "findings", None)
    assert report.write(found, tmp_path)[0].read_bytes() == (whole[1] / "report.html").read_bytes()
    assert report.table(found).records == report.table(whole[0]).records


def test_the_page_loads_nothing_and_runs_nothing(whole):
    page = (whole[1] / "report.html").read_text(encoding="utf-8")
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for key in ("src", "href", "xlink:href"):
            target = attributes.get(key) or "#"
            assert target.startswith("#") or (tag == "a" and (whole[1] / target).is_file()), f"{tag} {key}={target}"
        assert not any(key.startswith("on") for key in attributes)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import", page)


def test_several_pictures_share_a_page_without_sharing_an_id(whole):
    tags = Page((whole[1] / "report.html").read_text(encoding="utf-8")).tags
    ids = Counter(attributes["id"] for _, attributes in tags if "id" in attributes)
    assert ids.most_common(1)[0][1] == 1
    used = {
        target.removeprefix("#")
        for _, a in tags
        for k, target in a.items()
        if k.endswith("href") and target and target[0] == "#"
    }
    used |= set(re.findall(r"url\(#([^)]+)\)", (whole[1] / "report.html").read_text(encoding="utf-8")))
    assert used <= set(ids)


def test_pictures_describe_their_content(whole):
    tags = Page((whole[1] / "report.html").read_text(encoding="utf-8")).tags
    pictures = [attributes for tag, attributes in tags if tag == "svg"]
    ids = {attributes.get("id") for _, attributes in tags}
    assert len(pictures) == len(KINDS) * len(TASKS)
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    svg = ET.fromstring((whole[1] / "heatmap-adding.svg").read_text(encoding="utf-8"))
    described = svg.findtext("{http://www.w3.org/2000/svg}desc") or ""
    assert "layer, window 25: " in described


def test_the_heat_map_writes_every_mean_and_merges_cells_of_one_point(whole):
    record, folder = whole
    svg = (folder / "heatmap-adding.svg").read_text(encoding="utf-8")
    (comparison, _) = compare(record)
    for row in comparison.rows:
        assert f">{number(row.point.mean)}</text>" in svg
    found = blocks(comparison, Layout.of(record), {}, record.axes["norm"], record.axes["window"])
    assert [(b.top, b.left, b.tall, b.wide) for b in found if b.row and b.row.is_reference] == [(0, 0, 1, 2)]
    assert len(found) == 5


def test_better_is_blue_and_worse_is_orange_and_the_baseline_neither():
    record = study(lambda norm, window, seed: {"none": 2.0, "layer": 1.5, "rms": 2.5}[norm] + 0.01 * seed)
    (comparison,) = compare(record)
    colours = {row.point.cells[0]["norm"]: shade(record, comparison).colour(row) for row in comparison.rows}
    channels = {norm: [int(str(colour)[i : i + 2], 16) for i in (1, 3, 5)] for norm, colour in colours.items()}
    assert channels["layer"][2] > channels["layer"][0] + 50
    assert channels["rms"][0] > channels["rms"][2] + 50
    assert max(channels["none"]) - min(channels["none"]) < 5


def test_noise_stays_pale():
    record = study(lambda norm, window, seed: 2.0 + (-1) ** seed * 0.5 + (0.01 if norm == "layer" else 0.0))
    (comparison,) = compare(record)
    row = comparison.at({"norm": "layer", "window": "1"})
    assert row is not None
    colour = shade(record, comparison).colour(row) or ""
    assert min(int(colour[i : i + 2], 16) for i in (1, 3, 5)) > 225


def test_every_trial_is_a_line_of_the_csv():
    record = wreck(study(score, tasks=TASKS))
    lines = list(csv.DictReader(io.StringIO(results_csv(findings(record)))))
    assert [line["trial"] for line in lines] == [t.id for t in record.trials]
    assert [line["status"] for line in lines[-4:]] == ["pending", "running", "failed", "diverged"]
    assert lines[0] | {"norm": "none", "window": "any", "seed": "0", "seconds": "2.5"} == lines[0]
    assert float(lines[0]["test"]) == score("none", "1", 0)
    assert lines[-2]["reason"] == "RuntimeError: out of memory"


def test_axes_with_the_name_of_another_column_lose_no_value(tmp_path):
    axes = {
        "status": ["q"],
        "margin": ["0.5"],
        "test size": ["small"],
        "axis steps": ["r"],
        "steps": ["s"],
        "x": ["1", "2"],
    }
    record = grid(axes, lambda point, seed: 1.0 + 0.1 * seed + (point["x"] == "2"), seeds=2, baseline={"x": "1"})
    report.write(record, tmp_path, formats=[])
    first = {"results.csv": ["axis status", "margin", "axis test size", "axis steps", "axis axis steps", "x"]}
    first["points.csv"] = ["status", "axis margin", "axis test size", "axis steps", "steps", "x"]
    for file, columns in first.items():
        headers, *rows = csv.reader(io.StringIO((tmp_path / file).read_text()))
        assert len(set(headers)) == len(headers)
        assert [header for header in headers if header.removeprefix("axis ").removeprefix("axis ") in axes][
            :6
        ] == columns
        lines = [dict(zip(headers, row, strict=True)) for row in rows]
        for axis, column in zip(axes, columns, strict=True):
            assert {line[column] for line in lines} == set(axes[axis])
    again = report.read(tmp_path)
    assert again.trials[0].result == record.trials[0].result
    report.write(again, tmp_path / "again", formats=[])
    for path in tmp_path.glob("*.*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("keep", "goal", "step"), [("last", "min", 20), ("best", "min", 10), ("best", "max", 15)])
def test_the_step_whose_weights_are_scored_is_reported(tmp_path, keep, goal, step):
    record = study(score, norms=("none",), seeds=1, tasks={"adding": TaskFacts("score", goal=goal)})
    looks = [{"step": s, "train_loss": 1.0, "validation": v} for s, v in [(5, 2.0), (10, 1.0), (15, 3.0), (20, 1.0)]]
    (only,) = record.trials
    only = replace(only, curve=looks, trial={"seed": 0, "train": {"steps": 20, "keep": keep}})
    record = replace(record, trials=(only,))
    (line,) = csv.DictReader(io.StringIO(results_csv(findings(record))))
    assert (line["step"], line["scored_step"]) == ("20", str(step))
    report.write(record, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (f"20, scored {step}" in page) == (step != 20)


def test_a_trial_that_ended_early_reports_its_steps_and_reason(tmp_path):
    record = study(score, norms=("none",), seeds=1)
    (only,) = record.trials
    ended = {**(only.result or {}), "reason": "no improvement in 2 validations"}
    record = replace(record, trials=(replace(only, trial={"seed": 0, "train": {"steps": 60}}, result=ended),))
    (line,) = csv.DictReader(io.StringIO(results_csv(findings(record))))
    assert (line["step"], line["steps"], line["reason"]) == ("20", "60", "no improvement in 2 validations")
    report.write(record, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "20 of 60: no improvement in 2 validations" in page


def test_the_study_file_on_the_page_has_only_declared_options(tmp_path):
    record = study(score, norms=("none",), seeds=1)
    report.write(replace(record, study=record.study | {"task": "adding", "tasks": None, "reach": None}), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "task: adding" in page
    assert "null" not in page[page.index("Run it again</h2>") :]


def test_failed_and_diverged_trials_are_shown_with_their_reason(tmp_path):
    record = wreck(study(score))
    report.write(record, tmp_path)
    page = " ".join(" ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts).split())
    assert "RuntimeError: out of memory" in page
    assert "Traceback: deep <inside>" in page
    assert "5 diverged 137 the loss grew without bound" in page
    assert "1 diverged, 1 failed, 1 running and 1 pending" in page
    for kind in ("heatmap", "strip"):
        drawn = (tmp_path / f"{kind}-adding.svg").read_text(encoding="utf-8")
        assert "1 diverged, 1 failed, 1 running, 1 pending</text>" in drawn
    assert "2 of 6 (1 diverged, 1 failed, 1 running, 1 pending)" in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_names_from_files_are_escaped_everywhere(tmp_path):
    record = evil(study(score, seeds=2))
    report.write(record, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(EVIL in text for text in page.texts) > 10
    assert "<script" not in (tmp_path / "tables.md").read_text(encoding="utf-8")
    for path in tmp_path.glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text(encoding="utf-8"))))
    assert {line["reason"] for line in lines} == {f"'={EVIL}"}
    assert {line[EVIL] for line in lines} == {EVIL}


def test_tables_escape_special_characters():
    record = evil(study(score, seeds=2))
    text = latex(findings(record))
    assert r"\$x\_1\$ \& \{a\}\#\textbar{}\%" in text
    assert text.count(r"\begin{tabular}{lllrrll}") == 1
    for line in text.splitlines():
        if line.endswith(r" \\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 6
    refuse_bad_latex(text)
    rows = [line for line in markdown(findings(record)).splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


def refuse_bad_latex(text: str) -> None:
    """Check that braces and environments are balanced, and that all special characters of TeX are escaped."""
    assert text.isascii()
    text = re.sub(r"^%.*", "", text, flags=re.M).replace(FITTED, "{")
    bare = re.sub(r"\\[\\{}$&#%_]|\$(?:-|\\geq)\$", "", text)  # without escaped signs, ends of rows and mathematics
    assert not re.search(r"[$#%_^<>|]", bare)
    open_ones: list[str] = []
    for word in re.findall(r"\\(?:begin|end)\{\w+\}|[{}]", bare):
        if word == "{" or word.startswith(r"\begin"):
            open_ones.append(word)
        else:
            assert open_ones.pop() == ("{" if word == "}" else word.replace("end", "begin", 1))
    assert not open_ones


def test_a_table_in_latex_fits_the_page_with_its_headers_in_short_lines():
    text = latex(findings(study(score)))
    refuse_bad_latex(text)
    assert r"\shortstack[l]{difference to\\none} & \shortstack[l]{ahead of none\\at}" in text
    assert "& mean & median &" in text
    assert text.count(FITTED + "\n\\begin{tabular}") == text.count(r"\end{tabular}}") == 3


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_the_answer_claims_nothing_on_few_seeds(seeds):
    words = verdict_text(study(score, seeds=seeds))
    assert "every comparison is undecided: a verdict needs at least 5 seeds" in words
    assert words.startswith("Norm: helps at 0, hurts at 0, undecided at 4 of 4")
    assert f"({seeds} seed" in words
    assert "[" not in words


def test_the_table_is_plain_json_with_every_row():
    record = wreck(study(score, tasks=TASKS))
    diverged = [replace(t, status="diverged") if t.points[0]["norm"] == "rms" else t for t in record.trials]
    record = replace(record, trials=tuple(diverged))
    table = report.table(record)
    assert len(table.rows) == len(table.records) == 10
    assert {len(row) for row in table.rows} == {len(table.headers)}
    text = json.dumps(table.records, allow_nan=False)
    first = json.loads(text)[1]
    assert first["point"] == {"norm": "layer", "window": "1"}
    assert first["against_baseline"]["verdict"] == first["decision"]["verdict"] == "helps"
    assert first["decision"]["family"] == 8
    assert first["against_baseline"]["probability_of_improvement"] == 1.0
    last = json.loads(text)[-1]
    assert (last["mean"], last["median"], last["trials"]) == (None, None, {"diverged": 6})


def strange(record: StudyRecord) -> dict[str, StudyRecord]:
    values = [1e308, math.nan, math.inf, -math.inf, 0.0, -3.0, 5e-324, None]
    wild = tuple(
        replace(
            t,
            result={"metrics": {"test": {METRIC: values[i % 8]}}},
            curve=[{"step": 1, "train_loss": values[i % 8], "validation": values[(i + 1) % 8]}],
        )
        for i, t in enumerate(record.trials)
    )
    failed = tuple(replace(t, status="failed", result=None, error=None, run=None) for t in record.trials)
    return {
        "wild values": replace(record, trials=wild),
        "all failed": replace(record, trials=failed),
        "nothing started": replace(
            record, trials=tuple(replace(t, status="pending", result=None, curve=[], run=None) for t in record.trials)
        ),
        "no trials": replace(record, trials=()),
        "no tasks": replace(record, trials=(), tasks={}),
        "no baseline": replace(record, baseline={}),
        "baseline elsewhere": replace(record, baseline={"norm": "group"}),
        "no axes": replace(
            record,
            axes={},
            trials=tuple(replace(t, points=({"task": "adding"},)) for t in record.trials[:4]),
            baseline={},
        ),
        "one point": study(score, norms=["rms"], windows=["25"], baseline={"norm": "rms"}),
        "one seed": study(score, seeds=1),
        "window alone": replace(
            study(score, norms=["rms"], baseline={"window": "1"}),
            axes={"window": ["1", "25"]},
        ),
        "three axes": replace(
            record,
            axes={"cell": ["lstm", "gru"], **record.axes},
            trials=tuple(
                replace(t, id=f"{cell}{t.id}", points=tuple({**p, "cell": cell} for p in t.points))
                for cell in ("lstm", "gru")
                for t in record.trials
            ),
        ),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", list(strange(study(score, seeds=2))))
def test_any_study_gets_a_report(case, tmp_path):
    record = strange(study(score, seeds=2))[case]
    files = report.write(record, tmp_path)
    assert files[0] == tmp_path / "report.html"
    page = " ".join(Page(files[0].read_text(encoding="utf-8")).texts)
    for shown in record.trials:
        assert shown.id[:12] in page
    assert "nan" not in page.split()


def test_the_study_on_the_page_is_a_file_that_reads_back(tmp_path):
    record = replace(
        study(score, seeds=1), study={"model": {"cell": "lstm"}, "axes": {"norm": ["none", "1"]}, "lr": 1e-2}
    )
    files = report.write(record, tmp_path)
    page = Page(files[0].read_text(encoding="utf-8"))
    (tmp_path / "study.yaml").write_text(next(text for text in page.texts if text.startswith("model:")))
    assert read(tmp_path / "study.yaml")[0] == record.study


def test_a_report_with_whole_ids_is_read(tmp_path):
    """Reports of earlier versions have them; those of this version have the first eight characters."""
    record = study(score, seeds=2, norms=["rms"])
    trials = [replace(t, id=hashlib.sha256(t.id.encode()).hexdigest()[:16]) for t in record.trials]
    record = replace(record, trials=tuple(map(as_stored, trials)))
    report.write(record, tmp_path, formats=())
    before = report.read(tmp_path)
    assert [trial.id for trial in before.trials] == [trial.id for trial in trials]
    for name in ("results.csv", "curves.csv"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for trial in trials:
            assert trial.id[:8] in text and trial.id not in text
            text = text.replace(trial.id[:8], trial.id)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert report.read(tmp_path) == before


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(StoreError, match="report: got a file; expected a folder"):
        report.write(study(score, seeds=1, norms=["rms"]), tmp_path / "report")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = matplotlib.rcParams.copy()
    report.write(study(score, seeds=1, norms=["rms"]), tmp_path)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def beyond(figure) -> list[float]:
    """Return the pixels by which a figure's contents exceed its edges: left, bottom, right, top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, box = figure.get_tightbbox(canvas.get_renderer()), figure.bbox_inches
    reach = (box.x0 - drawn.x0, box.y0 - drawn.y0, drawn.x1 - box.x1, drawn.y1 - box.y1)
    return [round(72 * each, 1) for each in reach]


LONG = "a-very-long-normalizer-name(gain=0.1, per_step=true, statistics=shared, eps=0.001)"
WINDOWED = {"norm": ["none", "layer", "rms"], "window": ["1", "25"]}


def ends(point: dict[str, str], seed: int) -> float:
    return score(point.get("norm", "rms") if point.get("norm") in ("none", "layer") else "rms", "1", seed)


NONE = {"norm": "none"}
GALLERY = {
    "two seeds": grid(WINDOWED, ends, seeds=2, baseline=NONE),
    "ten seeds": grid(WINDOWED, ends, seeds=10, baseline=NONE),
    "many axes": grid({"cell": ["lstm", "gru"], **WINDOWED}, ends, baseline=NONE),
    "wrecked": wreck(grid(WINDOWED, ends, baseline=NONE)),
    "hostile": grid({EVIL: [EVIL, "b"]}, ends, baseline={EVIL: "b"}, task=EVIL, facts=TaskFacts(EVIL, {EVIL: 0.2})),
    "long names": grid({"norm": ["none", LONG], "window": ["1", LONG]}, ends, baseline=NONE, task=LONG),
    "single point": grid({}, ends),
}


@pytest.mark.parametrize("case", list(GALLERY))
def test_nothing_leaves_its_picture(case, monkeypatch):
    found = {}

    def watched(figure, name, *rest):
        found[name] = beyond(figure)
        assert figure.get_size_inches()[0] < 13, "wider than any page"
        return save(figure, name, *rest)

    for module in (forest, heatmap, curves, strip):
        monkeypatch.setattr(module, "save", watched)
    sections(findings(GALLERY[case]))
    assert len(found) == {"single point": 3}.get(case, 6)
    assert not {name: reach for name, reach in found.items() if max(reach) > 1}


@pytest.mark.parametrize("far", [False, True])
def test_the_forest_writes_a_long_measure_in_full(far, monkeypatch):
    record = study(lambda norm, window, seed: score(norm, window, seed) * (1 + 1e4 * (far and window == "25")))
    record = replace(record, study={**record.study, "endpoint": {"measure": "tail", "validations": 2}})
    reach = {}

    def watched(figure, name, *rest):
        reach.update({name: beyond(figure)})
        return save(figure, name, *rest)

    monkeypatch.setattr(forest, "save", watched)
    found = findings(record)
    picture = forest.forest(found.record, found.tasks[0], "forest")
    assert picture is not None and ">mean of the last 2 validations of mean squared error<" in picture.svg
    assert ("logarithmic beyond" in picture.svg) == far
    assert max(reach["forest"]) <= 1


@pytest.mark.parametrize("baseline", [{}, {"norm": "none"}, {"norm": "layer"}, {"window": "1"}, {"window": "25"}])
def test_the_curves_of_every_point_are_drawn(baseline, monkeypatch):
    drawn = []
    seeds = curves._seeds

    def watched(axes, point, *how, **look):
        drawn.append(point)
        seeds(axes, point, *how, **look)

    monkeypatch.setattr(curves, "_seeds", watched)
    record = study(score, baseline=baseline)
    (comparison,) = compare(record)
    curves.curves(record, comparison, "curves", None)
    assert {id(row.point) for row in comparison.rows} == set(map(id, drawn))
    assert len(comparison.rows) == 5


def test_a_trial_that_diverged_before_any_measurement_has_a_cross(monkeypatch):
    crosses = []

    def watched(figure, *rest):
        crosses.extend(line for axes in figure.axes for line in axes.lines if line.get_marker() == "x")
        return save(figure, *rest)

    monkeypatch.setattr(curves, "save", watched)
    record = study(score, seeds=2)
    ended = {"outcome": "diverged", "step": 2, "metrics": {}}
    trials = [
        replace(t, status="diverged", curve=[], result=ended, step=2) if t.points[0]["norm"] == "rms" else t
        for t in record.trials
    ]
    record = replace(record, trials=tuple(trials))
    curves.curves(record, compare(record)[0], "curves", None)
    assert [list(line.get_xdata()) for line in crosses] == [[2]] * 4


def test_a_rounded_path_is_the_line_that_was_drawn():
    figure = Figure(figsize=(3, 2))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    (line,) = axes.plot([math.sin(7 * x) for x in range(30)])
    drawn: Any = ET.fromstring(save(figure, "rounded", "a wave", "text").svg)
    paths = [path.get("d") for path in drawn.iter("{http://www.w3.org/2000/svg}path") if path.get("id") is None]
    numbers = re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+)", max(paths, key=len))  # a sign may be all that separates two
    assert max(len(number.partition(".")[2]) for number in numbers) == 2
    places = zip(*(accumulate(map(float, numbers[axis::2])) for axis in (0, 1)), strict=True)
    points = [[x * 72 / figure.dpi, 144 - y * 72 / figure.dpi] for x, y in axes.transData.transform(line.get_xydata())]
    for place, point in zip(places, points, strict=True):
        assert place == pytest.approx(point, abs=0.0051)


def test_a_path_keeps_each_letter_that_does_not_repeat():
    drawn = '<path d="M 0.123456 10.5 L 0.5 9.25 L 3.333333 9.25 L 3.4 0.0 z M 1 2 M 3 3 L 0.4 20.2"/>'
    assert _compact(drawn) == '<path d="M.12 10.5l.38-1.25 2.83 0 .07-9.25zM1 2M3 3l-2.6 17.2"/>'


@pytest.mark.parametrize("log", [False, True])
def test_the_thick_line_is_the_mean_of_the_table(log, monkeypatch):
    drawn = []

    def watched(figure, *rest):
        drawn.extend(line for axes in figure.axes for line in axes.lines if line.get_linewidth() == 2)
        return save(figure, *rest)

    monkeypatch.setattr(curves, "save", watched)
    record = study(lambda norm, window, seed: 0.01 * 10.0**seed, seeds=3)
    facts = {name: replace(each, spread="multiplicative" if log else "additive") for name, each in record.tasks.items()}
    record = replace(record, tasks=facts)
    curves.curves(record, compare(record)[0], "curves", None)
    ends = {round(float(line.get_ydata()[-1]), 6) for line in drawn if len(line.get_ydata())}
    assert ends == {0.1 if log else 0.37}


def test_reaching_a_level_at_the_very_last_step_is_reaching_it():
    record = study(lambda norm, window, seed: 0.15 if norm == "none" else 0.1, seeds=2)
    found = findings(record, {"adding": 0.11})
    answers = answer(found, found.tasks[0])[-1]
    tied = "layer, window 1, tied with layer, window 25 and rms, window 1 and rms, window 25, after 20 steps"
    assert f"is reached soonest by {tied}" in answers.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(("best", "answers"), [(0.2, True), (1 / 6, True), (0.16, False)])
def test_a_best_that_has_learnt_nothing_is_called_so(best, answers):
    record = study(lambda norm, window, seed: best if norm == "layer" else 0.3)
    assert ("no better than the trivial predictor “guessing one”, 0.167" in verdict_text(record)) == answers


def test_the_answer_is_short_and_claims_nothing_without_an_interval():
    for record in GALLERY.values():
        found = findings(record)
        answers = answer(found, found.tasks[0])
        assert len(answers) <= 5
        for sentence in answers:
            assert not re.search(r"\b(better|worse|faster|slower)\b", sentence), "not a word of a verdict"
            claims = re.search(r"^\w+ (helps|hurts) at ", sentence)
            assert not claims or re.search(r"\[[^\]]*\d[^\]]*\], adjusted p", sentence), sentence
    few = findings(GALLERY["two seeds"])
    assert not any(re.search("^Norm (helps|hurts)", each) for each in answer(few, few.tasks[0]))


def test_a_ratio_beyond_the_largest_number_has_an_axis():
    record = grid(
        {"norm": ["none", "layer"]},
        lambda p, s: (1e-320 if p["norm"] == "none" else 9e29) * (1 + s),
        baseline={"norm": "none"},
        facts=TaskFacts(METRIC, {}, spread="multiplicative"),
    )
    found = findings(replace(record, study={**record.study, "margin": 1e300}))
    assert forest.forest(found.record, found.tasks[0], "forest") is not None


def test_an_accuracy_is_read_the_other_way_round():
    facts = TaskFacts("accuracy", {"the most common": 0.1}, "max")
    record = grid(
        {"norm": ["none", "layer", "rms"]},
        lambda p, s: {"none": 0.6, "layer": 0.9, "rms": 0.4}[p["norm"]] + 0.01 * s,
        seeds=8,
        baseline={"norm": "none"},
        facts=facts,
    )
    words = verdict_text(record)
    assert words.startswith("Norm: helps at 1, hurts at 1, undecided at 0 of 2 ")
    assert words.count("The highest mean test accuracy is 0.935") == 1
    assert "Norm helps at layer (+0.300 (8 seeds), adjusted p 0.016). Norm hurts at rms (-0.200" in words
    (comparison,) = compare(record)
    colours = {row.point.cells[0]["norm"]: shade(record, comparison).colour(row) for row in comparison.rows}
    blue, orange = ([int(str(colours[norm])[i : i + 2], 16) for i in (1, 5)] for norm in ("layer", "rms"))
    assert blue[1] > blue[0] + 50
    assert orange[0] > orange[1] + 50
    assert shade(record, comparison).ends[0].endswith("higher")
    assert "higher is better" in markdown(findings(record))


def test_control_characters_are_written_out(tmp_path):
    name = "la\x07yer\u202e\x00"
    record = grid({"norm": ["none", name]}, ends, seeds=2, baseline=NONE, name=name)
    report.write(record, tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix != ".png":
            text = path.read_text(encoding="utf-8")
            assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text), path.name
        if path.suffix == ".svg":
            ET.fromstring(path.read_text(encoding="utf-8"))
    assert r"la\x07yer\u202e\x00" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_is_small_enough_to_keep_beside_the_code(tmp_path):
    record = grid(
        {"norm": ["none", "layer", "batch", "rms"], "window": ["1", "25"]}, ends, seeds=6, baseline={"norm": "none"}
    )
    assert len(record.trials) == 42
    assert sum(len(t.curve) for t in record.trials) == 4200
    files = report.write(record, tmp_path)
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_the_strip_plot_of_logarithms_names_the_geometric_mean(tmp_path):
    logarithmic = TaskFacts(METRIC, spread="multiplicative")
    for facts, mean in ((TaskFacts(METRIC), "Bar: mean of"), (logarithmic, "Bar: geometric mean of")):
        report.write(grid(WINDOWED, ends, seeds=2, baseline=NONE, facts=facts), tmp_path / facts.spread)
        picture = (tmp_path / facts.spread / "strip-adding.svg").read_text(encoding="utf-8")
        assert f"{mean} the finished seeds." in picture


def test_the_page_reports_the_time_to_a_level(tmp_path):
    record = grid(WINDOWED, ends, baseline=NONE)
    report.write(record, tmp_path, {"adding": 0.1})
    page = " ".join(" ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts).split())
    assert "The level, 0.100, was named for this report." in page
    assert "steps to a validation mean squared error of 0.100, fewer is better" in page
    assert "never at 5 of 5" in page
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text(encoding="utf-8"))))
    assert {line["level"] for line in lines} == {"0.1"}
    assert {line["reached_at"] for line in lines if line["norm"] == "none"} == {""}
    for line, shown in zip(lines, record.trials, strict=True):
        first = [x["step"] for x in shown.curve if x["validation"] is not None and x["validation"] <= 0.1][:1]
        assert line["reached_at"] == "".join(map(str, first))
    with pytest.raises(
        SpecError, match="--reach: got unknown task 'adding2'; expected one of adding; did you mean 'adding'?"
    ):
        report.write(record, tmp_path, {"adding2": 0.1})


def test_trivial_predictors_that_differ_between_points_are_listed_and_not_drawn(tmp_path):
    at = {"task.length 2": {"guess": 0.7}, "task.length 100": {"guess": 0.04}}
    axes = {"task.length": ["2", "100"], "norm": ["none", "layer"]}
    record = grid(axes, lambda point, seed: 0.1 + 0.01 * seed, facts=TaskFacts(METRIC, baselines_at=at))
    page = report.write(record, tmp_path)[0].read_text()
    words = "which differ between points and are not drawn: “guess” 0.700 at task.length 2; “guess” 0.0400 at"
    assert words in page
    assert "The task has no level: the trivial predictors of its points differ. Set one with" in page
    assert report.read(tmp_path).tasks["adding"].baselines_at == at


def test_a_report_removes_the_files_of_the_earlier_report_only(tmp_path):
    record = grid(WINDOWED, ends, seeds=2, baseline=NONE)
    record = replace(record, tasks={"adding": TaskFacts(METRIC)})  # no trivial predictor, so no default level
    own = {"notes.md", "forest-mine.svg", "tables.txt", "curves-adding.pdf"}
    for name in own:
        (tmp_path / name).write_text("a user's file")
    first = {path.name for path in report.write(record, tmp_path, {"adding": 0.1})}
    assert "steps-strip-adding.png" in first
    second = {path.name for path in report.write(record, tmp_path)}
    assert second < first and not any(name.startswith("steps-") for name in second)
    assert {path.name for path in tmp_path.iterdir()} == second | own
    third = {path.name for path in report.write(record, tmp_path, formats=("svg",))}
    assert third < second and "tables.md" not in third
    assert {path.name for path in tmp_path.iterdir()} == third | own
    assert {path.read_text() for path in map(tmp_path.joinpath, own)} == {"a user's file"}


@pytest.mark.parametrize("page", [b"\xff", b'<a href="../notes.md"><a href="notes.md"><a href="study.json">'])
def test_a_foreign_page_makes_a_report_remove_nothing(page, tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("notes.md", "report/notes.md", "report/tables.md"):
        (tmp_path / name).write_text("a user's file")
    (tmp_path / "report/report.html").write_bytes(page)
    report.write(study(score, seeds=1), tmp_path / "report", formats=())
    for name in ("notes.md", "report/notes.md", "report/tables.md"):
        assert (tmp_path / name).read_text() == "a user's file"


def test_every_comparison_is_a_line_of_the_points_file():
    found = findings(grid(WINDOWED, ends, baseline=NONE))
    lines = list(csv.DictReader(io.StringIO(points_csv(found))))
    # Five points: the baseline, four comparisons with it, and two comparisons with window 1.
    assert sorted(Counter(line["measure"] for line in lines).values()) == [7, 7]
    wanted = ("layer", "25", "none", "test mean squared error")
    (line,) = [x for x in lines if tuple(x[key] for key in ("norm", "window", "against", "measure")) == wanted]
    (row,) = [r for r in found.tasks[0].final.rows if r.point.cells[0] == {"norm": "layer", "window": "25"}]
    assert row.against is not None
    assert row.against.interval is not None
    assert (float(line["estimate"]), float(line["low"])) == (row.against.mean, row.against.interval.low)
    assert (line["effect"], line["role"], line["method"]) == ("difference", "primary", "paired t")
    assert float(line["adjusted_p"]) >= float(line["p"])
    assert line["verdict"] == "helps"
    roles = Counter((x["measure"], x["against"], x["role"]) for x in lines if x["against"])
    assert roles["test mean squared error", "none", "primary"] == 4
    assert roles["test mean squared error", "window 1", "exploratory"] == 2
    assert sum(count for (_, _, role), count in roles.items() if role == "primary") == 4


def test_the_points_file_has_the_comparisons_with_window_1_as_the_baseline():
    axes = {"norm": ["none", "layer"], "window": ["1", "5"]}
    found = findings(grid(axes, ends, baseline={"window": "1"}))
    lines = list(csv.DictReader(io.StringIO(points_csv(found))))
    compared = [line for line in lines if line["against"]]
    assert {(line["norm"], line["window"], line["against"]) for line in compared} == {("layer", "5", "window 1")}
    (line,) = [x for x in compared if x["role"] == "primary"]
    ((row, decision),) = found.tasks[0].decided()
    assert row.against is not None
    assert (float(line["estimate"]), float(line["adjusted_p"])) == (row.against.mean, decision.p)
    assert line["verdict"] == decision.verdict


def test_costs_are_reported_for_each_point():
    costs = report_costs.costs(findings(wreck(study(score))))
    assert [cost.timed for cost in costs] == [6, 6, 6, 6, 5]
    assert (costs[0].typical, costs[0].extremes, costs[0].total) == ("5.0 s", "2.5 s to 7.5 s", "30.0 s")
    assert costs[0].step == "250 ms"
    assert report_costs.machines(study(score)) == [("trained on here", "30 trials")]


def test_processors_are_reported_and_seeds_that_mix_them(tmp_path):
    """Rounding differs between processors, so a difference within such a seed has one more cause."""
    record = study(score)
    kinds = [
        f"Maker {'B' if trial.seed == 1 and trial.points[0]['norm'] == 'layer' else 'A'}" for trial in record.trials
    ]
    kinds[-1] = ""  # recorded by no older version
    trials = [
        replace(t, run={**(t.run or {}), "processor": kind}) for t, kind in zip(record.trials, kinds, strict=True)
    ]
    record = replace(record, trials=tuple(trials))
    counts = Counter(kinds)
    lines = [
        ("trained on here", "1 trial"),
        ("trained on here", f"{counts['Maker A']} trials, Maker A"),
        ("trained on here", f"{counts['Maker B']} trials, Maker B"),
        ("seeds with trials on different processors", "1"),
    ]
    assert report_costs.machines(record) == lines
    report.write(record, tmp_path, formats=())
    assert report_costs.machines(report.read(tmp_path)) == lines
    assert "seeds with trials on different processors" in (tmp_path / "report.html").read_text()


def test_a_level_of_a_task_without_validations_is_rejected(tmp_path):
    whole = study(score, norms=("none",), seeds=1)
    curve = [{"step": 5, "train_loss": 0.2, "validation": None}]
    record = replace(whole, trials=tuple(replace(trial, curve=curve) for trial in whole.trials))
    message = "--reach adding: got 0.1; expected no level, since no trial of the task has a validation"
    with pytest.raises(SpecError, match=message):
        report.write(record, tmp_path, {"adding": 0.1})
    assert findings(whole, {"adding": 0.1}).tasks[0].level.value == 0.1


@pytest.mark.parametrize("given", ["adding", "0.1", "=0.1", "adding=", "adding=soon"])
def test_an_invalid_level_is_rejected(given):
    with pytest.raises(SpecError, match=re.escape(f"--reach: got {given!r}; expected TASK=LEVEL with a number")):
        _levels([given])


def test_levels_are_read_as_they_are_given():
    assert _levels(["adding=0.1", "a=b=1e-2"]) == {"adding": 0.1, "a=b": 0.01}
    with pytest.raises(SpecError, match="--reach adding: got nan; expected a finite number"):
        findings(study(score, seeds=1), _levels(["adding=nan"]))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("study.json", b"[" * 200_000, "damaged, study.json and the CSV files do not fit"),
        ("study.json", b'{"tasks": [1], "trials": []}', "damaged, study.json and the CSV files do not fit"),
        ("curves.csv", b"trial,step,train_loss,validation\n" + b"x" * 200_000, "damaged, study.json and the CSV"),
        ("results.csv", b"\xff\xfe", r"results.csv: got bytes that are not UTF-8 \(.*\); expected UTF-8 text"),
    ],
)
def test_a_damaged_published_report_is_an_error(whole, tmp_path, file, content, message):
    record, _ = whole
    report.write(record, tmp_path, formats=())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(StoreError, match=message) as raised:
        report.read(tmp_path)
    assert str(tmp_path) in str(raised.value) and len(str(raised.value)) < 500


def test_a_pipe_in_a_published_report_is_an_error(whole, tmp_path):
    record, _ = whole
    report.write(record, tmp_path, formats=())
    (tmp_path / "curves.csv").unlink()
    os.mkfifo(tmp_path / "curves.csv")
    with pytest.raises(StoreError, match="curves.csv: got a named pipe; expected a regular file"):
        report.read(tmp_path)


@pytest.mark.parametrize(("validation", "written"), [(0.5, "0.123456789"), (None, "0.123456789012")])
def test_training_losses_are_exact_only_where_the_report_draws_them(validation, written):
    record = study(score, seeds=1)
    line = {"step": 7, "train_loss": 0.123456789012, "validation": validation}
    record = replace(record, trials=tuple(replace(trial, curve=[line]) for trial in record.trials))
    rows = list(csv.DictReader(curves_csv(findings(record)).splitlines()))
    assert len(rows) == len(record.trials)
    assert {row["train_loss"] for row in rows} == {written}


def test_a_study_of_one_point_without_curves_has_a_report(tmp_path):
    record = study(score)
    (first, *_) = record.trials
    alone = replace(first, curve=[])
    report.write(replace(record, trials=(alone,), axes={}), tmp_path)
    assert (tmp_path / "report.html").exists()
