"""The networks of the paper's experiments, written the way users write them, and loaders for the real weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtzip.demo.networks import LeNet300100

from .data import shared_folder


class CaffeLeNet5(nn.Module):
    """LeNet-5 of Caffe's MNIST example: nothing but pooling after the convolutions."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters: every second pixel, zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al.: three stages of 16, 32 and 64 channels with ``blocks`` basic blocks each."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def _stage(self, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class ProjectionBlock(nn.Module):
    """Two 3 x 3 convolutions; a 1 x 1 convolution with BatchNorm is the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ProjectionResNet(nn.Module):
    """The CIFAR ResNet with projections for shortcuts."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, classes)

    def _stage(self, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = ProjectionBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(ProjectionBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Vgg16(nn.Module):
    """VGG-16 for 3 x 32 x 32: thirteen 3 x 3 convolutions with BatchNorm and ReLU, five poolings, three linear layers.

    Args:
        classes: outputs.
        width: channels of the first stage; 64 is the true VGG-16, 16 a quarter of it.
        hidden: width of the two hidden linear layers, that of the last stage unless given.
    """

    def __init__(self, classes: int = 10, width: int = 64, hidden: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(convolutions):
                outputs = factor * width
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        hidden = hidden or channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class ImageNetVgg16(nn.Module):
    """VGG-16 as torchvision has it, for 3 x 224 x 224: no BatchNorm, linear layers 25,088 - 4,096 - 4,096 - classes.

    Weights are drawn so that activations keep their size from layer to layer (He et al., 2015).

    Args:
        classes: outputs.
        seed: of the weights.
    """

    def __init__(self, classes: int = 1000, seed: int = 0):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, 4096), nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout()),
            nn.Linear(4096, classes),
        )
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


VGG16_QUARTER = partial(Vgg16, width=16)

#: Folder of shared weights to the network they belong to, called with the number of classes.
ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "lenet-300-100-mnist": LeNet300100,
    "lenet-5-mnist": CaffeLeNet5,
    "resnet20-cifar10": partial(CifarResNet, 3),
    "resnet20-gtsrb": partial(CifarResNet, 3),
    "resnet20-projection-cifar10": partial(ProjectionResNet, 3),
    "resnet32-cifar10": partial(CifarResNet, 5),
    "resnet56-cifar10": partial(CifarResNet, 9),
    "vgg16-quarter-bn": VGG16_QUARTER,
}


def pretrained(name: str) -> nn.Module:
    """A network with real weights, in eval mode.

    Args:
        name: folder and file without its ending, such as ``"lenet-5-mnist/a"`` or ``"vgg16-quarter-bn/gtsrb"``.

    Raises:
        OSError: there is no such file.
        KeyError: the folder has no architecture here.
    """
    folder, stem = name.split("/")
    network = ARCHITECTURES[folder](43 if "gtsrb" in name else 10)
    files = sorted((shared_folder() / "weights" / folder).glob(f"{stem}.*"))
    if not files:
        raise FileNotFoundError(
            f"{shared_folder() / 'weights' / name}.* must be a file, got nothing; set MTZ_SHARED to the shared files"
        )
    network.load_state_dict(_read(files[0]))
    return network.eval()


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}
