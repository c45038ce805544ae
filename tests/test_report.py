"""The report of a study, whatever state the study is in: self-contained, escaped, complete, the same every time."""

import csv
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from atn_norms.ablation import report
from atn_norms.ablation.comparison import compare
from atn_norms.ablation.files import StoreError
from atn_norms.ablation.records import StudyRecord, TaskFacts
from atn_norms.ablation.report.heatmap import blocks, shade
from atn_norms.ablation.report.names import Layout, number
from atn_norms.ablation.report.sentences import answer
from atn_norms.ablation.report.tables import contrasts, latex, markdown, results_csv
from atn_norms.specs import read
from tests.recorded import METRIC, study

EVIL = '<script>alert("x")</script> $x_1$ & {a}#|%`\\'
TASKS = {
    "adding": TaskFacts(METRIC, {"guessing one": 1 / 6}),
    "charlm": TaskFacts("bits per character", {"unigram": 4.5}),
}


def score(norm: str, window: str, seed: int) -> float:
    return {"none": 0.15, "layer": 0.012, "rms": 0.009}[norm] * (1 + 0.1 * seed) / (1 + 0.01 * int(window))


class Page(HTMLParser):
    """What a browser would load, run and name on a page."""

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
    """The same study with a diverged, a failed, a running and a pending trial."""
    trials = list(record.trials)
    trials[-1] = replace(trials[-1], status="diverged", result={"outcome": "diverged", "step": 137, "metrics": {}})
    error = {"error": "RuntimeError: out of memory", "traceback": "Traceback: deep <inside>"}
    trials[-2] = replace(trials[-2], status="failed", result=None, error=error)
    trials[-3] = replace(trials[-3], status="running", result=None)
    trials[-4] = replace(trials[-4], status="pending", result=None, run=None, curve=[])
    return replace(record, trials=tuple(trials))


def evil(record: StudyRecord) -> StudyRecord:
    """The same study with every name that can come from a file replaced by a hostile one."""
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
    pictures = {
        f"{kind}-{task}.{ext}" for kind in ("heatmap", "curves", "strip") for task in TASKS for ext in ("png", "svg")
    }
    assert {path.name for path in folder.iterdir()} == pictures | {
        "report.html",
        "results.csv",
        "tables.md",
        "tables.tex",
    }
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


def test_pictures_say_what_they_show(whole):
    tags = Page((whole[1] / "report.html").read_text(encoding="utf-8")).tags
    pictures = [attributes for tag, attributes in tags if tag == "svg"]
    ids = {attributes.get("id") for _, attributes in tags}
    assert len(pictures) == 6
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= ids
    svg = ET.fromstring((whole[1] / "heatmap-adding.svg").read_text(encoding="utf-8"))
    described = svg.findtext("{http://www.w3.org/2000/svg}desc") or ""
    assert "layer, window 25: " in described


def test_the_heat_map_writes_every_mean_and_merges_what_is_one_point(whole):
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
    lines = list(csv.DictReader(io.StringIO(results_csv(record))))
    assert [line["trial"] for line in lines] == [t.id for t in record.trials]
    assert [line["status"] for line in lines[-4:]] == ["pending", "running", "failed", "diverged"]
    assert lines[0] | {"norm": "none", "window": "any", "seed": "0", "seconds": "2.5"} == lines[0]
    assert float(lines[0]["test"]) == score("none", "1", 0)
    assert lines[-2]["error"] == "RuntimeError: out of memory"


def test_failed_and_diverged_trials_are_shown_with_their_reason(tmp_path):
    record = wreck(study(score))
    report.write(record, tmp_path)
    page = " ".join(" ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts).split())
    assert "RuntimeError: out of memory" in page
    assert "Traceback: deep <inside>" in page
    assert "out of all bounds at step 137" in page
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
    assert {line["error"] for line in lines} == {f"'={EVIL}"}
    assert {line[EVIL] for line in lines} == {EVIL}


def test_tables_escape_what_their_language_would_read():
    record = evil(study(score, seeds=2))
    text = latex(record)
    assert r"\$x\_1\$ \& \{a\}\#\textbar{}\%" in text
    assert text.count(r"\begin{tabular}{lllrrll}") == 1
    for line in text.splitlines():
        if line.endswith(r" \\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 6
    rows = [line for line in markdown(record).splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


def test_the_answer_claims_what_the_intervals_carry():
    record = study(score)
    said = " ".join(answer(record, compare(record), contrasts(record)))
    assert "All 30 trials finished." in said
    assert "the lowest mean squared error, averaged over seeds, is 0.0090 (rms, window 25)" in said.replace(
        "0.00900", "0.0090"
    )
    assert "of 4 points: 4 better" in said
    assert "better at 6 of 6 seeds" in said
    assert re.search(r"-0\.\d+ \[-0\.\d+, -0\.\d+\] against none", said.replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_the_answer_claims_nothing_on_few_seeds(seeds):
    record = study(score, seeds=seeds)
    said = " ".join(answer(record, compare(record), contrasts(record)))
    assert "nothing here is a conclusion" in said
    assert f"({seeds} seed" in said
    assert "[" not in said


def test_the_answer_says_when_an_interval_cannot_tell():
    record = study(
        lambda norm, window, seed: 1.0 + (-1) ** (seed + (norm == "layer")) * 0.1 - 0.001 * (norm == "layer")
    )
    said = " ".join(answer(record, compare(record), None))
    assert "which does not tell the two apart" in said
    assert "4 undecided" in said


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
    assert first["against_baseline"]["verdict"] == "better"
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


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(StoreError, match="cannot create the folder .*report"):
        report.write(study(score, seeds=1, norms=["rms"]), tmp_path / "report")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = matplotlib.rcParams.copy()
    report.write(study(score, seeds=1, norms=["rms"]), tmp_path)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules
