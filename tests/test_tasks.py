"""The built-in tasks: inputs, targets, scores and baselines."""

import hashlib
import math
import os
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn

from atn_norms import LSTM
from atn_norms.ablation import create
from atn_norms.errors import SpecError
from atn_norms.pytree import tree_leaves
from atn_norms.tasks import AddingSpec, CharLMSpec, Model, language
from atn_norms.tasks.corpora import read
from tests.compare import compare
from tests.test_languages import Unigram


@pytest.fixture
def text(tmp_path):
    """Write a text of 2,000 characters of different frequencies; two of its letters take two bytes."""
    letters = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]).repeat(250)[torch.randperm(2000)]
    path = tmp_path / "text.txt"
    path.write_text("".join("aéß\n"[i] for i in letters), encoding="utf-8")
    return str(path)


def small_model(task, **options):
    torch.manual_seed(1)
    layer = LSTM(task.input_size, 5, **options)
    return Model(task.encoder(), layer, task.readout(layer.output_size)).double()


@pytest.mark.parametrize("length", [2, 3, 4, 50, 100])
def test_adding_marks_one_step_in_each_half_and_targets_their_sum(length):
    task = AddingSpec(length=length, train=2000).build(seed=3)
    inputs, targets, fresh, _ = task.batch(0, 2000)
    values, marks = inputs.unbind(-1)
    half = max(1, length // 2 - 1)
    assert inputs.shape == (length, 2000, 2) and fresh
    assert (marks[:half].sum(0) == 1).all() and (marks[half:].sum(0) == 1).all()
    compare((values * marks).sum(0), targets, tolerance=1e-6)
    assert set(marks[:half].sum(1).bool().tolist()) == {True}, "every step of the first part is marked somewhere"
    assert set(marks[half:].sum(1).bool().tolist()) == {True}


@pytest.mark.parametrize("length", [2, 50])
def test_the_best_constant_prediction_of_adding_costs_one_sixth(length):
    count = 200_000
    targets = AddingSpec(length=length, train=count).build(seed=0).batch(0, count).targets.double()
    baseline = AddingSpec(length=length).build(seed=0).baselines["always 1"]
    squared = (targets - 1).square()
    assert abs(squared.mean().item() - baseline) < 4 * squared.std().item() / math.sqrt(count)
    assert abs(targets.mean().item() - 1) < 4 * targets.std().item() / math.sqrt(count)


def test_a_batch_depends_only_on_seed_and_step():
    spec = AddingSpec(length=8, train=100)
    steps = [9, 0, 31, 9]
    again = [spec.build(5).batch(step, 10) for step in steps]
    task = spec.build(5)
    torch.rand(7)
    compare([task.batch(step, 10) for step in steps], again, tolerance=0)
    assert not torch.equal(spec.build(6).batch(9, 10).inputs, again[0].inputs)
    assert not torch.equal(task.batch(8, 10).inputs, again[0].inputs)


def test_an_epoch_shows_every_sequence_once_and_the_next_in_another_order():
    task = AddingSpec(length=8, train=60).build(0)
    epochs = [torch.cat([task.batch(step, 20).targets for step in range(e * 3, e * 3 + 3)]) for e in range(2)]
    assert not torch.equal(*epochs)
    compare(epochs[0].sort().values, epochs[1].sort().values, tolerance=0)


def test_the_splits_are_different_sequences():
    task = AddingSpec(length=8, train=20, validation=20, test=20).build(0)
    drawn = [task._draw(split, 20)[0] for split in ("train", "validation", "test")]
    assert len({tuple(row.tolist()) for values in drawn for row in values}) == 60


def test_adding_is_scored_on_every_sequence_however_it_is_cut(monkeypatch):
    task = AddingSpec(length=6, validation=23).build(0)
    model = small_model(task).float().eval()
    whole = task.evaluate(model, "validation")
    values, marks = task._draw("validation", 23)
    one_by_one = [
        model(torch.stack((v, torch.zeros(6).scatter(0, m, 1.0)), -1)[:, None])[0][-1, 0, 0] - v[m].sum()
        for v, m in zip(values, marks, strict=True)
    ]
    assert whole["mean squared error"] == pytest.approx(torch.stack(one_by_one).square().mean().item(), rel=1e-5)
    monkeypatch.setattr("atn_norms.tasks.adding.EVALUATION_ROWS", 4)
    assert task.evaluate(model, "validation")["mean squared error"] == pytest.approx(
        whole["mean squared error"], rel=1e-5
    )


def test_impossible_sizes_are_rejected_before_data_are_drawn():
    with pytest.raises(ValueError, match="train"):
        AddingSpec(length=1_000_000, train=1_000_000_000)


def test_the_default_text_is_real_and_hashed():
    spec = CharLMSpec()
    task = spec.build(0)
    assert len(task.train) > 100_000
    text = "\n".join(topics[name] for name in sorted(topics))
    assert spec.data() == {"text": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}
    assert "The Python" in text and task.vocabulary == sorted(set(text))


def test_the_text_is_split_in_reading_order(text):
    task = CharLMSpec(text=text).build(0)
    codes = torch.cat([task.train, task.splits["validation"], task.splits["test"]])
    with open(text, encoding="utf-8") as file:
        assert "".join(task.vocabulary[i] for i in codes) == file.read()
    assert [len(task.train), len(task.splits["validation"]), len(task.splits["test"])] == [1800, 100, 100]


def test_the_baselines_are_entropies(text):
    task = CharLMSpec(text=text).build(0)
    counts = Counter(task.train.tolist())
    cost = {code: -math.log2((count + 1) / (1800 + 4)) for code, count in counts.items()}
    expected = sum(cost[code] for code in task.splits["test"].tolist()[1:]) / 99
    assert task.baselines == {"uniform": 2.0, "character frequencies": pytest.approx(expected, rel=1e-12)}
    entropy = -sum(p * math.log2(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8))
    assert task.baselines["character frequencies"] == pytest.approx(entropy, abs=0.1)


def test_segments_are_consecutive_and_target_the_next_character(text):
    task = CharLMSpec(text=text, segment=50).build(0)
    length = 1799 // 6
    for step in range(2 * (length // 50)):
        inputs, targets, fresh, _ = task.batch(step, 6)
        start = step % (length // 50) * 50
        assert fresh == (start == 0)
        for row in range(6):
            at = row * length + start
            compare(inputs[:, row], task.train[at : at + 50], tolerance=0)
            compare(targets[:, row], task.train[at + 1 : at + 51], tolerance=0)


def test_segments_of_varying_length_cover_each_epoch_and_scale_the_learning_rate(text):
    spec = CharLMSpec(text=text, segment=40, segment_deviation=2.0, segment_halved=0.3)
    task, length = spec.build(0), 1799 // 6
    sizes, starts, position = [], [], 0
    for step in range(60):
        inputs, _, fresh, *_ = task.batch(step, 6)
        position = 0 if fresh else position
        compare(inputs[:, 1], task.train[length + position : length + position + len(inputs)], tolerance=0)
        assert task.rate(step, 6) == len(inputs) / 40
        starts.append(position)
        position += len(inputs)
        sizes.append(len(inputs))
        assert position <= length
    ends = [start + size for start, size, after in zip(starts, sizes, starts[1:], strict=False) if after == 0]
    assert len(ends) > 3
    assert set(ends) == {length}, "an epoch ends where the streams end"
    whole = [size for size, start in zip(sizes, starts, strict=True) if start + size < length]
    long, short = [n for n in whole if n > 30], [n for n in whole if n <= 30]
    assert abs(sum(long) / len(long) - 40) < 2
    assert abs(sum(short) / len(short) - 20) < 2
    again = spec.build(0)
    assert [len(again.batch(step, 6).inputs) for step in (50, 7, 31)] == [sizes[step] for step in (50, 7, 31)]
    assert [len(spec.build(1).batch(step, 6).inputs) for step in range(60)] != sizes
    assert CharLMSpec(text=text, segment=40).build(0).rate(3, 6) == 1.0


def test_an_embedding_starts_within_its_bound_and_a_tied_read_out_with_it(text):
    task = CharLMSpec(text=text, embedding=5, embedding_init=0.1).build(0)
    model = small_model(task)
    task.share(model)
    weight = model.encoder.get_parameter("weight")
    assert 0.05 < float(weight.detach().abs().max()) <= 0.1
    assert model.readout.get_parameter("weight") is weight


def test_options_at_their_defaults_keep_the_identity_of_older_trials(text):
    options = CharLMSpec(text=text).model_dump(mode="json")
    assert set(options) == {"kind", "text", "embedding", "segment", "carry", "tied"}
    changed = CharLMSpec(text=text, evaluation_streams=10).model_dump(mode="json")
    assert changed == {**options, "evaluation_streams": 10}
    assert CharLMSpec.model_validate(changed).evaluation_streams == 10


def test_the_shares_of_a_text_are_exact_and_default_to_a_twentieth(text):
    whole = Path(text).read_text(encoding="utf-8")
    for validation, test in ((0.05, 0.05), (0.1, 0.1), (0.1, 0.2), (0.3, 0.1)):
        corpus = read(text, "characters", validation, test)
        first, second = (len(whole) * round(100 * (1 - share)) // 100 for share in (validation + test, test))
        assert [len(part) for part in corpus] == [first, second - first, len(whole) - second]
        assert "".join("".join(part) for part in corpus) == whole
    assert len(CharLMSpec(text=text, validation=0.1, test=0.1).build(0).train) == len(whole) * 80 // 100


def test_shares_that_leave_nothing_to_train_on_are_rejected(text, tmp_path):
    with pytest.raises(ValueError, match=r"validation: got 0\.5 with test 0\.6; expected shares below 1"):
        CharLMSpec(text=text, validation=0.5, test=0.6)
    with pytest.raises(ValueError, match="a folder with its own splits"):
        CharLMSpec(text=str(tmp_path), validation=0.1)


@pytest.mark.parametrize("streams", [1, 7, 50, 99])
def test_every_character_of_a_split_but_the_first_counts_once(text, streams):
    task = CharLMSpec(text=text, segment=3, evaluation_streams=streams).build(0)
    scored = task.evaluate(Unigram(task), "test")["bits per character"]
    assert scored == pytest.approx(language.unigram(task.train, task.splits["test"][1:], 4) / math.log(2), rel=1e-9)


def test_evaluation_does_not_depend_on_the_training_batches(text):
    task = CharLMSpec(text=text, segment=10, embedding=3).build(0)
    model = small_model(task, norm="layer", window=4).eval()
    before = task.evaluate(model, "validation")
    for size in (1, 30):
        task.loss(model, task.batch(0, size), None)
        assert task.evaluate(model, "validation") == before


@pytest.mark.parametrize("carry", ["all", "hidden", "none"])
def test_the_state_carried_between_segments(text, carry):
    task = CharLMSpec(text=text, segment=10, embedding=3, carry=carry).build(0)
    model = small_model(task, norm="layer", window=4)
    first, second = task.batch(0, 4), task.batch(1, 4)
    _, carried = task.loss(model, first, None)
    loss, _ = task.loss(model, second, carried)
    _, state = model.features(first.inputs)
    states = {
        "all": state,
        "hidden": model.layer.initial(4, model.layer.hidden(state)),
        "none": None,
    }
    losses = {}
    for name, start in states.items():
        predictions, _ = model(second.inputs, start)
        losses[name] = nn.functional.cross_entropy(predictions.flatten(0, 1), second.targets.flatten())
    compare(loss, losses[carry], tolerance=1e-12)
    assert len({round(each.item(), 9) for each in losses.values()}) == 3, "the three modes are three computations"
    if carried is not None:
        assert not any(leaf.requires_grad for leaf in tree_leaves(carried)), "cut from the graph"
    fresh, _ = task.loss(model, first, carried)
    compare(fresh, task.loss(model, first, None)[0], tolerance=0)


def test_a_curve_in_bits_is_the_loss_in_nats_over_ln_2():
    assert CharLMSpec().build(0).in_metric(math.log(2)) == pytest.approx(1)


def test_a_score_is_reported_in_bits_and_in_nats(text):
    task = CharLMSpec(text=text).build(0)
    scores = task.evaluate(Unigram(task), "test")
    assert list(scores) == ["bits per character", "nats per character"]
    assert scores["nats per character"] == pytest.approx(scores["bits per character"] * math.log(2), rel=1e-12)
    assert scores["bits per character"] == pytest.approx(task.baselines["character frequencies"], rel=1e-6)


def test_invalid_texts_are_named(tmp_path):
    missing, binary, short = tmp_path / "missing.txt", tmp_path / "binary.txt", tmp_path / "short.txt"
    binary.write_bytes(b"abc\xff\xfe" * 100)
    short.write_text("too short")
    for path, message in [
        (missing, "No such file"),
        (binary, r"not UTF-8 at byte 3"),
        (tmp_path, "without ptb.char.train.txt"),
    ]:
        with pytest.raises(SpecError, match=message) as caught:
            CharLMSpec(text=str(path)).data()
        assert str(path) in str(caught.value)
    with pytest.raises(SpecError, match="with 9 characters; expected at least 100"):
        CharLMSpec(text=str(short)).build(0)


def test_a_text_of_one_character_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    with pytest.raises(SpecError, match="a.txt, which repeats 'a'; expected two different characters"):
        CharLMSpec(text=str(tmp_path / "a.txt")).build(0)


def test_a_batch_larger_than_the_training_split_is_rejected():
    with pytest.raises(SpecError, match="train.batch_size: got 21; expected 1 to 20, the training sequences"):
        AddingSpec(length=4, train=20).build(0).batch(0, 21)


def test_more_streams_than_characters_are_rejected(text):
    with pytest.raises(SpecError, match="got 1800; expected 1 to 1799, below the 1800 training"):
        CharLMSpec(text=text).build(0).batch(0, 1800)


@pytest.mark.parametrize(
    ("kind", "option"), [("charlm", "text"), ("series", "file"), ("sequences", "path"), ("python", "file")]
)
def test_a_folder_whose_name_is_no_utf_8_is_an_error_at_the_option(kind, option, tmp_path, monkeypatch):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    monkeypatch.chdir(folder)
    study = {"task": {"kind": kind, option: "data"}, "axes": {}, "seeds": 1}
    message = rf"(?m)^task\.{option}: got '.*.udcff/data'; expected a path that UTF-8 can encode"
    with pytest.raises(SpecError, match=message):
        create(study, tmp_path / "study")
