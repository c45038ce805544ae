"""Laws of a layer: a plugin among built-in parts, over whole sequences, ragged batches and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.layers import Recurrent, with_backend
from atn_norms.normalizers import Normalizer
from atn_norms.pytree import tree_leaves
from atn_norms.testing.comparing import compare, demand
from atn_norms.testing.law import Case, law
from atn_norms.testing.layered import LayerSubject, backends_for
from atn_norms.testing.subjects import noise

CLOSE = 1e-8  # float64; norms over one or two features may magnify 1e-14 some thousand times per layer


@law("layer")
def padding_is_never_read(subject: LayerSubject, case: Case) -> None:
    """Beyond a row's length its outputs are 0, and the padding affects neither values nor gradients.

    NaN in the padding must do no harm, and a row of a ragged batch gives the same as that row alone. With batch
    statistics this holds in evaluation, where `train_eval_differ` is declared. A length of 0 leaves the state of a row
    unchanged.
    """
    layer, (xs,) = subject.layer(case), subject.inputs(case)
    source = torch.Generator().manual_seed(case.seed)
    lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=source)
    lengths[:2] = case.steps  # batch statistics need two rows at every step
    lengths = lengths[torch.randperm(case.batch, generator=source)] if case.seed % 2 else lengths
    mask = (torch.arange(case.steps).unsqueeze(1) < lengths).unsqueeze(-1)
    weight = noise(case.seed + 1, case.steps, case.batch, layer.output_size)
    seen = []
    for dirt in (0.0, float("nan")):
        padded = torch.where(mask, xs, dirt).requires_grad_()
        ys, state = layer.unroll(padded, lengths=lengths)
        demand(bool((ys.masked_select(~mask) == 0).all()), "an output beyond a row's length is not 0")
        every = torch.autograd.grad((ys * weight).sum(), [padded, *layer.parameters()], allow_unused=True)
        gradients = [each for each in every if each is not None]
        demand(bool((gradients[0].masked_select(~mask) == 0).all()), "padding has a gradient")
        seen.append((ys.detach(), gradients, [leaf.detach() for leaf in tree_leaves(state)]))
    compare(seen[1], seen[0], tolerance=CLOSE, what="outputs with NaN in the padding")
    _is_itself_alone(layer.eval(), xs, lengths, noise(case.seed + 2, 1, case.batch, xs.shape[-1]))


def _is_itself_alone(layer: Recurrent, xs: Tensor, lengths: Tensor, more: Tensor) -> None:
    """Compare each row of a ragged batch with that row alone, and with separate statistics one further step."""
    norms = [module for module in layer.modules() if isinstance(module, Normalizer)]
    if any(norm.uses_batch_statistics and not norm.train_eval_differ for norm in norms):
        return
    coupled = any(norm.uses_batch_statistics for norm in norms)
    ys, state = layer.unroll(xs, lengths=lengths)
    follows, _ = layer.unroll(more, state)
    for row, count in enumerate(lengths.tolist()):
        if count:
            own = slice(row, row + 1)
            alone, state = layer.unroll(xs[:count, own])
            compare(
                ys[:count, row],
                alone[:, 0],
                tolerance=CLOSE,
                what=f"row {row} of {count} steps and the row alone",
            )
            if not coupled:
                after, _ = layer.unroll(more[:, own], state)
                compare(follows[:, row], after[:, 0], tolerance=CLOSE, what=f"what follows row {row} of {count} steps")


@law("layer", steps=(2, 3, 4, 5))
def a_stream_may_be_cut_anywhere(subject: LayerSubject, case: Case) -> None:
    """A sequence in two segments, with the state passed on, gives the outputs and the state of the whole sequence.

    Streaming and truncated backpropagation rely on it. A normalizer that reads the whole sequence, a window that
    restarts, or a cell that returns an incomplete state are all correct until the first cut.
    """
    layer, (xs,) = subject.layer(case), subject.inputs(case)
    for training in (True, False):
        whole, final = layer.train(training).unroll(xs)
        for cut in range(1, case.steps):
            first, state = layer.unroll(xs[:cut])
            second, state = layer.unroll(xs[cut:], state)
            compare(torch.cat([first, second]), whole, tolerance=CLOSE, what=f"cut at {cut}")
            hidden = [list(tree_leaves(layer.hidden(each))) for each in (state, final)]
            compare(*hidden, tolerance=CLOSE, what=f"the hidden state, cut at {cut}")
            more = noise(case.seed + 3, 2, case.batch, xs.shape[-1])
            follow = [layer.unroll(more, each)[0] for each in (state, final)]
            compare(*follow, tolerance=CLOSE, what=f"what follows, cut at {cut}")


@law("layer")
def backends_agree_on_it(subject: LayerSubject, case: Case) -> None:
    """Every backend that supports the layer gives the reference's outputs, hidden state and gradients.

    The backend depends on the machine; the result must not. A plugin that declares more than it computes (see
    `feature_moments`) is right in Python and wrong in C.
    """
    reference, (xs,) = subject.layer(case, backend="reference"), subject.inputs(case)
    expected = _everything(reference, xs, case)
    for name in backends_for(reference):  # in evaluation: code of training alone may have no native program
        layer = with_backend(reference, name)
        compare(_everything(layer, xs, case), expected, tolerance=1e-6, what=f"{name} compared with the reference")


def _everything(layer, xs: torch.Tensor, case: Case) -> list[torch.Tensor]:
    xs = xs.clone().requires_grad_()
    layer.eval()
    ys, state = layer.unroll(xs)
    outs = [ys, *tree_leaves(layer.hidden(state))]
    loss = torch.stack([(each * noise(case.seed + 8, *each.shape)).sum() for each in outs]).sum()
    gradients = torch.autograd.grad(loss, [xs, *layer.parameters()], allow_unused=True)
    return [*(each.detach() for each in outs), *(torch.zeros(()) if g is None else g for g in gradients)]


@law("layer")
def trainable_tensors_are_parameters(subject: LayerSubject, case: Case) -> None:
    """Every tensor that outputs depend on and that requires a gradient is in `parameters()` of the layer.

    Optimizers, checkpoints and `to` see parameters only. A tensor kept elsewhere receives gradients, yet it is never
    trained and never saved. A window with parameters is an `nn.Module`, which the layer registers.
    """
    layer, (xs,) = subject.layer(case, backend="reference"), subject.inputs(case)
    ys, state = layer.unroll(xs)
    known = {id(parameter) for parameter in layer.parameters()}
    hidden = [leaf for leaf in _graph_leaves([ys, *tree_leaves(state)]) if id(leaf) not in known]
    shapes = [list(leaf.shape) for leaf in hidden]
    demand(not hidden, f"outputs depend on trainable tensors of shapes {shapes} that are not in parameters()")


def _graph_leaves(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that a backward pass from `tensors` would accumulate gradients into."""
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    yield from (tensor for tensor in tensors if tensor.requires_grad and tensor.grad_fn is None)
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        below = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(below)
        stack += below
