"""Schedules: the rate of each step, compared with torch's schedulers, and invalid options."""

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler

from atn_norms.ablation import TrainSpec
from atn_norms.ablation.grid import schedules
from atn_norms.ablation.grid.schedules import Rate
from atn_norms.errors import to_spec_error

STEPS = 20


def optimizer(lr=0.3):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": each} for each in (lr, lr / 3)]
    return torch.optim.SGD(groups)


def rates(schedule, steps=STEPS):
    ours = optimizer()
    rate = Rate(schedules.resolve(schedule), steps, ours)
    return [[group["lr"] for group in ours.param_groups] for step in range(steps) if rate.set(step) is not None]


THEIRS = {
    "constant": ("constant", lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    "linear": (
        {"kind": "linear", "final": 0.25},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=STEPS),
    ),
    "cosine": ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS)),
    "step": ({"kind": "step", "every": 6, "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, step_size=6, gamma=0.3)),
    "warm-up": (
        {"kind": "constant", "warmup": 8},
        lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 8, end_factor=1.0, total_iters=7),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_schedule_has_the_rates_of_torch(name):
    schedule, make = THEIRS[name]
    theirs = optimizer()
    scheduler, expected = make(theirs), []
    for _ in range(STEPS):
        expected.append([group["lr"] for group in theirs.param_groups])
        theirs.step()
        scheduler.step()
    assert [rate for pair in rates(schedule) for rate in pair] == pytest.approx(
        [rate for pair in expected for rate in pair], rel=1e-9
    )


def test_after_the_warm_up_a_schedule_covers_the_steps_that_are_left():
    alone = [first for first, _ in rates("cosine", 15)]
    warm = [first for first, _ in rates({"kind": "cosine", "warmup": 5}, 20)]
    assert warm[:5] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])
    assert warm[5:] == pytest.approx(alone)


def test_a_plateau_lowers_the_rate_as_torch_s_does():
    scores = [3.0, 2.0, 2.0, 2.1, 1.9, 1.95, 1.95, 1.9, 1.9, 1.0, 1.0]
    ours, theirs = optimizer(), optimizer()
    rate = Rate(schedules.resolve({"kind": "plateau", "patience": 2, "gamma": 0.5}), 99, ours)
    scheduler = lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=1, threshold=0.0)  # counts one less
    for step, score in enumerate(scores):
        rate.see(score)
        rate.set(step)
        scheduler.step(score)
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups]), step
    assert ours.param_groups[0]["lr"] < 0.1


def test_a_plateau_continues_from_its_state():
    straight = Rate(schedules.resolve({"kind": "plateau", "patience": 2}), 99, optimizer())
    halting = Rate(schedules.resolve({"kind": "plateau", "patience": 2}), 99, optimizer())
    for score in (1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6, 0.7):
        straight.see(score)
        halting.see(score)
        again = Rate(schedules.resolve({"kind": "plateau", "patience": 2}), 99, optimizer())
        again.restore(halting.state())
        halting = again
        assert halting.set(3) == straight.set(3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosin", "schedule: got unknown schedule 'cosin'; expected one of constant, linear, cosine, step, plateau; did you mean 'cos"),  # noqa: E501
        ({"kind": "plato"}, "unknown schedule 'plato'"),
        ({"kind": 3}, "unknown schedule 3"),
        (["cosine"], "schedule: got ['cosine']; expected a schedule's name or a mapping"),
        ({"kind": "cosine", "warmpu": 3}, "schedule.warmpu: got an unknown key; expected one of kind, warmup, final; did you mean 'warm"),  # noqa: E501
        ({"kind": "step"}, "schedule.every: got nothing; expected a value"),
        ({"kind": "step", "every": 0}, "schedule.every: got 0; expected at least 1"),
        ({"kind": "linear", "final": 2.0}, "schedule.final: got 2.0; expected at most 1"),
        ({"warmup": -1}, "schedule.warmup: got -1; expected at least 0"),
        ({"kind": "plateau", "gamma": 1.0}, "schedule.gamma: got 1.0; expected a number below 1"),
    ],
)  # fmt: skip
def test_an_invalid_schedule_is_rejected_with_its_path(schedule, message):
    data = {"schedule": schedule}
    with pytest.raises(ValidationError) as caught:
        TrainSpec.model_validate(data)
    assert message in str(to_spec_error(caught.value, data=data))


@pytest.mark.parametrize(
    ("schedule", "got"), [("cosine", "cosine"), ({"warmup": 5}, "constant with a warmup"), ("plateau", "plateau")]
)
def test_a_schedule_that_rprop_ignores_is_rejected(schedule, got):
    data = {"optimizer": "rprop", "schedule": schedule}
    with pytest.raises(ValidationError) as caught:
        TrainSpec.model_validate(data)
    expected = "expected constant, since rprop reads its rate only at the first step"
    assert f"schedule: got {got}; {expected}" in str(to_spec_error(caught.value, data=data))
    assert TrainSpec.model_validate({"optimizer": "rprop", "schedule": "constant"}).schedule["kind"] == "constant"


def test_torch_s_rprop_reads_its_rate_only_at_the_first_step():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, factor in zip(parameters, (1.0, 0.0), strict=True):
        optimizer = torch.optim.Rprop([parameter], lr=0.1)
        for _ in range(3):
            parameter.grad = torch.ones(1)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 * factor
    assert parameters[0].item() == parameters[1].item()


def test_the_schema_shows_every_schedule_with_its_options():
    shown = TrainSpec.model_json_schema()["properties"]["schedule"]["anyOf"]
    assert shown[0] == {"enum": list(schedules.KINDS)}
    assert {model["properties"]["kind"]["const"] for model in shown[1:]} == set(schedules.KINDS)
    assert not any(">>>" in model["description"] for model in shown[1:])
