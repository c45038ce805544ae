"""Compare the pages with the code: hooks, kinds, options, commands and public names; run the examples."""

import ast
import csv
import inspect
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from atn_norms.ablation.analysis.paired import Paired
from atn_norms.plugins import Hooks
from atn_norms.registry import FAMILIES, registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
TEXTS = PAGES | {"README": (ROOT / "README.md").read_text(encoding="utf-8")}
PAGE_OF = {"normalizer": "normalizers", "window": "windows", "cell": "cells", "task": "tasks"}
EXECUTED = {"python", "console"}
SHOWN = {"text", "toml", "yaml", "bash", "py", "{image}", "{toctree}", "{eval-rst}"}


def test_every_hook_is_documented_with_its_exact_signature():
    hooks = [name for name in vars(Hooks) if name.startswith("atn_norms_")]
    assert hooks
    for name in hooks:
        signature = inspect.signature(getattr(Hooks, name), eval_str=True)
        arguments = [f"{p.name}: {p.annotation.__name__}" for p in list(signature.parameters.values())[1:]]
        assert f"\ndef {name}({', '.join(arguments)}) -> None\n" in PAGES["plugins"]


@pytest.mark.parametrize(
    "module", ["", "ablation", "ablation.report", "bench", "cells", "layers", "normalizers", "tasks", "testing"]
)
def test_every_public_name_is_in_the_reference(module):
    documented = _documented()
    public = import_module(f"atn_norms.{module}".rstrip("."))
    assert not [name for name in public.__all__ if id(getattr(public, name)) not in documented]


def _documented() -> set[int]:
    """Return the ids of the objects in the reference, under any of their paths."""
    listed = set(re.findall(r"^\.\. auto\w+:: (atn_norms[\w.]+)$", PAGES["api"], flags=re.M))
    parts = [path.rpartition(".") for path in listed]
    return {id(getattr(import_module(owner), name)) for owner, _, name in parts}


HELPERS = ("deprecation", "drawing", "errors", "files", "text")  # modules that every part of the package may use
PARTS = rf"atn_norms(?!\.(?:{{}}|{'|'.join(HELPERS)})\b)"


def test_the_conformance_suite_uses_the_documented_interface_alone():
    """`atn_norms.testing` imports names of the reference, and reads no private attribute of another object."""
    documented, private = _documented(), []
    for path in sorted((ROOT / "atn_norms" / "testing").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                private += [] if ast.unparse(node.value) in ("self", "cls") else [f"{path.name}: {ast.unparse(node)}"]
            if isinstance(node, ast.ImportFrom) and re.match(PARTS.format("testing"), node.module or ""):
                for alias in node.names:
                    public = id(getattr(import_module(node.module or ""), alias.name)) in documented
                    private += [] if public else [f"{path.name}: {alias.name}"]
    assert private == []


def test_studies_use_the_documented_interface_of_the_layers():
    """`atn_norms.ablation` imports names of the reference from the other parts of the package."""
    documented, undocumented = _documented(), set()
    for path in sorted((ROOT / "atn_norms" / "ablation").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(PARTS.format("ablation"), node.module or ""):
                values = {alias.name: getattr(import_module(node.module or ""), alias.name) for alias in node.names}
                undocumented |= {name for name, value in values.items() if not _is_public(value, documented)}
    assert undocumented == set()


def _is_public(value: object, documented: set[int]) -> bool:
    return id(value) in documented or isinstance(value, ModuleType)


def test_every_page_is_linked_from_the_index():
    listed = re.findall(r"^[a-z-]+$", "".join(re.findall(r"```{toctree}(.*?)```", PAGES["index"], flags=re.S)), re.M)
    assert sorted(listed) == sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_built_in_kind_is_on_its_page_with_every_option(family):
    for kind, entry in registry.kinds(family).items():
        if entry.distribution != "atn-norms":
            continue
        page = PAGES[PAGE_OF[family]]
        options = set(entry.spec.model_fields) - {"kind"}
        assert re.search(rf"`{kind}`|kind: {kind}\b", page), kind
        assert {option for option in options if not re.search(rf"\b{option}\b", page)} == set()


@pytest.mark.parametrize(
    ("module", "name", "page"),
    [
        ("atn_norms.layers", "LayerSpec", "specs"),
        ("atn_norms.cells", "Placement", "cells"),
        ("atn_norms.ablation.grid.study", "StudySpec", "studies"),
        ("atn_norms.ablation.grid.training", "TrainSpec", "studies"),
        *[
            ("atn_norms.ablation.grid.schedules", schedule, "studies")
            for schedule in ("Cosine", "Linear", "Step", "Plateau")
        ],
    ],
)
def test_every_option_of_a_file_is_on_its_page(module, name, page):
    fields = getattr(import_module(module), name).model_fields
    assert not [field for field in fields if f"`{field}`" not in PAGES[page]]


@pytest.mark.parametrize("page", TEXTS)
def test_a_code_block_is_executed_or_marked_as_not_executed(page):
    fences = re.findall(r"^```(\S*)", TEXTS[page], flags=re.M)
    assert set(fences[::2]) <= EXECUTED | SHOWN
    assert set(fences[1::2]) <= {""}


def installed(folder: Path) -> Path:
    """Write the plugin of the documentation into a folder that looks like its installation."""
    files = dict(re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGES["plugins"], flags=re.M | re.S))
    assert set(files) == {"atn_norms_pmean.py", "pyproject.toml"}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    (folder / "atn_norms_pmean.py").write_text(files["atn_norms_pmean.py"], encoding="utf-8")
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    points = "\n".join(f"{name} = {module}" for name, module in project["entry-points"]["atn_norms"].items())
    (information / "entry_points.txt").write_text(f"[atn_norms]\n{points}\n", encoding="utf-8")
    return folder


def test_the_plugin_of_the_documentation_works_once_installed(tmp_path):
    code = """
import json, torch, atn_norms as an
from atn_norms.plugins import report
options = {"input_size": 2, "hidden_size": 3, "norm": {"kind": "pmean", "p": 3.0}}
shapes = {}
for cell in ("lstm", "gru", "rnn"):
    for window in (3, "cumulative", {"kind": "exponential", "half_life": 2.0}):
        y, _ = an.build({"cell": cell, "window": window, **options})(torch.randn(5, 4, 2))
        shapes[f"{cell} {window}"] = list(y.shape)
spec = an.LayerSpec.model_validate({"cell": "gru", **options})
print(json.dumps({
    "shapes": shapes,
    "schema": "pmean" in json.dumps(an.LayerSpec.model_json_schema()),
    "again": an.LayerSpec.model_validate_json(spec.model_dump_json()) == spec,
    "plugins": [[r.name, r.distribution, r.version, r.status] for r in report() if r.name == "pmean"],
}))
"""
    path = os.pathsep.join([str(ROOT), str(installed(tmp_path))])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert set(map(tuple, output["shapes"].values())) == {(5, 4, 3)}
    assert len(output["shapes"]) == 9
    assert output["schema"]
    assert output["again"]
    assert output["plugins"] == [["pmean", "atn-norms-pmean", "0.1.0", "loaded"]]


def test_every_command_is_on_its_page():
    done = subprocess.run(
        [sys.executable, "-m", "atn_norms", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    from typer.main import get_command

    from atn_norms.cli import app

    commands = list(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    assert {"ablate", "resume", "status", "report", "list", "plugins", "show", "schema", "init", "doctor"} <= set(
        commands
    )
    for command in commands:
        assert command in done.stdout
        assert re.search(rf"^\| `{command}\b", PAGES["cli"], flags=re.M), command


RESULTS = DOCS / "results"
PUBLISHED = sorted(path.parent.name for path in RESULTS.glob("*/report.html"))


def lines_of(study):
    with (RESULTS / study / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def statuses_of(study):
    return Counter(line["status"] for line in lines_of(study))


def unfinished(study):
    statuses = statuses_of(study)
    return statuses["pending"] + statuses["running"] > 0


@pytest.mark.parametrize("study", PUBLISHED)
def test_a_published_report_is_complete_and_linked(study):
    page = (RESULTS / "index.md").read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"#:]+)"', (RESULTS / study / "report.html").read_text(encoding="utf-8")))
    assert {"results.csv", "points.csv", "curves.csv", "study.yaml"} <= links
    assert {path.name for path in (RESULTS / study).iterdir()} == links | {"report.html", "study.json"}
    assert f"({study}/report.html)" in page


def test_the_page_of_results_shows_the_tables_of_the_reports():
    page = (RESULTS / "index.md").read_text(encoding="utf-8")
    tables = runpy.run_path(str(RESULTS / "summary.py"))["main"]().split("\n\n")
    assert len(tables) == 2, "verdicts, steps to a level"
    for table in tables:
        assert table.strip() in page


def test_the_tables_of_the_page_of_results_are_written_again(tmp_path, capsys):
    page, copy = RESULTS / "index.md", tmp_path / "index.md"
    whole = page.read_text(encoding="utf-8")
    copy.write_text(whole.replace("| layer, window 25 | undecided |", "| layer, window 25 | old |"), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != whole
    update = runpy.run_path(str(RESULTS / "summary.py"))["update"]
    update(copy)
    assert copy.read_text(encoding="utf-8") == whole
    assert capsys.readouterr().out == ""
    copy.write_text(whole.replace("| study | point | verdict |", "| other |"), encoding="utf-8")
    update(copy)
    assert capsys.readouterr().out.startswith("| study | point | verdict |")


@pytest.mark.parametrize("study", PUBLISHED)
def test_the_numbers_of_a_published_report_follow_from_its_own_files(study):
    from atn_norms.ablation import report
    from atn_norms.ablation.report import csv_export

    found = report.findings(report.read(RESULTS / study))
    for name, make in (("results", csv_export.results_csv), ("points", csv_export.points_csv)):
        assert (RESULTS / study / f"{name}.csv").read_text(encoding="utf-8") == make(found)


@pytest.mark.parametrize("study", [study for study in PUBLISHED if not study.startswith(("charlm", "tinyshakespeare"))])
def test_a_published_study_still_plans_the_trials_it_published(study):
    """A new option must leave the identity of older trials alone, or their folders cannot be resumed."""
    from atn_norms.ablation import StudySpec, make_plan
    from atn_norms.specs import read

    plan = make_plan(StudySpec.model_validate(read(RESULTS / study / "study.yaml")[0]))
    published = json.loads((RESULTS / study / "study.json").read_text(encoding="utf-8"))["trials"]
    assert {trial.id for trial in plan.trials} == {trial["id"] for trial in published}


@pytest.mark.parametrize("study", PUBLISHED)
def test_a_published_report_is_small(study):
    assert (
        sum(path.stat().st_size for path in (RESULTS / study).iterdir()) < 1_000_000
    )  # adding: 50 curves of 200 points


def test_published_reports_are_small_on_average():
    """Every clone has all of them."""
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 350_000 * len(PUBLISHED)


@pytest.mark.parametrize("study", PUBLISHED)
def test_the_page_of_results_counts_the_finished_trials_of_a_running_study(study):
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    statuses = statuses_of(study)
    begin = page.find(f"[{study}]({study}/report.html) is ", page.find("## A study that still runs"))
    running = unfinished(study)
    count = f"Of its {statuses.total()} trials {statuses['done']} have finished."
    assert not running or (begin >= 0 and count in page[begin : begin + 300])


def test_a_row_of_no_difference_has_the_p_values_that_decide_it():
    """The p-value of "no difference" may be 0.9 where the equivalence test decides."""
    from tests.test_decision import difference

    script = runpy.run_path(str(RESULTS / "summary.py"))
    equal = difference(0.001)
    row = script["Compared"]("study", "point", None, equal, 0.06, False)
    ((each, decision),) = script["decided"]([row])
    cells = script["_line"](each, decision)
    assert decision.verdict == "no difference" and (equal.p or 0) > 0.05
    assert (cells[2], cells[5], cells[7]) == ("no difference larger than 0.06", "<0.001", "<0.001")


HELPED = [("copying", "layer, window 45"), ("copying-windows", "layer, window 100")]


def test_the_verdicts_in_prose_are_those_of_the_reports():
    script = runpy.run_path(str(RESULTS / "summary.py"))
    compared, _ = script["collected"]()
    assert {each.study for each in compared} <= {study for study in PUBLISHED if not unfinished(study)}
    decisions = [decision for _, decision in script["decided"](compared)]
    counts = Counter(decision.verdict for decision in decisions)
    trivial = sum(decision.both_trivial for decision in decisions)
    of = f"undecided at {counts['undecided']} of {len(decisions)}; both worse than a guess at {trivial}."
    line = f"**Window against window 1: helps at {counts['helps']}, hurts at {counts['hurts']}, {of}**"
    assert line in (RESULTS / "index.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"Of {len(decisions)} comparisons with window 1, corrected for their number, {counts['undecided']} are"
        in readme
    )
    decided = [pair for pair in script["decided"](compared) if pair[1].verdict != "undecided"]
    trivially = [each.study for each, decision in decided if decision.both_trivial]
    helped = [(each.study, each.point, f"{decision.p:.3f}") for each, decision in decided if not decision.both_trivial]
    assert {decision.verdict for _, decision in decided} == {"helps"} and trivially == ["paper-denoise"]
    assert [pair[:2] for pair in helped] == HELPED, "as the README states"
    stated = (
        "On copying with layer normalization, windows of 45 and of 100 steps help (ten seeds, adjusted p = {} and {})."
    )
    assert stated.format(*(p for *_, p in helped)) in " ".join(readme.split())


def test_the_steps_to_learn_adding_in_prose_are_those_of_the_trials():
    with (RESULTS / "adding" / "results.csv").open(encoding="utf-8") as file:
        done = [line for line in csv.DictReader(file) if line["status"] == "done"]
    plain, normed = (
        [int(line["reached_at"]) for line in done if (line["norm"] == "none") == is_plain] for is_plain in (True, False)
    )
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    assert f"below 0.02 between step {min(plain):,} and step {max(plain):,}, a normalized" in page
    assert f"LSTM between step {min(normed):,} and step {max(normed):,}." in page
    assert len(done) == 50


def scores_of(study):
    return {line["trial"]: line for line in lines_of(study) if line["status"] == "done"}


def signed(value, form=".3f"):
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def paired_of(differences) -> Paired:
    found = Paired.of(differences)
    assert found is not None
    return found


def test_the_repeated_trials_of_copying_in_prose_are_those_of_the_reports():
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    first, second = scores_of("paper-copying"), scores_of("copying")
    both = [trial for trial in first if trial in second]
    changes = [float(second[t]["test"]) - float(first[t]["test"]) for t in both if second[t]["norm"] != "none"]
    assert len(both) == 25 and len(changes) == 20
    assert (
        f"The 20 trials with a norm differ by up to {max(map(abs, changes)):.3f} nats (standard deviation "
        f"{statistics.stdev(changes):.3f}), and are lower by {-statistics.mean(changes):.3f} on average."
    ) in page


def test_the_repetitions_of_copying_in_prose_are_those_of_the_reports():
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    first, second = (
        {(t["window"], int(t["seed"])): float(t["test"]) for t in scores_of(study).values() if t["norm"] == "layer"}
        for study in ("copying", "copying-windows")
    )
    changes = [second[key] - first[key] for key in first]
    assert len(changes) == 20
    spread = f"{max(map(abs, changes)):.3f} nats (standard deviation {statistics.stdev(changes):.3f})"
    assert f"The scores of the 20 trials change by up to {spread}." in page
    of = {seed: [run["45", seed] - run["1", seed] for run in (first, second)] for seed in range(10)}
    averaged = paired_of([statistics.mean(pair) for pair in of.values()])
    low, high = (signed(end, "+.3f") for end in (averaged.interval.low, averaged.interval.high))
    assert f"the mean difference is {signed(averaged.mean, '+.3f')} [{low}, {high}] (exploratory)." in page
    old, new = (statistics.mean(of[seed][1] for seed in seeds) for seeds in ((0, 5), (1, 2, 3, 4, 6, 7, 8, 9)))
    assert f"are {signed(old, '+.3f')} on average, those of the other eight {signed(new, '+.3f')}." in page
    means = {
        k: statistics.mean(second[k, seed] for seed in range(10)) for k in ("1", "2", "5", "10", "25", "45", "100")
    }
    short = [means[k] for k in ("2", "5", "10", "25")]
    ends = (
        f"{means['1']:.3f} at k = 1, {min(short):.3f} to {max(short):.3f} at k = 2 to 25, {means['45']:.3f} at k = 45"
    )
    assert f"The mean score is {ends} and {means['100']:.3f} at k = 100." in page
    longest = paired_of([second["100", seed] - second["1", seed] for seed in range(10)])
    ends = f"[{-longest.interval.high:.3f}, {-longest.interval.low:.3f}]"
    assert f"There k = 100 is lower by {-longest.mean:.3f} {ends}," in page
    again = statistics.mean(second["45", seed] - second["1", seed] for seed in range(10))
    assert f"At k = 45 the mean difference is again {-again:.3f}, but it" in page
    for window in ("1", "45"):
        assert abs(statistics.mean(second[window, seed] - first[window, seed] for seed in range(10))) < 0.0005


def test_the_differences_of_copying_in_prose_are_those_of_the_reports():
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    arms = defaultdict(dict)
    for line in scores_of("copying").values():
        arms[line["norm"], line["window"]][int(line["seed"])] = float(line["test"])

    def paired(one, other, seeds=range(10)):
        return paired_of([arms[one][seed] - arms[other][seed] for seed in seeds])

    layer, wide, plain = ("layer", "1"), ("layer", "45"), ("none", "any")
    unseen = paired(wide, layer, range(5, 10))
    low, high = (signed(end, "+.4f") for end in (unseen.interval.low, unseen.interval.high))
    assert f"give {signed(unseen.mean, '+.4f')} [{low}, {high}] alone (p = {unseen.p:.3f}, not corrected)" in page
    texts = []
    for one in (layer, wide):
        found = paired(one, plain)
        texts.append(f"{-found.mean:.3f} [{-found.interval.high:.3f}, {-found.interval.low:.3f}]")
    assert f"layer normalization is lower by {texts[0]} at window 1 and by {texts[1]} at window 45." in page
    whole = paired(wide, layer)
    ends = f"[{-whole.interval.high:.3f}, {-whole.interval.low:.3f}]"
    assert f"lower by {-whole.mean:.3f} nats a step {ends}" in page
    means = [f"{statistics.mean(arms[arm].values()):.3f}" for arm in (plain, layer, wide)]
    sentence = "The plain LSTM has {}, layer normalization {} at window 1 and {} at window 45."
    assert sentence.format(*means) in page


@pytest.mark.parametrize(
    ("longer", "shorter", "different"),
    [("adding", "paper-adding", 1), ("paper-denoise-whole", "paper-denoise", 0), ("charlm", "charlm-short", 0)],
)
def test_studies_that_share_their_first_steps_have_the_same_curves(longer, shorter, different):
    points, curves = [], []
    for study in (longer, shorter):
        points.append({(t["norm"], t["window"], t["seed"]): t["trial"] for t in scores_of(study).values()})
        with (RESULTS / study / "curves.csv").open(encoding="utf-8") as file:
            curves.append({(line["trial"], line["step"]): line["train_loss"] for line in csv.DictReader(file)})
    shared = points[0].keys() & points[1].keys()
    changed = 0
    for point in shared:
        one, other = (
            {step: loss for (t, step), loss in c.items() if t == p[point]} for p, c in zip(points, curves, strict=True)
        )
        assert one.keys() & other.keys()
        changed += any(one[step] != other[step] for step in one.keys() & other.keys())
    assert len(shared) >= 9 and changed == different


def test_the_spread_of_adding_in_prose_is_that_of_the_report():
    page = " ".join((RESULTS / "index.md").read_text(encoding="utf-8").split())
    arms = defaultdict(dict)
    for line in scores_of("adding").values():
        arms[line["norm"], line["window"]][int(line["seed"])] = math.log(float(line["test"]))
    spreads = [math.exp(max(arm.values()) - min(arm.values())) for arm in arms.values()]
    assert f"differ between seeds by factors of {min(spreads):.0f} to {max(spreads):.0f}." in page
    plain = statistics.mean(arms["none", "any"].values())
    ratios = [math.exp(statistics.mean(arm.values()) - plain) for (norm, _), arm in arms.items() if norm != "none"]
    assert f"LSTM is {min(ratios):.2f} to {max(ratios):.2f} of the plain LSTM's (exploratory)." in page
    rest = [seed for seed in range(10) if seed != 4]
    found = paired_of([arms["rms", "25"][seed] - arms["rms", "1"][seed] for seed in rest])
    low, high = math.exp(found.interval.low), math.exp(found.interval.high)
    assert f"Without it the ratio is \N{MULTIPLICATION SIGN}{math.exp(found.mean):.3g} [{low:.3g}, {high:.3g}]" in page


def test_the_figure_of_the_results_follows_from_the_reports(tmp_path):
    script = runpy.run_path(str(RESULTS / "summary.py"))
    script["draw"](tmp_path / "overview.svg")
    assert (tmp_path / "overview.svg").read_bytes() == script["FIGURE"].read_bytes()
    assert "(overview.svg)" in (RESULTS / "index.md").read_text(encoding="utf-8")


def test_every_study_file_of_the_results_is_on_their_page():
    page = (RESULTS / "index.md").read_text(encoding="utf-8")
    for file in (RESULTS / "studies").glob("*.yaml"):
        assert f"[{file.stem}](studies/{file.name})" in page


def test_the_figure_equals_the_output_of_its_script(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "window.py"))
    script["draw"](tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == script["TARGET"].read_bytes()
