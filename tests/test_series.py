"""Time series from files: contents of windows, absence of leakage, scores, and errors of invalid files."""

import html
import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import atn_norms as an
from atn_norms.cli import main
from atn_norms.errors import SpecError
from atn_norms.tasks import Model, SeriesSpec
from atn_norms.tasks.series import filled
from tests.compare import compare

ROWS = 40


def write(tmp_path, columns, name="load.csv"):
    """Write columns (None: missing) as a CSV file."""
    lines = [",".join(columns)]
    lines += [
        ",".join("" if value is None else str(value) for value in row) for row in zip(*columns.values(), strict=True)
    ]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return str(tmp_path / name)


def columns(**changed):
    """Return 40 rows: a time, an increasing target, a second target, and a covariate."""
    rows = range(ROWS)
    made = {
        "time": [str(row) for row in rows],
        "load": [float(row + 3 * math.sin(row)) for row in rows],
        "price": [100.0 * math.cos(row) for row in rows],
        "heat": [float(row % 5) for row in rows],
    }
    return made | changed


def spec(tmp_path, made=None, **options):
    file = write(tmp_path, columns() if made is None else made)
    return SeriesSpec(**{"file": file, "targets": ["load"], "context": 4, "horizon": 2, "time": "time", **options})


class Constant(Model):
    """Predict the same standardized change everywhere."""

    def __init__(self, task, change):
        super().__init__(nn.Identity(), None, nn.Identity())
        self.shape, self.change = (task.horizon, len(task.spec.targets)), change

    def features(self, inputs, state=None, lengths=None):
        return torch.full((*inputs.shape[:2], *self.shape), self.change), None


def test_a_window_holds_standardized_columns_and_the_changes_to_predict(tmp_path):
    task = spec(tmp_path, targets=["load", "price"], covariates=["heat"]).build(0)
    made = columns()
    train = 28
    scaled = {}
    for name in ("load", "price", "heat"):
        values = torch.tensor(made[name], dtype=torch.float64)
        scaled[name] = (values - values[:train].mean()) / values[:train].std(correction=0)
    assert {part: (starts[0].item(), starts[-1].item()) for part, starts in task.starts.items()} == {
        "train": (0, 22),
        "validation": (24, 28),
        "test": (30, 34),
    }
    batch = task._cut(torch.tensor([0, 30]))
    assert batch.inputs.shape == (4, 2, 3) and batch.targets.shape == (2, 2, 2, 2)
    for row, start in enumerate((0, 30)):
        for feature, name in enumerate(("load", "price", "heat")):
            compare(batch.inputs[:, row, feature], scaled[name][start : start + 4].float(), tolerance=1e-6)
        for target, name in enumerate(("load", "price")):
            change = scaled[name][start + 4 : start + 6] - scaled[name][start + 3]
            compare(batch.targets[row, :, target, 0], change.float(), tolerance=1e-6)
    assert (batch.targets[..., 1] == 1).all()


def test_scaling_makes_forecasts_of_raw_rows(tmp_path):
    made = columns()
    task = spec(tmp_path, made, covariates=["heat"]).build(0)
    torch.manual_seed(0)
    model = Model(task.encoder(), an.GRU(2, 8, norm="layer", window=3), task.readout(8)).eval()
    mean, deviation = torch.tensor([task.scaling["load"], task.scaling["heat"]], dtype=torch.float64).T
    rows = torch.tensor([made["load"], made["heat"]], dtype=torch.float64).T
    errors = []
    for start in task.starts["test"].tolist():
        recent = rows[start : start + 4]
        with torch.no_grad():
            output, _ = model(((recent - mean) / deviation).float().unsqueeze(1))
        forecast = recent[-1, 0] + deviation[0] * output[-1, 0, :, 0]
        errors.append((forecast - rows[start + 4 : start + 6, 0]).abs())
    with torch.no_grad():
        assert torch.cat(errors).mean().item() == pytest.approx(task.evaluate(model, "test")["MAE"], rel=1e-5)


def test_training_never_uses_later_rows(tmp_path):
    made = columns()
    before = spec(tmp_path, made, covariates=["heat"]).build(0)
    for name in ("load", "heat"):
        made[name] = made[name][:28] + [1e6 + row for row in range(12)]
    after = spec(tmp_path, made, covariates=["heat"]).build(0)
    for step in range(8):
        compare(tuple(before.batch(step, 5))[:2], tuple(after.batch(step, 5))[:2], tolerance=0)
    assert before.baselines != after.baselines


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(tmp_path):
    task = spec(tmp_path).build(0)
    epochs = [torch.cat([task.batch(step, 1).inputs for step in range(e * 23, e * 23 + 23)], 1) for e in range(2)]
    assert not torch.equal(*epochs)
    compare(epochs[0][0, :, 0].sort().values, epochs[1][0, :, 0].sort().values, tolerance=0)
    other = SeriesSpec(**dict(task.spec)).build(1)
    assert not torch.equal(other.batch(0, 23).inputs, task.batch(0, 23).inputs)


@pytest.mark.parametrize("metric", ["MAE", "MSE", "MASE"])
def test_scores_are_in_the_unit_of_the_file(tmp_path, metric, monkeypatch):
    monkeypatch.setattr("atn_norms.tasks.series.EVALUATION_ROWS", 2)
    made = columns(load=[*columns()["load"][:36], None, *columns()["load"][37:]])
    task = spec(tmp_path, made, targets=["load", "price"], season=3, metric=metric).build(0)
    change = 0.25
    scores = task.evaluate(Constant(task, change), "test")
    errors, relative = [], []
    for name in ("load", "price"):
        values = [math.nan if value is None else value for value in made[name]]
        train = torch.tensor(values[:28], dtype=torch.float64)
        naive = (train[3:] - train[:-3]).abs().mean().item()
        for start in range(30, 35):
            known = [value for value in values[: start + 4] if not math.isnan(value)]
            predicted = known[-1] + change * train.std(correction=0).item()
            ahead = [predicted - value for value in values[start + 4 : start + 6] if not math.isnan(value)]
            errors += ahead
            relative += [abs(error) / naive for error in ahead]
    expected = {
        "MAE": sum(map(abs, errors)) / len(errors),
        "MSE": sum(error**2 for error in errors) / len(errors),
        "MASE": sum(relative) / len(relative),
    }
    assert task.metric == metric and scores == {
        name: pytest.approx(value, rel=1e-6) for name, value in expected.items()
    }


@pytest.mark.parametrize("metric", ["MAE", "MSE", "MASE"])
def test_the_loss_is_the_metric_up_to_a_factor(tmp_path, metric):
    task = spec(tmp_path, targets=["load", "price"], metric=metric).build(0)
    model = Constant(task, 0.25)
    everything = task._cut(task.starts["test"])
    loss, carry = task.loss(model, everything, None)
    assert task.in_metric(loss.item()) == pytest.approx(task.evaluate(model, "test")[metric], rel=1e-5)
    assert carry is None


def test_the_baselines_are_trivial_predictors(tmp_path):
    values = columns()["load"]
    task = spec(tmp_path, season=3, horizon=4).build(0)
    mean = sum(values[:28]) / 28
    found = {"training mean": [], "last value": [], "seasonal": []}
    for start in (30, 31, 32):
        for ahead in range(4):
            value, last = values[start + 4 + ahead], start + 3
            found["training mean"].append(abs(mean - value))
            found["last value"].append(abs(values[last] - value))
            found["seasonal"].append(abs(values[last - 2 + ahead % 3] - value))
    assert task.baselines == {name: pytest.approx(sum(each) / 12, rel=1e-9) for name, each in found.items()}


def test_missing_values_are_masked_and_reported(tmp_path):
    made = columns()
    made["load"][5] = made["load"][37] = made["heat"][7] = None
    task = spec(tmp_path, made, covariates=["heat"]).build(0)
    assert task.input_size == 4, "two columns and a mask for each"
    inputs, targets, *_ = task._cut(torch.tensor([4]))
    assert inputs[1, 0].tolist() == [0, inputs[1, 0, 1].item(), 1, 0] and inputs[3, 0, 1:].tolist() == [0, 0, 1]
    assert task._cut(torch.tensor([1])).targets[0, :, 0].tolist()[0] == [0, 0], "row 5 does not count"
    anchored = task._cut(torch.tensor([2])).targets[0, 0, 0, 0]
    compare(anchored, (task.targets[6] - task.targets[4])[0].float(), tolerance=1e-6)
    gradient = torch.ones(1, 2, 1, requires_grad=True)
    costs = task.loss(Fixed(gradient), task._cut(torch.tensor([0])), None)[0]
    assert torch.autograd.grad(costs, gradient)[0].flatten().tolist()[1] == 0, "row 5 has no gradient"
    assert targets[..., 1].tolist() == [[[1], [1]]]
    assert task.notes == (
        "load.csv: 40 rows (28 train, 6 validation, 6 test)",
        "column 'load': 2 of 40 values are missing and masked (first at load.csv:7)",
        "column 'heat': 1 of 40 values are missing and masked (first at load.csv:9)",
    )


class Fixed(Model):
    """Return fixed predictions."""

    def __init__(self, predictions):
        super().__init__(nn.Identity(), None, nn.Identity())
        self.predictions = predictions

    def features(self, inputs, state=None, lengths=None):
        return self.predictions.unsqueeze(0), None


def test_windows_without_a_value_to_predict_are_left_out(tmp_path):
    made = columns()
    made["load"][10:13] = [None] * 3
    task = spec(tmp_path, made).build(0)
    assert sorted({*range(23)} - {*task.starts["train"].tolist()}) == [6, 7]
    made["load"][34:] = [None] * 6
    with pytest.raises(
        SpecError, match=r"load.csv: targets: got no value in the 6 rows for test; expected at least one"
    ):
        spec(tmp_path, made).build(0)


def test_the_last_value_is_the_last_observed_one():
    values = torch.tensor([[math.nan, 1.0], [2.0, math.nan], [math.nan, math.nan]])
    compare(filled(values), torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0]]), tolerance=0)


def test_a_regression_sees_covariates_up_to_the_step_and_no_target(tmp_path):
    made = columns(heat=[2 * value + 1 for value in columns()["load"]])
    task = spec(tmp_path, made, mode="regress", covariates=["heat"], horizon=None, context=1).build(0)
    assert task.input_size == 1 and task.baselines.keys() == {"training mean"}
    inputs, targets, *_ = task.batch(0, 28)
    compare(targets[:, 0, 0, 0], inputs[0, :, 0], tolerance=1e-6)
    assert [task.starts[part][[0, -1]].tolist() for part in task.starts] == [[0, 27], [28, 33], [34, 39]]


def test_columns_known_in_advance_are_inputs_of_the_forecast_steps(tmp_path):
    made = columns()
    made["heat"][38] = None
    task = spec(tmp_path, made, covariates=["price"], known=["heat"]).build(0)
    assert task.input_size == 2 + 2 * 2, "two columns; a known column and its mask at each of two steps"
    values = torch.tensor([math.nan if value is None else value for value in made["heat"]], dtype=torch.float64)
    scaled = (values - values[:28].mean()) / values[:28].std(correction=0)
    for part in task.starts:
        starts = task.starts[part]
        inputs = task._cut(starts).inputs
        for step in range(4):
            for ahead in (1, 2):
                row = scaled[starts + step + ahead]
                expected = torch.stack([row.nan_to_num(0.0), row.isnan()], 1).float()
                compare(inputs[step, :, 2 * ahead : 2 * ahead + 2], expected, tolerance=1e-6)
    assert "column 'heat': 1 of 40 values are missing" in task.notes[-1]


def test_the_stride_leaves_windows_out(tmp_path):
    task = spec(tmp_path, stride=3).build(0)
    assert task.starts["test"].tolist() == [30, 33]
    counts = ", ".join(f"{len(task.starts[part])} {part}" for part in ("train", "validation", "test"))
    assert task.notes[1] == f"windows with stride 3: {counts}" and counts.endswith("2 test")
    assert "windows" not in " ".join(spec(tmp_path).build(0).notes)


def test_a_model_learns_from_a_leading_covariate(tmp_path):
    """Forecast a target that repeats the covariate of the previous step."""
    noise = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    made = {"time": [*range(400)], "load": [0.0, *noise[:-1]], "heat": noise}
    task = spec(tmp_path, made, covariates=["heat"], horizon=1).build(0)
    torch.manual_seed(0)
    model = Model(task.encoder(), an.GRU(task.input_size, 8, norm="layer", window=4), task.readout(8))
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for step in range(150):
        optimizer.zero_grad()
        task.loss(model, task.batch(step, 32), None)[0].backward()
        optimizer.step()
    with torch.no_grad():
        score = task.evaluate(model.eval(), "test")["MAE"]
    assert score < min(task.baselines.values()) / 2


def test_irregular_steps_of_time_are_reported(tmp_path):
    times = [f"2020-01-{day:02}" for day in (*range(1, 20), 21, *range(23, 32))] + [
        f"2020-02-{d:02}" for d in range(1, 12)
    ]
    task = spec(tmp_path, columns(time=times)).build(0)
    note = "column 'time': 2 of 39 steps differ from the median, 86400 s (first at load.csv:21)"
    assert task.notes[1:] == (note,)


@pytest.mark.parametrize("step", [1, 3, 12])
def test_months_quarters_and_years_are_regular_steps(tmp_path, step):
    months = range(0, step * ROWS, step)
    for form in ("{:04}-{:02}", "{:04}-{:02}-15", "{:04}-{:02}-01 06:00:00"):
        times = [form.format(1960 + month // 12, month % 12 + 1) for month in months]
        assert spec(tmp_path, columns(time=times)).build(0).notes[1:] == ()
    times[-1] = "2099-12-31 06:00:00"
    assert "steps differ from the median" in spec(tmp_path, columns(time=times)).build(0).notes[1]


def test_dates_that_are_read_as_numbers_are_named(tmp_path):
    times = [f"2020{month:02}{day:02}" for month in (1, 2) for day in range(1, 21)]
    (note,) = spec(tmp_path, columns(time=times)).build(0).notes[1:]
    assert note.endswith("differ from the median, 1 (first at load.csv:22); for dates, set `time_format: '%Y%m%d'`")
    (note,) = spec(tmp_path, columns(time=times), time_format="%Y%m%d").build(0).notes[1:]
    assert "86400 s" in note and "time_format" not in note
    times[-1] = "20209999"
    assert "time_format" not in spec(tmp_path, columns(time=times)).build(0).notes[1]


def test_rounding_of_a_time_is_not_an_irregular_step(tmp_path):
    times = [f"{0.0125 * row:.4f}" for row in range(ROWS)]
    assert len({float(b) - float(a) for a, b in pairwise(times)}) > 1
    assert spec(tmp_path, columns(time=times)).build(0).notes[1:] == ()
    times[20:] = [f"{0.0125 * row:.4f}" for row in range(21, 41)]
    assert "1 of 39 steps differ from the median, 0.0125" in spec(tmp_path, columns(time=times)).build(0).notes[1]


STUDY = """
task:
  kind: series
  file: load.csv
  targets: [load]
  context: 4
  horizon: 2
model: {cell: gru, hidden_size: 4}
train: {steps: 4, batch_size: 5}
axes: {norm: [layer]}
"""


def test_a_study_names_the_line_of_the_option_and_of_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    write(tmp_path, columns(load=[*columns()["load"][:-1], "x"]))
    assert main(["ablate", "study.yaml", "--workers", "0", "--out", "here"]) == 2
    file = tmp_path / "load.csv"
    message = f"study.yaml:4:3: task.file: {file}:41: got 'x' in column 'load'; expected a number"
    assert capsys.readouterr().err == f"atn-norms: {message}\n" and not (tmp_path / "here").exists()


def test_a_study_reports_its_data_and_rejects_a_changed_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    made = columns()
    made["load"][3] = None
    write(tmp_path, made)
    notes = [
        "load.csv: 40 rows (28 train, 6 validation, 6 test)",
        "column 'load': 1 of 40 values are missing and masked (first at load.csv:5)",
    ]
    assert main(["ablate", "study.yaml", "--workers", "0", "--out", "here"]) == 0
    assert "".join(f"data: {note}\n" for note in notes) in capsys.readouterr().out
    assert f"Data: {'; '.join(notes)}." in html.unescape((tmp_path / "here/report/report.html").read_text())
    write(tmp_path, columns())
    assert main(["ablate", "study.yaml", "--workers", "0", "--out", "here"]) == 2
    for result in (tmp_path / "here/trials").glob("*/result.json"):
        result.unlink()
    capsys.readouterr()
    assert main(["resume", "here", "--workers", "0"]) != 0
    assert "task.file: got changed content; expected the content of the time when" in "".join(capsys.readouterr())


def test_the_hash_is_that_of_the_file(tmp_path):
    before = spec(tmp_path)
    kept = before.data()["file"]
    (tmp_path / "elsewhere.csv").write_bytes((tmp_path / "load.csv").read_bytes())
    assert before.model_copy(update={"file": str(tmp_path / "elsewhere.csv")}).data()["file"] == kept
    assert kept.startswith("sha256:") and len(kept) == 71
    assert spec(tmp_path, columns(heat=[9.0] * ROWS)).data()["file"] != kept


def swapped(values, one, other):
    values = [*values]
    values[one], values[other] = values[other], values[one]
    return values


TIMES = columns()["time"]


KNOWN = "a column of FILE ('time', 'load', 'price', 'heat')"
MISSING = [*[None] * 28, *range(12)]
FAULTS = [
    ({}, {"targets": ["laod"]}, f"targets: got 'laod'; expected {KNOWN}; did you mean 'load'?"),
    ({}, {"covariates": ["het"]}, f"covariates: got 'het'; expected {KNOWN}; did you mean 'heat'?"),
    ({}, {"known": ["het"]}, f"known: got 'het'; expected {KNOWN}; did you mean 'heat'?"),
    (
        {"heat": MISSING},
        {"known": ["heat"]},
        "FILE: known: got no value in the 28 training rows of column 'heat'; expected at least one value",
    ),
    ({}, {"time": "tmie"}, f"time: got 'tmie'; expected {KNOWN}; did you mean 'time'?"),
    (
        {"time": swapped(TIMES, 7, 8)},
        {},
        "FILE:10: time: got '7' in column 'time', after '8' in the row before; "
        "expected times that increase from row to row",
    ),
    (
        {"time": [*TIMES[:9], "8", *TIMES[10:]]},
        {},
        "FILE:11: time: got '8' in column 'time' again; expected times that increase from row to row",
    ),
    ({"load": [*["1.5"] * 39, "x"]}, {}, "FILE:41: file: got 'x' in column 'load'; expected a number"),
    (
        {"load": [2.0] * ROWS},
        {},
        "FILE: targets: got only 2 in the 28 training rows of column 'load'; expected values that differ",
    ),
    (
        {"load": MISSING},
        {},
        "FILE: targets: got no value in the 28 training rows of column 'load'; expected values that differ",
    ),
    (
        {"heat": MISSING},
        {"covariates": ["heat"]},
        "FILE: covariates: got no value in the 28 training rows of column 'heat'; expected at least one value",
    ),
    *(
        (
            {"heat": column},
            {"covariates": ["heat"]},
            f"FILE:{line}: file: got '{value}' in column 'heat'; "
            f"expected a value that float32 holds after standardization (mean {mean}, deviation {deviation})",
        )
        for column, line, value, mean, deviation in (
            ([*range(9), 1e200, *range(30)], 11, "1e+200", "3.57143e+198", "inf"),
            ([1e-200 * row for row in range(ROWS)], 41, "3.9e-199", "1.35e-199", "0"),
            ([*[2.0] * 35, -1e60, *[2.0] * 4], 37, "-1e+60", "2", "1"),
        )
    ),
    (
        {"load": [1e200 * (row % 2) for row in range(ROWS)]},
        {},
        "FILE:3: file: got '1e+200' in column 'load'; expected a value that float32 holds after standardization "
        "(mean 5e+199, deviation inf)",
    ),
    (
        {},
        {"context": 27},
        "FILE: file: got 40 rows, 28 of them for train; "
        "expected at least 29 for train, the context of 27 and the horizon of 2",
    ),
    (
        {},
        {"horizon": 7},
        "FILE: file: got 40 rows, 6 of them for validation; expected at least 7 for validation, the horizon of 7",
    ),
    ({}, {"season": 28}, "season: got 28; expected less than the 28 training rows"),
    (
        {"load": [float(row % 4) for row in range(ROWS)]},
        {"season": 4, "metric": "MASE"},
        "metric: got no change of column 'load' over 4 steps in the training rows; "
        "expected a change, which MASE divides by; or another metric",
    ),
]


@pytest.mark.parametrize(("changed", "options", "message"), FAULTS, ids=[fault[2][:60] for fault in FAULTS])
def test_an_invalid_file_is_rejected(tmp_path, changed, options, message):
    with pytest.raises(SpecError) as caught:
        spec(tmp_path, columns(**changed), **options).build(0)
    assert str(caught.value).replace(str(tmp_path / "load.csv"), "FILE") == message


REGRESS = {"mode": "regress", "horizon": None}
DISPUTES = [
    ({"targets": ["load", "load"]}, "targets: got 'load' 2 times; expected each column once"),
    ({"covariates": ["load"]}, "covariates: got 'load', which is a target; expected other columns"),
    ({"known": ["load"]}, "known: got 'load', which is a target or a covariate; expected other columns"),
    (
        REGRESS | {"known": ["heat"], "covariates": ["price"]},
        "known: got columns with mode regress; expected covariates, whose values at the step are inputs",
    ),
    (REGRESS, "covariates: got no covariates; expected at least one with mode regress"),
    (
        REGRESS | {"covariates": ["heat"], "horizon": 2},
        "horizon: got 2 with mode regress; expected none, or mode forec",
    ),
    (
        {"time": None, "time_format": "%Y"},
        "time_format: got a format without a column `time`; expected both or neither",
    ),
    ({"validation": 0.5, "test": 0.5}, "test: got 0.5 beside validation 0.5; expected a sum below 1"),
    ({"targets": []}, "at least 1 item"),
]


@pytest.mark.parametrize(("options", "message"), DISPUTES, ids=[message[:40] for _, message in DISPUTES])
def test_inconsistent_options_are_rejected(tmp_path, options, message):
    with pytest.raises(ValidationError, match=message):
        spec(tmp_path, **options)


def test_a_prediction_that_is_not_finite_has_no_finite_score(tmp_path):
    made = columns()
    made["load"][36] = None
    task = spec(tmp_path, made).build(0)
    assert math.isnan(task.evaluate(Constant(task, math.nan), "test")["MAE"])
    assert task.loss(Constant(task, math.nan), task._cut(torch.tensor([30])), None)[0].isnan()


def test_a_batch_larger_than_the_training_windows_is_rejected(tmp_path):
    with pytest.raises(SpecError, match="train.batch_size: got 24; expected 1 to 23, the windows in the training rows"):
        spec(tmp_path).build(0).batch(0, 24)
