"""A character language model: predict the next character of a real text."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from atn_norms.registry import SpecError
from atn_norms.tasks.adding import kaiming_linear
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec
from atn_norms.trees import Tree, detach

EVALUATION_STREAMS = 50  # fixed, so that a score never depends on how training was batched
SHORTEST = 100  # characters: below, a 5% split has nothing to predict
IGNORED = -100


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


class CharLMSpec(TaskSpec):
    """Options of the character language model; sizes follow the character-PTB setting of arXiv 2209.14439.

    | option | meaning | unit |
    |---|---|---|
    | `text` | a UTF-8 file (relative to where the program runs); None: Python's own language reference | path |
    | `embedding` | size of a character's vector, the layer's input | features |
    | `segment` | steps of truncated back-propagation | characters |
    | `carry` | what crosses from one segment to the next, in training and evaluation: `all` of the state, windows too; `hidden` states only, windows start anew; or `none` | |

    >>> CharLMSpec(carry="hidden").data()["text"][:7]
    'sha256:'
    """  # noqa: E501

    kind: Literal["charlm"] = "charlm"
    text: Annotated[str | None, AfterValidator(_absolute)] = None
    embedding: int = Field(default=200, ge=1, le=1_000_000)
    segment: int = Field(default=220, ge=1)
    carry: Literal["all", "hidden", "none"] = "all"

    def build(self, seed: int) -> CharLM:
        return CharLM(self)

    def data(self) -> dict[str, str]:
        return {"text": "sha256:" + hashlib.sha256(read_text(self.text).encode()).hexdigest()}

    def refuses(self, layer: Any) -> str | None:
        if layer.bidirectional:
            return "a bidirectional layer reads the characters it must predict"
        return None


class CharLM(Task):
    r"""Cross-entropy of the next character, in bits per character; the text is split 90/5/5 in reading order.

    $$\mathrm{bpc} = -\frac{1}{N} \sum_{n=1}^{N} \log_2 p(c_n \mid c_{<n})$$

    Training cuts the text into one stream per sequence of the batch and walks along all of them segment by segment,
    carrying state; an epoch ends at the streams' end. Evaluation covers every character of a split but its first, in
    a fixed number of streams. The alphabet is that of the whole text.

    Baselines, on the test split: `uniform`, log2 of the alphabet's size; `character frequencies`, the cross-entropy under the
    training split's frequencies (each count plus one, so that a new character costs finitely much).
    """  # noqa: E501

    batch_size = 32
    metric = "bits per character"
    metric_per_loss = 1 / math.log(2)

    def __init__(self, spec: CharLMSpec) -> None:
        self.spec = spec
        self.input_size = spec.embedding
        text = read_text(spec.text)
        if len(text) < SHORTEST:
            raise SpecError(f"text: {spec.text} has {len(text)} characters; at least {SHORTEST} are needed")
        self.alphabet = sorted(set(text))
        if len(self.alphabet) == 1:
            raise SpecError(f"text: {spec.text} repeats {self.alphabet[0]!r}; two different characters are needed")
        index = {character: i for i, character in enumerate(self.alphabet)}
        codes = torch.tensor([index[character] for character in text])
        first, second = len(codes) * 90 // 100, len(codes) * 95 // 100
        self.train = codes[:first]
        self.splits: dict[str, Tensor] = {"validation": codes[first:second], "test": codes[second:]}
        self.baselines = {
            "uniform": math.log2(len(self.alphabet)),
            "character frequencies": unigram(self.train, self.splits["test"], len(self.alphabet)),
        }

    def encoder(self) -> nn.Module:
        return nn.Embedding(len(self.alphabet), self.spec.embedding)

    def readout(self, output_size: int) -> nn.Module:
        return kaiming_linear(output_size, len(self.alphabet))

    def batch(self, step: int, size: int) -> Batch:
        if size >= len(self.train):
            raise SpecError(f"train.batch_size: {size} streams of a text with {len(self.train)} training characters")
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
            predictions, state = model(some, state)
            state = self._carried(model, state)
            nats += nn.functional.cross_entropy(
                predictions.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
            ).double()
        return {self.metric: nats.item() / count / math.log(2)}

    def _carried(self, model: Model, state: Tree) -> Tree | None:
        if self.spec.carry == "none":
            return None
        if self.spec.carry == "hidden":
            hidden = detach(model.layer.hidden(state))
            batch = (hidden[0] if isinstance(hidden, tuple) else hidden).shape[-2]
            return detach(model.layer.initial(batch, hidden))
        return detach(state)


def read_text(path: str | None) -> str:
    """The text of a file, or of Python's own language reference (`pydoc_data.topics`) when there is no path."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise SpecError(f"text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"text: {path} is not UTF-8 (byte {error.start})") from error


def unigram(train: Tensor, test: Tensor, size: int) -> float:
    """Bits per character of `test` under the frequencies of `train`, each of `size` counts plus one."""
    counts = torch.bincount(train, minlength=size).double() + 1
    return -(counts / counts.sum()).log2()[test].mean().item()
