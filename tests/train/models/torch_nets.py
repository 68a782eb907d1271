"""Torch programs of the contract suite, written as a user would write them."""

from typing import Any

import numpy as np
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(width * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Noisy(Plain):
    """Batch statistics and dropout; a part that is not trained."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.features = nn.Sequential(*self.features, nn.BatchNorm2d(width), nn.Dropout(0.3))
        self.unused = nn.Linear(2, 2)
        self.features[0].bias.requires_grad_(False)


class Own(Plain):
    """Every piece that a user may replace."""

    def transform(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return x if rng is None or rng.random() < 0.5 else x[:, :, ::-1]

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True)

    def schedule(self, round_: int) -> float:
        return 1 / (1 + round_)

    def labels(self, outputs: torch.Tensor) -> torch.Tensor:
        return 2 - outputs.argmin(1)


class Scaled(Plain):
    def transform(self, x: np.ndarray, rng: Any) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2) / 9


class Viewing(Plain):
    """Needs channels first in memory, too; counts even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.classifier(self.features(x).view(len(x), -1))


class Branching(Plain):
    """Other steps in training than in evaluation, and steps after the layer one may cut at."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.classifier(nn.functional.dropout(self.features(x), 0.5, self.training).flatten(1))
        return scores * 2 if self.training else scores.log_softmax(1)


class Skipping(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1)) + x.mean()


class Looking(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Summed(Plain):
    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return outputs[:1, 0]


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.LazyLinear(3)


class Half(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


def make(width: int = 6) -> nn.Module:
    return Plain(width)


ready = Plain(4)
