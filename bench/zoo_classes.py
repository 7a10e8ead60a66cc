"""Networks as users write them: residual, dense, branched, shuffled, gated, recurrent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WideBlock(nn.Module):
    """Pre-activation block; a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.equal = inputs == outputs
        self.shortcut = None if self.equal else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        if not self.equal:
            x = self.shortcut(out)
        out = self.conv2(F.dropout(F.relu(self.bn2(self.conv1(out))), 0.3, self.training))
        return torch.add(x, out)


class WideResNet(nn.Module):
    """Wide ResNet of Zagoruyko and Komodakis: three stages of ``blocks``, ``widen`` times as wide."""

    def __init__(self, blocks: int = 4, widen: int = 10, classes: int = 10):
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        layers = []
        for stage in range(3):
            for block in range(blocks):
                inputs = widths[stage] if block == 0 else widths[stage + 1]
                layers.append(WideBlock(inputs, widths[stage + 1], 2 if stage and block == 0 else 1))
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class DenseLayer(nn.Module):
    """Bottleneck layer whose output is concatenated to its input."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseNet(nn.Module):
    """DenseNet-BC of Huang et al. with three dense blocks."""

    def __init__(self, growth: int = 12, layers: int = 16, classes: int = 10):
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            self.blocks.append(nn.ModuleList(DenseLayer(channels + at * growth, growth) for at in range(layers)))
            channels += layers * growth
            if block < 2:
                parts = nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(*parts, nn.AvgPool2d(2)))
                channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for at, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if at < 2:
                x = self.transitions[at](x)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net of Ronneberger et al.: transposed convolutions up, what was on the way down concatenated."""

    def __init__(self, width: int = 64, classes: int = 2):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(twice(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.bottom = twice(widths[2], 8 * width)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths))
        self.merges = nn.ModuleList(twice(2 * w, w) for w in reversed(widths))
        self.final = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, block, skip in zip(self.ups, self.merges, reversed(skips), strict=True):
            x = block(torch.cat([skip, up(x)], dim=1))
        return self.final(x)


class BasicConv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, **kwargs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, bias=False, **kwargs), nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Four branches, concatenated."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1 = BasicConv(inputs, 4 * width, kernel_size=1)
        self.branch5 = nn.Sequential(
            BasicConv(inputs, 3 * width, kernel_size=1), BasicConv(3 * width, 4 * width, kernel_size=5, padding=2)
        )
        self.branch3 = nn.Sequential(
            BasicConv(inputs, 4 * width, kernel_size=1),
            BasicConv(4 * width, 6 * width, kernel_size=(1, 3), padding=(0, 1)),
            BasicConv(6 * width, 6 * width, kernel_size=(3, 1), padding=(1, 0)),
        )
        self.pooled = BasicConv(inputs, 2 * width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1(x), self.branch5(x), self.branch3(x), pooled], 1)


class Inception(nn.Module):
    """A stem, three Inception blocks, and a head."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = BasicConv(3, 2 * width, kernel_size=3, padding=1)
        widths = [2 * width, 16 * width, 16 * width]
        self.blocks = nn.Sequential(*[InceptionBlock(inputs, width) for inputs in widths])
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.max_pool2d(self.stem(x), 2))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deals channels out to groups in turn."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass by, then all are shuffled; with stride 2 both halves are computed."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half, self.stride = outputs // 2, stride
        entering = inputs if stride > 1 else half
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, bias=False, groups=inputs),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(entering, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, bias=False, groups=half),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of Ma et al. with two stages."""

    def __init__(self, width: int = 116, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(ShuffleUnit(24, width, 2), *[ShuffleUnit(width, width, 1) for _ in range(3)])
        self.stage3 = nn.Sequential(ShuffleUnit(width, 2 * width, 2), ShuffleUnit(2 * width, 2 * width, 1))
        self.conv5 = BasicConv(2 * width, 4 * width, kernel_size=1)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage3(self.stage2(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1).expand_as(x)


class SEResNeXt(nn.Module):
    """Bottleneck blocks with grouped convolutions, GroupNorm at the stem, squeeze and excitation at the end."""

    def __init__(self, width: int = 256, groups: int = 32, classes: int = 10):
        super().__init__()
        inner = width // 2
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False),
                nn.BatchNorm2d(inner),
                nn.PReLU(inner),
                nn.Conv2d(inner, width, 1, bias=False),
                nn.InstanceNorm2d(width, affine=True),
                Excite(width),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.flatten(2).mean(-1))


class Encoder(nn.Module):
    """nn.TransformerEncoder over a sequence with a class token and learned positions."""

    def __init__(self, width: int = 256, heads: int = 8, classes: int = 4):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 8, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.position[:, : x.size(1) + 1]
        x = self.encoder(x)
        query = x[:, :1]
        x = query + self.last(query, x, x, need_weights=True)[0]
        return self.head(x[:, 0])


class RMSNorm(nn.Module):
    """Root mean square normalisation in elementary operations."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedMLP(nn.Module):
    """Two gated blocks on a residual stream: one with two layers for the branches, one with a fused layer."""

    def __init__(self, width: int = 512, classes: int = 4):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norm1, self.norm2 = RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.fused, self.out = nn.Linear(width, 3 * width), nn.Linear(3 * width // 2, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        gate, value = self.fused(self.norm2(x)).chunk(2, dim=-1)
        x = x + self.out(F.gelu(gate) * value)
        return self.head(F.normalize(x, dim=-1).amax(1))


class Decoder(nn.Module):
    """From a code to a picture: transposed convolutions, interpolation, pixel shuffle."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.width = width
        self.enter = nn.Linear(10, 8 * width * 16)
        self.up1 = nn.ConvTranspose2d(8 * width, 4 * width, 4, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, output_padding=1)
        self.conv = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = F.relu(self.enter(code)).view(-1, 8 * self.width, 4, 4)
        x = F.leaky_relu(self.bn1(self.up1(x)), 0.2)
        x = F.interpolate(F.relu(self.up2(x)), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.pixel_shuffle(F.hardswish(self.conv(x)), 2)
        return torch.sigmoid(self.last(x))


class GRUClassifier(nn.Module):
    """Embedding, a recurrent layer, and a classifier over its last state."""

    def __init__(self, width: int = 256, vocabulary: int = 50, classes: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.project = nn.Linear(width, width)
        self.gru = nn.GRU(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(2 * width, width), nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.relu(self.project(self.embedding(input_ids))) * attention_mask.unsqueeze(-1)
        _, state = self.gru(x)
        return self.fc2(F.relu(self.fc1(torch.cat([state[-2], state[-1]], 1))))
