"""A small trained classifier, to compare attacks on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


NUM_CLASSES = 4


@functools.cache
def trained_toy_classifier() -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a two-layer network, held-out images (500, 3, 6, 6) in [0, 1], and their classes."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(NUM_CLASSES, 3, 6, 6, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        noise = 0.3 * torch.randn(count, 3, 6, 6, generator=generator)
        return (0.5 + 0.3 * (prototypes[labels] - 0.5) + noise).clamp(0, 1), labels

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        images, labels = draw(2000)
        for rows in torch.randperm(2000, generator=generator).repeat(10).split(100):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    return model, *draw(500)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(dim=1) == labels).double().mean().item()
