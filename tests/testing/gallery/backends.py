"""Wrong backends: the reference with one change."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from atn_norms.backends.program import CellInputs, Program, Unsupported
from atn_norms.backends.reference import Reference, ReferenceProgram
from atn_norms.cells import Cell, CellWeights
from atn_norms.pytree import tree_map
from tests.testing.gallery.entry import wrong


class Altered(Reference):
    """The reference, run by `run` of a subclass."""

    def prepare(self, cell: Cell, description: Any) -> Any:
        return AlteredProgram(cell, self)

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        """Run a cell as the reference does."""
        return ReferenceProgram(cell).run(inputs, state, lengths)


class AlteredProgram(Program):
    """A program of `Altered`."""

    def __init__(self, cell: Cell, backend: Altered) -> None:
        super().__init__(cell)
        self.name, self.backend = backend.name, backend

    def run(self, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        return self.backend.run(self.cell, inputs, state, lengths)


@wrong("unsupported_reasons_are_sentences")
class RefusesWithTrue(Reference):
    """Returns True instead of a reason for an unsupported case."""

    def prepare(self, cell: Cell, description: Any) -> Any:
        return True if description.normed else super().prepare(cell, description)


@wrong("unsupported_reasons_are_sentences")
class RefusesByRaising(Reference):
    """Raises an error instead of returning a reason."""

    def prepare(self, cell: Cell, description: Any) -> Any:
        if cell.torch_name == "LSTM":
            raise NotImplementedError("LSTM")
        return super().prepare(cell, description)


@wrong("unsupported_reasons_are_sentences")
class SupportsNothing(Reference):
    """Supports no case at all, so that the other laws test nothing."""

    def prepare(self, cell: Cell, description: Any) -> Any:
        return Unsupported("cell", "it is not ready for any case")


@wrong("unsupported_reasons_are_sentences")
class RefusesWithAnUnknownCode(Reference):
    """Returns a code that no program compares."""

    def prepare(self, cell: Cell, description: Any) -> Any:
        refused = Unsupported("moon", "it is the wrong phase of the moon")  # type: ignore[arg-type]
        return refused if description.normed else super().prepare(cell, description)


@wrong("calls_are_pure")
class CachesByShape(Altered):
    """Caches its outputs by the shape of the inputs."""

    seen: ClassVar[dict[Any, Any]] = {}

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        weights = inputs.weights
        key = (inputs.xs.shape, cell, lengths is None, len(weights.norms), float(weights["weight_hh"].detach().sum()))
        fresh = super().run(cell, inputs, state, lengths)
        known = self.seen.get(key)
        self.seen[key] = tree_map(lambda leaf: leaf.detach(), fresh)
        return fresh if known is None else known


@wrong("inputs_are_not_modified")
class WritesIntoTheInitialState(Altered):
    """Stores the running state in the memory of the initial state."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        ys, after = super().run(cell, inputs, state, lengths)
        with torch.no_grad():
            for old, new in zip(state[0], after[0], strict=True):
                old.copy_(new)
        return ys, after


@wrong("values_match_the_reference")
class TakesAnotherGateOrder(Altered):
    """Uses the gate order i, g, f, o."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        if cell.gates == ("i", "f", "g", "o"):
            turned = dict(inputs.weights.tensors)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                i, f, g, o = turned[name].chunk(4)
                turned[name] = torch.cat([i, g, f, o])
            inputs = inputs._replace(weights=CellWeights(turned, inputs.weights.norms))
        return super().run(cell, inputs, state, lengths)


@wrong("values_match_the_reference")
class DropsTheType(Altered):
    """Computes and returns in float32."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        ys, state = super().run(cell, inputs, state, lengths)
        return ys.float(), state


@wrong("values_match_the_reference")
class ReturnsTheStateBeforeLast(Altered):
    """Returns the final state of one step too early."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        ys, after = super().run(cell, inputs, state, lengths)
        before = (
            super().run(cell, inputs._replace(xs=inputs.xs[:-1]), state)[1]
            if len(inputs.xs) > 1 and lengths is None
            else after
        )
        return ys, (before[0], after[1])


@wrong("lengths_are_honoured")
class IgnoresLengths(Altered):
    """Runs every row to the end."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        return super().run(cell, inputs._replace(xs=torch.nan_to_num(inputs.xs)), state, None)


@wrong("gradients_match_the_reference")
class LosesTheFinalGradient(Altered):
    """Computes no gradient through the final state."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        ys, after = super().run(cell, inputs, state, lengths)
        return ys, (tuple(c.detach() + 0 * ys.sum() for c in after[0]), after[1])


@wrong("gradients_match_the_reference")
class TruncatesTheGradient(Altered):
    """Cuts the gradient in the middle of the sequence, to save memory."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        xs = inputs.xs
        if lengths is not None or len(xs) < 2:
            return super().run(cell, inputs, state, lengths)
        half = len(xs) // 2
        first, state = super().run(cell, inputs._replace(xs=xs[:half]), state)
        second, state = super().run(cell, inputs._replace(xs=xs[half:]), tree_map(Tensor.detach, state))
        return torch.cat([first, second]), state


@wrong("its_state_continues_in_the_reference")
class ReturnsFreshWindows(Altered):
    """Does not return the window states, but empty ones."""

    def run(self, cell: Cell, inputs: CellInputs, state: Any, lengths: Any = None) -> Any:
        ys, (carried, norms) = super().run(cell, inputs, state, lengths)
        return ys, (carried, tree_map(torch.zeros_like, norms))
