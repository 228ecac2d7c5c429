"""The larger models of the benchmarks on GPUs: Hugging Face's, from their configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import Case, classes, images, next_tokens, text
from torch import Tensor, nn


class Logits(nn.Module):
    """A model's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def of(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a model by the name of its class, from a configuration with these options."""

    def make() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        return Logits(kind(kind.config_class(**options)))

    return make


def gpt2(name: str, batch: int, layers: int, d: int, heads: int, vocabulary: int = 50257, length: int = 1024) -> Case:
    """GPT-2, its head tied to the embedding, without dropout."""
    make = of(
        "GPT2LMHeadModel", n_layer=layers, n_embd=d, n_head=heads, vocab_size=vocabulary, n_positions=length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(f"{name} T={length} ({batch})", make, batch, text(vocabulary, length), next_tokens)


def resnet50(batch: int, side: int = 224, **options: Any) -> Case:
    """ResNet-50."""
    make = of("ResNetForImageClassification", num_labels=10, **options)
    return Case(f"ResNet-50 {side} ({batch})", make, batch, images(3, side, side), classes)


def vit(batch: int, side: int = 224, **options: Any) -> Case:
    """ViT-B/16."""
    make = of("ViTForImageClassification", num_labels=10, image_size=side, **options)
    return Case(f"ViT-B/16 {side} ({batch})", make, batch, images(3, side, side), classes)


LARGE = [
    gpt2("GPT-2 small", 16, 12, 768, 12),
    gpt2("GPT-2 medium", 8, 24, 1024, 16),
    resnet50(32),
    resnet50(256),
    vit(32),
    vit(128),
]

SMALL = [
    gpt2("GPT-2 tiny", 2, 1, 16, 2, 40, 12),
    resnet50(2, 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    vit(2, 16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, patch_size=8),
]
"""The same in so little that any machine runs them at once."""
