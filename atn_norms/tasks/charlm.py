"""A character language model: predict the next character of a real text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from atn_norms.tasks.corpora import Corpus, Unit
from atn_norms.tasks.language import Language, LanguageSpec


class CharLMSpec(LanguageSpec):
    """Options of the character language model; sizes follow the character-PTB setting of arXiv 2209.14439's authors.

    | option | meaning | unit |
    |---|---|---|
    | `text` | a UTF-8 file (relative to the working directory), or a folder with `ptb.char.train.txt`, `.valid.txt` and `.test.txt` (or `ptb.train.txt` ...); None: Python's own language reference | path |
    | `embedding` | size of a character's vector, the layer's input | features |
    | `segment` | steps of truncated back-propagation | characters |
    | `segment_deviation`, `segment_halved` | lengths of training segments: normal around `segment` with this deviation, and around half of `segment` for this share; the learning rate is scaled by length over `segment` | tokens, share |
    | `carry` | state carried from one segment to the next, in training and evaluation: `all`, including windows; `hidden` states only; or `none` | |
    | `tied` | share the weights of read-out and embedding; None: if the layer's outputs have the embedding's size | |
    | `evaluation_streams` | number of parallel streams in evaluation | |
    | `validation`, `test` | shares of the text, cut from its end; a folder has its own splits | share |
    | `embedding_init` | bound of the uniform initialization of the embedding (and a tied read-out); None: the read-out's initialization if tied, otherwise torch's | |

    >>> CharLMSpec(carry="hidden").data()["text"][:7]
    'sha256:'
    """  # noqa: E501

    unit: ClassVar[Unit] = "characters"
    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 1000,
        "optimizer": {"kind": "adam", "lr": 1e-2},
        "clip_grad_norm": 3.0,
    }
    kind: Literal["charlm"] = "charlm"

    def build(self, seed: int) -> CharLM:
        return CharLM(self, seed)


class CharLM(Language):
    r"""Cross-entropy of the next character, in bits per character; the alphabet is that of the whole text.

    $$\mathrm{bpc} = -\frac{1}{N} \sum_{n=1}^{N} \log_2 p(c_n \mid c_{<n})$$

    Baselines, on the test split: `uniform`, log2 of the alphabet's size; `character frequencies`, the cross-entropy
    under the frequencies of the training split (each count plus one, so that new characters have a finite cost). For
    Python's language reference they are about 6.7 and 4.6.
    """

    batch_size = 32
    metric = "bits per character"

    def __init__(self, spec: CharLMSpec, seed: int = 0) -> None:
        super().__init__(spec, seed)
        self.baselines = self.baselines_of("character frequencies")

    def known(self, corpus: Corpus) -> list[str]:
        return sorted(set().union(*corpus))

    def score(self, nats: float) -> float:
        return nats / math.log(2)

    def other_scores(self, nats: float) -> dict[str, float]:
        return {"nats per character": nats}
