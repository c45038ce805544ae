"""Print the processor hours of the studies in this folder: `python docs/results/studies/cost.py [NAME ...]`.

The script measures the processor time of a few steps and a validation of each arm, in one thread, and extrapolates.
Other work on the machine changes processor time less than wall time. `--texts FOLDER` holds the texts of language
models.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from atn_norms.ablation import StudySpec, make_plan
from atn_norms.ablation.execution.trial import Trainer, isolated
from atn_norms.ablation.store.files import canonical
from atn_norms.specs import read

HERE = Path(__file__).parent
STEPS = 12


def timed(trial: dict[str, Any]) -> float:
    """Return the processor seconds of one trial, extrapolated from `STEPS` steps and one validation."""
    steps, every = trial["train"]["steps"], trial["train"]["eval_every"]
    trainer = Trainer({**trial, "train": {**trial["train"], "eval_every": steps}})
    trainer.advance()  # the first step includes one-time setup
    began = time.process_time()
    for _ in range(STEPS):
        trainer.advance()
    middle = time.process_time()
    trainer.evaluate("validation")
    return (middle - began) / STEPS * steps + (time.process_time() - middle) * (steps // every)


def cost(file: Path, texts: Path) -> tuple[int, float]:
    """Return the number of trials of a study and their processor hours."""
    options: Any = read(file)[0]
    if text := options["task"].get("text"):
        options["task"]["text"] = str(texts / text)
    seconds: dict[str, float] = {}
    trials = [planned.trial for planned in make_plan(StudySpec.model_validate(options)).trials]
    keys = [canonical([trial["model"], trial["train"], trial["task"]]) for trial in trials]
    with isolated():
        for key, trial in zip(keys, trials, strict=True):
            if key not in seconds:
                seconds[key] = timed(trial)
    return len(trials), sum(seconds[key] for key in keys) / 3600


def main() -> None:
    """Print a row for each study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, default=Path())
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for file in sorted(HERE.glob("*.yaml")):
        if not given.names or file.stem in given.names:
            trials, hours = cost(file, given.texts)
            print(f"{file.stem:24s} {trials:3d} trials {hours:5.1f} h", flush=True)


if __name__ == "__main__":
    main()
