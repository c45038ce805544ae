"""Options of the training of a trial."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from atn_norms.ablation.grid import optimizers, schedules
from atn_norms.ablation.grid.errors import Problem, invalid
from atn_norms.ablation.grid.renames import rename_train
from atn_norms.ablation.store.schema import MOST_STEPS
from atn_norms.options import Options

MOST_CURVE_POINTS = 1_000_000


class TrainSpec(Options):
    """Options of the training of a trial; None is filled in from the task or the number of steps.

    | option | meaning | unit, default |
    |---|---|---|
    | `steps` | training steps | |
    | `batch_size` | sequences per step | the task's |
    | `optimizer` | a name of `torch.optim` in lower case, or a mapping with `kind` and torch's options | adam |
    | `schedule` | `constant`, `linear`, `cosine`, `step`, `plateau`, or a mapping with `kind`, `warmup` and more | constant |
    | `clip_grad_norm` | largest norm of the whole gradient; None: no clipping | |
    | `eval_every` | steps between validations | a tenth of `steps` |
    | `patience` | consecutive validations without improvement after which training ends; None: train to the end | |
    | `keep` | the weights that are scored at the end: the `last`, or those of the `best` validation | |
    | `keep_model` | the weights that are saved as `model.safetensors`: `best`, `last` or `none`; not part of a trial's identity | as `keep` |
    | `population_batches` | training batches from which populations are computed before every scoring; 0: none | |
    | `divergence_factor` | a mean loss since the last curve point over this many times the first loss is divergence; None: only a loss that is not finite | |
    | `log_every` | steps averaged into one point of the training curve | a hundredth of `steps` |
    | `checkpoint_every` | steps between checkpoints; not part of a trial's identity | a tenth of `steps` |
    | `threads` | threads of torch per trial | |
    """  # noqa: E501

    steps: int = Field(default=1000, ge=1, le=MOST_STEPS)
    batch_size: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    optimizer: Annotated[dict[str, Any], BeforeValidator(optimizers.resolve), WithJsonSchema(optimizers.SCHEMA)] = (
        Field(default_factory=lambda: optimizers.resolve("adam"))
    )
    schedule: Annotated[dict[str, Any], BeforeValidator(schedules.resolve), WithJsonSchema(schedules.SCHEMA)] = Field(
        default_factory=lambda: schedules.resolve("constant")
    )
    clip_grad_norm: float | None = Field(default=None, gt=0)
    eval_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    patience: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    keep: Literal["last", "best"] = "last"
    keep_model: Literal["best", "last", "none"] | None = None
    population_batches: int = Field(default=0, ge=0, le=MOST_STEPS)
    divergence_factor: float | None = Field(default=1e3, gt=1)
    log_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    checkpoint_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    threads: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, data: Any) -> Any:
        return rename_train(data)

    @model_validator(mode="after")
    def _refuse_too_many_points(self) -> Self:
        for name in ("log_every", "eval_every"):
            every = getattr(self, name)
            if every is not None and self.steps // every > MOST_CURVE_POINTS:
                points = f"got {every}, which makes {self.steps // every} points of the learning curve"
                raise invalid("train", [Problem((name,), f"{points}; expected at most {MOST_CURVE_POINTS}")])
        return self

    @model_validator(mode="after")
    def _refuse_a_schedule_of_rprop(self) -> Self:
        kind, warmup = self.schedule["kind"], self.schedule["warmup"]
        if self.optimizer["kind"] == "rprop" and (kind != "constant" or warmup):
            got = f"got {kind} with a warmup" if warmup else f"got {kind}"
            expected = "expected constant, since rprop reads its rate only at the first step"
            raise invalid("train", [Problem(("schedule",), f"{got}; {expected}")])
        return self

    @property
    def validations(self) -> int:
        """The number of validations of a training that does not end early; the last step is always validated."""
        return math.ceil(self.steps / self.apart)

    @property
    def apart(self) -> int:
        """The number of steps between validations."""
        return self.eval_every or max(1, self.steps // 10)

    @classmethod
    def nearest_key(cls, key: object) -> str | None:
        """Return the closest key, or the path of the optimizer's option with this name."""
        option = optimizers.option_named(key)
        return super().nearest_key(key) if option is None else f"train.optimizer.{option}"

    def filled(self, batch_size: int) -> dict[str, Any]:
        """Return every option as JSON, all filled in; `batch_size` is the task's default."""
        tenth, hundredth = max(1, self.steps // 10), max(1, self.steps // 100)
        given = self.model_dump(mode="json")
        if not self.population_batches:  # a later option: without it, trials keep their earlier ids
            del given["population_batches"]
        if self.keep_model is None:
            del given["keep_model"]
        derived = {"batch_size": batch_size, "eval_every": tenth, "log_every": hundredth, "checkpoint_every": tenth}
        return given | {name: value for name, value in derived.items() if given[name] is None}
