"""Functions over state: a tensor, or a nested tuple of tensors with the batch on axis 0 of every leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from atn_norms.errors import mismatch, typed_repr

Tree: TypeAlias = Any  # Tensor | tuple[Tree, ...]; not every tool supports recursive aliases


@dataclass(frozen=True)
class Leaf:
    """Layout of a leaf of a state: its axes after the batch, and whether it holds floating-point numbers or counts."""

    shape: tuple[int, ...]
    floating: bool = True


def layout(tree: Tree) -> Any:
    """Return the tree with a `Leaf` for every tensor."""
    if isinstance(tree, Tensor):
        return Leaf(tuple(tree.shape[1:]), tree.is_floating_point())
    return tuple(layout(branch) for branch in tree)


def checked_state(state: Tree, wanted: Any, batch: int, device: torch.device, shared: bool = False) -> Tree:
    """Return `state` if it has the layout `wanted` (see `layout`) for `batch` rows on `device`.

    A `shared` state has one row. `reorder` may have repeated this row; the first copy is then returned.

    Errors: `ValueError` with both structures, or with both types, if the layouts differ, and for different rows of a
    `shared` state.
    """
    rows = batch
    if shared and isinstance(state, tuple) and state and isinstance(state[0], Tensor) and state[0].numel():
        rows = state[0].shape[0]
    pairs = _paired(state, wanted)
    if pairs is None or any(tuple(leaf.shape) != (rows, *form.shape) for leaf, form in pairs):
        structure = describe_structure(wanted).replace("[", f"[{batch}, ").replace(", ]", "]")
        expected = f"{structure}, as a norm and window of this kind return it"
        raise ValueError(mismatch("state", describe_structure(state), expected))
    for leaf, form in pairs:
        counts = not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
        if leaf.device != device or (not leaf.is_floating_point() if form.floating else not counts):
            kind = "a floating-point type" if form.floating else "an integer type"
            raise ValueError(mismatch("state", f"a leaf of {leaf.dtype} on {leaf.device}", f"{kind} on {device}"))
    if rows == batch:
        return state
    _check_equal_rows([leaf for leaf, _ in pairs], rows)
    return tree_map(lambda leaf: leaf[:1], state)


def _check_equal_rows(leaves: Sequence[Tensor], rows: int) -> None:
    same = [((leaf == leaf[:1]) | (leaf.isnan() & leaf[:1].isnan())).all() for leaf in leaves]
    expected = "1 row, or equal rows, since the rows of a batch share one statistic"
    text = mismatch("state", f"{rows} different rows of batch statistics", expected)
    if torch.compiler.is_compiling():  # a graph cannot read values; it checks them when it runs
        torch._assert_async(torch.stack(same).all(), text)
    elif not all(map(bool, same)):
        raise ValueError(text)


def _paired(state: Tree, wanted: Any) -> list[tuple[Tensor, Leaf]] | None:
    """Return every leaf with its expected layout, or None if the structures differ."""
    if isinstance(wanted, Leaf):
        return [(state, wanted)] if isinstance(state, Tensor) else None
    if not isinstance(state, tuple) or len(state) != len(wanted):
        return None
    branches = [_paired(branch, form) for branch, form in zip(state, wanted, strict=True)]
    return None if None in branches else [pair for branch in branches if branch is not None for pair in branch]


def tree_map(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` leaf by leaf to trees of equal structure; return plain tuples.

    Errors: `ValueError` if the trees differ in structure.

    >>> import torch
    >>> tree_map(lambda a, b: a + b, (torch.tensor(1), ()), (torch.tensor(2), ()))
    (tensor(3), ())
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if not isinstance(tree, tuple):
        raise _not_a_tree(tree)
    if any(not isinstance(other, tuple) or len(other) != len(tree) for other in others):
        structures = ", ".join(map(describe_structure, others))
        raise ValueError(mismatch("state", structures, f"the structure {describe_structure(tree)}"))
    return tuple(tree_map(function, *branches) for branches in zip(tree, *others, strict=True))


def tree_leaves(tree: Tree) -> Iterator[Tensor]:
    """Yield every tensor of a tree, left to right."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from tree_leaves(branch)
    else:
        raise _not_a_tree(tree)


def _not_a_tree(tree: Any) -> ValueError:
    return ValueError(mismatch("state", describe_structure(tree), "tensors in nested tuples"))


def describe_structure(tree: Tree) -> str:
    """Describe the structure of a tree for error messages: shapes in nested parentheses."""
    if isinstance(tree, (Tensor, Leaf)):
        return str(list(tree.shape))
    if isinstance(tree, tuple):
        return "(" + ", ".join(map(describe_structure, tree)) + ")"
    return type(tree).__name__


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Append axes of length 1 to a mask or weight over the leading axes, so that it broadcasts against `like`."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def where_mask(mask: Tensor, new: Tree, old: Tree) -> Tree:
    """Return the new state in unmasked rows, and the old state, value and gradient, in masked rows.

    `mask` [N] covers axis 0 of every leaf.
    """
    return tree_map(lambda a, b: torch.where(expand_mask(mask, a), a, b), new, old)


def detach(state: Tree) -> Tree:
    """Detach a state from the graph, for truncated back-propagation through time.

    >>> import torch
    >>> detach((torch.ones(1, requires_grad=True),))
    (tensor([1.]),)
    """
    return tree_map(Tensor.detach, state)


def reorder(state: Tree, index: Tensor) -> Tree:
    """Select rows of the batch in a state, for beam search or for compacting a batch.

    `index` [M] (int64) holds the old row for each new row. Where the state has several rows and a leaf has one, the
    leaf is shared by the batch (batch statistics) and stays unchanged.

    Errors: `IndexError` if an index is outside the batch, and `TypeError` if `index` is no tensor.

    >>> import torch
    >>> reorder((torch.tensor([[1.0], [2.0]]), torch.tensor([[9.0]])), torch.tensor([1, 1, 0]))
    (tensor([[2.],
            [2.],
            [1.]]), tensor([[9.]]))
    """
    if not isinstance(index, Tensor):
        raise TypeError(mismatch("index", typed_repr(index), "an int64 tensor such as torch.tensor([0, 1])"))
    batch = max((leaf.shape[0] for leaf in tree_leaves(state)), default=0)
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < batch):
        got = f"rows {index.tolist()} of a state with {batch} row(s)"
        raise IndexError(mismatch("index", got, f"0 to {batch - 1}"))
    return tree_map(lambda leaf: leaf if leaf.shape[0] < batch else leaf.index_select(0, index), state)
