"""Tasks: the protocol that every task follows, and the built-in tasks."""

from atn_norms.tasks.adding import Adding, AddingSpec
from atn_norms.tasks.base import Batch, Model, Split, Task, TaskSpec, generator
from atn_norms.tasks.charlm import CharLM, CharLMSpec
from atn_norms.tasks.copying import Copying, CopyingSpec
from atn_norms.tasks.denoise import Denoise, DenoiseSpec
from atn_norms.tasks.language import Language
from atn_norms.tasks.recall import Recall
from atn_norms.tasks.sequences import Sequences, SequencesSpec
from atn_norms.tasks.series import Series, SeriesSpec
from atn_norms.tasks.wordlm import WordLM, WordLMSpec

__all__ = [
    "Adding",
    "AddingSpec",
    "Batch",
    "CharLM",
    "CharLMSpec",
    "Copying",
    "CopyingSpec",
    "Denoise",
    "DenoiseSpec",
    "Language",
    "Model",
    "Recall",
    "Sequences",
    "SequencesSpec",
    "Series",
    "SeriesSpec",
    "Split",
    "Task",
    "TaskSpec",
    "WordLM",
    "WordLMSpec",
    "generator",
]
