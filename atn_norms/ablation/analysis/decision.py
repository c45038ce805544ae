"""The verdicts of a study: each declared comparison on its primary endpoint, with corrected p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from atn_norms.ablation.analysis import student
from atn_norms.ablation.analysis.comparison import Difference, Verdict
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.analysis.paired import ALPHA, Paired, holm

# Causes of a missing score, and their counts in a `Difference`.
LOST = {
    "failed": ("failed", "reference_failed"),
    "diverged": ("diverged", "reference_diverged"),
    "unreached": ("unreached",),
}


@dataclass(frozen=True)
class Decision:
    """A declared comparison with its verdict.

    | field           | meaning                                                                                       |
    |-----------------|-----------------------------------------------------------------------------------------------|
    | `difference`    | the comparison                                                                                |
    | `p`             | p-value of "no difference", adjusted by Holm's method over the family                         |
    | `p_equivalence` | p-value of "a difference of at least the margin", adjusted the same way; None without a margin |
    | `margin`        | margin on the measure's scale (the logarithm of a ratio); None if no margin is tested. The    |
    |                 | test is against the margin minus the measure's resolution                                     |
    | `family`        | the number of declared comparisons of the study                                               |
    | `both_trivial`  | whether a trivial predictor scores better than both sides on average                          |
    """

    difference: Difference
    p: float
    p_equivalence: float | None
    margin: float | None
    family: int
    both_trivial: bool = False

    @property
    def verdict(self) -> Verdict:
        """`helps`, `hurts`, `no difference` (larger than the margin), or `undecided`.

        If both tests reject, the verdict is `no difference`: the difference is not 0, but smaller than the margin.
        The difference of a seed at which a side never reached the level is unknown, so it excludes `no difference`.
        """
        difference = self.difference
        unknown = any(difference.lost) or difference.unreached
        equivalent = self.p_equivalence is not None and self.p_equivalence < ALPHA
        if equivalent and difference.pairs >= ENOUGH_SEEDS and not unknown:
            return "no difference"
        return difference.verdict_at(self.p)

    @property
    def blocked(self) -> bool:
        """True if only trials without a score prevent a verdict; more seeds would not change this."""
        return self.verdict == "undecided" != self.without(*LOST).verdict

    def without(self, *causes: str) -> Decision:
        """Return the decision if no trial lost its score by these causes of `LOST`."""
        fields = [field for cause in causes for field in LOST[cause]]
        return replace(self, difference=replace(self.difference, **dict.fromkeys(fields, 0)))

    @property
    def deciding_p(self) -> tuple[float | None, float]:
        """The p-value of the test that decides the verdict, and its adjusted value.

        The test is that of "a difference of at least the margin" for `no difference`, and of "no difference" otherwise.
        """
        paired, margin, adjusted = self.difference.paired, self.margin, self.p_equivalence
        if paired is None or margin is None or adjusted is None or self.verdict != "no difference":
            return self.difference.p, self.p
        return paired.p_equivalence(margin - self.difference.measure.resolution), adjusted

    @property
    def target(self) -> float:
        """The difference for which power is computed: the margin, or the observed mean without a margin."""
        return self.difference.mean if self.margin is None else self.margin

    @property
    def alpha(self) -> float:
        """The strictest level in Holm's method: 5% over the size of the family."""
        return ALPHA / self.family

    @property
    def _paired(self) -> Paired | None:
        """The pairs from which power is estimated; None below two pairs, and if more seeds would not decide."""
        return None if self.blocked else self.difference.paired

    @cached_property
    def power(self) -> float | None:
        """The probability of detecting `target` with these seeds at the observed spread.

        It is None below two pairs, and if the comparison is `blocked`.
        """
        paired = self._paired
        return student.power(paired.standardized(self.target), self.difference.pairs, self.alpha) if paired else None

    @cached_property
    def needed(self) -> int | None:
        """The number of seeds that detect `target` with a probability of 80%; None as `power`, or above 10,000.

        It is at least the number of seeds that a verdict needs.
        """
        paired = self._paired
        found = student.needed(paired.standardized(self.target), self.alpha) if paired else None
        return found and max(found, ENOUGH_SEEDS)


def decide(differences: Sequence[Difference], margins: Sequence[float | None]) -> list[Decision]:
    """Correct the p-values of the declared comparisons of a study for their number.

    `margins`: the margin of each comparison, in the unit of its `effect`. A comparison without `paired` is part of the
    family, with a p-value of 1. Tests of "no difference" and of "at least the margin" are two families, each with its
    own 5%. A margin that is a ratio is not tested on scores without logarithms, and a margin within the resolution of
    the measure is not tested.
    """
    scaled = [_scaled(each, margin) for each, margin in zip(differences, margins, strict=True)]
    tests = holm([each.p if each.p is not None else 1.0 for each in differences])
    with_margin = [(each, margin) for each, margin in zip(differences, scaled, strict=True) if margin is not None]
    bounds = [(each.paired, margin - each.measure.resolution) for each, margin in with_margin]
    found = holm([paired.p_equivalence(bound) if paired else 1.0 for paired, bound in bounds])
    equivalences = iter(found)
    return [
        Decision(difference, p, None if margin is None else next(equivalences), margin, len(differences))
        for difference, margin, p in zip(differences, scaled, tests, strict=True)
    ]


def _scaled(difference: Difference, margin: float | None) -> float | None:
    measure = difference.measure
    if margin is None or (measure.ratio_margin and not measure.log) or margin <= measure.resolution:
        return None
    return math.log(margin) if measure.log else margin
