"""What a cell is trained on: the protocol every task follows, and the built-in tasks."""

from atn_norms.tasks.adding import Adding, AddingSpec
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator
from atn_norms.tasks.charlm import CharLM, CharLMSpec

__all__ = [
    "Adding",
    "AddingSpec",
    "Batch",
    "CharLM",
    "CharLMSpec",
    "Model",
    "Split",
    "Task",
    "TaskSpec",
    "generator",
]
