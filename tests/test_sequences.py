"""Sequences from files: listing, splits, batches by length, scores, and errors of invalid files."""

import csv
import io
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import f1_score
from torch import nn

import atn_norms as an
from atn_norms.errors import SpecError
from atn_norms.tasks import Model, SequencesSpec, tables
from tests.compare import compare


def values(number, features=2):
    """Return a sequence of 3 to 9 steps that is unique to its number."""
    return np.random.default_rng(number).normal(size=(3 + number % 7, features))


def write(path, array):
    """Write an array in the format of the file extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"x{i}" for i in range(array.shape[1])]
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".csv":
        cells = [["" if math.isnan(value) else repr(float(value)) for value in row] for row in array]
        path.write_text("\n".join(map(",".join, [names, *cells])) + "\n")
    else:
        columns = [pa.array([None if math.isnan(value) else value for value in column]) for column in array.T]
        pq.write_table(pa.table(columns, names), path)


@pytest.fixture
def folder(tmp_path):
    """Write 60 sequences of three classes (30, 20 and 10) in three formats."""
    for number in range(60):
        label = "a" if number < 30 else "b" if number < 50 else "c"
        write(tmp_path / "data" / label / f"{number:02}.{('npy', 'csv', 'parquet')[number % 3]}", values(number))
    return tmp_path / "data"


def index(tmp_path, rows, header=("file", "label"), name="index.csv"):
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(tmp_path / name)


def numbered(tmp_path, count=30, **options):
    """Write a regression data set: the target is the first value of a sequence times 10."""
    for number in range(count):
        write(tmp_path / "files" / f"{number:02}.npy", values(number))
    rows = [(f"files/{number:02}.npy", 10 * values(number)[0, 0]) for number in range(count)]
    return SequencesSpec(path=index(tmp_path, rows), mode="regress", **options)


def model_of(task, **options):
    torch.manual_seed(0)
    layer = an.LSTM(task.input_size, 5, **options)
    return Model(task.encoder(), layer, task.readout(layer.output_size))


def test_a_folder_is_divided_by_class_whatever_the_seed(folder):
    task = SequencesSpec(path=str(folder)).build(0)
    sizes = {part: Counter(task.classes[i] for i in task.targets[rows]) for part, rows in task.rows.items()}
    assert sizes == {
        "train": {"a": 22, "b": 14, "c": 6},
        "validation": {"a": 4, "b": 3, "c": 2},
        "test": {"a": 4, "b": 3, "c": 2},
    }
    other = SequencesSpec(path=str(folder)).build(1)
    compare(other.targets, task.targets, tolerance=0)
    compare(other.inputs, task.inputs, tolerance=0)
    assert SequencesSpec(path=str(folder), split_seed=1).build(0).rows["test"].tolist() != task.rows["test"].tolist()


def test_files_of_each_format_hold_the_same_numbers(tmp_path):
    kinds = {}
    for ending in ("npy", "csv", "parquet"):
        for number in range(12):
            array = values(number)
            if number == 4:
                array[1, 1] = math.nan
            write(tmp_path / ending / "ab"[number % 2] / f"{number}.{ending}", array)
        kinds[ending] = SequencesSpec(path=str(tmp_path / ending)).build(0)
    for ending in ("csv", "parquet"):
        compare(kinds[ending].inputs, kinds["npy"].inputs, tolerance=0)
    assert kinds["npy"].input_size == 3, "two features and a mask for the one with a missing value"
    (note,) = kinds["csv"].notes[2:]
    total = sum(len(values(number)) for number in range(12))
    assert note == f"x1: 1 of {total} values are missing and masked (first at a/4.csv: row 2)"


def test_scaling_uses_only_the_training_sequences(folder):
    task = SequencesSpec(path=str(folder)).build(0)
    train = torch.cat([task.inputs[row] for row in task.rows["train"]]).double()
    compare(train.mean(0), torch.zeros(2, dtype=torch.float64), tolerance=1e-6)
    compare(train.std(0, correction=0), torch.ones(2, dtype=torch.float64), tolerance=1e-6)
    before = task.inputs
    for row in task.rows["test"].tolist():
        task.inputs[row] += 1
    assert task.batch(0, 8).inputs.shape[2] == 2 and len(before) == 60


def test_scaling_standardizes_new_sequences_and_numbers(tmp_path):
    task = numbered(tmp_path).build(0)
    mean, deviation = torch.tensor(list(task.scaling.values()), dtype=torch.float64).T
    assert [*task.scaling] == ["feature 0", "feature 1"]
    scaling = {name: list(pair) for name, pair in task.scaling.items()}
    assert task.preprocessing == {"scaling": scaling, "masks": [], "label_scaling": list(task.label_scaling)}
    for row in range(30):
        compare(((torch.from_numpy(values(row)) - mean) / deviation).float(), task.inputs[row], tolerance=1e-6)
        middle, scale = task.label_scaling
        assert middle + scale * task.targets[row].item() == pytest.approx(10 * values(row)[0, 0], abs=1e-4)


def test_classes_and_masks_are_saved_for_new_sequences(folder):
    write(folder / "a" / "00.npy", np.array([[np.nan, 1.0], [2.0, 3.0]]))
    task = SequencesSpec(path=str(folder)).build(0)
    assert task.preprocessing["classes"] == ["a", "b", "c"] and task.preprocessing["masks"] == ["x0"]


def test_an_epoch_shows_every_sequence_once_in_batches_of_similar_lengths(folder):
    task = SequencesSpec(path=str(folder)).build(0)
    epochs = [[task._batches(epoch, 6)[i] for i in range(7)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == task.rows["train"].tolist()
        spread = [int(task.lengths[rows].max() - task.lengths[rows].min()) for rows in epoch]
        assert sum(spread) <= int(task.lengths.max() - task.lengths.min()), "sorted by length"
    assert [rows.tolist() for rows in epochs[0]] != [rows.tolist() for rows in epochs[1]]
    longest = [int(task.lengths[rows].max()) for rows in epochs[0]]
    assert longest != sorted(longest), "batches of short and long sequences alternate at random"
    batch = task.batch(8, 6)
    compare(tuple(batch)[:2], tuple(task._padded(epochs[1][1]))[:2], tolerance=0)
    assert SequencesSpec(path=str(folder)).build(3).batch(0, 6).targets.tolist() != task.batch(0, 6).targets.tolist()


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "window": 3}, {"norm": "rms", "bidirectional": True}])
def test_a_ragged_batch_equals_its_sequences_alone(folder, pool, options):
    task = SequencesSpec(path=str(folder), pool=pool).build(0)
    model = model_of(task, **options).eval()
    rows = task.rows["train"][[0, 5, 9, 30]]
    assert len(task.lengths[rows].unique()) > 1
    alone = torch.cat([task.predict(model, task._padded(row.unsqueeze(0))) for row in rows])
    compare(task.predict(model, task._padded(rows)), alone, tolerance=2e-6)
    (first,) = rows[:1].tolist()
    y, _ = model.layer.unroll(task.inputs[first].unsqueeze(1))
    pooled = y[-1, 0] if pool == "last" else y[:, 0].mean(0)
    compare(alone[0], model.readout(pooled), tolerance=2e-6)


class Oracle(Model):
    """Predict the class or number that the test chose for each sequence."""

    def __init__(self, task, answers):
        super().__init__(nn.Identity(), None, nn.Identity())
        self.answers = {
            tuple(each.flatten().tolist()): answer for each, answer in zip(task.inputs, answers, strict=True)
        }

    def features(self, inputs, state=None, lengths=None):
        steps, batch, _ = inputs.shape
        ends = [steps] * batch if lengths is None else lengths.tolist()
        found = [self.answers[tuple(inputs[:end, row].flatten().tolist())] for row, end in enumerate(ends)]
        return torch.stack(found).expand(steps, batch, -1), None


@pytest.mark.parametrize("cut", [1, 40, 2**15])
def test_every_sequence_of_a_split_is_scored_once(folder, cut, monkeypatch):
    monkeypatch.setattr("atn_norms.tasks.sequences.EVALUATION_STEPS", cut)
    task = SequencesSpec(path=str(folder)).build(0)
    chosen = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))
    answers = 5.0 * nn.functional.one_hot(chosen, 3)
    for part in ("validation", "test"):
        rows = task.rows[part]
        nats = nn.functional.cross_entropy(answers[rows], task.targets[rows])
        assert task.evaluate(Oracle(task, answers), part) == {
            "accuracy": pytest.approx((chosen == task.targets)[rows].double().mean().item()),
            "macro F1": pytest.approx(f1_score(task.targets[rows], chosen[rows], average="macro")),
            "cross-entropy": pytest.approx(nats.item(), rel=1e-6),
        }


def test_a_class_that_neither_occurs_nor_is_predicted_has_no_f1_score(folder):
    task = SequencesSpec(path=str(folder)).build(0)
    predicted, targets = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0])
    expected = f1_score(targets, predicted, average="macro")
    assert task._classes(predicted, targets) == {"accuracy": 0.75, "macro F1": pytest.approx(expected)}


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 4 / 9), ("macro F1", 2 * 4 / (2 * 4 + 5) / 3)])
def test_the_majority_class_is_the_baseline(folder, metric, score):
    task = SequencesSpec(path=str(folder), metric=metric).build(0)
    assert (task.metric, task.goal) == (metric, "max")
    assert task.baselines == {"majority class": pytest.approx(score)}


@pytest.mark.parametrize("metric", ["MAE", "MSE"])
def test_numbers_are_scored_in_their_unit(tmp_path, metric):
    task = numbered(tmp_path, metric=metric).build(0)
    rows = task.rows["test"].tolist()
    answers = torch.linspace(-1, 1, 30).unsqueeze(1)
    model = Oracle(task, answers)
    deviation, mean = task.deviation, 0.0
    errors = [(answers[row, 0].item() - task.targets[row].item()) * deviation for row in rows]
    scores = task.evaluate(model, "test")
    assert scores["MAE"] == pytest.approx(sum(map(abs, errors)) / len(rows), rel=1e-6)
    assert scores["MSE"] == pytest.approx(sum(error**2 for error in errors) / len(rows), rel=1e-6)
    loss, _ = task.loss(model, task._padded(task.rows["test"]), None)
    assert task.in_metric(loss.item()) == pytest.approx(scores[metric], rel=1e-5) and task.goal == "min"
    train = task.targets[task.rows["train"]]
    assert train.mean().item() == pytest.approx(mean, abs=1e-6) and train.std(correction=0).item() == pytest.approx(1)
    trivial = [task.targets[row].item() * deviation for row in rows]
    expected = sum(map(abs, trivial)) if metric == "MAE" else sum(error**2 for error in trivial)
    assert task.baselines == {"training mean": pytest.approx(expected / len(rows), rel=1e-6)}


def test_split_folders_are_used_and_a_missing_validation_is_drawn(tmp_path):
    for part, count in (("train", 20), ("test", 6)):
        for number in range(count):
            write(tmp_path / "data" / part / "ab"[number % 2] / f"{number}.npy", values(number + 20 * (part == "test")))
    task = SequencesSpec(path=str(tmp_path / "data")).build(0)
    assert {part: len(rows) for part, rows in task.rows.items()} == {"train": 16, "validation": 4, "test": 6}
    assert sorted(task.lengths[task.rows["test"]].tolist()) == sorted(len(values(number)) for number in range(20, 26))
    for number in range(4):
        write(tmp_path / "data" / "validation" / "ab"[number % 2] / f"{number}.npy", values(40 + number))
    task = SequencesSpec(path=str(tmp_path / "data")).build(0)
    assert {part: len(rows) for part, rows in task.rows.items()} == {"train": 20, "validation": 4, "test": 6}


def test_an_index_names_splits(tmp_path):
    rows = []
    for number in range(12):
        write(tmp_path / f"{number}.csv", values(number))
        rows.append((f"{number}.csv", "xy"[number % 2], ("train", "train", "validation", "test")[number // 2 % 4]))
    path = index(tmp_path, rows, ("name", "class", "part"))
    options = {"file_column": "name", "label_column": "class", "split_column": "part"}
    task = SequencesSpec.model_validate({"path": path, "columns": ["x1"], **options}).build(0)
    assert task.input_size == 1 and task.classes == ("x", "y")
    assert {part: len(rows) for part, rows in task.rows.items()} == {"train": 8, "validation": 2, "test": 2}


def test_the_content_is_hashed(folder):
    spec = SequencesSpec(path=str(folder))
    hashes = {spec.data()["path"]}
    write(folder / "a" / "00.npy", values(99))
    hashes.add(spec.data()["path"])
    (folder / "a" / "00.npy").rename(folder / "b" / "00.npy")
    hashes.add(spec.data()["path"])
    (folder / "b" / "00.npy").unlink()
    hashes.add(spec.data()["path"])
    assert len(hashes) == 4 and all(each.startswith("sha256:") and len(each) == 71 for each in hashes)
    kept = spec.data()["path"]
    folder.rename(folder.parent / "moved")
    assert SequencesSpec(path=str(folder.parent / "moved")).data()["path"] == kept


def test_the_order_of_an_index_has_no_effect(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number}.npy", values(number))
    rows = [(f"{number}.npy", "ab"[number % 2]) for number in range(20)]
    one, other = (
        SequencesSpec(path=index(tmp_path, each, name=n)) for each, n in ((rows, "i.csv"), (rows[::-1], "j.csv"))
    )
    assert one.data() == other.data()
    compare(one.build(0).rows, other.build(0).rows, tolerance=0)


def test_labels_and_splits_of_an_index_are_hashed(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.npy", values(number))
    hashes = set()
    for label, part in (("a", "test"), ("b", "test"), ("a", "train")):
        rows = [("0.npy", "a", "train"), ("1.npy", "b", "validation"), ("2.npy", label, part)]
        path = index(tmp_path, rows, ("file", "label", "part"))
        hashes.add(SequencesSpec(path=path, split_column="part").data()["path"])
    assert len(hashes) == 3


def test_the_content_of_a_folder_is_reported(folder):
    assert SequencesSpec(path=str(folder)).build(0).notes == (
        "data: 60 sequences (42 train, 9 validation, 9 test) of 3 to 9 steps and 2 features",
        "3 classes of 10 to 30 sequences",
    )


def refused(spec_or_path, message, root, **options):
    spec = spec_or_path
    if not isinstance(spec, SequencesSpec):
        spec = SequencesSpec.model_validate({"path": str(spec), **options})
    with pytest.raises(SpecError) as caught:
        spec.build(0)
    assert str(caught.value).replace(str(root), "ROOT") == message


ENDINGS = "files with the endings .npy, .csv, .parquet"
NUMBERS = "numbers of shape [steps] or [steps, features], not empty"


def test_an_invalid_folder_is_rejected(folder):
    root = folder.parent
    refused(
        root / "dta",
        "path: got ROOT/dta (No such file or directory); expected a readable file; did you mean 'data'?",
        root,
    )
    refused(
        folder,
        "ROOT/data: path: got a folder with mode regress; expected an index file with a number for each sequence",
        root,
        mode="regress",
    )
    refused(
        folder,
        "ROOT/data: split_column: got 'x' with a folder; expected no column, or an index file",
        root,
        split_column="x",
    )
    (folder / "a" / "notes.txt").write_text("x")
    refused(folder, f"ROOT/data/a/notes.txt: path: got the ending '.txt'; expected {ENDINGS}", root)
    (folder / "a" / "notes.txt").rename(folder / "notes.txt")
    expected = "a folder for each class, or an index file as `path`"
    refused(folder, f"ROOT/data/notes.txt: path: got a file; expected {expected}", root)
    (folder / "notes.txt").unlink()
    (folder / "d").mkdir()
    refused(folder, f"ROOT/data/d: path: got no sequences; expected {ENDINGS}", root)
    (folder / "d").rmdir()
    (folder / "a" / "deeper").mkdir()
    refused(folder, f"ROOT/data/a/deeper: path: got a folder; expected {ENDINGS}", root)
    (root / "empty").mkdir()
    refused(root / "empty", f"ROOT/empty: path: got no sequences; expected {ENDINGS}", root)
    (root / "splits" / "train").mkdir(parents=True)
    (root / "splits" / "test").mkdir()
    (root / "splits" / "vlidation").mkdir()
    refused(
        root / "splits",
        "ROOT/splits/vlidation: path: got a folder beside train and test; expected validation, or none; "
        "did you mean 'validation'?",
        root,
    )


ARRAYS = [
    (np.zeros((3, 3)), "ROOT/a/01.csv: path: got 2 features; expected 3, as in ROOT/a/00.npy"),
    (np.zeros((0, 2)), f"ROOT/a/00.npy: path: got float64 of shape [0, 2]; expected {NUMBERS}"),
    (np.zeros((1, 2, 3)), f"ROOT/a/00.npy: path: got float64 of shape [1, 2, 3]; expected {NUMBERS}"),
    (np.array(["x"]), f"ROOT/a/00.npy: path: got <U1 of shape [1]; expected {NUMBERS}"),
    (np.array([[1.0, np.inf]]), "ROOT/a/00.npy: row 1: path: got inf; expected finite numbers"),
]


@pytest.mark.parametrize(("array", "message"), ARRAYS, ids=[message[6:60] for _, message in ARRAYS])
def test_an_incompatible_array_is_rejected(folder, array, message):
    np.save(folder / "a" / "00.npy", array)
    refused(folder, message, folder)


def test_a_pickle_in_an_array_is_not_loaded(folder):
    np.save(folder / "a" / "00.npy", np.array([{"x": 1}], dtype=object))
    with pytest.raises(SpecError, match=r"00.npy: path: got unreadable content \(.*allow_pickle.*\); expected an .npy"):
        SequencesSpec(path=str(folder)).build(0)
    (folder / "a" / "00.npy").write_bytes(b"no array")
    with pytest.raises(SpecError, match=r"00.npy: path: got unreadable content \(.*\); expected an .npy file"):
        SequencesSpec(path=str(folder)).build(0)


def test_columns_are_required_by_name(tmp_path):
    for number in range(12):
        write(tmp_path / "data" / "ab"[number % 2] / f"{number:02}.csv", values(number))
    spec = SequencesSpec(path=str(tmp_path / "data"))
    (tmp_path / "data" / "b" / "03.csv").write_text("x0,y1\n1,2\n")
    refused(spec, "path: got 'x1'; expected a column of ROOT/data/b/03.csv ('x0', 'y1')", tmp_path)
    (tmp_path / "data" / "b" / "03.csv").write_text("x0,x1,x2\n1,2,3\n")
    refused(
        spec,
        "ROOT/data/b/03.csv: path: got the column 'x2'; expected the columns of the first table, x0, x1",
        tmp_path,
    )
    SequencesSpec(path=str(tmp_path / "data"), columns=("x1", "x0")).build(0)
    (tmp_path / "data" / "b" / "03.csv").write_text("x0,x1\n1,2\n3,x\n")
    refused(spec, "ROOT/data/b/03.csv:3: path: got 'x' in column 'x1'; expected a number", tmp_path)
    write(tmp_path / "data" / "b" / "03.npy", values(1))
    (tmp_path / "data" / "b" / "03.csv").unlink()
    refused(
        SequencesSpec(path=str(tmp_path / "data"), columns=("x0", "x1")),
        "ROOT/data/b/03.npy: columns: got an array, which has no names; expected CSV or Parquet files, or no `columns`",
        tmp_path,
    )


def test_a_class_missing_from_training_is_rejected(tmp_path):
    rows = []
    for number in range(12):
        write(tmp_path / f"{number}.npy", values(number))
        rows.append((f"{number}.npy", "up" if number % 2 else "down", ("train", "validation", "test")[number // 4]))
    rows[9] = ("9.npy", "upp", "test")
    message = (
        "ROOT/index.csv:11: path: got the label 'upp' in test, which no training sequence has; "
        "expected one of down, up; did you mean 'up'?"
    )
    refused(index(tmp_path, rows, ("file", "label", "split")), message, tmp_path, split_column="split")
    for number in range(12):
        part = "train" if number < 8 else "test"
        write(tmp_path / "data" / part / ("c" if number == 11 else "ab"[number % 2]) / f"{number}.npy", values(number))
    message = (
        "ROOT/data/test/c/11.npy: path: got the label 'c' in test, which no training sequence has; expected one of a, b"
    )
    refused(tmp_path / "data", message, tmp_path)


def test_a_missing_split_or_class_is_rejected(tmp_path):
    for number in range(4):
        write(tmp_path / "pairs" / "ab"[number % 2] / f"{number}.npy", values(number))
        write(tmp_path / "alone" / "a" / f"{number}.npy", values(number))
    cure = "at least one; a class is divided where it has three, or name the splits in the files"
    refused(tmp_path / "pairs", f"ROOT/pairs: path: got no sequences for validation among 4; expected {cure}", tmp_path)
    refused(
        tmp_path / "alone", "ROOT/alone: path: got the class 'a' alone in training; expected at least two", tmp_path
    )


BAD_ROW = "ROOT/index.csv:3: path: got"
NO_FILE = "'1.npx' in column 'file', and no such file; expected a file relative to ROOT; did you mean '1.npy'?"
NO_SPLIT = "'tst' in column 'label'; expected one of train, validation, test; did you mean 'test'?"
EMPTY = ". An empty cell, or a sign such as NA, is a missing value"
INDEXES = [
    ([("0.npy", "a"), ("1.npx", "b")], {}, f"{BAD_ROW} {NO_FILE}"),
    (
        [("0.npy", "a"), ("0.npy", "b")],
        {},
        f"{BAD_ROW} '0.npy' in column 'file' again, after ROOT/index.csv:2; expected each file once",
    ),
    (
        [("0.npy", "train"), ("./x/../0.npy", "test")],
        {"split_column": "label"},
        f"{BAD_ROW} './x/../0.npy' in column 'file' again, after ROOT/index.csv:2; expected each file once",
    ),
    ([("0.npy", "a"), ("1.npy", "")], {}, f"{BAD_ROW} no value in column 'label'; expected a value{EMPTY}"),
    ([("0.npy", "1"), ("1.npy", "")], {"mode": "regress"}, f"{BAD_ROW} no value in column 'label'; expected a number"),
    ([("0.npy", "1"), ("1.npy", "x")], {"mode": "regress"}, f"{BAD_ROW} 'x' in column 'label'; expected a number"),
    ([("0.npy", "train"), ("1.npy", "tst")], {"split_column": "label"}, f"{BAD_ROW} {NO_SPLIT}"),
]


@pytest.mark.parametrize(("rows", "options", "message"), INDEXES, ids=[message[15:60] for *_, message in INDEXES])
def test_an_invalid_index_is_rejected(tmp_path, rows, options, message):
    for number in range(2):
        write(tmp_path / f"{number}.npy", values(number))
    refused(index(tmp_path, rows), message, tmp_path, **options)


def test_a_missing_file_of_the_index_is_suggested_with_its_folder(tmp_path):
    write(tmp_path / "tone" / "loud.npy", values(0))
    path = index(tmp_path, [("tone/loud.npy", "a"), ("tone/luod.npy", "b")])
    got = "got 'tone/luod.npy' in column 'file', and no such file; expected a file relative to ROOT"
    refused(path, f"ROOT/index.csv:3: path: {got}; did you mean 'tone/loud.npy'?", tmp_path)


def test_a_missing_column_of_the_index_is_rejected(tmp_path):
    path = index(tmp_path, [("0.npy", "a")], ("file", "lable"))
    expected = "a column of ROOT/index.csv ('file', 'lable')"
    refused(path, f"label_column: got 'label'; expected {expected}; did you mean 'lable'?", tmp_path)


def test_constant_numbers_are_rejected(tmp_path):
    for number in range(9):
        write(tmp_path / f"{number}.npy", values(number))
    path = index(tmp_path, [(f"{number}.npy", "2.5") for number in range(9)])
    message = "ROOT/index.csv: label_column: got only 2.5 for 7 training sequences; expected numbers that differ"
    refused(path, message, tmp_path, mode="regress")


@pytest.mark.parametrize(
    ("ending", "value", "deviation"), [("npy", 1e200, "inf"), ("csv", -1e200, "inf"), ("npy", 1e-200, "0")]
)
def test_a_value_that_cannot_be_standardized_is_located(tmp_path, ending, value, deviation):
    for number in range(20):
        array = values(number)
        array[:, 1] = 0.0
        array[2, 1] = number / 19 * value
        write(tmp_path / "data" / "ab"[number % 2] / f"{number}.{ending}", array)
    name, place = "x1" if ending == "csv" else "feature 1", f"{tmp_path}/data/b/19.{ending}: row 3"
    with pytest.raises(SpecError) as caught:
        SequencesSpec(path=str(tmp_path / "data")).build(0)
    start, _, end = str(caught.value).partition(" (mean ")
    expected = "expected a value that float32 holds after standardization"
    assert start == f"{place}: path: got {value:g} in {name}; {expected}"
    assert end.endswith(f", deviation {deviation})")


def test_a_number_that_cannot_be_standardized_is_located(tmp_path):
    for number in range(9):
        write(tmp_path / f"{number}.npy", values(number))
    path = index(tmp_path, [(f"{number}.npy", 1e200 if number == 4 else number) for number in range(9)])
    with pytest.raises(SpecError, match=r"index.csv:6: label_column: got 1e\+200; expected a value that float32 holds"):
        SequencesSpec(path=path, mode="regress").build(0)


def test_inconsistent_options_are_rejected():
    with pytest.raises(ValidationError, match="metric: got 'MAE' with mode classify; expected accuracy or macro F1"):
        SequencesSpec(path="x", metric="MAE")
    with pytest.raises(ValidationError, match=r"test: got 0.5 beside validation 0.5; expected a sum below 1"):
        SequencesSpec(path="x", test=0.5, validation=0.5)


def test_a_batch_larger_than_the_training_split_is_rejected(folder):
    with pytest.raises(SpecError, match="train.batch_size: got 43; expected 1 to 42, the training sequences"):
        SequencesSpec(path=str(folder)).build(0).batch(0, 43)


def header(shape, kind="<f8", version=(1, 0)):
    """Return the header of an .npy file."""
    file = io.BytesIO()
    fields = {"shape": shape, "fortran_order": False, "descr": kind}
    if version == (1, 0):
        np.lib.format.write_array_header_1_0(file, fields)
    else:
        np.lib.format.write_array_header_2_0(file, fields)
    return file.getvalue()


BOMBS = {
    "more values than the file holds": (header((100, 2)), r"float64 of shape \[100, 2\] in .* bytes; expected a whole"),
    "more memory than any machine has": (header((10**15, 2)), ".*; expected at most 268435456 values"),
    "many values of one bit of memory": (header((10**9, 2), "|b1"), ".*; expected at most 268435456 values"),
    "another version of the format": (header((10**15,), version=(2, 0)), ".*; expected at most 268435456 values"),
    "objects": (header((2,), "|O") + b"0" * 16, "unreadable content .*Object arrays"),
    "no magic number": (b"cos\nsystem\n(S'true'\ntR.", "unreadable content"),
    "half a header": (header((2, 2))[:20], "unreadable content"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_array_is_checked_before_it_is_read(name, folder, monkeypatch):
    data, message = BOMBS[name]
    (folder / "a" / "00.npy").write_bytes(data)
    monkeypatch.setattr(np, "load", np.load if "Object" in message or "content" in message else None)
    with pytest.raises(SpecError, match=rf"00\.npy: path: got {message}|00\.npy.* got {message}"):
        SequencesSpec(path=str(folder)).build(0)


def test_a_parquet_file_of_too_many_values_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(tables, "MOST_VALUES", 5)
    monkeypatch.setattr(pq, "read_table", None)
    with pytest.raises(SpecError, match=r"\.parquet: path: got \d+ rows of 2 columns; expected at most 5 values"):
        SequencesSpec(path=str(folder)).build(0)


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_a_file_above_the_limit_is_not_read(ending, folder, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST", 100)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != f".{ending}":
            path.unlink()
    with pytest.raises(SpecError, match=rf"\.{ending} \(a file of more than 100 bytes\)"):
        SequencesSpec(path=str(folder)).build(0)
