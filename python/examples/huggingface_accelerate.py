"""Hugging Face Accelerate: the plain loop on whatever devices and precision ``accelerate launch`` gives.

The lines that zipping adds are marked. Without them this is a script that trains two networks.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tasks import arguments, datasets, networks, report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mtzip  # zip


class Together(nn.Module):
    """Runs the networks of all tasks in one forward, as wrappers for several devices need it."""

    def __init__(self, models):
        super().__init__()
        self.models = models

    def forward(self, inputs):
        return {task: self.models[task](images) for task, images in inputs.items()}


def train(models, sets, epochs: int, rate: float) -> None:
    """One batch of every task a step; what is trained is moved and wrapped by the accelerator."""
    accelerator = Accelerator()
    model = Together(models).train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model, optimizer, *loaders = accelerator.prepare(
        model, optimizer, *(DataLoader(data, 64, shuffle=True) for data in sets.values())
    )
    for _ in range(epochs):
        for batches in zip(*loaders, strict=True):
            optimizer.zero_grad()
            outputs = model({task: images for task, (images, _) in zip(sets, batches, strict=True)})
            loss = sum(F.cross_entropy(outputs[task], y) for task, (_, y) in zip(sets, batches, strict=True))
            accelerator.backward(loss)
            optimizer.step()
    accelerator.unwrap_model(model).cpu()


def main():
    options = arguments(__doc__)
    training, testing = datasets(options.data)
    models = nn.ModuleDict(networks(training))
    train(models, training, options.epochs, 2e-3)
    errors = [report(models, testing)]
    models = mtzip.zip_networks(dict(models), training, samples=2000)  # zip
    train(models, training, 1, 1e-4)  # zip
    errors.append(report(models, testing))
    return models, errors


if __name__ == "__main__":
    main()
