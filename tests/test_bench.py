"""The bench: a backend whose laws fail gets no figure, runs are interleaved, and ratios and output are complete."""

import csv
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from atn_norms.backends import Reference, Unsupported, base
from atn_norms.backends.reference import ReferenceProgram
from atn_norms.bench import BenchSpec, Case, Size, contest, engine, laws, measure, memory, picture
from atn_norms.bench.records import Row, compared
from atn_norms.bench.textbook import Textbook, footprint
from atn_norms.bench.timing import LEAST, interleaved, whole_call
from atn_norms.cli import main
from atn_norms.layers import LayerSpec, Recurrent
from atn_norms.pytree import tree_map
from tests.compare import compare

TINY = Case("lstm", "layer", Size(2, 5, 3, 6), 1, "training", "float32")
QUICK = ("--size", "2,3,2,4", "--windows", "1,3", "--runners", "reference,textbook", "--budget", "0.9", "--no-memory")


class Clock:
    """A clock that advances only during timed work."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log=None, name=""):
        def call():
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


class Wrong(Reference):
    """The reference with one change."""

    name = "wrong"

    def __init__(self, change):
        self.change = change

    def prepare(self, cell, description):
        return WrongProgram(cell, self.change)


class WrongProgram(ReferenceProgram):
    def __init__(self, cell, change):
        super().__init__(cell)
        self.change = change

    def run(self, inputs, state, lengths=None):
        return self.change(*super().run(inputs, state, lengths), lengths)


def gradient_doubled(ys, after, lengths):
    return 2 * ys - ys.detach(), after


def last_step_shifted(ys, after, lengths):
    return torch.cat([ys[:-1], ys[-1:] + 1e-4]), after


def window_forgets(ys, after, lengths):
    (carried, norms) = after
    return ys, (carried, tuple((index, tree_map(lambda leaf: 0.999 * leaf, memory)) for index, memory in norms))


def padding_not_zero(ys, after, lengths):
    return (ys if lengths is None else ys + 1.0), after


def wrong_without_gradients(ys, after, lengths):
    return (ys if torch.is_grad_enabled() else ys + 1.0), after


def raises_when_ragged(ys, after, lengths):
    if lengths is not None:
        raise NotImplementedError("no lengths")
    return ys, after


def state_cut_off(ys, after, lengths):
    return ys, tree_map(torch.Tensor.detach, after)


@pytest.fixture
def wrong(monkeypatch):
    def install(change):
        monkeypatch.setattr(base, "_IN_ORDER", (*base._IN_ORDER, Wrong(change)))

    return install


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gradient_doubled, "the gradient of"),
        (last_step_shifted, "elements differ, worst at"),
        (window_forgets, "leaf"),
        (padding_not_zero, "elements differ, worst at"),
        (wrong_without_gradients, "elements differ, worst at"),
        (raises_when_ragged, "it raises NotImplementedError: no lengths"),
        (state_cut_off, "the gradient of"),
    ],
)
def test_a_wrong_backend_fails_the_check(wrong, change, message):
    wrong(change)
    broken = laws.broken_law(TINY, "wrong", 3)
    assert broken is not None
    assert message in broken
    assert broken.startswith("lstm, norm layer, k = 3, (")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_a_correct_backend_passes_the_check(wrong, cell, norm):
    wrong(lambda ys, after, lengths: (ys, after))
    mode, window = ("inference", 1) if cell == "rnn" else ("training", 4)
    assert laws.broken_law(replace(TINY, cell=cell, norm=norm, mode=mode), "wrong", window) is None


def test_a_backend_whose_laws_fail_gets_no_figure_and_exit_code_1(wrong, capsys):
    wrong(gradient_doubled)
    arguments = ("bench", *QUICK[:4], "--runners", "wrong,reference", "--modes", "training", *QUICK[6:])
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "laws fail: lstm, norm layer, k = 1" in out
    assert "not timed, for the reasons above: wrong, k = 1, wrong, k = 3" in out
    assert main((*arguments, "--json")) == 1
    output = json.loads(capsys.readouterr().out)
    rows = {(row["runner"], row["window"]): row for row in output["cases"][0]["rows"]}
    assert output["laws_hold"] is False
    assert rows["wrong", 1]["status"] == "laws fail"
    assert [rows["wrong", 3][key] for key in ("best", "median", "ratio", "memory", "runs")] == [None] * 4 + [0]
    assert rows["reference", 1]["status"] == "measured"
    assert rows["reference", 1]["best"] > 0


def test_a_wrong_textbook_takes_the_figures_of_the_reference_too(monkeypatch):
    monkeypatch.setattr(Textbook, "rnn", lambda self, a, b, carried, past: (torch.tanh(a - b),))
    for name in ("reference", "textbook"):
        assert "y: " in str(laws.broken_law(replace(TINY, cell="rnn"), name, 2))


def test_an_unsupported_case_is_no_failure(wrong, monkeypatch, capsys):
    wrong(gradient_doubled)
    monkeypatch.setattr(Wrong, "prepare", lambda self, cell, description: Unsupported("cell", "not today"))
    arguments = ("bench", *QUICK[:4], "--runners", "wrong", "--modes", "training", *QUICK[6:], "--json")
    assert main(arguments) == 0
    row = json.loads(capsys.readouterr().out)["cases"][0]["rows"][1]
    assert (row["status"], row["reason"], row["best"]) == ("refused", "not today", None)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", {"kind": "rnn", "nonlinearity": "relu"}])
@pytest.mark.parametrize("norm", ["layer", "rms", {"kind": "rms", "bias": True}])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_the_textbook_is_the_package_in_float64(cell, norm, window):
    spec = LayerSpec(cell=cell, input_size=3, hidden_size=5, norm=norm, window=window, backend="reference")
    layer = spec.build(dtype=torch.float64)
    laws._stir(layer)
    xs = torch.randn(11, 4, 3, dtype=torch.float64)
    textbook = Textbook(layer, window)
    ys, state = textbook(xs[:6])
    more, _ = textbook(xs[6:], state)
    found, expected = torch.cat([ys, more]), layer(xs)[0]
    compare(found, expected, tolerance=1e-12)
    upstream = torch.randn_like(found)
    parameters = list(layer.parameters())
    compare(
        torch.autograd.grad(found, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        tolerance=1e-11,
    )


def test_every_round_runs_everybody_and_begins_with_another():
    clock, log = Clock(), []
    calls = {name: clock.work(0.01, log, name) for name in "abc"}
    samples = interleaved(calls, dict.fromkeys("abc", 0.01), budget=0.12, clock=clock)
    assert "".join(log) == "abcbcacababc"
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abc", 4)


def test_the_slow_sit_out_rounds_evenly_and_are_still_run():
    clock, log = Clock(), []
    calls = {"fast": clock.work(0.01, log, "f"), "slow": clock.work(1.0, log, "S")}
    samples = interleaved(calls, {"fast": 0.01, "slow": 1.0}, budget=0.24, clock=clock)
    assert len(samples["slow"]) >= LEAST
    assert "".join(log) == "fS" + 7 * "f" + "fS" + 7 * "f" + "fS"


def test_short_calls_are_repeated_within_a_sample():
    clock, log = Clock(), []
    samples = interleaved({"a": clock.work(1e-4, log, "a")}, {"a": 1e-4}, budget=0.02, clock=clock)
    assert len(log) == 20 * len(samples["a"])
    assert samples["a"] == pytest.approx([1e-4] * len(samples["a"]))


def test_a_case_that_would_take_too_long_is_skipped():
    clock = Clock()
    assert whole_call(lambda steps: clock.work(0.01 + 0.001 * steps), 100, 0.2, clock) == pytest.approx(0.11)
    clock = Clock()
    output = whole_call(lambda steps: clock.work(0.1 * steps), 1000, 2.0, clock)
    assert isinstance(output, str)
    assert output.startswith("too slow here: 8 of its 1000 steps took 0.8 s, and a call may take 2 s")
    assert clock.now < 4.0


def test_ratios_come_from_the_clock(monkeypatch):
    clock = Clock()
    speeds = {"torch.nn": 0.01, "reference": 0.025, "textbook": 0.1}
    turns = dict.fromkeys(speeds, 0)

    class Fake:
        def __init__(self, case, name, window):
            self.name = name

        def call(self, steps):
            def work():
                turns[self.name] += 1
                clock.now += speeds[self.name] * (2 if turns[self.name] % 3 == 0 else 1)

            return work

    monkeypatch.setattr(engine, "Runner", Fake)
    spec = BenchSpec(
        sizes=((2, 3, 4, 4),), windows=(3,), modes=("training",), runners=("reference", "textbook"), memory=False
    )
    (case,) = measure(spec, clock=clock).cases
    assert [row.label for row in case.rows] == ["torch.nn", "reference, k = 3", "textbook, k = 3"]
    assert [row.best for row in case.rows] == pytest.approx([0.01, 0.025, 0.1])
    assert [row.ratio for row in case.rows] == pytest.approx([1.0, 2.5, 10.0])
    assert case.noise == pytest.approx(1.0)


def test_ratios_are_to_torch_in_best_median_and_memory():
    mine = replace(Row("native", 25).timed([3.0, 9.0, 4.0]), memory=70)
    torch_row = replace(Row("torch.nn", None).timed([2.0, 2.0, 8.0, 8.0]), memory=100)
    first, second, third = compared([mine, torch_row, Row("textbook", 25, "skipped", "too slow")])
    assert (first.best, first.median, first.spread) == (3.0, 4.0, 4 / 3)
    assert (first.ratio, first.ratio_of_medians, first.memory_ratio) == (1.5, 0.8, 0.7)
    assert (second.ratio, second.ratio_of_medians, second.spread) == (1.0, 1.0, 2.5)
    assert (third.ratio, third.ratio_of_medians, third.memory_ratio) == (None, None, None)


def test_a_runner_that_breaks_does_not_stop_the_others(monkeypatch):
    def breaks(self, xs, upstream):
        if self.name == "reference":
            raise RuntimeError("out of breath")
        return lambda: None

    monkeypatch.setattr(contest.Runner, "_inference", breaks)
    spec = BenchSpec(sizes=((2, 3, 4, 4),), windows=(1,), modes=("inference",), runners=("reference", "textbook"))
    (case,) = measure(spec.model_copy(update={"budget": 0.05})).cases
    assert [row.status for row in case.rows] == ["measured", "failed", "measured"]
    assert case.rows[1].reason == "RuntimeError: out of breath"


def test_other_runners_have_times_if_torch_fails(monkeypatch, tmp_path, capsys):
    """torch's LSTM has no autocast to bfloat16 on some processors."""

    def fail(self, *given):
        raise RuntimeError("no such primitive")

    monkeypatch.setattr(torch.nn.LSTM, "forward", fail)
    chosen = ("--modes", "inference", "--windows", "1", "--budget", "0.05", "--no-memory", "--size", "2,3,4,5")
    assert main(("bench", *chosen, "--runners", "reference", "--picture", str(tmp_path / "b"))) == 1
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no such primitive" in printed
    assert re.search(r"reference +1 +[\d.]+ [mu]s", printed)
    assert "noise: unknown" in printed
    assert re.search(r">[\d.]+ ms<", (tmp_path / "b.svg").read_text())


def test_the_titles_of_a_picture_are_inside_of_it_and_name_the_case(tmp_path):
    chosen = {"modes": ("inference",), "windows": (1,), "runners": ("reference",), "sizes": ((2, 3, 4, 5),)}
    spec = BenchSpec.model_validate({**chosen, "placements": [{"sum": "joint"}], "autocast": True})
    figure = picture._figure(measure(spec.model_copy(update={"budget": 0.05, "memory": False})))
    (axes,) = figure.axes
    title = axes.get_title(loc="left")
    assert '{"sum": "joint"}' in title
    assert "autocast" in title
    (title,) = (text for text in axes.findobj(Text) if text.get_text() == title)
    assert title.get_window_extent(FigureCanvasAgg(figure).get_renderer()).x0 >= 0


def test_json_csv_and_picture_hold_every_figure(tmp_path, capsys):
    files = ("--csv", str(tmp_path / "b.csv"), "--picture", str(tmp_path / "b"))
    assert main(("bench", *QUICK, *files, "--json")) == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output) == {"machine", "options", "malloc", "laws_hold", "cases"}
    assert {"processor", "cores", "torch", "native_kernels", "load"} <= set(output["machine"])
    assert [case["mode"] for case in output["cases"]] == ["training", "inference", "streaming"]
    assert output["cases"][2]["size"] == {"input": 2, "hidden": 3, "batch": 1, "steps": 1}
    for case in output["cases"]:
        assert case["noise"] >= 1
        assert [(row["runner"], row["window"]) for row in case["rows"]] == [
            ("torch.nn", None), ("reference", 1), ("textbook", 1), ("reference", 3), ("textbook", 3)
        ]  # fmt: skip
        for row in case["rows"]:
            assert row["median"] >= row["best"] > 0
            assert row["ratio"] == pytest.approx(row["best"] / case["rows"][0]["best"])
    lines = list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))
    assert len(lines) == 15
    assert float(lines[1]["ratio"]) == output["cases"][0]["rows"][1]["ratio"]
    assert lines[0]["hidden"] == "3"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "textbook, k = 3" in (tmp_path / "b.svg").read_text()


@pytest.mark.skipif(not memory.can_measure(), reason="this system does not let a process set its peak back")
def test_memory_is_the_growth_of_a_fresh_process(monkeypatch):
    case = Case("lstm", "layer", Size(4, 64, 128, 300), 1, "training", "float32")
    grown = memory.growth(case, "torch.nn", None, timeout=60)
    outputs = 4 * 300 * 128 * 64  # bytes of one tensor with all outputs; the four gates of all steps are freed at once
    assert isinstance(grown, int)
    assert 5 * outputs < grown < 30 * outputs
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    output = memory.growth(case, "torch.nn", None, timeout=60)
    assert output == "memory not measured: exit code 1: no output"


def test_a_textbook_that_would_not_fit_is_not_begun(monkeypatch):
    assert footprint(window=100, steps=120, batch=128, features=9 * 68, itemsize=4) > 2 * 2**30
    monkeypatch.setattr(engine, "available_memory", lambda: 2**30)
    big = replace(TINY, size=Size(10, 68, 128, 120))
    row = engine._admitted(big, Row("textbook", 100), {})
    assert isinstance(row, Row)
    assert (row.status, row.reason) == ("skipped", "too large here: it would hold about 4.1 GiB, and 1.0 GiB are free")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--size", "2,60"),
            "--size: got '2,60'; expected INPUT,HIDDEN,BATCH,STEPS, such as 2,60,50,100",
        ),
        (("--size", "2,60,0,5"), "sizes[0][2]: got 0; expected at least 1"),
        (("--windows", "3,3"), "windows: got 3 twice; expected each value once"),
        (
            ("--runners", "nativ"),
            "runners: got unknown runner 'nativ'; expected one of native, reference, textbook; did you mean 'native'?",
        ),
        (("--modes", "trainin"), "modes[0]: got 'trainin'; expected 'training', 'inference' or 'streaming'"),
        (("--cells", "lstn"), "cell: got unknown cell 'lstn'"),
        (("--norms", "laier"), "did you mean 'layer'?"),
        (("--norms", "none"), "norms: 'none' leaves nothing to compare"),
        (
            ("--norms", "{kind: rms, epss: 1}"),
            "norm.epss: got an unknown key; expected one of kind, eps, bias",
        ),
        (("--norms", "{kind: rms"), "--norms {kind: rms: not a YAML value"),
        (("--windows", "cumulativ"), "did you mean 'cumulative'?"),
        (("--windows", "0"), "windows[0]: got 0; expected at least 1"),
        (("--placements", "{sum: jiont}"), "placement.sum: got 'jiont'; expected 'separate' or 'joint'"),
        (("--budget", "0"), "budget: got 0.0; expected a number above 0"),
        (("--dtype", "float16"), "dtype: got 'float16'; expected 'float32' or 'float64'"),
        (("--csv", "nowhere/b.csv"), "nowhere/b.csv: got no folder nowhere; expected a folder for the file"),
        (("--size", "2,60,100000000,100000000"), "expected sequences that fit the"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    assert main(("bench", *arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_options_make_cases_in_order():
    spec = BenchSpec(threads=(1, 2), modes=("training", "streaming"), malloc="both", sizes=((2, 3, 4, 5), (2, 3, 6, 7)))
    cases = spec.cases()
    assert [case.malloc for case in cases] == ["default"] * 6 + ["keep"] * 6  # both sizes have the same stream
    assert len(set(cases)) == 12


def results(capsys, *arguments):
    code = main(("bench", *QUICK[:2], "--budget", "3", "--no-memory", "--json", *arguments))
    return code, json.loads(capsys.readouterr().out)["cases"]


def test_placements_and_windows_are_those_of_the_layer(capsys):
    arguments = ("--modes", "training", "--runners", "reference,textbook", "--placements", "{}, {carry: normed}")
    code, cases = results(capsys, *arguments, "--windows", "2, {kind: exponential, half_life: 3}")
    assert code == 0
    assert [case["placement"] for case in cases] == ["", '{"carry": "normed"}']
    rows = {(case["placement"], row["runner"], row["window"]): row for case in cases for row in case["rows"]}
    kind = '{"kind": "exponential", "half_life": 3}'
    assert rows["", "reference", kind]["status"] == "measured"
    assert rows["", "textbook", kind]["reason"] == "it is written for windows of k steps"
    assert rows[cases[1]["placement"], "textbook", 2]["reason"] == "it is written for the default placement"
    assert rows[cases[1]["placement"], "reference", 2]["status"] == "measured"


def test_a_case_builds_the_layer_of_its_options():
    options = {"norms": [{"kind": "rms", "eps": 1e-3}], "placements": [{"gates": "per_gate"}], "modes": ["training"]}
    (case,) = BenchSpec.model_validate(options).cases()
    layer = case.layer('{"kind": "exponential", "half_life": 2.0}')
    assert layer.norm is not None
    assert layer.norm.model_dump()["eps"] == 1e-3
    assert layer.placement.gates == "per_gate"
    assert layer.window.model_dump()["half_life"] == 2.0
    assert case.layer(None).norm is None


def test_autocast_is_on_in_every_call_and_in_the_gate(monkeypatch, capsys):
    forward = Recurrent.forward

    def shifted(self, *given):
        ys, after = forward(self, *given)
        return (ys + 1.0 if torch.is_autocast_enabled("cpu") else ys), after

    monkeypatch.setattr(Recurrent, "forward", shifted)
    assert laws.broken_law(TINY, "native", 3) is None
    assert "y: " in str(laws.broken_law(replace(TINY, autocast=True), "native", 3))
    monkeypatch.undo()
    enabled = []
    forward = torch.nn.GRU.forward
    monkeypatch.setattr(
        torch.nn.GRU, "forward", lambda self, *a: enabled.append(torch.is_autocast_enabled("cpu")) or forward(self, *a)
    )
    code, (case,) = results(
        capsys, "--cells", "gru", "--modes", "training", "--runners", "reference", "--windows", "2", "--autocast"
    )
    assert code == 0
    assert case["autocast"] is True
    assert enabled
    assert all(enabled)


@pytest.mark.parametrize(("load", "busy"), [(99.0, True), (0.1, False), (None, False)])
def test_a_busy_machine_is_reported(load, busy, monkeypatch, capsys):
    def average():
        if load is None:
            raise OSError
        return (load, load, load)

    monkeypatch.setattr(os, "getloadavg", average)
    assert (
        main(("bench", *QUICK[:2], "--runners", "reference", "--budget", "0.05", "--no-memory", "--modes", "inference"))
        == 0
    )
    assert ("the machine is busy with other work" in capsys.readouterr().out) == busy
