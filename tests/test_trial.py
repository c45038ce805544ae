"""One trial: deterministic, resumed bit for bit, and divergence as an outcome."""

import contextlib
import io
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from atn_norms.ablation import TrainSpec, create, load
from atn_norms.ablation.execution.environment import processor
from atn_norms.ablation.execution.trial import Diverged, Trainer, isolated, run_trial
from atn_norms.ablation.grid.plan import VERSION
from atn_norms.ablation.store import files
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError
from tests.compare import compare

ADDING = {"kind": "adding", "length": 5, "train": 40, "validation": 10, "test": 10}
LAYER = {"cell": "lstm", "hidden_size": 4, "norm": "layer", "window": 3, "num_layers": 2, "dropout": 0.3}
TRAIN = {"steps": 9, "batch_size": 6, "eval_every": 4, "log_every": 2, "checkpoint_every": 3, "clip_grad_norm": 0.5}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 20)
    return str(path)


def make(folder, task=None, seeds=1, **changes):
    """Create a study with one trial per seed; return the folder of the first trial."""
    study = {"model": LAYER, "task": task or ADDING, "train": {**TRAIN, **changes}, "seeds": seeds}
    create(study, folder)
    return StudyFolder(folder).trial(load(folder).trials[0].id)


def outputs(trial):
    return (trial.path / "result.json").read_bytes(), (trial.path / "metrics.jsonl").read_bytes()


def variants(text):
    charlm = {"kind": "charlm", "text": text, "embedding": 3, "segment": 7}
    return {
        "adding": {},
        "charlm, state carried": {"task": charlm, "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9}},
        "charlm, hidden carried": {"task": {**charlm, "carry": "hidden"}, "optimizer": "rmsprop"},
    }


def test_a_trial_writes_its_files(tmp_path):
    trial = make(tmp_path / "study")
    assert run_trial(trial) == "finished"
    result = trial.result()
    assert result is not None and list(result) == ["trial", "outcome", "step", "metrics", "curve"]
    assert result["step"] == 9 and set(result["metrics"]) == {"validation", "test"}
    assert [(line["step"], line["validation"] is not None) for line in trial.curve()] == [
        (2, False), (4, True), (6, False), (8, True), (9, True),
    ]  # fmt: skip
    assert result["metrics"]["validation"]["mean squared error"] == trial.curve()[-1]["validation"]
    assert {path.name for path in trial.path.iterdir()} == {
        "trial.json", "metrics.jsonl", "model.safetensors", "result.json", "run.json", "log.txt", ".lock"
    }  # fmt: skip
    assert trial.run()["attempts"] == 1


def test_the_same_trial_writes_the_same_bytes_in_every_process(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", seeds=2)
    run_trial(first)
    torch.manual_seed(99)
    torch.rand(5)
    run_trial(second)
    assert first.id == second.id and outputs(first) == outputs(second)
    other = StudyFolder(tmp_path / "b").trial(load(tmp_path / "b").trials[1].id)
    run_trial(other)
    assert outputs(other) != outputs(first)


def test_a_finished_trial_is_not_changed(tmp_path):
    trial = make(tmp_path / "study")
    run_trial(trial)
    before = {path: path.stat().st_mtime_ns for path in trial.path.iterdir() if path.name != ".lock"}
    assert run_trial(trial) == "finished"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_caller_keeps_its_random_numbers_and_threads(tmp_path):
    trial, state, threads = make(tmp_path / "study", threads=2), torch.get_rng_state(), torch.get_num_threads()
    run_trial(trial)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_every_normalizer_starts_from_the_same_weights():
    weights = []
    for norm in ("none", "layer", "batch", "rms"):
        model = {**LAYER, "norm": norm, "input_size": 2}
        if norm == "none":
            del model["window"]
        train = TrainSpec(**TRAIN, optimizer={"kind": "sgd", "lr": 0.1}).filled(6)
        trial = {"version": VERSION, "model": model, "task": ADDING, "train": train, "seed": 3, "data": {}}
        parameters = Trainer(trial).model.named_parameters()
        weights.append({name: each for name, each in parameters if "norm" not in name})
    for other in weights[1:]:
        compare(other, weights[0], tolerance=0)


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(now):
        if now == step:
            raise Stopped

    return on_step


@pytest.mark.parametrize("variant", ["adding", "charlm, state carried", "charlm, hidden carried"])
@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_trial_stopped_after_every_step_equals_the_uninterrupted(tmp_path, text, variant, checkpoint_every):
    options = variants(text)[variant]
    whole, stopped = make(tmp_path / "whole", **options), make(tmp_path / "stopped", **options)
    run_trial(whole)
    trial = stopped.trial()
    trial["train"]["checkpoint_every"] = checkpoint_every  # not part of the id
    stopped.write_trial(trial)
    for step in range(1, 10):
        with pytest.raises(Stopped):
            run_trial(stopped, stop_at(step))
        assert stopped.result() is None
    run_trial(stopped)
    assert outputs(stopped) == outputs(whole)
    assert stopped.run()["attempts"] == 10


def test_the_whole_state_survives_a_checkpoint(tmp_path, text):
    trial = make(tmp_path / "study", **variants(text)["charlm, state carried"])
    straight = Trainer(trial.trial())
    for _ in range(5):
        straight.advance()
    buffer = io.BytesIO()
    torch.save(straight.state(), buffer)
    buffer.seek(0)
    halting = Trainer(trial.trial())
    halting.restore(torch.load(buffer, weights_only=True))
    compare(halting.state(), straight.state(), tolerance=0)


def killed_at(monkeypatch, trial, fatal):
    """Run a trial and stop it before the `fatal`-th file is renamed; return the number of renamed files."""
    replace, count = files.os.replace, [0]

    def replace_or_die(source, target, **folders):
        count[0] += 1
        if count[0] == fatal:
            raise KeyboardInterrupt
        replace(source, target, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace_or_die)
        try:
            run_trial(trial)
        except KeyboardInterrupt:
            pass
        else:
            assert count[0] < fatal
    return count[0]


def test_a_trial_stopped_at_any_write_equals_the_uninterrupted(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    writes = killed_at(monkeypatch, whole, 1000)
    assert writes == 10, "two notes, three checkpoints with a note each, the model, the result"
    for fatal in range(1, writes + 1):
        trial = make(tmp_path / str(fatal))
        killed_at(monkeypatch, trial, fatal)
        assert trial.result() is None
        run_trial(trial)
        assert outputs(trial) == outputs(whole)


PROGRAM = """
import sys
from atn_norms.ablation import run
run(sys.argv[1], workers=0)
"""


def test_a_killed_process_keeps_finished_trials_and_changes_no_byte(tmp_path):
    options = {"steps": 120, "checkpoint_every": 7, "eval_every": 50, "log_every": 5}
    whole, killed = make(tmp_path / "whole", **options), make(tmp_path / "killed", **options)
    run_trial(whole)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path / "killed"])
    deadline = time.monotonic() + 120
    while len(killed.curve()) < 6 or not (killed.path / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed.result() is None and load(tmp_path / "killed").trials[0].status == "pending"
    steps = []
    run_trial(killed, steps.append)
    assert 20 < steps[0] < 120, "went on from a checkpoint"
    assert outputs(killed) == outputs(whole)


def test_the_time_of_every_attempt_counts(tmp_path):
    trial = make(tmp_path / "study")

    def slowly_until_the_fifth(step):
        time.sleep(0.1)
        stop_at(5)(step)

    with pytest.raises(Stopped):
        run_trial(trial, slowly_until_the_fifth)
    counted = trial.run()["seconds"]
    assert counted >= 0.5  # five sleeps, of which two or three are before the checkpoint at step 3
    here = processor()
    trial.write_run({**trial.run(), "processor": "another"})
    run_trial(trial)
    assert trial.run()["attempts"] == 2 and trial.run()["seconds"] > counted
    assert trial.run()["processor"] == f"another; {here}"


@pytest.mark.parametrize(("most", "begins"), [(0.0, 5), (60.0, 1)])
def test_checkpoints_are_also_written_by_time(tmp_path, monkeypatch, most, begins):
    monkeypatch.setattr("atn_norms.ablation.execution.trial.MOST_LOST", most)
    monkeypatch.setattr("atn_norms.ablation.execution.trial.SAVING", most)
    whole, trial = make(tmp_path / "whole"), make(tmp_path / "study", checkpoint_every=9)
    run_trial(whole)
    with pytest.raises(Stopped):
        run_trial(trial, stop_at(4))
    steps = []
    run_trial(trial, steps.append)
    assert steps[0] == begins
    assert outputs(trial) == outputs(whole)


def test_a_lost_checkpoint_only_costs_time(tmp_path):
    whole, trial = make(tmp_path / "whole"), make(tmp_path / "study")
    run_trial(whole)
    with pytest.raises(Stopped):
        run_trial(trial, stop_at(7))
    (trial.path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    run_trial(trial)
    assert outputs(trial) == outputs(whole)


def test_one_trial_is_trained_by_one_process_at_a_time(tmp_path):
    trial = make(tmp_path / "study")

    def intrude(step):
        with pytest.raises(Busy, match="is being trained by another process"):
            run_trial(StudyFolder(tmp_path / "study").trial(trial.id))
        raise Stopped

    with pytest.raises(Stopped):
        run_trial(trial, intrude)


def test_divergence_is_an_outcome(tmp_path):
    trial = make(tmp_path / "study", optimizer={"kind": "sgd", "lr": 1e30}, clip_grad_norm=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_trial(trial) == "diverged"
    result = trial.result()
    assert result is not None and 0 < result["step"] < 9 and result["metrics"] == {}
    assert load(tmp_path / "study").trials[0].status == "diverged"
    assert "diverged at step" in (trial.path / "log.txt").read_text()


def test_warnings_go_to_the_log(tmp_path, monkeypatch):
    trial = make(tmp_path / "study")
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, split: warnings.warn("odd", stacklevel=1) or {"mean squared error": 1.0}
    )
    run_trial(trial)
    assert "UserWarning: odd" in (trial.path / "log.txt").read_text()


def test_a_score_that_is_not_finite_is_divergence(tmp_path, monkeypatch):
    trainer = Trainer(make(tmp_path / "study").trial())
    monkeypatch.setattr(trainer.task, "evaluate", lambda model, split: {"mean squared error": float("nan")})
    with pytest.raises(Diverged, match="the test mean squared error is nan"):
        trainer.evaluate("test")


def test_the_gradient_is_clipped_as_a_whole(tmp_path):
    trial = make(tmp_path / "study", clip_grad_norm=1e-3, optimizer={"kind": "sgd", "lr": 1.0}).trial()
    trainer = Trainer(trial)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.advance()
    moved = [(p - q).flatten() for p, q in zip(trainer.model.parameters(), before, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_curve_averages_the_loss_between_its_points(tmp_path):
    every = make(tmp_path / "every", log_every=1, eval_every=9)
    some = make(tmp_path / "some", log_every=4, eval_every=9)
    run_trial(every)
    run_trial(some)
    losses = [line["train_loss"] for line in every.curve()]
    means = [sum(part) / len(part) for part in (losses[:4], losses[4:8], losses[8:])]
    assert [line["train_loss"] for line in some.curve()] == pytest.approx(means, rel=1e-12)


def test_validation_does_not_touch_training(tmp_path):
    often, once = make(tmp_path / "often", eval_every=1), make(tmp_path / "once", eval_every=9)
    run_trial(often)
    run_trial(once)
    assert often.result()["metrics"] == once.result()["metrics"]  # type: ignore[index]


def test_a_text_that_changed_since_the_study_was_created_is_rejected(tmp_path, text):
    trial = make(tmp_path / "study", **variants(text)["charlm, state carried"])
    with open(text, "a") as file:
        file.write("!")
    with pytest.raises(SpecError, match="task.text: got changed content; expected the content of the time when"):
        run_trial(trial)


def test_a_trial_of_another_version_is_rejected(tmp_path):
    trial = make(tmp_path / "study").trial()
    with pytest.raises(SpecError, match="version: got 7; expected 2"):
        Trainer({**trial, "version": 7})


def test_a_full_disk_is_named_and_keeps_earlier_files(tmp_path, monkeypatch):
    whole, trial = make(tmp_path / "whole"), make(tmp_path / "study")
    run_trial(whole)

    def full(folder, name, *given):
        if name == "checkpoint.pt":
            raise StoreError(f"cannot write {folder.path / name}: No space left on device")
        write(folder, name, *given)

    write = files.Folder.write
    with monkeypatch.context() as patch:
        patch.setattr(files.Folder, "write", full)
        with pytest.raises(StoreError, match="checkpoint.pt: No space left on device"):
            run_trial(trial)
    run_trial(trial)
    assert outputs(trial) == outputs(whole)


def test_the_learning_rate_follows_the_length_of_the_segment(tmp_path, text):
    task = {"kind": "charlm", "text": text, "embedding": 4, "segment": 12, "segment_deviation": 3.0}
    trainer = Trainer(make(tmp_path / "study", task).trial())
    rates = []
    for _ in range(6):
        length = len(trainer.task.batch(trainer.step, trainer.train["batch_size"]).inputs)
        trainer.advance()
        (group,) = trainer.optimizer.param_groups
        rates.append(group["lr"] / trainer.rate.full[0])
        assert rates[-1] == pytest.approx(length / 12)
    assert len(set(rates)) > 2


def flushes_denormals():
    return (torch.tensor(5e-324, dtype=torch.float64) * 1).item() == 0


@contextlib.contextmanager
def restoring(read, write):
    before = read()
    try:
        yield
    finally:
        write(before)


def onednn(enabled):
    torch.backends.mkldnn.set_flags(enabled)


# A change of torch's global state, a function that reads it, and a function that restores it.
CHANGES = {
    "default type": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype, torch.set_default_dtype),
    # A default device that is set, also to the CPU, stays as a mode around every call of torch.
    "default device": (
        lambda: torch.set_default_device("meta"),
        torch.get_default_device,
        lambda before: torch.set_default_device(None),
    ),
    "threads": (lambda: torch.set_num_threads(2), torch.get_num_threads, torch.set_num_threads),
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "gradient mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (
        lambda: torch.autograd.set_detect_anomaly(True),
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    ),
    "oneDNN": (lambda: onednn(False), lambda: torch.backends.mkldnn.enabled, onednn),
    "autocast": (
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.is_autocast_enabled("cpu"),
        lambda enabled: torch.set_autocast_enabled("cpu", enabled),
    ),
    "denormal numbers": (lambda: torch.set_flush_denormal(True), flushes_denormals, torch.set_flush_denormal),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trial_does_not_depend_on_torchs_global_state_and_keeps_it(change, tmp_path):
    set_global, read, write = CHANGES[change]
    results = []
    for name in ("plain", "changed"):
        trial = make(tmp_path / name, steps=2)
        with restoring(read, write):
            if name == "changed":
                set_global()
            before = read()
            run_trial(trial)
            assert read() == before
        results.append(outputs(trial))
    assert results[0] == results[1]


def test_a_trial_runs_in_inference_mode():
    with torch.inference_mode(), isolated():
        assert torch.nn.Linear(2, 2)(torch.ones(2)).sum().requires_grad
