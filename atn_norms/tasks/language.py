"""The common part of language models: training on segments of streams, scores on every token of a split."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from atn_norms.files import absolute
from atn_norms.pytree import Tree, detach
from atn_norms.registry import SpecError
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator, kaiming_linear
from atn_norms.tasks.corpora import Corpus, Unit, fingerprint, read

MOST_LOGITS = 2**23  # at once in evaluation: 32 MiB of float32
SHORTEST = 100  # tokens: a 5% split of a shorter text has nothing to predict
IGNORED = -100


class LanguageSpec(TaskSpec):
    """Common options of language models."""

    unit: ClassVar[Unit]
    text: Annotated[str, AfterValidator(absolute)] | None = None
    embedding: int = Field(default=200, ge=1, le=1_000_000)
    segment: int = Field(default=220, ge=1)
    segment_deviation: float = Field(default=0.0, ge=0)
    segment_halved: float = Field(default=0.0, ge=0, le=1)
    carry: Literal["all", "hidden", "none"] = "all"
    tied: bool | None = None
    evaluation_streams: int = Field(default=50, ge=1, le=10_000)
    embedding_init: float | None = Field(default=None, gt=0)
    validation: float = Field(default=0.05, gt=0, lt=1)
    test: float = Field(default=0.05, gt=0, lt=1)

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer options at their defaults, so that trials keep their identity."""
        options = handler(self)
        later = ("segment_deviation", "segment_halved", "evaluation_streams", "embedding_init", "validation", "test")
        return {
            name: v for name, v in options.items() if name not in later or v != type(self).model_fields[name].default
        }

    @model_validator(mode="after")
    def _leaves_text_for_training(self) -> Self:
        if self.validation + self.test >= 1:
            raise SpecError("validation", f"{self.validation} with test {self.test}", "shares below 1 in all")
        if self.text is not None and Path(self.text).is_dir() and {"validation", "test"} & self.model_fields_set:
            got = f"shares of a text for {self.text}, a folder with its own splits"
            raise SpecError("validation", got, "neither validation nor test, or a text file")
        return self

    def data(self) -> dict[str, str]:
        return {"text": fingerprint(self.text, self.unit)}

    def unsupported_reason(self, layer: Any) -> str | None:
        if layer.bidirectional:
            return f"a bidirectional layer reads the {self.unit} it must predict"
        outputs = layer.equations().output_size * layer.directions
        if self.tied and outputs != self.embedding:
            return f"tied weights need outputs of the embedding's size {self.embedding}, and the layer's have {outputs}"
        return None


class Language(Task):
    r"""Cross-entropy of the next token of a text.

    $$H = -\frac{1}{N} \sum_{n=1}^{N} \ln p(x_n \mid x_{<n})$$

    Training cuts the text into one stream per sequence of the batch. It reads all streams segment by segment and
    carries the state; an epoch ends at the end of the streams. Evaluation covers every token of a split except the
    first, in a fixed number of streams, and carries the state in the same way.

    Read-out and embedding share their weights (Press, Wolf, arXiv 1608.05859) if their sizes agree, unless `tied` is
    false. Tied weights have the initialization of the read-out.
    """

    spec: LanguageSpec

    def __init__(self, spec: LanguageSpec, seed: int = 0) -> None:
        self.spec, self.seed, self.input_size = spec, seed, spec.embedding
        self._starts: dict[int, list[list[int]]] = {}  # length of a stream -> the starts of each epoch's segments
        corpus = read(spec.text, spec.unit, spec.validation, spec.test)
        self._require_length(corpus)
        self.vocabulary = self.known(corpus)
        self.index = {token: i for i, token in enumerate(self.vocabulary)}
        self.train, validation, test = (self._codes(tokens) for tokens in corpus)
        self.splits: dict[str, Tensor] = {"validation": validation, "test": test}

    @abstractmethod
    def known(self, corpus: Corpus) -> list[str]:
        """Return the vocabulary; its first token replaces every unknown token."""

    @abstractmethod
    def score(self, nats: float) -> float:
        """Convert a cross-entropy in nats per token into the metric."""

    def other_scores(self, nats: float) -> dict[str, float]:
        """Return scores that are reported next to the metric."""
        return {}

    def in_metric(self, loss: float) -> float:
        return self.score(loss)

    def encoder(self) -> nn.Module:
        return nn.Embedding(len(self.vocabulary), self.spec.embedding)

    def readout(self, output_size: int) -> nn.Module:
        return kaiming_linear(output_size, len(self.vocabulary))

    def share(self, model: Model) -> None:
        encoder: Any = model.encoder
        readout: Any = model.readout
        if self.spec.tied is not False and encoder.weight.shape == readout.weight.shape:
            encoder.weight = readout.weight
        if self.spec.embedding_init is not None:
            nn.init.uniform_(encoder.weight, -self.spec.embedding_init, self.spec.embedding_init)

    def batch(self, step: int, size: int) -> Batch:
        if size >= len(self.train):
            expected = f"1 to {len(self.train) - 1}, below the {len(self.train)} training {self.spec.unit}"
            raise SpecError("train.batch_size", str(size), expected)
        length = (len(self.train) - 1) // size
        start, segment = self._place(step, length)
        rows = torch.arange(size) * length + start + torch.arange(segment).unsqueeze(1)  # [segment, size]
        return Batch(self.train[rows], self.train[rows + 1], fresh=start == 0)

    def rate(self, step: int, size: int) -> float:
        if not self._varied:
            return 1.0
        return self._place(step, (len(self.train) - 1) // size)[1] / self.spec.segment

    @property
    def _varied(self) -> bool:
        return bool(self.spec.segment_deviation or self.spec.segment_halved)

    def _place(self, step: int, length: int) -> tuple[int, int]:
        """Return the first token and the number of tokens of a training step, for streams of a length."""
        if not self._varied:
            segment = min(self.spec.segment, length)
            return step % (length // segment) * segment, segment
        epochs, before = self._starts.setdefault(length, []), 0
        for epoch in itertools.count():
            if epoch == len(epochs):
                epochs.append(self._draw_starts(epoch, length))
            count = len(epochs[epoch]) - 1
            if step < before + count:
                start, end = epochs[epoch][step - before : step - before + 2]
                return start, end - start
            before += count
        raise AssertionError

    def _draw_starts(self, epoch: int, length: int) -> list[int]:
        """Return the starts of an epoch's segments, followed by the end of the stream."""
        random, starts = generator(self.seed, "segments", epoch), [0]
        while starts[-1] < length:
            halved = float(torch.rand((), generator=random)) < self.spec.segment_halved
            drawn = float(torch.randn((), generator=random)) * self.spec.segment_deviation
            drawn += self.spec.segment / 2 if halved else self.spec.segment
            starts.append(min(length, starts[-1] + max(1, round(drawn))))
        return starts

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        predictions, state = model(batch.inputs, None if batch.fresh else carry)
        loss = nn.functional.cross_entropy(predictions.flatten(0, 1), batch.targets.flatten())
        return loss, self._carried(model, state)

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        codes = self.splits[split]
        count = len(codes) - 1
        streams = self.spec.evaluation_streams
        length = -(-count // streams)
        steps = torch.arange(streams) * length + torch.arange(length).unsqueeze(1)  # [length, streams]
        inputs = codes[steps.clamp(max=count - 1)]
        targets = codes[steps.clamp(max=count - 1) + 1].where(steps < count, IGNORED)
        nats, state = torch.zeros((), dtype=torch.float64), None
        for some, wanted in zip(inputs.split(self.spec.segment), targets.split(self.spec.segment), strict=True):
            y, state = model.features(some, state)
            state = self._carried(model, state)
            for predictions, tokens in self._read_out(model, y, wanted):
                nats += nn.functional.cross_entropy(
                    predictions.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED, reduction="sum"
                ).double()
        return {self.metric: self.score(nats.item() / count), **self.other_scores(nats.item() / count)}

    def baselines_of(self, frequencies: str) -> dict[str, float]:
        """Return the test scores of uniform predictions, and of the training frequencies, named `frequencies`."""
        size = len(self.vocabulary)
        return {
            "uniform": self.score(math.log(size)),
            frequencies: self.score(unigram(self.train, self.splits["test"][1:], size)),
        }

    def _read_out(self, model: Model, y: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield predictions and targets, a few steps at a time, to bound the memory of a large vocabulary."""
        steps = max(1, MOST_LOGITS // (y.shape[1] * len(self.vocabulary)))
        for some, tokens in zip(y.split(steps), wanted.split(steps), strict=True):
            yield model.readout(some), tokens

    def _carried(self, model: Model, state: Tree) -> Tree | None:
        if self.spec.carry == "none":
            return None
        if self.spec.carry == "hidden":
            hidden = detach(model.layer.hidden(state))
            batch = (hidden[0] if isinstance(hidden, tuple) else hidden).shape[-2]
            return detach(model.layer.initial(batch, hidden))
        return detach(state)

    def _codes(self, tokens: Any) -> Tensor:
        return torch.tensor([self.index.get(token, 0) for token in tokens])

    def _require_length(self, corpus: Corpus) -> None:
        where, unit = self.spec.text, self.spec.unit
        count = sum(map(len, corpus))
        if count < SHORTEST:
            raise SpecError("text", f"{where} with {count} {unit}", f"at least {SHORTEST}")
        for name, tokens in corpus._asdict().items():
            if len(tokens) < 2:
                raise SpecError("text", f"{where} with {len(tokens)} {unit} for {name}", "at least 2")
        if len(set(corpus.train)) == 1:
            raise SpecError("text", f"{where}, which repeats {corpus.train[0]!r}", f"two different {unit}")


def unigram(train: Tensor, test: Tensor, size: int) -> float:
    """Return the nats per token of `test` under the frequencies of `train`, each of `size` counts plus one."""
    counts = torch.bincount(train, minlength=size).double() + 1
    return -(counts / counts.sum()).log()[test].mean().item()
