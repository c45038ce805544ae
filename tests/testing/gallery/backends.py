"""Wrong backends: the reference with one change."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from atn_norms.backends.reference import Reference
from atn_norms.cells import Cell, CellWeights
from atn_norms.pytree import tree_map
from tests.testing.gallery.entry import wrong


@wrong("refusals_are_sentences")
class RefusesWithTrue(Reference):
    """Returns True instead of a reason for an unsupported case."""

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> Any:
        return True if weights.norms else None


@wrong("refusals_are_sentences")
class RefusesByRaising(Reference):
    """Raises an error instead of returning a reason."""

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> Any:
        if cell.torch_name == "LSTM":
            raise NotImplementedError("LSTM")
        return None


@wrong("refusals_are_sentences")
class RefusesEverything(Reference):
    """Supports no case at all, so that the other laws test nothing."""

    def unsupported_reason(self, cell: Cell, weights: CellWeights) -> Any:
        return "it is not ready for any case"


@wrong("calls_are_pure")
class CachesByShape(Reference):
    """Caches its outputs by the shape of the inputs."""

    seen: ClassVar[dict[Any, Any]] = {}

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        key = (xs.shape, cell, lengths is None, len(weights.norms), float(weights["weight_hh"].detach().sum()))
        fresh = super().run(cell, weights, xs, state, lengths)
        known = self.seen.get(key)
        self.seen[key] = tree_map(lambda leaf: leaf.detach(), fresh)
        return fresh if known is None else known


@wrong("inputs_are_left_alone")
class WritesIntoTheInitialState(Reference):
    """Stores the running state in the memory of the initial state."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        ys, after = super().run(cell, weights, xs, state, lengths)
        with torch.no_grad():
            for old, new in zip(state[0], after[0], strict=True):
                old.copy_(new)
        return ys, after


@wrong("values_are_the_reference_s")
class TakesAnotherGateOrder(Reference):
    """Uses the gate order i, g, f, o."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        if cell.gates == ("i", "f", "g", "o"):
            turned = dict(weights.tensors)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                i, f, g, o = turned[name].chunk(4)
                turned[name] = torch.cat([i, g, f, o])
            weights = CellWeights(turned, weights.norms)
        return super().run(cell, weights, xs, state, lengths)


@wrong("values_are_the_reference_s")
class DropsTheType(Reference):
    """Computes and returns in float32."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        ys, state = super().run(cell, weights, xs, state, lengths)
        return ys.float(), state


@wrong("values_are_the_reference_s")
class HandsBackTheStateBeforeLast(Reference):
    """Returns the final state of one step too early."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        ys, after = super().run(cell, weights, xs, state, lengths)
        before = super().run(cell, weights, xs[:-1], state)[1] if len(xs) > 1 and lengths is None else after
        return ys, (before[0], after[1])


@wrong("lengths_are_honoured")
class IgnoresLengths(Reference):
    """Runs every row to the end."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        return super().run(cell, weights, torch.nan_to_num(xs), state, None)


@wrong("gradients_are_the_reference_s")
class LosesTheFinalGradient(Reference):
    """Computes no gradient through the final state."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        ys, after = super().run(cell, weights, xs, state, lengths)
        return ys, (tuple(c.detach() + 0 * ys.sum() for c in after[0]), after[1])


@wrong("gradients_are_the_reference_s")
class TruncatesTheGradient(Reference):
    """Cuts the gradient in the middle of the sequence, to save memory."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        if lengths is not None or len(xs) < 2:
            return super().run(cell, weights, xs, state, lengths)
        half = len(xs) // 2
        first, state = super().run(cell, weights, xs[:half], state)
        second, state = super().run(cell, weights, xs[half:], tree_map(Tensor.detach, state))
        return torch.cat([first, second]), state


@wrong("its_state_continues_in_the_reference")
class HandsBackFreshWindows(Reference):
    """Does not return the window states, but empty ones."""

    def run(
        self, cell: Cell, weights: CellWeights, xs: Tensor, state: Any, lengths: Any = None, keep_state: bool = True
    ) -> Any:
        ys, (carried, norms) = super().run(cell, weights, xs, state, lengths)
        return ys, (carried, tree_map(torch.zeros_like, norms))
