"""A plain PyTorch loop: two networks are trained, zipped, and trained on with the same loop.

The lines that zipping adds are marked. Without them this is a script that trains two networks.
"""

from __future__ import annotations

import torch
from tasks import arguments, datasets, networks, report
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mtzip  # zip


def train(models, loaders, epochs: int, rate: float) -> None:
    """One batch of every task a step, one optimiser over all parameters."""
    parameters = {parameter for task in loaders for parameter in models[task].train().parameters()}
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(epochs):
        for batches in zip(*loaders.values(), strict=True):
            optimizer.zero_grad()
            for task, (images, labels) in zip(loaders, batches, strict=True):
                F.cross_entropy(models[task](images), labels).backward()
            optimizer.step()


def main():
    options = arguments(__doc__)
    training, testing = datasets(options.data)
    loaders = {task: DataLoader(data, 64, shuffle=True) for task, data in training.items()}
    models = networks(training)
    train(models, loaders, options.epochs, 2e-3)
    errors = [report(models, testing)]
    models = mtzip.zip_networks(models, loaders, samples=2000)  # zip
    train(models, loaders, 1, 1e-4)  # zip
    errors.append(report(models, testing))
    return models, errors


if __name__ == "__main__":
    main()
