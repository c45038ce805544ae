"""Sequences of different lengths from files: classification or regression of each sequence."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from atn_norms.errors import plural
from atn_norms.files import absolute
from atn_norms.pytree import Tree
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator
from atn_norms.tasks.listing import PARTS, Item, divided, listed, loaded, missing_values
from atn_norms.tasks.scaling import extreme, limits, masked, moments
from atn_norms.tasks.tables import content, digest, fault

EVALUATION_STEPS = 2**15  # steps per batch, padding included; fixed, so that a score does not depend on training
POOL = 16  # number of batches whose sequences are sorted by length together
CLASSES, NUMBERS = ("accuracy", "macro F1"), ("MAE", "MSE")


class SequencesSpec(TaskSpec):
    """Options of sequences in files, one file per sequence; the defaults are small customary values.

    | option | meaning | unit |
    |---|---|---|
    | `path` | a folder with a folder of files for each class, or an index file (CSV or Parquet) with a row for each file; relative to the working directory | path |
    | `mode` | `classify`: predict the class of a sequence; `regress`: predict a number | |
    | `columns` | input columns of the files; None: all, in the order of the first file | |
    | `file_column`, `label_column` | columns of an index file: file of a sequence, relative to the index, and its class or number | |
    | `split_column` | column of an index file with `train`, `validation` or `test`; None: draw the splits | |
    | `validation`, `test` | shares of the sequences of each class, drawn if the files name no splits | |
    | `split_seed` | seed of the splits, the same for every seed of a study | |
    | `pool` | input of the read-out: the layer's output at the `last` step of a sequence, or the `mean` over its steps | |
    | `metric` | score: `accuracy` or `macro F1` of classes, `MAE` or `MSE` of numbers; None: `accuracy` or `MAE` | |
    | `delimiter` | field separator of a CSV file | |
    | `missing` | spellings of a missing value in a CSV file, in addition to the empty field, `NA`, `NaN`, `null` and similar | |

    A folder may have the folders `train`, `test` and optionally `validation`, each with the folders of the classes.
    Without `validation`, validation sequences are drawn from the training sequences.

    >>> import pathlib
    >>> for i in range(40):
    ...     folder = pathlib.Path("strokes", "up" if i % 2 else "down")
    ...     folder.mkdir(parents=True, exist_ok=True)
    ...     rows = (str(step * (-1) ** (i + 1)) for step in range(3 + i % 5))
    ...     _ = (folder / f"{i}.csv").write_text("x\\n" + "\\n".join(rows))
    >>> task = SequencesSpec(path="strokes").build(seed=0)
    >>> task.classes, task.baselines, task.batch(0, 6).inputs.shape[1:]
    (('down', 'up'), {'majority class': 0.5}, torch.Size([6, 1]))
    """  # noqa: E501

    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 2000,
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "clip_grad_norm": 1.0,
        "keep": "best",
    }
    kind: Literal["sequences"] = "sequences"
    path: Annotated[str, AfterValidator(absolute)]
    mode: Literal["classify", "regress"] = "classify"
    columns: tuple[str, ...] | None = None
    file_column: str = "file"
    label_column: str = "label"
    split_column: str | None = None
    validation: float = Field(default=0.15, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    pool: Literal["last", "mean"] = "last"
    metric: Literal["accuracy", "macro F1", "MAE", "MSE"] | None = None
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        known = CLASSES if self.mode == "classify" else NUMBERS
        if self.metric is not None and self.metric not in known:
            raise fault("metric", "", f"{self.metric!r} with mode {self.mode}", " or ".join(known))
        if self.validation + self.test >= 1:
            raise fault("test", "", f"{self.test} beside validation {self.validation}", "a sum below 1")
        return self

    def build(self, seed: int) -> Sequences:
        return Sequences(self, seed)

    def data(self) -> dict[str, str]:
        """Return one hash of all files with their labels and splits, in the order of the listing."""
        whole = hashlib.sha256()
        for item in listed(self):
            whole.update(repr((item.name, item.label, item.part, digest(content(item.path, "path")))).encode())
        return {"path": f"sha256:{whole.hexdigest()}"}


class Sequences(Task):
    r"""Predict the class of each sequence (cross-entropy, scored by accuracy or macro F1), or a number.

    $$\mathrm{accuracy} = \frac{1}{N} \sum_{n=1}^{N} [\, \arg\max_c p_c(x_n) = c_n \,], \qquad
    \mathrm{F}_1 = \frac{1}{C} \sum_{c=1}^{C} \frac{2\, TP_c}{2\, TP_c + FP_c + FN_c}$$

    Macro F1 is the mean over the classes that occur in the split or in the predictions.

    | symbol | meaning | shape |
    |---|---|---|
    | inputs | standardized features, 0 after the end of a sequence; a mask column (1: missing) for each feature with missing values | `[T, B, F]` |
    | targets | classes (int64), or standardized numbers | `[B]` |
    | lengths | steps of each sequence, if they differ | `[B]` |

    Means and deviations are those of the training sequences: `scaling` maps each feature to both, and `label_scaling`
    holds those of the numbers. `preprocessing` holds them for new data, with the `classes`, and the features that have
    a mask column (`masks`). A training batch has sequences of similar lengths: each epoch draws an order, sorts every
    16 batches by length, and draws the order of the batches. A missing input is 0. The loss of a regression is the
    metric, up to a constant factor.

    Baselines, on the test split: `majority class`, the most frequent training class; or `training mean` of numbers.

    Errors: `SpecError` naming the option, the file, and the line if there is one.
    """  # noqa: E501

    batch_size = 32

    def __init__(self, spec: SequencesSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        items = sorted(divided(listed(spec), spec))
        labels = [item.label for item in items]
        self.rows = {part: torch.tensor([i for i, item in enumerate(items) if item.part == part]) for part in PARTS}
        self.classes = tuple(sorted({labels[i] for i in self.rows["train"].tolist()}))
        if spec.mode == "classify":
            self._require_known(items)
        values, names = loaded(items, spec)
        self.lengths = torch.tensor([len(each) for each in values])
        self.notes = (*self._described(labels, len(names)), *missing_values(items, values, names))
        self.inputs = self._standardized(values, names, items)
        self.input_size = self.inputs[0].shape[1]
        self.metric = spec.metric or (CLASSES if spec.mode == "classify" else NUMBERS)[0]
        if spec.mode == "classify":
            self.goal = "max"
            self.preprocessing = {**self.preprocessing, "classes": list(self.classes)}
            self.targets = torch.tensor([self.classes.index(label) for label in labels])
            self.baselines = {"majority class": self._majority()}
        else:
            self._scale_numbers(torch.tensor([float(label) for label in labels], dtype=torch.float64), items)
            self.baselines = {"training mean": self._numbers(torch.zeros(len(labels)), "test")[self.metric]}

    def encoder(self) -> nn.Module:
        return nn.Identity()

    def readout(self, output_size: int) -> nn.Module:
        return nn.Linear(output_size, len(self.classes) if self.spec.mode == "classify" else 1)

    def batch(self, step: int, size: int) -> Batch:
        count = len(self.rows["train"])
        if size > count:
            raise fault("train.batch_size", "", f"{size}", f"1 to {count}, the training sequences")
        epoch, index = divmod(step, count // size)  # sequences that do not fill a batch are skipped
        if (epoch, size) != self._epoch[0]:
            self._epoch = (epoch, size), self._batches(epoch, size)
        return self._padded(self._epoch[1][index])

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        predicted = self.predict(model, batch)
        if self.spec.mode == "classify":
            return nn.functional.cross_entropy(predicted, batch.targets), None
        error = predicted[:, 0] - batch.targets
        return (error.square() if self.metric == "MSE" else error.abs()).mean(), None

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        rows = self._by_length(self.rows[split])
        predicted = torch.cat([self.predict(model, self._padded(some)).double() for some in self._chunks(rows)])
        if self.spec.mode == "regress":
            whole = torch.zeros(len(self.lengths), dtype=torch.float64).index_copy(0, rows, predicted[:, 0])
            return self._numbers(whole, split)
        nats = nn.functional.cross_entropy(predicted, self.targets[rows]).item()
        return {**self._classes(predicted.argmax(-1), self.targets[rows]), "cross-entropy": nats}

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Return the read-out [B, C] of each sequence's pooled outputs."""
        y, _ = model.features(batch.inputs, lengths=batch.lengths)
        steps, rows = len(y), torch.arange(y.shape[1])
        lengths = batch.lengths if batch.lengths is not None else torch.full_like(rows, steps)
        pooled = y[lengths - 1, rows] if self.spec.pool == "last" else y.sum(0) / lengths.unsqueeze(1)
        return model.readout(pooled)

    def _padded(self, rows: Tensor) -> Batch:
        inputs, lengths = [self.inputs[row] for row in rows.tolist()], self.lengths[rows]
        ragged = bool((lengths != lengths[0]).any())
        padded = nn.utils.rnn.pad_sequence(inputs)
        return Batch(padded, self.targets[rows], lengths=lengths if ragged else None)

    def _batches(self, epoch: int, size: int) -> Tensor:
        """Return the rows [batches, size] of an epoch's batches."""
        random, rows = generator(self.seed, "sequences", "order", epoch), self.rows["train"]
        order = rows[torch.randperm(len(rows), generator=random)][: len(rows) // size * size]
        batches = torch.cat([self._by_length(pool) for pool in order.split(POOL * size)]).view(-1, size)
        return batches[torch.randperm(len(batches), generator=random)]

    def _by_length(self, rows: Tensor) -> Tensor:
        return rows[self.lengths[rows].argsort(stable=True)]

    def _chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield chunks of rows, sorted by length, of at most EVALUATION_STEPS padded steps."""
        first, lengths = 0, self.lengths[rows].tolist()
        for last, length in enumerate(lengths):
            if last > first and (last + 1 - first) * length > EVALUATION_STEPS:
                yield rows[first:last]
                first = last
        yield rows[first:]

    def _standardized(self, values: list[Tensor], names: list[str], items: list[Item]) -> list[Tensor]:
        train = torch.cat([values[row] for row in self.rows["train"].tolist()])
        absent = train.isnan().all(0).nonzero()
        if len(absent):
            name = names[int(absent[0])]
            raise fault("path", self.spec.path, f"no value of {name} in the training sequences", "at least one")
        mean, deviation = moments(train)
        extremes = [(found, i) for i, each in enumerate(values) if (found := extreme(each, mean, deviation))]
        if extremes:
            (_, row, column), place = max(extremes)
            got = f"{values[place][row, column].item():g} in {names[column]}"
            raise fault("path", f"{items[place].path}: row {row + 1}", got, limits(mean[column], deviation[column]))
        self.scaling = dict(zip(names, zip(mean.tolist(), deviation.tolist(), strict=True), strict=True))
        flagged = torch.stack([each.isnan().any(0) for each in values]).any(0)
        scaling = {name: list(pair) for name, pair in self.scaling.items()}
        masks = [name for name, absent in zip(names, flagged.tolist(), strict=True) if absent]
        self.preprocessing = {"scaling": scaling, "masks": masks}
        return [masked((each - mean) / deviation, flagged) for each in values]

    def _scale_numbers(self, numbers: Tensor, items: list[Item]) -> None:
        known = numbers[self.rows["train"]]
        if known.min() == known.max():
            got = f"only {known[0].item():g} for {len(known)} training sequences"
            raise fault("label_column", self.spec.path, got, "numbers that differ")
        mean, deviation = moments(known.unsqueeze(1))
        if found := extreme(numbers.unsqueeze(1), mean, deviation):
            item = items[found[1]]
            raise fault("label_column", item.place, item.label, limits(mean, deviation))
        self.label_scaling = mean.item(), deviation.item()
        self.preprocessing = {**self.preprocessing, "label_scaling": list(self.label_scaling)}
        self.deviation = deviation.item()
        self.targets = ((numbers - mean) / deviation).to(torch.get_default_dtype())
        self.metric_per_loss = self.deviation ** (2 if self.metric == "MSE" else 1)

    def _numbers(self, predicted: Tensor, split: str) -> dict[str, float]:
        """Return the scores of standardized predictions on a split, in the unit of the labels."""
        rows = self.rows[split]
        error = (predicted[rows].double() - self.targets[rows].double()).abs() * self.deviation
        return {"MAE": error.mean().item(), "MSE": error.square().mean().item()}

    def _classes(self, predicted: Tensor, targets: Tensor) -> dict[str, float]:
        count = len(self.classes)
        hits = torch.bincount(targets[predicted == targets], minlength=count).double()
        both = torch.bincount(predicted, minlength=count) + torch.bincount(targets, minlength=count)
        scores = (2 * hits / both)[both > 0]
        return {"accuracy": (hits.sum() / len(targets)).item(), "macro F1": scores.mean().item()}

    def _majority(self) -> float:
        most = self.targets[self.rows["train"]].bincount(minlength=len(self.classes)).argmax()
        targets = self.targets[self.rows["test"]]
        return self._classes(most.expand(len(targets)), targets)[self.metric]

    def _require_known(self, items: list[Item]) -> None:
        if len(self.classes) < 2:
            raise fault(
                "path",
                self.spec.path,
                f"the class {', '.join(map(repr, self.classes))} alone in training",
                "at least two",
            )
        for item in items:
            if item.label not in self.classes:
                got = f"the label {item.label!r} in {item.part}, which no training sequence has"
                raise fault("path", item.place, got, f"one of {', '.join(self.classes)}", self.classes, item.label)

    def _described(self, labels: list[str], features: int) -> Iterator[str]:
        counts = ", ".join(f"{len(rows)} {part}" for part, rows in self.rows.items())
        short, long = int(self.lengths.min()), int(self.lengths.max())
        steps = f"{short} to {long} steps" if short != long else plural(long, "step")
        yield (
            f"{Path(self.spec.path).name}: {plural(len(labels), 'sequence')} ({counts}) "
            f"of {steps} and {plural(features, 'feature')}"
        )
        if self.spec.mode == "classify":
            sizes = sorted(Counter(labels).values())
            least = f"{sizes[0]} to " if sizes[0] < sizes[-1] else ""
            yield f"{len(sizes)} classes of {least}{plural(sizes[-1], 'sequence')}"

    _epoch: tuple[tuple[int, int], Tensor] = (-1, 0), torch.empty(0)
