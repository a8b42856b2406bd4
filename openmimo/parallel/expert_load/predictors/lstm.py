"""An LSTM that reads means of blocks of steps, and continues them block by block (arXiv 2404.16914, sizes of our own).

The paper trains on the trace of one run and tests on another. Here the network is trained on the past of the same
run, so that a forecast needs no second run. It predicts the change from a block to the next, and shares its weights
between layers.
"""

import numpy as np
import torch
from torch import nn

from openmimo.core.errors import ConfigError
from openmimo.parallel.expert_load.predictor import Predictor, as_shares

BLOCK_STEPS = 20
HIDDEN_SIZE = 32
TRAINING_STEPS = 150
_LEAST_BLOCKS = 4


class BlockModel(nn.Module):
    """Predicts the change of each expert's share from a block of steps to the next."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.memory = nn.LSTM(num_experts, HIDDEN_SIZE, batch_first=True)
        self.change = nn.Linear(HIDDEN_SIZE, num_experts)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(
        self, blocks_LBE: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Return the predicted next block after each block, float32 [layers, blocks, experts], and the state."""
        hidden, state = self.memory(blocks_LBE * blocks_LBE.shape[-1] - 1.0, state)
        return blocks_LBE + self.change(hidden) / blocks_LBE.shape[-1], state


def predict(past_SLE: np.ndarray, horizon: int) -> np.ndarray:
    """Train on the past with a fixed seed, and roll the network over the horizon."""
    num_blocks = len(past_SLE) // BLOCK_STEPS
    if num_blocks < _LEAST_BLOCKS:
        raise ConfigError(f"lstm needs {_LEAST_BLOCKS * BLOCK_STEPS} steps of the past; there are {len(past_SLE)}.")
    blocks = past_SLE[-num_blocks * BLOCK_STEPS :].reshape(num_blocks, BLOCK_STEPS, *past_SLE.shape[1:]).mean(axis=1)
    blocks_LBE = torch.from_numpy(blocks.swapaxes(0, 1).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlockModel(past_SLE.shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(TRAINING_STEPS):
        loss = (model(blocks_LBE[:, :-1])[0] - blocks_LBE[:, 1:]).square().mean() * blocks_LBE.shape[-1] ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted, state = model(blocks_LBE)
        rows = [predicted[:, -1:]]
        for _ in range(-(-horizon // BLOCK_STEPS) - 1):
            predicted, state = model(rows[-1], state)
            rows.append(predicted)
    forecast = torch.cat(rows, dim=1).double().numpy().swapaxes(0, 1)
    return as_shares(np.repeat(forecast, BLOCK_STEPS, axis=0)[:horizon])


PLUGIN = Predictor(f"an LSTM over means of {BLOCK_STEPS} steps", predict)
