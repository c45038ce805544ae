"""What language models share: streams of tokens walked along in segments, scored on every token of a split."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from atn_norms.pytree import Tree, detach
from atn_norms.registry import SpecError
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, kaiming_linear
from atn_norms.tasks.corpora import Corpus, Unit, fingerprint, read

EVALUATION_STREAMS = 50  # fixed, so that a score never depends on how training was batched
MOST_LOGITS = 2**23  # at a time in evaluation: 32 MiB of float32
SHORTEST = 100  # tokens: below, a 5% split has nothing to predict
IGNORED = -100


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(os.path.expanduser(path)).absolute())


class LanguageSpec(TaskSpec):
    """Options that language models share."""

    unit: ClassVar[Unit]
    text: Annotated[str | None, AfterValidator(_absolute)] = None
    embedding: int = Field(default=200, ge=1, le=1_000_000)
    segment: int = Field(default=220, ge=1)
    carry: Literal["all", "hidden", "none"] = "all"
    tied: bool | None = None

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

    Training cuts the text into one stream per sequence of the batch and walks along all of them segment by segment,
    carrying state; an epoch ends at the streams' end. Evaluation covers every token of a split but its first, in a
    fixed number of streams, carrying state in the same way.

    Read-out and embedding share their weights (Press, Wolf, arXiv 1608.05859) where their sizes agree, unless `tied`
    is false; they then start as the read-out does.
    """

    spec: LanguageSpec

    def __init__(self, spec: LanguageSpec) -> None:
        self.spec, self.input_size = spec, spec.embedding
        corpus = read(spec.text, spec.unit)
        self._refuse_short(corpus)
        self.vocabulary = self.known(corpus)
        self.index = {token: i for i, token in enumerate(self.vocabulary)}
        self.train, validation, test = (self._codes(tokens) for tokens in corpus)
        self.splits: dict[str, Tensor] = {"validation": validation, "test": test}

    @abstractmethod
    def known(self, corpus: Corpus) -> list[str]:
        """The tokens that the model tells apart, the first of which stands for any other."""

    @abstractmethod
    def score(self, nats: float) -> float:
        """The metric, of a cross-entropy in nats per token."""

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

    def batch(self, step: int, size: int) -> Batch:
        if size >= len(self.train):
            told = f"{size} streams of a text with {len(self.train)} training {self.spec.unit}"
            raise SpecError(f"train.batch_size: {told}; allowed: 1 to {len(self.train) - 1}")
        length = (len(self.train) - 1) // size
        segment = min(self.spec.segment, length)
        start = step % (length // segment) * segment
        rows = torch.arange(size) * length + start + torch.arange(segment).unsqueeze(1)  # [segment, size]
        return Batch(self.train[rows], self.train[rows + 1], fresh=start == 0)

    def loss(self, model: Model, batch: Batch, carry: Tree | None) -> tuple[Tensor, Tree | None]:
        predictions, state = model(batch.inputs, None if batch.fresh else carry)
        loss = nn.functional.cross_entropy(predictions.flatten(0, 1), batch.targets.flatten())
        return loss, self._carried(model, state)

    def evaluate(self, model: Model, split: Split) -> dict[str, float]:
        codes = self.splits[split]
        count = len(codes) - 1
        length = -(-count // EVALUATION_STREAMS)
        steps = torch.arange(EVALUATION_STREAMS) * length + torch.arange(length).unsqueeze(1)  # [length, streams]
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
        return {self.metric: self.score(nats.item() / count)}

    def baselines_of(self, frequencies: str) -> dict[str, float]:
        """What guessing evenly scores on the test split, and guessing by the training split's `frequencies`."""
        size = len(self.vocabulary)
        return {
            "uniform": self.score(math.log(size)),
            frequencies: self.score(unigram(self.train, self.splits["test"][1:], size)),
        }

    def _read_out(self, model: Model, y: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Predictions and targets, few steps at a time: of a large vocabulary all at once would not fit."""
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

    def _refuse_short(self, corpus: Corpus) -> None:
        where, unit = self.spec.text, self.spec.unit
        count = sum(map(len, corpus))
        if count < SHORTEST:
            raise SpecError(f"text: {where} has {count} {unit}; at least {SHORTEST} are needed")
        for name, tokens in corpus._asdict().items():
            if len(tokens) < 2:
                raise SpecError(f"text: {where} has {len(tokens)} {unit} to be used for {name}; at least 2 are needed")
        if len(set(corpus.train)) == 1:
            raise SpecError(f"text: {where} repeats {corpus.train[0]!r}; two different {unit} are needed")


def unigram(train: Tensor, test: Tensor, size: int) -> float:
    """Nats per token of `test` under the frequencies of `train`, each of `size` counts plus one."""
    counts = torch.bincount(train, minlength=size).double() + 1
    return -(counts / counts.sum()).log()[test].mean().item()
