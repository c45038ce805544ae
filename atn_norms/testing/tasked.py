"""The subject of the laws of a task: the task for one seed, and small models to train on it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from atn_norms.layers import LayerSpec
from atn_norms.options import spec_label
from atn_norms.tasks import Model, Task, TaskSpec
from atn_norms.testing.subjects import SpecSubject

HIDDEN = 4


class TaskSubject(SpecSubject):
    """A task: its spec, built for a seed, and a small model without a norm."""

    family = "task"

    def __init__(self, spec: TaskSpec) -> None:
        self.spec, self.label = spec, spec_label(spec)
        self.axes = {}
        try:
            built = self.task
        except Exception as error:  # noqa: BLE001  any error of a plugin
            self.broken = f"build(0) raises {type(error).__name__}: {error}"
            return
        if not isinstance(built, Task):
            self.broken = f"build(0): got {type(built).__name__}; expected a Task"
            return
        reason = spec.unsupported_reason(self.layer_spec())
        self.broken = f"it does not support a plain one-way layer: {reason}" if reason else ""

    @cached_property
    def task(self) -> Task:
        """The task for seed 0, built once, since a build may read files."""
        return self.spec.build(0)

    @property
    def size(self) -> int:
        """Number of sequences in a batch of the laws."""
        return min(4, self.task.batch_size)

    def layer_spec(self) -> LayerSpec:
        """Return the options of a small layer for the task."""
        return LayerSpec.model_validate(
            {"cell": "rnn", "input_size": self.task.input_size, "hidden_size": HIDDEN, "backend": "auto"}
        )

    def model(self, seed: int = 0) -> Model:
        """Return a small model, initialized as in a trial."""
        torch.manual_seed(seed)
        layer = self.layer_spec().build()
        model = Model(self.task.encoder(), layer, self.task.readout(layer.output_size))
        self.task.share(model)
        return model

    def result_of(self, spec: TaskSpec) -> Any:
        return tuple(spec.build(0).batch(0, self.size)[:2])

    def built(self, spec: TaskSpec) -> Any:
        return spec  # workers receive the options and build the task themselves
