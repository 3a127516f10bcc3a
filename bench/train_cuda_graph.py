"""Train a character-level LSTM with every step replayed from a CUDA graph.

    python bench/train_cuda_graph.py [--steps N] [--text FILE]

What capture asks for:

* batches, gradients and the hidden state live in tensors that stay where they are: new data is
  copied into them, and gradients are zeroed, not dropped;
* ``lr`` is a tensor, so that a schedule can change it between replays;
* which step is due for a pair update is known on the host, so a plain step and a pair-update step
  are captured apart, after both have run once; this is what the warning at capture asks for;
* whether a step is dropped, and a pair stored or skipped, is decided on the device, in the graph.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch

from adaqn_cuda import PAPER, AdaQN
from adaqn_cuda.demo.data import Batches, load_corpus
from adaqn_cuda.demo.models import RecurrentLM, loss_of

BATCH, BPTT, HIDDEN, INTERVAL = 32, 32, 256, 10


class Trainer:
    """A model with static inputs, and its training step."""

    def __init__(self, batches: Batches, vocabulary: int, lr: float) -> None:
        self.batches = batches
        self.model = RecurrentLM("lstm", vocabulary, HIDDEN, 1).cuda()
        self.inputs = torch.zeros(BPTT, BATCH, dtype=torch.int64, device="cuda")
        self.targets = torch.zeros_like(self.inputs)
        self.hidden = tuple(torch.zeros(1, BATCH, HIDDEN, device="cuda") for _ in range(2))
        self.loss = torch.zeros((), device="cuda")
        self.lr = torch.tensor(lr, dtype=torch.float64, device="cuda")
        options = {**PAPER, "lr": self.lr, "update_interval": INTERVAL}
        self.optimizer = AdaQN(self.model.parameters(), **options)

    def load_batch(self) -> None:
        if self.batches.at_start():
            for part in self.hidden:
                part.zero_()
        inputs, targets = self.batches.next()
        self.inputs.copy_(inputs, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)

    def step(self) -> None:
        """What a graph holds: forward, backward, optimizer step."""
        logits, hidden = self.model(self.inputs, self.hidden)
        loss = loss_of(logits, self.targets)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())
        for old, new in zip(self.hidden, hidden, strict=True):
            old.copy_(new.detach())

    def warm_up(self) -> None:
        """A whole interval on a side stream, as capture wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(INTERVAL):
                self.load_batch()
                self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self) -> dict[bool, torch.cuda.CUDAGraph]:
        """Graphs by whether the step is due for a pair update.

        Capturing advances the host's count of steps like stepping does, so it takes as many
        captures as an interval has steps, of which the first plain one and the due one are kept.
        """
        warnings.filterwarnings("ignore", message="AdaQN.step.. is being captured")
        graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        for step in range(1, INTERVAL + 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            graphs.setdefault(step == INTERVAL, graph)
        return graphs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--text", help="a file or folder to learn from (default: Python's library)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; adaqn train runs on the CPU")
    torch.manual_seed(0)
    corpus = load_corpus(options.text, "char")
    trainer = Trainer(Batches(corpus.train, BATCH, BPTT), len(corpus.vocabulary), options.lr)
    trainer.warm_up()
    graphs = trainer.capture()
    started = time.perf_counter()
    for step in range(1, options.steps + 1):
        trainer.load_batch()
        graphs[step % INTERVAL == 0].replay()
        if step % max(1, options.steps // 20) == 0:
            rate = step / (time.perf_counter() - started)
            print(f"step {step}: loss {trainer.loss.item():.3f}, {rate:.0f} steps/s", flush=True)
        if step == options.steps * 3 // 4:
            trainer.lr.mul_(0.3)  # the graphs read it anew at every replay
    print(trainer.optimizer.stats())
    return 0


if __name__ == "__main__":
    sys.exit(main())
