"""Corpora and language models: reading, hashing, vocabularies, tied weights and scores."""

import hashlib
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from atn_norms import LSTM, LayerSpec
from atn_norms.errors import SpecError
from atn_norms.tasks import CharLMSpec, Model, WordLMSpec, corpora, language
from tests.compare import compare

TEXT = "A cat, a dog;\r\nand a cat.\n\nÉtudes: the cat sat (again)\n" * 12
PTB = {
    "train": " the cat <unk> \n a cat sat \n" * 30,
    "valid": " the cat sat \n" * 3,
    "test": " a dog <unk> sat \n the cat \n" * 3,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


@pytest.fixture
def treebank(tmp_path):
    folder = tmp_path / "treebank"
    folder.mkdir()
    for part, content in PTB.items():
        (folder / f"ptb.{part}.txt").write_text(content)
    return folder


def test_a_text_becomes_words_signs_and_line_ends(text):
    words = [*corpora.read(text, "words").train[:13]]
    assert words == ["A", "cat", ",", "a", "dog", ";", "\n", "and", "a", "cat", ".", "\n", "\n"]
    whole = [token for split in corpora.read(text, "words") for token in split]
    assert whole == whole[:22] * 12
    assert [len(split) for split in corpora.read(text, "words")] == [237, 13, 14]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा", "।"]),
        ("مُحَمَّدٌ كِتَاب", ["مُحَمَّدٌ", "كِتَاب"]),
        ("e\u0301tude, cafe\u0301", ["\u00e9tude", ",", "caf\u00e9"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # noqa: RUF001  Persian letters
        ("我喜欢ABC。カタカナ", ["我", "喜", "欢", "ABC", "。", "カタカナ"]),
        ("x² = 1_000; a\u0300b", ["x²", "=", "1_000", ";", "\u00e0b"]),
        ("\U0001f469\u200d\U0001f4bb ok?!", ["\U0001f469\u200d\U0001f4bb", "ok", "?!"]),
    ],
    ids=["hindi", "vocalised arabic", "decomposed accents", "joiner", "ideographs", "signs", "emoji"],
)
def test_a_mark_is_part_of_its_word(tmp_path, text, words):
    path = tmp_path / "text.txt"
    path.write_text(f"{text}\n" * 40, encoding="utf-8")
    corpus = corpora.read(str(path), "words")
    assert [token for split in corpus for token in split] == [*words, "\n"] * 40


@pytest.mark.parametrize("unit", ["characters", "words"])
def test_every_line_end_is_one_token(tmp_path, unit):
    ends = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}
    texts = {name: f"a cat{end}{end}caf\u00e9{end}" for name, end in ends.items()} | {"marks": "a cat\n\ncafe\u0301\n"}
    read = set()
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(text.encode() * 20)
        splits = tuple("".join(split) for split in corpora.read(str(path), unit))
        read.add((splits, corpora.fingerprint(str(path), unit)))
    assert len(read) == 1 and "".join(read.pop()[0]).count("\n") == 60


def test_a_treebank_has_its_own_splits(treebank):
    corpus = corpora.read(str(treebank), "words")
    assert [*corpus.train[:8]] == ["the", "cat", "<unk>", "\n", "a", "cat", "sat", "\n"]
    assert [*corpus.validation] == ["the", "cat", "sat", "\n"] * 3


def test_the_spaces_around_a_line_of_a_treebank_are_no_characters(treebank):
    corpus = corpora.read(str(treebank), "characters")
    assert "".join(corpus.test) == "a dog <unk> sat\nthe cat\n" * 3
    assert PTB["train"].count("\n") * 2 == len(PTB["train"]) - len(corpus.train), "one at each end"
    padded = corpora.fingerprint(str(treebank), "characters")
    for part in PTB:
        (treebank / f"ptb.{part}.txt").write_text("".join(f"{line.strip()}\n" for line in PTB[part].splitlines()))
    assert corpora.fingerprint(str(treebank), "characters") == padded


def test_the_characters_of_a_treebank_are_separated_by_spaces(treebank):
    for part in ("train", "valid", "test"):
        (treebank / f"ptb.char.{part}.txt").write_text(" t h e _ c a t \n a _ c a t \n" * 9)
    assert "".join(corpora.read(str(treebank), "characters").train) == "the_cat\na_cat\n" * 9
    assert [*corpora.read(str(treebank), "words").validation[:3]] == ["the", "cat", "sat"], "words have their own files"


def test_the_content_is_hashed(text, treebank):
    read = TEXT.replace("\r\n", "\n").encode()
    assert CharLMSpec(text=text).data() == {"text": "sha256:" + hashlib.sha256(read).hexdigest()}
    assert WordLMSpec(text=text).data() != CharLMSpec(text=text).data(), "the word rule is part of the hash"
    before = [WordLMSpec(text=str(treebank)).data()["text"]]
    for part in PTB:
        (treebank / f"ptb.{part}.txt").write_text(PTB[part] + "more\n")
        before.append(WordLMSpec(text=str(treebank)).data()["text"])
    assert len(set(before)) == 4 and all(each.startswith("sha256:") and len(each) == 71 for each in before)


def test_a_byte_order_mark_is_not_a_character(tmp_path, text):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert corpora.read(str(marked), "characters") == corpora.read(text, "characters")
    assert corpora.fingerprint(str(marked), "words") == corpora.fingerprint(text, "words")


def test_a_folder_without_a_corpus_is_named(tmp_path, treebank):
    with pytest.raises(SpecError, match=r"a folder without ptb.train.txt; expected a UTF-8 file, or"):
        WordLMSpec(text=str(tmp_path)).data()
    (treebank / "ptb.valid.txt").unlink()
    with pytest.raises(SpecError, match="got .*ptb.valid.txt .No such file or directory.; expected a readable file"):
        WordLMSpec(text=str(treebank)).build(0)


def test_a_split_that_is_too_short_is_named(treebank):
    (treebank / "ptb.test.txt").write_text("\n")
    with pytest.raises(SpecError, match="with 1 words for test; expected at least 2"):
        WordLMSpec(text=str(treebank)).build(0)


def test_frequent_words_are_distinct_and_others_are_unknown(treebank):
    task = WordLMSpec(text=str(treebank)).build(0)
    assert task.vocabulary == ["<unk>", "\n", "cat", "a", "sat", "the"]
    assert task.splits["test"].tolist()[:8] == [3, 0, 0, 4, 1, 5, 2, 1], "dog never occurred in training"
    assert WordLMSpec(text=str(treebank), vocabulary=3).build(0).vocabulary == ["<unk>", "\n", "cat"]


def test_the_baselines_of_words_are_perplexities(treebank):
    task = WordLMSpec(text=str(treebank)).build(0)
    counts = Counter(task.train.tolist())
    cost = [math.log((sum(counts.values()) + 6) / (counts[word] + 1)) for word in task.splits["test"].tolist()[1:]]
    assert task.baselines == {
        "uniform": pytest.approx(6, rel=1e-12),
        "word frequencies": pytest.approx(math.exp(sum(cost) / len(cost)), rel=1e-12),
    }


class Unigram(Model):
    """Model that predicts the training frequencies."""

    def __init__(self, task):
        super().__init__(nn.Identity(), None, nn.Identity())
        counts = torch.bincount(task.train, minlength=len(task.vocabulary)).double() + 1
        self.logits = (counts / counts.sum()).log()

    def features(self, inputs, state=None):
        return self.logits.expand(*inputs.shape, -1), (torch.zeros(1),)


@pytest.mark.parametrize("logits", [1, 50 * 6 * 2, 2**23])
def test_perplexity_counts_every_word_of_a_split_but_the_first_once(treebank, monkeypatch, logits):
    monkeypatch.setattr(language, "MOST_LOGITS", logits)
    task = WordLMSpec(text=str(treebank), segment=3).build(0)
    assert task.evaluate(Unigram(task), "test") == {
        "perplexity": pytest.approx(task.baselines["word frequencies"], rel=1e-9)
    }


def test_a_loss_is_reported_in_the_unit_of_the_metric(text):
    assert WordLMSpec(text=text).build(0).in_metric(math.log(7)) == pytest.approx(7)
    assert WordLMSpec(text=text).build(0).in_metric(1e4) == math.inf
    assert CharLMSpec(text=text).build(0).in_metric(math.log(4)) == pytest.approx(2)


def model_of(task, hidden_size):
    model: Any = Model(task.encoder(), LSTM(task.input_size, hidden_size), task.readout(hidden_size))
    task.share(model)
    return model


@pytest.mark.parametrize(("tied", "hidden_size", "shared"), [(None, 5, True), (None, 4, False), (False, 5, False)])
def test_read_out_and_embedding_share_weights_of_equal_size(text, tied, hidden_size, shared):
    task = CharLMSpec(text=text, embedding=5, tied=tied).build(0)
    model = model_of(task, hidden_size)
    assert (model.encoder.weight is model.readout.weight) == shared
    batch = task.batch(0, 3)
    task.loss(model, batch, None)[0].backward()
    before = model.encoder.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.encoder.weight, before)
    if shared:
        compare(model.encoder.weight, model.readout.weight, tolerance=0)
    else:
        assert model.encoder.weight.shape != model.readout.weight.shape or tied is False


def test_weights_that_cannot_be_shared_are_rejected_with_the_reason():
    spec = CharLMSpec(embedding=5, tied=True)
    reason = spec.unsupported_reason(LayerSpec.model_validate({"cell": "lstm", "input_size": 5, "hidden_size": 4}))
    assert reason == "tied weights need outputs of the embedding's size 5, and the layer's have 4"
    assert (
        spec.unsupported_reason(LayerSpec.model_validate({"cell": "lstm", "input_size": 5, "hidden_size": 5})) is None
    )
    assert (
        CharLMSpec().unsupported_reason(LayerSpec.model_validate({"cell": "lstm", "input_size": 5, "hidden_size": 5}))
        is None
    )


def test_words_are_segmented_like_characters(treebank):
    task = WordLMSpec(text=str(treebank), segment=5).build(0)
    inputs, targets, fresh, _ = task.batch(1, 4)
    assert not fresh and inputs.shape == (5, 4)
    compare(inputs[1:], targets[:-1], tolerance=0)
