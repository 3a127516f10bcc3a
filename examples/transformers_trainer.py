"""AdaQN in the Trainer of Hugging Face Transformers, with pairs and a monitor.

pip install transformers accelerate
python examples/transformers_trainer.py
"""

import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from adaqn_cuda import AdaQN, unwrap


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 1)).tanh()
    data = [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)]
    model = Regression()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=20, per_device_train_batch_size=32, report_to=[],
            save_strategy="no", learning_rate=0.01, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            optimizer_cls_and_kwargs=(AdaQN, {"lr": 0.01, "history_size": 4}),
        )
        trainer.create_optimizer()
        unwrap(trainer.optimizer).monitor = lambda: model(x[:64], y[:64])["loss"]
        trainer.train()
    print(f"loss {model(x, y)['loss'].item():.2e}")
    print(unwrap(trainer.optimizer).stats())


if __name__ == "__main__":
    main()
