"""AdaQN in a Lightning module, with pairs and a monitor.

pip install lightning
python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaqn_cuda import AdaQN, unwrap


class Regression(lightning.LightningModule):
    def __init__(self, held: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.held = held

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> AdaQN:
        return AdaQN(self.parameters(), history_size=4, monitor=lambda: self.loss(self.held))

    def on_train_end(self) -> None:
        print(unwrap(self.optimizers()).stats())


def main() -> None:
    lightning.seed_everything(0)
    x = torch.randn(256, 8)
    data = TensorDataset(x, (x @ torch.randn(8, 1)).tanh())
    module = Regression(data[:64])
    trainer = lightning.Trainer(
        max_epochs=20, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(module, DataLoader(data, 32, shuffle=True))
    print(f"loss {module.loss(data[:]).item():.2e}")


if __name__ == "__main__":
    main()
