"""A small language model with LoRA, and text for it, both made in place."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.>"
LENGTH = 32
WORDS = (
    "the",
    "a",
    "one",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "likes",
    "red",
    "old",
    "small",
    "and",
    "then",
    "not",
    "it",
)


class LoRALinear(nn.Module):
    """A frozen linear map, and a trained one of low rank beside it: names as peft gives them."""

    def __init__(self, inside: int, out: int, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inside, out).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


class Block(nn.Module):
    """Attention and a small network, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = LoRALinear(width, 3 * width)
        self.output = LoRALinear(width, width)
        self.up, self.down = LoRALinear(width, 2 * width), LoRALinear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Predicts the next character. Trained are the adapters, the norms and the head."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width).requires_grad_(False)
        self.position = nn.Embedding(LENGTH, width).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, text: Tensor) -> Tensor:
        """The loss: mean negative log-likelihood of each character after the ones before it, in nats."""
        x = self.embedding(text[:, :-1]) + self.position.weight[: text.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


class Sentences(Dataset):
    """Sentences of random words, each twice: ``the cat sees.>the cat sees.``, cut to one length."""

    def __init__(self, count: int) -> None:
        generator = random.Random(0)
        self.texts = []
        for _ in range(count):
            half = " ".join(generator.choices(WORDS, k=3))[: LENGTH // 2 - 1]
            self.texts.append(f"{half}.>{half}{' ' * LENGTH}"[:LENGTH])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([ALPHABET.index(letter) for letter in self.texts[index]])
