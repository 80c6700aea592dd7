"""Models for pictures: a small convolutional net for each usual size, and ResNet-18."""

from typing import Literal

from torch import Tensor, nn

from atoll.client.data import DataInfo
from atoll.protocols.errors import UsageError

Norm = Literal["group", "batch"]


def cnn(info: DataInfo) -> nn.Module:
    """A convolutional net that fits the pictures.

    Under 16 pixels a side (digits): two 3x3 layers of 16 and 32, one pooling. Grey ones (MNIST):
    conv5x5(8)-pool-conv5x5(16)-pool-64, 54,314 parameters on 28x28. Colour pictures (CIFAR-10):
    three blocks of two 3x3 layers of 32, 64 and 128 with GroupNorm, then 128.
    """
    channels, height, width = _picture("cnn", info)
    if min(height, width) < 16:
        body = [*_conv(channels, 16, 3), *_conv(16, 32, 3), nn.MaxPool2d(2)]
        last, halved, hidden = 32, 2, 64
    elif channels == 1:
        body = [*_conv(1, 8, 5), nn.MaxPool2d(2), *_conv(8, 16, 5), nn.MaxPool2d(2)]
        last, halved, hidden = 16, 4, 64
    else:
        body, last = [], channels
        for out in (32, 64, 128):
            body += [*_conv(last, out, 3, norm=True), *_conv(out, out, 3, norm=True)]
            body += [nn.MaxPool2d(2)]
            last = out
        halved, hidden = 8, 128
    flat = last * (height // halved) * (width // halved)
    head = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, info.classes)]
    return nn.Sequential(*body, *head)


def resnet18(info: DataInfo, norm: Norm = "group", width: int = 64) -> nn.Module:
    """ResNet-18 with a 3x3 stem for small pictures, https://arxiv.org/abs/1512.03385.

    `norm` "group" by default: the running statistics of "batch" do not average well where clients
    hold different data (https://arxiv.org/abs/1910.00189).
    """
    channels, _, _ = _picture("resnet18", info)
    if norm not in ("group", "batch"):
        raise UsageError("FL-S102", f"resnet18: norm={norm!r}", "give norm=group or norm=batch")
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        _norm(norm, width),
        nn.ReLU(),
    ]
    before = width
    for stage in range(4):
        out = width << stage
        layers += [_Block(before, out, norm, stride=2 if stage else 1), _Block(out, out, norm)]
        before = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, info.classes)]
    return nn.Sequential(*layers, *head)


class _Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, before: int, out: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, out, 3, stride, padding=1, bias=False),
            _norm(norm, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            _norm(norm, out),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != out:
            self.around = nn.Sequential(
                nn.Conv2d(before, out, 1, stride, bias=False), _norm(norm, out)
            )

    def forward(self, x: Tensor) -> Tensor:  # (batch, before, h, w) -> (batch, out, h/s, w/s)
        summed: Tensor = self.body(x) + self.around(x)
        return summed.relu()


def _conv(before: int, out: int, side: int, norm: bool = False) -> list[nn.Module]:
    layer = nn.Conv2d(before, out, side, padding=side // 2)
    return [layer, *([_norm("group", out)] if norm else []), nn.ReLU()]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(min(32, max(1, channels // 8)), channels)


def _picture(model: str, info: DataInfo) -> tuple[int, int, int]:
    if len(info.shape) != 3:
        raise UsageError(
            "FL-S104",
            f"{model} wants pictures (channels, height, width), the data is {info.shape}",
            "use --model mlp",
        )
    return info.shape
