"""Hugging Face Trainer: a model of several networks is trained, its networks are zipped, and it is trained on.

The lines that zipping adds are marked. Without them this is a script that trains two networks.
"""

from __future__ import annotations

from tasks import arguments, datasets, networks, report
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import mtzip  # zip


class MultiTask(nn.Module):
    """Networks by task; its inputs are ``<task>_images`` and ``<task>_labels``, as a collator makes them."""

    def __init__(self, models):
        super().__init__()
        self.models = models

    def forward(self, **batch):
        tasks = [name.removesuffix("_images") for name in batch if name.endswith("_images")]
        outputs = {task: self.models[task](batch[f"{task}_images"]) for task in tasks}
        loss = sum(F.cross_entropy(outputs[task], batch[f"{task}_labels"]) for task in tasks)
        return {"loss": loss, "logits": tuple(outputs.values())}


class Together(Dataset):
    """A sample of every task at once."""

    def __init__(self, sets):
        self.sets = sets

    def __len__(self) -> int:
        return min(map(len, self.sets.values()))

    def __getitem__(self, index: int):
        samples = {task: data[index] for task, data in self.sets.items()}
        images = {f"{task}_images": image for task, (image, _) in samples.items()}
        return images | {f"{task}_labels": label for task, (_, label) in samples.items()}


def fit(model: MultiTask, data, epochs: int, rate: float, output) -> None:
    """A Trainer as every script makes one."""
    settings = TrainingArguments(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=64,
        num_train_epochs=epochs,
        learning_rate=rate,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, settings, train_dataset=Together(data)).train()


def main():
    options = arguments(__doc__)
    training, testing = datasets(options.data)
    model = MultiTask(nn.ModuleDict(networks(training)))
    fit(model, training, options.epochs, 2e-3, options.output)
    model.cpu()
    errors = [report(model.models, testing)]
    model = MultiTask(mtzip.zip_networks(dict(model.models), training, samples=2000))  # zip
    fit(model, training, 1, 1e-4, options.output)  # zip
    errors.append(report(model.cpu().models, testing))
    return model.models, errors


if __name__ == "__main__":
    main()
