"""Train, save and load real programs whose recurrent layers are replaced: `python .ci/programs.py`.

Programs that are not installed are skipped and named. Install any of: sb3-contrib, accelerate, lightning, opacus,
tensorboard, darts, neuralforecast, demucs. Some need environments of their own.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atn_norms as an


def recurrent_ppo(folder: Path) -> None:
    """Train RecurrentPPO on CartPole, save it, and load it into an agent with a replaced policy."""
    from sb3_contrib import RecurrentPPO

    def make() -> Any:
        options = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}}
        agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            an.replace(agent.policy, norm="layer", window=4)
        assert any("without its 12 norm parameters" in str(warning.message) for warning in caught)
        norms = list(an.norm_parameters(agent.policy).values())
        agent.policy.optimizer.add_param_group({"params": norms})
        return agent

    agent = make()
    before = copies(an.norm_parameters(agent.policy))
    agent.learn(64)
    assert_changed(an.norm_parameters(agent.policy), before)
    agent.save(folder / "agent.zip")
    other = make()
    other.set_parameters(folder / "agent.zip")
    assert_equal(other.policy.state_dict(), agent.policy.state_dict())
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


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of tensors by name."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that two state dicts are the same."""
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_changed(found: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    """Check that training changed every tensor."""
    same = [name for name in before if torch.equal(found[name], before[name])]
    assert before and not same, same


def accelerate(folder: Path) -> None:
    """Train in an accelerate loop in bfloat16, save its state, and load it."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model: Any = an.replace(Classifier(), norm="rms", window=3)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    before = copies(an.norm_parameters(model))
    for x, y in data():
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    kept = copies(model.state_dict())
    assert_changed(an.norm_parameters(model), before)
    nn.init.zeros_(model.head.weight)
    accelerator.load_state(str(folder))
    assert_equal(model.state_dict(), kept)


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
    before = copies(an.norm_parameters(task))
    trainer.fit(task, torch.utils.data.DataLoader(data(), batch_size=None))  # type: ignore[arg-type]
    assert_changed(an.norm_parameters(task), before)
    trainer.save_checkpoint(folder / "task.ckpt")
    assert_equal(Task.load_from_checkpoint(folder / "task.ckpt").state_dict(), task.state_dict())


def opacus(folder: Path) -> None:
    """Train with differential privacy on per-sample gradients of `vmap(grad)`, save the model, and load it."""
    from opacus import PrivacyEngine
    from torch.func import functional_call, grad, vmap

    model: Any = an.replace(Classifier(), norm="layer", window=3)
    before = copies(an.norm_parameters(model))
    dataset = torch.utils.data.TensorDataset(torch.randn(12, 5, 3), torch.randint(2, (12,)))
    private, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(dataset, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="no_op",  # the program computes the gradients
    )

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x.unsqueeze(1),)), y.unsqueeze(0))

    for x, y in batches:
        parameters: dict[str, Any] = dict(model.named_parameters())
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, gradient in vmap(grad(loss), (None, 0, 0))(detached, x, y).items():
            parameters[name].grad_sample = gradient
        optimizer.step()
        optimizer.zero_grad()
    assert_changed(an.norm_parameters(model), before)
    torch.save(private.state_dict(), folder / "model.pt")
    other = an.replace(Classifier(), norm="layer", window=3)
    other.load_state_dict({name.removeprefix("_module."): v for name, v in torch.load(folder / "model.pt").items()})
    assert_equal(other.state_dict(), model.state_dict())


def tensorboard(folder: Path) -> None:
    """Write the graph of a model for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        writer.add_graph(an.replace(Classifier(), norm="layer", window=3), data()[0][0])
    assert any(b"recurrent" in file.read_bytes() for file in folder.glob("events*"))


def darts(folder: Path) -> None:
    """Fit RNNModel with a module whose layers are replaced when it is built, save it, and load it."""
    from darts import TimeSeries
    from darts.models import RNNModel

    options: dict[str, Any] = {"input_chunk_length": 8, "training_length": 12, "hidden_dim": 6, "random_state": 0}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    series = TimeSeries.from_values(wave().numpy())
    model = RNNModel(model=normed_darts_module(), n_epochs=1, pl_trainer_kwargs=quiet, **options)
    model.fit(series, epochs=1)
    before = copies(an.norm_parameters(model.model))
    model.fit(series, epochs=2)
    assert_changed(an.norm_parameters(model.model), before)
    model.save(str(folder / "model.pt"))
    loaded = RNNModel.load(str(folder / "model.pt"), trusted=True)  # the class of the module is not darts' own
    assert_equal(loaded.model.state_dict(), model.model.state_dict())
    assert (loaded.predict(4, series=series).values() == model.predict(4, series=series).values()).all()


def normed_darts_module() -> Any:
    """Return the class of the module, as a global of this file so that pickle finds it."""
    from darts.models.forecasting.rnn_model import _RNNModule

    class NormedModule(_RNNModule):
        def __init__(self, name: str = "LSTM", **options: Any) -> None:
            super().__init__(name=name, **options)
            an.replace(self, norm="layer", window=3)

    return published(NormedModule)


def published(cls: Any) -> Any:
    """Make a class that is defined in a function a global of this file."""
    cls.__qualname__ = cls.__name__
    globals()[cls.__name__] = cls
    return cls


def wave() -> torch.Tensor:
    """Return a sine of 60 steps."""
    return torch.sin(torch.arange(60) / 4)


def neuralforecast(folder: Path) -> None:
    """Fit an LSTM forecaster whose layers are replaced when it is built, save it, and load it."""
    import pandas as pd
    from neuralforecast import NeuralForecast, core
    from neuralforecast.models import LSTM

    class NormedLSTM(LSTM):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            an.replace(self, norm="layer", window=3)

    core.MODEL_FILENAME_DICT["normedlstm"] = published(NormedLSTM)  # the name in saved files
    sizes = {"encoder_n_layers": 1, "encoder_hidden_size": 6, "decoder_hidden_size": 6}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    model = NormedLSTM(h=4, input_size=8, max_steps=3, scaler_type="standard", random_seed=1, **sizes, **quiet)
    before = copies(an.norm_parameters(model))
    dates = pd.date_range("2020-01-01", periods=60, freq="D")
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.DataFrame({"unique_id": "a", "ds": dates, "y": wave().numpy()}))
    assert_changed(an.norm_parameters(forecast.models[0]), before)
    forecast.save(str(folder), overwrite=True, save_dataset=True)
    loaded = NeuralForecast.load(str(folder))
    assert_equal(loaded.models[0].state_dict(), forecast.models[0].state_dict())
    assert (loaded.predict().iloc[:, -1] == forecast.predict().iloc[:, -1]).all()


def demucs(folder: Path) -> None:
    """Train a small Demucs, whose bidirectional LSTM is replaced, save its weights, and load them."""
    from demucs.demucs import Demucs

    def make() -> Any:
        torch.manual_seed(0)
        model = Demucs(["drums", "voice"], audio_channels=1, channels=4, depth=2, lstm_layers=2, dconv_mode=0)
        return an.replace(model, norm="layer", window=3)

    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    before = copies(an.norm_parameters(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 2048)).square().mean().backward()
        optimizer.step()
    assert_changed(an.norm_parameters(model), before)
    torch.save(model.state_dict(), folder / "model.pt")
    other = make()
    other.load_state_dict(torch.load(folder / "model.pt"))
    x = torch.randn(1, 1, 2048)
    assert torch.equal(other.eval()(x), model.eval()(x))


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "sb3_contrib": recurrent_ppo,
    "accelerate": accelerate,
    "lightning": lightning,
    "opacus": opacus,
    "tensorboard": tensorboard,
    "darts": darts,
    "neuralforecast": neuralforecast,
    "demucs": demucs,
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
