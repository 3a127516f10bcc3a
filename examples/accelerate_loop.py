"""AdaQN in a loop of Hugging Face Accelerate, with pairs, a monitor and a checkpoint.

pip install accelerate
python examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaqn_cuda import AdaQN, unwrap


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data = TensorDataset(x, (x @ torch.randn(8, 1)).tanh())
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    loss_fn = nn.MSELoss()
    held_x, held_y = data[:64]

    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(
        model, AdaQN(model.parameters(), history_size=4), DataLoader(data, 32, shuffle=True)
    )
    # What is assigned to the prepared optimizer stays there; unwrap() finds AdaQN inside.
    unwrap(optimizer).monitor = lambda: loss_fn(model(held_x), held_y)

    for _ in range(20):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()

    print(f"loss {loss.item():.2e}")
    print(unwrap(optimizer).stats())
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)  # training goes on bit for bit


if __name__ == "__main__":
    main()
