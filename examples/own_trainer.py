"""Your own trainer: three methods around numpy, without a torch module or a torch loop.

The run's model is named tensors; how they are trained is the client's affair. Here `linear`,
softmax regression, is trained in numpy on this client's part of the digits.

    fl-server start --model linear --strategy fedcompass:min_clients=2 --target-accuracy 0.9
    fl-client start 127.0.0.1:7447 --name a --shard 0/2 --trainer own_trainer:Softmax
    fl-client start 127.0.0.1:7447 --name b --shard 1/2 --trainer own_trainer:Softmax
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from atoll.client.data import Split, load_data
from atoll.client.trainer import Task, Tensors, Trained

Array = npt.NDArray[np.float32]
WEIGHT, BIAS = "1.weight", "1.bias"  # what the run's model calls them: (10, 64) and (10,)
BATCH = 32


class Softmax:
    def __init__(self, shard: tuple[int, int] = (0, 1), lr: float = 0.1, seed: int = 0) -> None:
        part, parts = shard  # as `--shard` says
        digits = load_data("digits")  # any arrays will do
        self.x, self.y = (a[part::parts] for a in arrays(digits.train))
        self.test_x, self.test_y = arrays(digits.test)
        self.examples = len(self.y)  # this client's weight in an average
        self.lr, self.seed = lr, seed
        self.w: Array = np.zeros((10, 64), np.float32)
        self.b: Array = np.zeros(10, np.float32)

    def load(self, tensors: Tensors) -> None:
        if set(tensors) != {WEIGHT, BIAS} or tensors[WEIGHT].shape != self.w.shape:
            raise ValueError(f"this trainer knows {WEIGHT} and {BIAS}, not {sorted(tensors)}")
        self.w, self.b = tensors[WEIGHT].numpy().copy(), tensors[BIAS].numpy().copy()

    def train(self, task: Task) -> Trained:
        """Batches are drawn from (seed, step in this client's life): a restart draws the same."""
        losses: list[float] = []
        while len(losses) < task.steps:
            rng = np.random.default_rng([self.seed, task.done + len(losses)])
            losses.append(self.step(rng.integers(0, len(self.y), BATCH)))
            task.report(len(losses))
            then = task.asked()
            if then == "continue":
                task.snapshot(self.trained(losses))
            elif then is not None:
                break
        return self.trained(losses)

    def evaluate(self) -> Mapping[str, float]:
        right = (self.test_x @ self.w.T + self.b).argmax(1) == self.test_y
        return {"accuracy": float(right.mean()), "examples": float(len(right))}

    def step(self, at: npt.NDArray[np.int64]) -> float:
        x, y = self.x[at], self.y[at]
        scores = x @ self.w.T + self.b  # (batch, 10)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = p.copy()
        error[np.arange(BATCH), y] -= 1
        self.w -= self.lr * error.T @ x / BATCH
        self.b -= self.lr * error.mean(0)
        return float(-np.log(p[np.arange(BATCH), y] + 1e-9).mean())

    def trained(self, losses: list[float]) -> Trained:
        tensors = {WEIGHT: torch.from_numpy(self.w), BIAS: torch.from_numpy(self.b)}
        metrics = {"loss": sum(losses) / len(losses)} if losses else {}
        return Trained(tensors, len(losses), BATCH * len(losses), metrics)


def arrays(examples: object) -> tuple[Array, npt.NDArray[np.int64]]:
    """x (n, 64), y (n,)."""
    assert isinstance(examples, Split)
    return examples.x.flatten(1).numpy(), examples.y.numpy()


if __name__ == "__main__":
    trainer = Softmax()
    trainer.train(Task(steps=500))
    print(trainer.evaluate())
