"""The net of `train_communication`: three convolutions and two linear layers, for 32 x 32 colour images.

156,106 parameters, about 3 million multiplications per image forward: small enough to train five seeds several ways within
minutes. An ordinary torch module; `tenure.train.torch_module` makes it a training program.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (16, 32, 64)
HIDDEN = 128


class Net(nn.Module):
    """32 x 32 x 3 to 10 scores, with batch normalisation after each convolution."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(WIDTHS[-1] * 4 * 4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores, shape (n, 10), of images shaped (n, 3, 32, 32), 0..1."""
        scores: torch.Tensor = self.classifier(self.features(x).flatten(1))
        return scores
