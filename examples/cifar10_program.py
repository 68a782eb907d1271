"""A small convolutional net in torch, as one would write it without Tenure, for pictures of 32 x 32 pixels.

`cifar10.toml` names it; `tenure.train.torch_module` makes a training program of it. Three methods say what differs from the
defaults there: pictures are flipped and moved while training, the rate rises and falls, labels are softened.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

MOVE = 3
"""Pixels that a picture is moved by, at most."""


class Net(nn.Module):
    """Three convolutions and a linear layer. width: channels of the first. rounds: length of training, for the schedule."""

    def __init__(self, classes: int = 10, width: int = 32, rounds: int = 1000) -> None:
        super().__init__()
        self.rounds = rounds
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(4 * width * 4 * 4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (n, classes), of pictures shaped (n, 3, 32, 32), 0..1."""
        scores: torch.Tensor = self.classifier(self.features(x - 0.5).flatten(1))
        return scores

    def transform(self, x: Any, rng: np.random.Generator | None) -> Any:
        """Return training pictures, uint8 (n, 32, 32, 3), half of them mirrored, each moved by up to MOVE pixels."""
        if rng is None:  # evaluation
            return x
        n, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (MOVE, MOVE), (MOVE, MOVE), (0, 0)))
        down, right = rng.integers(0, 2 * MOVE + 1, (2, n))
        rows, columns = down[:, None] + np.arange(height), right[:, None] + np.arange(width)
        mirrored = rng.random(n) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
        return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def schedule(self, round_: int) -> float:
        """Return the factor of the rate: up to 1 in the first fifth of the rounds, then down to 0."""
        share = (round_ + 1) / self.rounds
        return share / 0.2 if share < 0.2 else max(0.0, 1 - share) / 0.8

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return each picture's cross entropy, a tenth of it spread over all classes."""
        return nn.functional.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)
