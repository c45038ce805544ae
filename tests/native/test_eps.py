"""Gates whose norms differ in eps run on the native backend; results equal those of the reference."""

import re
from typing import Any

import pytest
import torch

import atn_norms as an
from atn_norms.normalizers import BatchMoments, FeatureMoments, PerGate
from tests.compare import compare
from tests.laws.strategies import level
from tests.native.batched import check as check_batch
from tests.native.strategies import EXACT, Pair, check, functional, needs_kernels, outcome
from tests.native.test_operators import Recorded

pytestmark = needs_kernels
EPS = 1e-5, 0.5, 3.0, 0.01
NORMS: dict[str, Any] = {
    "batch": "batch",
    "per step": {"kind": "batch", "max_steps": 4},
    "batch, layer": {"sites": {"ih": "batch", "hh": "layer"}},
    "layer": "layer",
    "rms": {"kind": "rms", "bias": True},
}
WINDOWS = "1", "4", "cumulative", "exponential", "detached"


class Uneven(Pair):
    """A pair whose gates have different eps."""

    def layer(self, backend: str, dtype: torch.dtype | None = None) -> Any:
        layer = super().layer(backend, dtype)
        for norm in layer.modules():
            gates: Any = norm.gates if isinstance(norm, PerGate) else ()
            for gate, eps in zip(gates, EPS, strict=False):
                gate.eps = eps
        return layer


def uneven(cell: str, norm: str, *fields: Any, options: Any = None, **others: Any) -> Uneven:
    return Uneven(cell, "layer", *fields, per_gate=True, options={"norm": NORMS[norm]} | (options or {}), **others)


def check_both(pair: Uneven, norm: str) -> None:
    """Compare training, and evaluation, in which populations normalize."""
    if norm in ("layer", "rms"):
        check(pair)
        return
    check_batch(pair)
    check_batch(pair, training=False)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_that_differ_in_eps(cell, norm, window):
    for hidden, batch, before in ((3, 5, 2), (37, 19, None)):  # blocks have 32 units or 16 rows
        pair = uneven(cell, norm, window, hidden, batch, 6, 3, before=before, ragged=batch == 19)
        assert "backend 'native'" in an.explain(pair.layer("auto"))
        check_both(pair, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_layers_directions_projections_and_joint_sums(norm):
    for options in (
        {"num_layers": 2, "bidirectional": True},
        {"proj_size": 2},
        {"placement": {"gates": "per_gate", "carry": "normed"}},
    ):
        check_both(uneven("lstm", norm, "4", 5, 6, options=options), norm)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradients_of_gradients(norm):
    results = []
    for backend in ("native", "reference"):
        pair = uneven("gru", norm, "4", batch=4)
        layer = pair.layer(backend)
        once = outcome(layer, pair.xs(), retain=True).gradients
        penalty = functional([gradient for gradient in once if gradient.requires_grad])
        results.append(torch.autograd.grad(penalty, list(layer.parameters()), materialize_grads=True))
    compare(results[0], results[1], tolerance=1e3 * EXACT, scale=level(*results[1]))


@pytest.mark.parametrize("norm", [pytest.param("batch", marks=pytest.mark.deep), "layer"])
def test_opcheck_and_compilation(norm):
    torch._dynamo.reset()
    pair = uneven("lstm", norm, "4", batch=4)
    layer = pair.layer("native")
    with Recorded() as recorded:
        layer.unroll(pair.xs())[0].square().sum().backward()
    recorded.check([torch.ops.atn_norms.recurrent, torch.ops.atn_norms.recurrent_backward])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for eps in (0.25, 0.75):
        layer.norm_hh_l0.gates[1].eps = eps
        compare(compiled(pair.xs())[0], layer(pair.xs())[0], tolerance=EXACT)


def test_declarations_run_without_a_program():
    for norm, kind in (("batch", "batch_moments"), ("layer", "feature_moments")):
        declared = getattr(uneven("lstm", norm).layer("native").norm_ih_l0, kind)()
        assert declared.eps == EPS


@pytest.mark.parametrize("eps", [(), (1e-5, float("nan")), (1e-5, -1.0), (1e-5, "1"), [1e-5]])
def test_eps_that_are_no_numbers_are_rejected(eps):
    expected = r"Moments.eps: got .*; expected a finite number of at least 0, or a tuple of such numbers"
    for make in (lambda: FeatureMoments(6, True, eps, None, None), lambda: BatchMoments(eps, None, None, True, False)):
        with pytest.raises(ValueError, match=expected):
            make()


def test_the_number_of_eps_must_divide_the_groups_or_features():
    with pytest.raises(ValueError, match=r"FeatureMoments.eps: got 4 numbers; expected a tuple whose length divides 6"):
        FeatureMoments(6, True, (1.0,) * 4, None, None)
    with pytest.raises(ValueError, match=r"BatchMoments.eps: got 4 numbers; expected a tuple whose length divides 6"):
        BatchMoments((1.0,) * 4, None, None, True, False).check(6)


@pytest.mark.parametrize("name", ["eps", "weight", "bias"])
def test_an_option_of_the_gates_cannot_be_set_on_the_whole(name):
    """It would have no effect."""
    norm: Any = an.LSTM(2, 3, norm="layer", placement={"gates": "per_gate"}).norm_ih_l0
    expected = f"{name}: got an attribute of all gates; expected an attribute of one gate, such as gates[0].{name}"
    with pytest.raises(AttributeError, match=re.escape(expected)):
        setattr(norm, name, 0.5)
    norm.gates[1].eps = 0.5
    norm.apply(lambda module: setattr(module, "note", "any other attribute"))  # the gates have it first
    declared = norm.feature_moments()
    assert declared is not None and declared.eps == (1e-5, 0.5, 1e-5, 1e-5) and norm.note


def test_gates_of_gates_have_their_own_eps():
    """Every gate has the same two eps; the first half of the groups does not share the first one."""
    halves = [PerGate([an.LayerNorm(3, eps=eps) for eps in EPS[:2]]) for _ in range(3)]
    declared = PerGate(halves).feature_moments()
    assert declared is not None and declared.eps == (*EPS[:2],) * 3
    alike = PerGate([PerGate([an.LayerNorm(3), an.LayerNorm(3)]) for _ in range(3)]).feature_moments()
    assert alike is not None and alike.eps == 1e-5
