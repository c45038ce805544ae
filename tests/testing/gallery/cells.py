"""Wrong cells, and plugins that fail only within a layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import atn_norms as an
from atn_norms.cells import CellWeights, GRUEquations, LSTMEquations, RNNEquations
from atn_norms.cells.base import SiteStates
from atn_norms.normalizers import FeatureMoments
from atn_norms.pytree import tree_map
from tests.testing.gallery.entry import wrong
from tests.testing.gallery.normalizers import Layer


class Simple(RNNEquations):
    """Correct: tanh of the two products."""

    refused: ClassVar[tuple[str, ...]] = ("carry",)
    torch_name: ClassVar[str | None] = None


@wrong("calls_are_pure")
class KeepsItsHiddenState(Simple):
    """Stores the last hidden state on the class and adds it in the next call."""

    last: ClassVar[dict[Any, Tensor]] = {}

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, state = super().step(weights, u + self.last.get(u.shape, torch.zeros(())), state, mask)
        self.last[u.shape] = u.detach() * 0.1
        return y, state


@wrong("inputs_are_not_modified")
class ProjectsInPlace(Simple):
    """Scales its input in place."""

    def project(self, weights: CellWeights, xs: Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        with torch.no_grad():
            xs *= 0.5
        return super().project(weights, xs, state, lengths)


@wrong("gradients_are_derivatives")
class DetachesTheHiddenState(Simple):
    """Cuts the gradient at every step."""

    def recur(self, weights: CellWeights, h: Tensor) -> Tensor:
        return super().recur(weights, h.detach())


@wrong("gradients_are_derivatives")
class DetachesTheFinalState(LSTMEquations):
    """Returns a detached cell state, so truncated backpropagation misses the loss of later segments."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, ((h, c), norms) = super().step(weights, u, state, mask)
        return y, ((h, c.detach()), norms)


@wrong("sizes_are_as_declared")
class ReturnsMoreThanDeclared(Simple):
    """Returns its gates together with its output, and declares the output alone."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, state = super().step(weights, u, state, mask)
        return torch.cat([y, y], -1), state


@wrong("sizes_are_as_declared")
class CarriesLessThanDeclared(LSTMEquations):
    """Sums the cell state to one number per row."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, ((h, c), norms) = super().step(weights, u, state, mask)
        return y, ((h, c.sum(-1, keepdim=True)), norms)


@wrong("masked_rows_keep_their_state")
class ContinuesAfterTheEnd(Simple):
    """Ignores the mask of ended rows."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        return super().step(weights, u, state, None)


@wrong("masked_rows_keep_their_state")
class ClearsAfterTheEnd(Simple):
    """Sets the state of an ended row to 0, so that its final state is lost."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, after = super().step(weights, u, state, mask)
        if mask is None:
            return y, after
        return y, (tree_map(lambda leaf: torch.where(mask.unsqueeze(1), leaf, 0.0), after[0]), after[1])


@wrong("projecting_is_not_recurrent")
class CentresTheSequence(Simple):
    """Subtracts the mean of the whole projected sequence, the future included."""

    def project(self, weights: CellWeights, xs: Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        us, state = super().project(weights, xs, state, lengths)
        return us - us.mean(0, keepdim=True), state


@wrong("every_part_has_an_effect")
class ForgetsANorm(LSTMEquations):
    """Declares a norm of the cell state and never applies it."""

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        (h, c), states = state
        norm = SiteStates(self, weights, states, mask)
        i, f, g, o = norm("sum", u + norm("hh", self.recur(weights, h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return self.ended(torch.sigmoid(o) * torch.tanh(c), (torch.sigmoid(o) * torch.tanh(c), c), norm, state, mask)


@wrong("every_part_has_an_effect")
class ForgetsABias(Simple):
    """Registers a recurrent bias and omits it from the product."""

    def recur(self, weights: CellWeights, h: Tensor) -> Tensor:
        return F.linear(h, weights["weight_hh"])


@wrong("placements_are_rejected_or_have_an_effect")
class TakesAnyPlacement(GRUEquations):
    """Accepts a placement of the cell state, which it does not have, and ignores it."""

    torch_name: ClassVar[str | None] = None


@wrong("padding_is_never_read")
class ReadsPadding(Simple):
    """Projects the padding too: a NaN in it reaches every gradient."""

    def project(self, weights: CellWeights, xs: Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        us = F.linear(xs, weights["weight_ih"], weights.get("bias_ih"))
        if "ih" not in weights.norms:
            return us, state
        carried, (memory, *others) = state
        us, memory = weights.norms["ih"].scan(us, memory, lengths)
        return us, (carried, (memory, *others))


@wrong("padding_is_never_read")
class RunsTheWindowThroughPadding(Simple):
    """Continues the window of the input norm through the padding."""

    def project(self, weights: CellWeights, xs: Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        return super().project(weights, torch.nan_to_num(xs), state, None)


@wrong("a_stream_may_be_cut_anywhere")
class RestartsTheInputNorm(Simple):
    """Starts the window of the input norm again at every call."""

    def project(self, weights: CellWeights, xs: Tensor, state: Any, lengths: Tensor | None = None) -> Any:
        fresh = self.initial(weights, xs.shape[1], state[0])
        us, _ = super().project(weights, xs, fresh, lengths)
        return us, (state[0], (fresh[1][0], *state[1][1:]))


@wrong("backends_agree_on_it")
@dataclass(frozen=True)
class UsesTorchsName(GRUEquations):
    """Uses torch's name for other equations: without a norm, torch's GRU runs instead."""

    refused: ClassVar[tuple[str, ...]] = ("sum", "carry")
    torch_name: ClassVar[str | None] = "GRU"

    def step(self, weights: CellWeights, u: Tensor, state: Any, mask: Tensor | None = None) -> Any:
        y, state = super().step(weights, u, state, mask)
        return y * 0.9, state


@wrong("backends_agree_on_it")
class DeclaresOtherMoments(Layer):
    """Declares moments over features and adds another term, which no kernel computes."""

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, pooled) + 0.1 * torch.tanh(x)

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, True, 1e-5, self.weight, None)


assert issubclass(DeclaresOtherMoments, an.Normalizer)
