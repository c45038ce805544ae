"""A word language model: predict the next word of a real text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from atn_norms.tasks.corpora import Corpus, Unit
from atn_norms.tasks.language import Language, LanguageSpec

UNKNOWN = "<unk>"


class WordLMSpec(LanguageSpec):
    """Options of the word language model; sizes and training are small customary values, not from a paper.

    | option | meaning | unit |
    |---|---|---|
    | `text` | a UTF-8 file (relative to the working directory), or a folder with `ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt`; None: Python's own language reference | path |
    | `vocabulary` | size of the vocabulary: the most frequent words of the training split; any other word is `<unk>` | words |
    | `embedding` | size of a word's vector, the layer's input | features |
    | `segment` | steps of truncated back-propagation | words |
    | `segment_deviation`, `segment_halved` | lengths of training segments: normal around `segment` with this deviation, and around half of `segment` for this share; the learning rate is scaled by length over `segment` | tokens, share |
    | `carry` | state carried from one segment to the next, in training and evaluation: `all`, including windows; `hidden` states only; or `none` | |
    | `tied` | share the weights of read-out and embedding; None: if the layer's outputs have the embedding's size | |
    | `evaluation_streams` | number of parallel streams in evaluation | |
    | `validation`, `test` | shares of the text, cut from its end; a folder has its own splits | share |
    | `embedding_init` | bound of the uniform initialization of the embedding (and a tied read-out); None: the read-out's initialization if tied, otherwise torch's | |

    >>> task = WordLMSpec(vocabulary=50).build(seed=0)
    >>> task.vocabulary[0], len(task.vocabulary), task.batch(0, 20).inputs.shape
    ('<unk>', 50, torch.Size([35, 20]))
    """  # noqa: E501

    unit: ClassVar[Unit] = "words"
    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 2000,
        "optimizer": {"kind": "adam", "lr": 2e-3},
        "clip_grad_norm": 1.0,
    }
    kind: Literal["wordlm"] = "wordlm"
    segment: int = Field(default=35, ge=1)
    vocabulary: int = Field(default=10_000, ge=2, le=10_000_000)

    def build(self, seed: int) -> WordLM:
        return WordLM(self, seed)


class WordLM(Language):
    r"""Perplexity of the next word, the exponential of its cross-entropy; line ends are words as well.

    $$\mathrm{ppl} = \exp\left(-\frac{1}{N} \sum_{n=1}^{N} \ln p(w_n \mid w_{<n})\right)$$

    Compare perplexities only for the same vocabulary: a smaller vocabulary has more `<unk>` words, which are easy.

    Baselines, on the test split: `uniform`, the vocabulary's size; `word frequencies`, the perplexity under the
    training split's frequencies (each count plus one). For Python's language reference they are about 4,700 and 340.
    """

    spec: WordLMSpec
    batch_size = 20
    metric = "perplexity"
    spread = "multiplicative"

    def __init__(self, spec: WordLMSpec, seed: int = 0) -> None:
        super().__init__(spec, seed)
        self.baselines = self.baselines_of("word frequencies")

    def known(self, corpus: Corpus) -> list[str]:
        counts = Counter(word for word in corpus.train if word != UNKNOWN)
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return [UNKNOWN, *frequent[: self.spec.vocabulary - 1]]

    def score(self, nats: float) -> float:
        return math.exp(nats) if nats < 700 else math.inf
