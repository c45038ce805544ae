"""The subject of the laws of a task: the task for one seed, and small models to train on it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from atn_norms.layers import LayerSpec
from atn_norms.tasks import Model, Task, TaskSpec
from atn_norms.testing.law import label_of
from atn_norms.testing.subjects import SpecSubject

HIDDEN = 4


class TaskSubject(SpecSubject):
    """A task: its spec, built for a seed, and a small model without a norm."""

    family = "task"

    def __init__(self, spec: TaskSpec) -> None:
        self.spec, self.label = spec, label_of(spec)
        self.axes = {}
        try:
            built = self.task
        except Exception as error:  # noqa: BLE001  whatever a plugin raises
            self.broken = f"build(0) raises {type(error).__name__}: {error}"
            return
        if not isinstance(built, Task):
            self.broken = f"build(0) returns {type(built).__name__}; allowed: a Task"
            return
        refused = spec.unsupported_reason(self.layer_spec())
        self.broken = f"it refuses a plain one-way layer: {refused}" if refused else ""

    @cached_property
    def task(self) -> Task:
        """The task of seed 0, built once: building may read a file."""
        return self.spec.build(0)

    @property
    def size(self) -> int:
        """Sequences in a batch of the laws."""
        return min(4, self.task.batch_size)

    def layer_spec(self) -> LayerSpec:
        """The options of a small layer for the task."""
        return LayerSpec.model_validate(
            {"cell": "rnn", "input_size": self.task.input_size, "hidden_size": HIDDEN, "backend": "auto"}
        )

    def model(self, seed: int = 0) -> Model:
        """A small model, drawn as a trial draws it."""
        torch.manual_seed(seed)
        layer = self.layer_spec().build()
        model = Model(self.task.encoder(), layer, self.task.readout(layer.output_size))
        self.task.share(model)
        return model

    def answer(self, spec: TaskSpec) -> Any:
        return tuple(spec.build(0).batch(0, self.size)[:2])

    def built(self, spec: TaskSpec) -> Any:
        return spec  # workers are sent the options and build the task themselves
