"""Two processes that train one model: run as `python -m tests.torch_api.processes RANK FOLDER`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import atn_norms as an

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "lstm": {"make": an.LSTM},
    "gru per gate": {"make": an.GRU, "placement": {"gates": "per_gate"}},
    "rnn, all steps apart": {"make": an.RNN, "norm": {"kind": "batch", "sync": True, "max_steps": 3}},
}


def layer_of(name: str) -> Any:
    """Return the layer of a case with synchronized batch norm and the same parameters in every process."""
    options = {"norm": {"kind": "batch", "sync": True}, "window": 2, "dtype": torch.float64} | CASES[name]
    torch.manual_seed(0)
    return options.pop("make")(3, 4, **options)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of all processes and their lengths, which are mixed in every process."""
    source = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, 3, generator=source, dtype=torch.float64), torch.tensor([5, 3, 0, 4, 5, 2])


def loss_of(layer: Any, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    ys, _ = layer(x, lengths)
    return ys.square().sum(0).mean()


class Unrolled(nn.Module):
    """A layer whose `forward` is `unroll`, since DDP wraps `forward`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        return self.layer.unroll(x, lengths=lengths)


def outcome(model: Any) -> dict[str, torch.Tensor]:
    """Return gradients and buffers by the names of the layer, without the prefix of a wrapper."""
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name.replace("module.", ""): value.detach().clone() for name, value in (*found.items(), *model.named_buffers())
    }


def trained_apart(rank: int) -> dict[str, Any]:
    """Train every case with DDP on the rows of this process, for two steps."""
    results = {}
    x, lengths = (whole.chunk(WORLD, dim)[rank] for whole, dim in zip(batch(), (1, 0), strict=True))
    for name in CASES:
        model = nn.parallel.DistributedDataParallel(Unrolled(layer_of(name)))
        for _ in range(2):
            model.zero_grad()
            loss_of(model, x, lengths).backward()
        results[name] = outcome(model)
    return results


def sharded(rank: int) -> dict[str, Any]:
    """Train with FSDP2: sharded by layer, with sharded norms too, and with a batch norm."""
    from torch.distributed.fsdp import fully_shard

    results: dict[str, Any] = {}
    x = batch()[0].chunk(WORLD, 1)[rank]
    for name, norms in (("by layer", False), ("norms too", True)):
        torch.manual_seed(0)
        model: Any = nn.Sequential(an.LSTM(3, 4, norm="layer", window=2, dtype=torch.float64))
        if norms:
            for module in list(model[0].children()):
                fully_shard(module)
        fully_shard(model[0])
        fully_shard(model)
        model(x)[0].square().sum(0).mean().backward()
        results[name] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    return results


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save({"ddp": trained_apart(rank), "fsdp": sharded(rank)}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
