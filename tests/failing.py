"""The example of distributed training, with its arguments, in which a process is killed once."""

import os
import runpy
import signal
from pathlib import Path

import adaqn_cuda

LAST_STEP = 47


class Failing(adaqn_cuda.AdaQN):
    def step(self, closure=None):
        loss = super().step(closure)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
        if first and self.state and self._calls == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


if __name__ == "__main__":
    adaqn_cuda.AdaQN = Failing
    example = Path(__file__).parents[1] / "examples" / "distributed.py"
    runpy.run_path(str(example), run_name="__main__")
