"""A small transformer that predicts the next character: pre-norm, learned positions, tied head."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll.aggregation.checks import at_least
from atoll.client.data import DataInfo
from atoll.protocols.errors import UsageError

HEAD = 32  # channels of an attention head


class CharLM(nn.Module):
    """Tokens (batch, time) -> logits (batch, time, vocabulary), time up to `context`.

    `context` 0 takes the windows of the data. The head shares the embedding's weights.
    """

    def __init__(self, info: DataInfo, width: int = 64, depth: int = 2, context: int = 0) -> None:
        super().__init__()
        if info.kind != "text":
            raise UsageError("FL-S104", f"charlm wants text, the data is {info.kind}", "use mlp")
        at_least(1, width=width)
        at_least(0, depth=depth)
        context = context or info.shape[0]
        if width % HEAD or context < info.shape[0]:
            raise UsageError(
                "FL-S102",
                f"charlm: width={width}, context={context}",
                f"give a width divisible by {HEAD} and a context of at least {info.shape[0]}",
            )
        self.tokens = nn.Embedding(info.classes, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)  # as a head, N(0, 1) would start at loss 20

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x = self.tokens(tokens_bt) + self.places.weight[: tokens_bt.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> the same
        x = x + self._attend(self.norm1(x))
        return torch.add(x, self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(b, t, width))
        return mixed
