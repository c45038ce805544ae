"""Time series from a file: forecast columns, or regress them on other columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from atn_norms.errors import SpecError
from atn_norms.files import absolute
from atn_norms.pytree import Tree
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator
from atn_norms.tasks.scaling import extreme, limits, masked, moments
from atn_norms.tasks.tables import Table, content, digest, fault, read

EVALUATION_ROWS = 500  # windows at a time: fixed, so that a score never depends on how training was batched
Metric = Literal["MAE", "MSE", "MASE"]
METRICS: tuple[Metric, ...] = ("MAE", "MSE", "MASE")
PARTS = ("train", "validation", "test")
EPOCH = datetime(1970, 1, 1)
COMPACT = "%Y%m%d"  # dates that are numbers otherwise
MONTH = 28 * 86400 * 10**9  # nanoseconds of the shortest month


class SeriesSpec(TaskSpec):
    """Options of a time series in a CSV or Parquet file; the defaults are small customary values.

    | option | meaning | unit |
    |---|---|---|
    | `file` | a CSV or Parquet file, one row per time step (relative to the working directory) | path |
    | `targets` | columns to predict | |
    | `covariates` | additional input columns | |
    | `known` | columns known in advance, such as a calendar: their values at the next `horizon` steps are inputs | |
    | `mode` | `forecast`: predict the targets of the next `horizon` steps from the targets and covariates so far; `regress`: predict the targets of a step from the covariates up to it | |
    | `time` | column of times, which must increase; None: the rows are in order | |
    | `time_format` | format of the times as in `strptime`; None: numbers, or ISO 8601 dates and times | |
    | `context` | input steps of a prediction | steps |
    | `horizon` | steps to forecast; None: 1 | steps |
    | `season` | steps after which the series repeats, for the seasonal predictor and MASE; None: no season | steps |
    | `stride` | steps from one window to the next, in training, validation and test | steps |
    | `validation`, `test` | shares of the rows, cut from the end in time order: training, validation, test | |
    | `metric` | score: `MAE`, `MSE` or `MASE` | |
    | `delimiter` | field separator of a CSV file | |
    | `missing` | spellings of a missing value in a CSV file, in addition to the empty field, `NA`, `NaN`, `null` and similar | |

    >>> import pathlib
    >>> _ = pathlib.Path("load.csv").write_text("load\\n" + "\\n".join(str(i % 7) for i in range(200)))
    >>> task = SeriesSpec(file="load.csv", targets=["load"], context=14, season=7).build(seed=0)
    >>> task.batch(0, 20).inputs.shape, task.baselines["seasonal"]
    (torch.Size([14, 20, 1]), 0.0)
    """  # noqa: E501

    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 2000,
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "clip_grad_norm": 1.0,
        "keep": "best",
    }
    kind: Literal["series"] = "series"
    file: Annotated[str, AfterValidator(absolute)]
    targets: tuple[str, ...] = Field(min_length=1)
    covariates: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    mode: Literal["forecast", "regress"] = "forecast"
    time: str | None = None
    time_format: str | None = None
    context: int = Field(default=48, ge=1, le=1_000_000)
    horizon: int | None = Field(default=None, ge=1, le=100_000)
    season: int | None = Field(default=None, ge=1)
    stride: int = Field(default=1, ge=1)
    validation: float = Field(default=0.15, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)
    metric: Metric = "MAE"
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for option in ("targets", "covariates", "known"):
            columns = getattr(self, option)
            for column in columns:
                if columns.count(column) > 1:
                    raise fault(option, "", f"{column!r} {columns.count(column)} times", "each column once")
        if both := [column for column in self.covariates if column in self.targets]:
            raise fault("covariates", "", f"{both[0]!r}, which is a target", "other columns")
        if both := [column for column in self.known if column in (*self.targets, *self.covariates)]:
            raise fault("known", "", f"{both[0]!r}, which is a target or a covariate", "other columns")
        if self.mode == "regress" and self.known:
            raise fault("known", "", "columns with mode regress", "covariates, whose values at the step are inputs")
        if self.mode == "regress" and not self.covariates:
            raise fault("covariates", "", "no covariates", "at least one with mode regress")
        if self.mode == "regress" and self.horizon is not None:
            raise fault("horizon", "", f"{self.horizon} with mode regress", "none, or mode forecast")
        if self.time_format is not None and self.time is None:
            raise fault("time_format", "", "a format without a column `time`", "both or neither")
        if self.validation + self.test >= 1:
            raise fault("test", "", f"{self.test} beside validation {self.validation}", "a sum below 1")
        return self

    @property
    def offset(self) -> int:
        """Steps from the last input step to the first target step."""
        return 1 if self.mode == "forecast" else 0

    @property
    def ahead(self) -> int:
        """Steps from the last input step to the last target step."""
        return (self.horizon or 1) * self.offset

    def build(self, seed: int) -> Series:
        return Series(self, seed)

    def data(self) -> dict[str, str]:
        return {"file": f"sha256:{digest(content(Path(self.file), 'file'))}"}


class Series(Task):
    r"""Predict columns of a time series; the score is a mean over windows, steps and targets, in the file's unit.

    $$\mathrm{MAE} = \overline{|\hat y - y|}, \qquad \mathrm{MSE} = \overline{(\hat y - y)^2}, \qquad
    \mathrm{MASE} = \overline{|\hat y - y| / q}, \quad q = \overline{|y_t - y_{t - m}|}$$

    MASE is from Hyndman and Koehler (International Journal of Forecasting 22:679, 2006); q is a target's mean over the
    training rows, m the season, or 1. Each target has its own q, so MASE suits several targets in different units.

    | symbol | meaning | shape |
    |---|---|---|
    | inputs | standardized columns; a mask column (1: missing) for each column with missing values; `known` columns of the next `horizon` steps | `[T, B, F]` |
    | targets | standardized targets minus the last observed values, and 1 for each observed value | `[B, H, J, 2]` |

    The rows are split in time order. A window belongs to the split that holds its target steps; its input steps may
    reach into the split before. Means and deviations are those of the training rows. A forecast is the last observed
    value plus the output of the read-out. `scaling` maps each column to its mean and deviation. `preprocessing` holds
    them for new data, and the columns that have a mask column (`masks`). A missing value is 0 as an input, and a
    missing target is left out of losses and scores. The loss is the metric, up to a constant factor.

    Baselines, on the test split: `training mean`; of a forecast also `last value`, the last observed one, and
    `seasonal`, the values of the last whole season.

    Errors: `SpecError` naming the option, and the line of the file if there is one.
    """  # noqa: E501

    batch_size = 32

    def __init__(self, spec: SeriesSpec, seed: int) -> None:
        self.spec, self.seed, self.metric = spec, seed, spec.metric
        path = Path(spec.file)
        table = read(content(path, "file"), path, "file", spec.delimiter, spec.missing)
        for option in ("targets", "covariates", "known"):
            table.require(getattr(spec, option), option)
        notes = [*_checked_times(table, spec.time, spec.time_format)]
        self.parts = self._divided(table.rows)
        counts = ", ".join(f"{len(rows)} {part}" for part, rows in self.parts.items())
        names = (*spec.targets, *spec.covariates, *spec.known)
        values = torch.stack([table.numbers(column) for column in names], 1)  # [N, columns], float64
        self.notes = (f"{path.name}: {table.rows} rows ({counts})", *notes, *missing_values(table, names, values))
        self._require_values(values)
        self._standardize(values, table)
        self.starts = {part: self._windows(part) for part in self.parts}
        if spec.stride > 1:
            windows = ", ".join(f"{len(starts)} {part}" for part, starts in self.starts.items())
            self.notes = (self.notes[0], f"windows with stride {spec.stride}: {windows}", *self.notes[1:])
        self.baselines = {name: self._trivial(kind)[self.metric] for name, kind in self._predictors().items()}

    @property
    def horizon(self) -> int:
        """Target steps of a window."""
        return max(1, self.spec.ahead)

    def encoder(self) -> nn.Module:
        return nn.Identity()

    def readout(self, output_size: int) -> nn.Module:
        sizes = (self.horizon, len(self.spec.targets))
        return nn.Sequential(nn.Linear(output_size, sizes[0] * sizes[1]), nn.Unflatten(-1, sizes))

    def batch(self, step: int, size: int) -> Batch:
        starts = self.starts["train"]
        if size > len(starts):
            raise fault("train.batch_size", "", f"{size}", f"1 to {len(starts)}, the windows in the training rows")
        epoch, index = divmod(step, len(starts) // size)  # windows that do not fill a batch are skipped
        if epoch != self._epoch[0]:
            order = torch.randperm(len(starts), generator=generator(self.seed, "series", "order", epoch))
            self._epoch = (epoch, order)
        return self._cut(starts[self._epoch[1][index * size : (index + 1) * size]])

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        wanted, observed = batch.targets.unbind(-1)
        error = predict(model, batch.inputs) - wanted
        costs = error.square() if self.metric == "MSE" else error.abs()
        return (costs * observed * self.weights).sum() / observed.sum(), None

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        return self._means(
            self._errors(predict(model, self._cut(starts).inputs), self._changes(starts))
            for starts in self.starts[split].split(EVALUATION_ROWS)
        )

    def _cut(self, starts: Tensor) -> Batch:
        """Return the windows whose input steps start at the rows `starts` [B]."""
        inputs = self.inputs[starts + torch.arange(self.spec.context).unsqueeze(1)]
        wanted = self._changes(starts)
        return Batch(inputs, torch.stack((wanted.nan_to_num(0.0), ~wanted.isnan()), -1).to(inputs))

    def _changes(self, starts: Tensor) -> Tensor:
        """Return the standardized targets minus the last observed values [B, H, J], float64; NaN: missing."""
        return self.targets[self._target_rows(starts)] - self.last[starts + self.spec.context - 1].unsqueeze(1)

    def _target_rows(self, starts: Tensor) -> Tensor:
        """Return the target rows [B, H] of windows."""
        return (starts + self.spec.context - 1 + self.spec.offset).unsqueeze(1) + torch.arange(self.horizon)

    def _errors(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Return the sums [4] of absolute, squared and MASE errors over observed values, and their number."""
        observed = ~wanted.isnan()
        error = ((predicted.double() - wanted).abs() * self.deviation).where(observed, 0.0)  # keeps a NaN prediction
        return torch.stack([each.sum() for each in (error, error.square(), error / self.naive, observed)])

    def _means(self, sums: Iterator[Tensor]) -> dict[str, float]:
        *errors, count = torch.stack([*sums]).sum(0).tolist()
        scores = {name: error / count for name, error in zip(METRICS, errors, strict=True)}
        return {name: score for name, score in scores.items() if name != "MASE" or bool((self.naive > 0).all())}

    def _divided(self, rows: int) -> dict[str, range]:
        """Return the rows of each split, in time order."""
        spec = self.spec
        test, validation = int(rows * spec.test), int(rows * spec.validation)
        cuts = (0, rows - test - validation, rows - test, rows)
        parts = {part: range(*cuts[i : i + 2]) for i, part in enumerate(PARTS)}
        for part, has in parts.items():
            window = f"the horizon of {self.horizon}"
            least = self.horizon
            if part == "train":
                window, least = f"the context of {spec.context} and {window}", spec.context + spec.ahead
            if len(has) < least:
                got = f"{rows} rows, {len(has)} of them for {part}"
                raise fault("file", spec.file, got, f"at least {least} for {part}, {window}")
        return parts

    def _require_values(self, values: Tensor) -> None:
        """Require two different values of every target, and one value of every covariate, among the training rows."""
        spec, train = self.spec, self.parts["train"]
        columns_of = {"targets": spec.targets, "covariates": spec.covariates, "known": spec.known}
        names = [column for columns in columns_of.values() for column in columns]
        for option, columns in columns_of.items():
            several = option == "targets"
            for column in columns:
                known = values[train.start : train.stop, names.index(column)]
                known = known[~known.isnan()]
                if not len(known) or (several and known.min() == known.max()):
                    value = f"only {known[0].item():g}" if len(known) else "no value"
                    got = f"{value} in the {len(train)} training rows of column {column!r}"
                    expected = "values that differ" if several else "at least one value"
                    raise fault(option, spec.file, got, expected)
        if spec.season is not None and spec.season >= len(train):
            raise fault("season", "", str(spec.season), f"less than the {len(train)} training rows")

    def _standardize(self, values: Tensor, table: Table) -> None:
        """Scale by the means and deviations of the training rows; store inputs, targets and their last values."""
        spec, count = self.spec, len(self.spec.targets)
        mean, deviation = moments(values[: len(self.parts["train"])])
        names = (*spec.targets, *spec.covariates, *spec.known)
        if found := extreme(values, mean, deviation):
            _, row, column = found
            got = f"{table.text(names[column], row)} in column {names[column]!r}"
            raise fault("file", table.place(row), got, limits(mean[column], deviation[column]))
        scaled = (values - mean) / deviation
        self.scaling = dict(zip(names, zip(mean.tolist(), deviation.tolist(), strict=True), strict=True))
        past, future = scaled.split((scaled.shape[1] - len(spec.known), len(spec.known)), 1)
        history = past if spec.mode == "forecast" else past[:, count:]
        missing = [name for name, absent in zip(names, scaled.isnan().any(0).tolist(), strict=True) if absent]
        used = names[count:] if spec.mode == "regress" else names
        self.preprocessing = {
            "scaling": {name: list(pair) for name, pair in self.scaling.items()},
            "masks": [name for name in missing if name in used],
        }
        self.inputs = masked(history, history.isnan().any(0))
        if spec.known:
            ahead = masked(future, future.isnan().any(0))
            steps = [_shifted(ahead, step) for step in range(1, self.horizon + 1)]
            self.inputs = torch.cat((self.inputs, *steps), 1)
        self.input_size = self.inputs.shape[1]
        self.targets, self.deviation = scaled[:, :count], deviation[:count]
        self.last = filled(self.targets) if spec.mode == "forecast" else torch.zeros_like(self.targets)
        self.naive = self._naive(self.targets[: len(self.parts["train"])]) * self.deviation
        factors = {"MAE": self.deviation, "MSE": self.deviation**2, "MASE": self.deviation / self.naive}[self.metric]
        self.metric_per_loss = factors.mean().item()
        self.weights = (factors / self.metric_per_loss).to(torch.get_default_dtype())

    def _naive(self, train: Tensor) -> Tensor:
        """Return the mean absolute change [J] over a season, or over one step without a season."""
        season = self.spec.season or 1
        changes = (train[season:] - train[:-season]).abs().nanmean(0).nan_to_num(0.0)
        for column, change in zip(self.spec.targets, changes.tolist(), strict=True):
            if self.metric == "MASE" and change == 0:
                got = f"no change of column {column!r} over {season} step{'s'[: season > 1]} in the training rows"
                raise fault("metric", "", got, "a change, which MASE divides by; or another metric")
        return changes

    def _windows(self, part: str) -> Tensor:
        """Return the first input rows of the windows with targets in a split and at least one observed target."""
        rows, reach = self.parts[part], self.spec.context - 1 + self.spec.offset
        starts = torch.arange(max(0, rows.start - reach), rows.stop - reach - self.horizon + 1, self.spec.stride)
        observed = (~self.targets.isnan()).any(1)[self._target_rows(starts)].any(1)
        if not observed.any():
            raise fault("targets", self.spec.file, f"no value in the {len(rows)} rows for {part}", "at least one")
        return starts[observed]

    def _predictors(self) -> dict[str, Tensor]:
        """Return the standardized predictions of each trivial predictor for the test windows."""
        starts = self.starts["test"]
        shape = (len(starts), self.horizon, len(self.spec.targets))
        predictors = {"training mean": torch.zeros(shape, dtype=torch.float64)}
        if self.spec.mode == "regress":
            return predictors
        last = starts + self.spec.context - 1
        predictors["last value"] = self.last[last].unsqueeze(1).expand(shape)
        if self.spec.season is not None:
            ahead = torch.arange(1, self.horizon + 1)
            back = -(-ahead // self.spec.season) * self.spec.season
            predictors["seasonal"] = self.last[last.unsqueeze(1) + ahead - back]
        return predictors

    def _trivial(self, values: Tensor) -> dict[str, float]:
        """Return the scores of a trivial predictor on the test split."""
        starts = self.starts["test"]
        relative = values - self.last[starts + self.spec.context - 1].unsqueeze(1)
        chunks = zip(relative.split(EVALUATION_ROWS), starts.split(EVALUATION_ROWS), strict=True)
        return self._means(self._errors(some, self._changes(rows)) for some, rows in chunks)

    _epoch: tuple[int, Tensor] = (-1, torch.empty(0))


def predict(model: Model, inputs: Tensor) -> Tensor:
    """Return predictions [B, H, J] from the layer's output at the last input step."""
    y, _ = model.features(inputs)
    return model.readout(y[-1])


def _shifted(values: Tensor, steps: int) -> Tensor:
    """Return the values [N, C] of `steps` rows later; the last rows, after which no window can forecast, are 0."""
    return torch.cat((values[steps:], torch.zeros_like(values[:steps])))


def filled(values: Tensor) -> Tensor:
    """Return `values` [N, C] with each missing value replaced by the last value before it, or by 0.

    >>> filled(torch.tensor([[float("nan")], [2.0], [float("nan")], [4.0]])).flatten()
    tensor([0., 2., 2., 4.])
    """
    rows = torch.arange(len(values)).unsqueeze(1).where(~values.isnan(), 0)
    return values.gather(0, rows.cummax(0).values).nan_to_num(0.0)


def missing_values(table: Table, columns: tuple[str, ...], values: Tensor) -> Iterator[str]:
    """Yield a sentence for each column with missing values."""
    for column, each in zip(columns, values.unbind(1), strict=True):
        rows = each.isnan().nonzero()
        if len(rows):
            first = table.place(int(rows[0]), folder=False)
            yield f"column {column!r}: {len(rows)} of {len(each)} values are missing and masked (first at {first})"


def _are_monthly(times: Tensor) -> bool:
    """Check whether times (nanoseconds) are a constant number of calendar months apart: months, quarters or years."""
    dates = [EPOCH + timedelta(microseconds=time // 1000) for time in times.tolist()]
    months = {12 * (b.year - a.year) + b.month - a.month for a, b in pairwise(dates)}
    return len(months) == 1 and len({date - date.replace(day=1) for date in dates}) == 1


def _checked_times(table: Table, column: str | None, pattern: str | None) -> Iterator[str]:
    """Check that times increase from row to row; yield a sentence where their steps differ.

    Errors: `SpecError` naming the line of the first time that does not increase.
    """
    if column is None:
        return
    table.require([column], "time")
    times, unit = table.times(column, pattern)
    steps = times.diff()
    wrong = (steps <= 0).nonzero()
    if len(wrong):
        row = int(wrong[0]) + 1
        got, before = f"{table.text(column, row)} in column {column!r}", table.text(column, row - 1)
        got += " again" if steps[row - 1] == 0 else f", after {before} in the row before"
        raise fault("time", table.place(row), got, "times that increase from row to row")
    if not len(steps):
        return
    usual = steps.double().median()
    rounding = 0.0 if unit else 4 * torch.finfo(times.dtype).eps * times.abs().max()  # of two times
    odd = ((steps - usual).abs() > rounding).nonzero()
    if len(odd) and not (unit and usual >= MONTH and _are_monthly(times)):
        step = f"{usual.item() / 1e9:g} s" if unit else f"{usual.item():g}"
        first = f"first at {table.place(int(odd[0]) + 1, folder=False)}"
        dates = f"; for dates, set `time_format: '{COMPACT}'`" if not unit and _are_dates(table, column) else ""
        yield f"column {column!r}: {len(odd)} of {len(steps)} steps differ from the median, {step} ({first}){dates}"


def _are_dates(table: Table, column: str) -> bool:
    """Check whether all numbers of a column are dates without separators, such as 20240131."""
    try:
        return bool(table.times(column, COMPACT))
    except SpecError:
        return False
