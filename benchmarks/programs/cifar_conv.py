"""The small convolutional net of the training benchmarks: four convolutions and a linear layer, for 32 x 32 colour images.

262,026 parameters, about 13 million multiplications per image forward. It is an ordinary torch module; what makes it a
training program is `tenure.train.torch_module`. `x_train.npy` … are uint8 images [N, 32, 32, 3] (`benchmarks.cifar`).
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (32, 64, 128, 128)


class Net(nn.Module):
    """32 x 32 x 3 to 10 scores. norm: batch normalisation after each convolution."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place, (before, width) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            if place < 3:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(WIDTHS[-1] * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores, shape (n, 10), of images shaped (n, 3, 32, 32), 0..1."""
        return self.classifier(self.features(x).flatten(1))
