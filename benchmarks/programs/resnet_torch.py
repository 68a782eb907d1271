"""ResNet-50 (v1.5, normalisation folded, random weights) as a torch module, and as an exported program for any batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class Block(nn.Module):
    """1x1, 3x3, 1x1, and the way around them."""

    def __init__(self, taken: int, width: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(taken, width, 1)
        self.b = nn.Conv2d(width, width, 3, stride, 1)
        self.c = nn.Conv2d(width, 4 * width, 1)
        self.around = nn.Conv2d(taken, 4 * width, 1, stride) if stride > 1 or taken != 4 * width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next features."""
        return torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + self.around(x))


class ResNet50(nn.Module):
    """x [n,3,224,224] -> y [n,1000]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        taken = 64
        for blocks, width, first_stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
            for index in range(blocks):
                layers.append(Block(taken, width, first_stride if index == 0 else 1))
                taken = 4 * width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(taken, 1000)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the scores."""
        return {"y": self.head(self.layers(x).mean((2, 3)))}


def export(path: Path, *, seed: int = 0, max_rows: int = 128) -> Path:
    """Write the program and return its path."""
    torch.manual_seed(seed)
    model = ResNet50().eval()
    rows = torch.export.Dim("n", min=1, max=max_rows)
    example = torch.zeros(2, 3, 224, 224)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes={"x": {0: rows}}), path)
    return path
