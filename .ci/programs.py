"""Train, save and load real programs whose recurrent layers are replaced: `python .ci/programs.py`.

Programs that are not installed are skipped and named. Install any of: sb3-contrib, accelerate, lightning.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atn_norms as an


def recurrent_ppo(folder: Path) -> None:
    """Train RecurrentPPO on CartPole, save it, and load its weights into a replaced policy."""
    from sb3_contrib import RecurrentPPO

    def make() -> Any:
        options = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}}
        agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            an.replace(agent.policy, norm="layer", window=4)
        assert any("already trains" in str(warning.message) for warning in caught)
        norms = list(an.norm_parameters(agent.policy).values())
        agent.policy.optimizer.add_param_group({"params": norms})
        return agent

    agent = make()
    gains = {name: p.detach().clone() for name, p in an.norm_parameters(agent.policy).items()}
    agent.learn(64)
    assert any(not torch.equal(p, gains[name]) for name, p in an.norm_parameters(agent.policy).items())
    torch.save(agent.policy.state_dict(), folder / "policy.pt")
    other = make()
    other.policy.load_state_dict(torch.load(folder / "policy.pt"))
    observation = agent.get_env().reset()  # type: ignore[union-attr]
    found, expected = (one.predict(observation, deterministic=True)[0] for one in (other, agent))
    assert (found == expected).all()


class Classifier(nn.Module):
    """A GRU and a read-out, for the programs that take any module."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][-1])


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return six batches of sequences and classes."""
    torch.manual_seed(0)
    return [(torch.randn(5, 4, 3), torch.randint(2, (4,))) for _ in range(6)]


def accelerate(folder: Path) -> None:
    """Train in an accelerate loop in bfloat16, save its state, and load it."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model: Any = an.replace(Classifier(), norm="rms", window=3)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    for x, y in data():
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.zeros_(model.head.weight)
    accelerator.load_state(str(folder))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def lightning(folder: Path) -> None:
    """Fit a Lightning module in bf16-mixed and load its checkpoint."""
    import lightning as pl

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = an.replace(Classifier(), norm="layer", window=3)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, precision="bf16-mixed", accelerator="cpu", default_root_dir=folder, **quiet)
    task = Task()
    trainer.fit(task, torch.utils.data.DataLoader(data(), batch_size=None))  # type: ignore[arg-type]
    trainer.save_checkpoint(folder / "task.ckpt")
    loaded = Task.load_from_checkpoint(folder / "task.ckpt")
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in loaded.state_dict().items())


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "sb3_contrib": recurrent_ppo,
    "accelerate": accelerate,
    "lightning": lightning,
}


def main() -> None:
    """Run every program that is installed."""
    torch.set_num_threads(1)
    for package, program in PROGRAMS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package}: skipped, not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            program(Path(folder))
        print(f"{package}: passed")


if __name__ == "__main__":
    main()
