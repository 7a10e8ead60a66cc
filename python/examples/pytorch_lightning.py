"""PyTorch Lightning: a LightningModule of several networks is trained, its networks are zipped, and it is trained on.

The lines that zipping adds are marked. Without them this is a script that trains two networks.
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.utilities import CombinedLoader
from tasks import arguments, datasets, networks, report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mtzip  # zip


class MultiTask(lightning.LightningModule):
    """Networks by task; a batch is a dict from task to images and labels."""

    def __init__(self, models, rate: float):
        super().__init__()
        self.models, self.rate = models, rate

    def training_step(self, batch, _):
        losses = {task: F.cross_entropy(self.models[task](images), labels) for task, (images, labels) in batch.items()}
        self.log_dict({f"loss/{task}": loss for task, loss in losses.items()})
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.rate)


def fit(module: MultiTask, loaders, epochs: int, output) -> None:
    """A Trainer as every script makes one."""
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=output, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module.train(), CombinedLoader(loaders, "max_size_cycle"))


def main():
    options = arguments(__doc__)
    training, testing = datasets(options.data)
    loaders = {task: DataLoader(data, 64, shuffle=True) for task, data in training.items()}
    module = MultiTask(nn.ModuleDict(networks(training)), 2e-3)
    fit(module, loaders, options.epochs, options.output)
    errors = [report(module.models, testing)]
    module = MultiTask(mtzip.zip_networks(dict(module.models), loaders, samples=2000), 1e-4)  # zip
    fit(module, loaders, 1, options.output)  # zip
    errors.append(report(module.models, testing))
    return module.models, errors


if __name__ == "__main__":
    main()
