"""Architectures of all kinds, built offline: from ``transformers`` configurations, and classes as users write them.

Each comes in a size that is used in earnest and in a tiny one for tests, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import zoo_classes as classes
from .networks import CifarResNet


@dataclass(frozen=True)
class Architecture:
    """How to build a network and its example.

    Args:
        name: as the table says it.
        make: network for ``tiny``.
        example: batch for ``tiny``: a tensor, or a dict of keyword arguments.
        casts: it computes in float32 whatever its weights are.
    """

    name: str
    make: Callable[[bool], nn.Module]
    example: Callable[[bool], Any]
    casts: bool = False

    def build(self, tiny: bool, seed: int = 0) -> nn.Module:
        """The network in evaluation mode, weights and BatchNorm statistics random."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.make(tiny)
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2)
            for parameter in network.parameters():
                if parameter.dim() < 2:  # vectors start as constants, which any order leaves alone
                    parameter.data += 0.3 * torch.randn_like(parameter)
                else:  # large enough that signals reach the outputs
                    parameter.data.normal_(std=(2 * len(parameter) / max(parameter.numel(), 1)) ** 0.5)
        return network.eval()


def pictures(size: int, small: int, channels: int = 3) -> Callable[[bool], Tensor]:
    """Examples of ``size`` x ``size`` pixels, ``small`` where tiny."""
    return lambda tiny: torch.randn(3, channels, *[small if tiny else size] * 2, generator=_generator())


def tokens(length: int, vocabulary: int = 50) -> Callable[[bool], dict[str, Tensor]]:
    """Examples of token numbers and a mask that hides the end of one."""

    def example(tiny: bool) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (3, 7 if tiny else length), generator=_generator())
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return example


def sequences(length: int, features: int) -> Callable[[bool], Tensor]:
    """Examples [3, length, features]."""
    return lambda tiny: torch.randn(3, length, features, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def hugging_face(model: str, config: str, tiny: dict[str, Any], **real: Any) -> Callable[[bool], nn.Module]:
    """A class of ``transformers`` with its default configuration, or a tiny one."""

    def make(small: bool) -> nn.Module:
        import transformers

        settings = {**real, **tiny} if small else real
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


ENCODER = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, vocab_size=50, num_labels=4
)
VISION = {**ENCODER, "image_size": 16, "patch_size": 4}
del VISION["vocab_size"]
STAGES = dict(embedding_size=8, hidden_sizes=[8, 16, 12], depths=[1, 2, 1], num_labels=4)

TRANSFORMERS = [
    Architecture(
        "ResNet-34",
        hugging_face(
            "ResNetForImageClassification",
            "ResNetConfig",
            {**STAGES},
            layer_type="basic",
            hidden_sizes=[64, 128, 256, 512],
            depths=[3, 4, 6, 3],
        ),
        pictures(224, 32),
    ),
    Architecture(
        "ResNet-50", hugging_face("ResNetForImageClassification", "ResNetConfig", {**STAGES}), pictures(224, 32)
    ),
    Architecture(
        "MobileNetV2",
        hugging_face(
            "MobileNetV2ForImageClassification", "MobileNetV2Config", dict(depth_multiplier=0.25, num_labels=4)
        ),
        pictures(224, 32),
    ),
    Architecture(
        "RegNetX",
        hugging_face("RegNetForImageClassification", "RegNetConfig", {**STAGES, "groups_width": 4}, layer_type="x"),
        pictures(224, 32),
    ),
    Architecture(
        "RegNetY",
        hugging_face("RegNetForImageClassification", "RegNetConfig", {**STAGES, "groups_width": 4}),
        pictures(224, 32),
    ),
    Architecture(
        "ConvNeXt-T",
        hugging_face(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            dict(hidden_sizes=[8, 12, 16, 8], depths=[1, 2, 1, 1], num_labels=4),
        ),
        pictures(224, 32),
    ),
    Architecture("ViT-B/16", hugging_face("ViTForImageClassification", "ViTConfig", VISION), pictures(224, 16)),
    Architecture("DeiT-B", hugging_face("DeiTForImageClassification", "DeiTConfig", VISION), pictures(224, 16)),
    Architecture(
        "Swin-T",
        hugging_face(
            "SwinForImageClassification",
            "SwinConfig",
            dict(
                image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=4
            ),
        ),
        pictures(224, 32),
    ),
    Architecture("BERT-Base", hugging_face("BertForSequenceClassification", "BertConfig", ENCODER), tokens(32)),
    Architecture(
        "DistilBERT",
        hugging_face(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dict(dim=24, n_layers=2, n_heads=3, hidden_dim=20, vocab_size=50, num_labels=4),
        ),
        tokens(32),
    ),
    Architecture(
        "GPT-2",
        hugging_face(
            "GPT2LMHeadModel",
            "GPT2Config",
            dict(n_embd=24, n_layer=2, n_head=3, vocab_size=50, n_positions=20),
            bos_token_id=1,
            eos_token_id=1,
        ),
        tokens(32),
    ),
    Architecture(
        "Llama (8 layers, grouped queries)",
        hugging_face(
            "LlamaForCausalLM",
            "LlamaConfig",
            dict(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                intermediate_size=20,
                vocab_size=50,
            ),
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=4,
            intermediate_size=1376,
            vocab_size=4096,
        ),
        tokens(32),
        casts=True,
    ),
]

CLASSES = [
    Architecture("ResNet-20, zero-padded shortcut", lambda tiny: CifarResNet(1 if tiny else 3), pictures(32, 16)),
    Architecture("ResNet-56, zero-padded shortcut", lambda tiny: CifarResNet(2 if tiny else 9), pictures(32, 16)),
    Architecture("Wide ResNet", lambda tiny: classes.WideResNet(1 if tiny else 4, 2 if tiny else 10), pictures(32, 16)),
    Architecture("DenseNet", lambda tiny: classes.DenseNet(4 if tiny else 12, 2 if tiny else 16), pictures(32, 16)),
    Architecture("U-Net", lambda tiny: classes.UNet(4 if tiny else 64), pictures(64, 16)),
    Architecture("Inception", lambda tiny: classes.Inception(2 if tiny else 16), pictures(32, 16)),
    Architecture("ShuffleNetV2", lambda tiny: classes.ShuffleNetV2(8 if tiny else 116), pictures(32, 16)),
    Architecture(
        "SE-ResNeXt", lambda tiny: classes.SEResNeXt(16 if tiny else 256, 4 if tiny else 32), pictures(32, 16)
    ),
    Architecture(
        "nn.TransformerEncoder", lambda tiny: classes.Encoder(24 if tiny else 256, 3 if tiny else 8), sequences(7, 5)
    ),
    Architecture("gated MLP", lambda tiny: classes.GatedMLP(12 if tiny else 512), sequences(7, 5)),
    Architecture(
        "Conv-VAE decoder",
        lambda tiny: classes.Decoder(4 if tiny else 64),
        lambda tiny: torch.randn(3, 10, generator=_generator()),
    ),
    Architecture("GRU classifier", lambda tiny: classes.GRUClassifier(6 if tiny else 256), tokens(32)),
]

ARCHITECTURES = TRANSFORMERS + CLASSES
