"""What is trained on and what is measured on: one training set, and held-out parts by protocol.

`icons` has two kinds of held-out drawings, and one training serves both. Half of the names and
three fifths of the families of sets are trained on. Drawings of these names by other families are
*unseen styles*; drawings of other names are *unseen classes*.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.data import load
from benchmarks.common.encoders import (
    IMAGENET_WIDTH,
    EfficientNet,
    SmallCNN,
    make_augmentation,
    shifted_icons,
)
from benchmarks.common.icons import Icons, load_icons
from benchmarks.common.terminal import progress_bar
from varcon_loss import ProjectionHead

SPLIT_SEED = 0  # the same split for every run: seeds vary training, never what is held out
DIM = 128  # of the embedding
AUGMENTED = 4  # views of a drawing whose frozen features are kept, beside the drawing itself
REGIMES = ("frozen", "whole")


@dataclass(frozen=True)
class Samples:
    inputs: Tensor  # images [N, C, H, W], or cached features [N, 1 + views, F]
    labels: Tensor  # [N] int64

    def __getitem__(self, rows: Tensor) -> "Samples":
        return Samples(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    name: str
    train: Samples
    held_out: dict[tuple[str, str], Samples]  # by protocol and split
    num_classes: int
    make_encoder: Callable[[], nn.Module]  # inputs as `clean` gives them -> embeddings [N, DIM]
    augmented: Callable[[Tensor], Tensor]  # one random view of each input
    clean: Callable[[Tensor], Tensor]


def make_task(
    data: str,
    *,
    regime: str = "whole",
    root: Path | None = None,
    icons: Path | None = None,
    cache: Path = Path("runs/cache"),
    fetch: bool = False,
) -> Task:
    """``icons``, or one of `data.DATASETS` in a small CNN.

    Raises:
        ValueError: no such data or regime; or files are missing, with what to do.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    if data == "icons":
        return _icons(load_icons(icons, cache, fetch=fetch), cache, regime)
    if regime != "whole":
        raise ValueError(f"frozen features exist for icons only, got data {data!r}: --regime whole")
    images = load(data, root)
    channels = images.train.images.shape[1]
    parts = {
        ("images", split): Samples(part.images, part.labels)
        for split, part in (("validation", images.validation), ("test", images.test))
    }
    return Task(
        data,
        Samples(images.train.images, images.train.labels),
        parts,
        images.num_classes,
        lambda: nn.Sequential(cnn := SmallCNN(channels), ProjectionHead(cnn.out_dim, DIM)),
        make_augmentation(flips=images.flips),
        lambda inputs: inputs,
    )


def _icons(icons: Icons, cache: Path, regime: str) -> Task:
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    sizes = icons.families.bincount()
    order = torch.randperm(len(sizes), generator=generator)
    share = torch.empty(len(sizes))
    share[order] = sizes[order].cumsum(0) / sizes.sum()  # of the drawings up to this family
    style = share[icons.families]
    count = len(icons.classes)
    place = torch.empty(count)
    place[torch.randperm(count, generator=generator)] = torch.arange(count) / count
    name = place[icons.labels]
    trained, validation_names, other_names = name < 0.5, (name >= 0.5) & (name < 0.6), name >= 0.6
    parts = {
        ("styles", "validation"): trained & (style > 0.6) & (style <= 0.75),
        ("styles", "test"): trained & (style > 0.75),
        ("classes", "validation"): validation_names,
        ("classes", "test"): other_names,
        ("unknown", "validation"): validation_names & (style > 0.75),
        ("unknown", "test"): other_names & (style > 0.75),  # of the same families as known ones
    }
    if regime == "frozen":
        inputs = _features(icons.images, cache / f"features-{icons.package}.pt")
        encoder = lambda: ProjectionHead(IMAGENET_WIDTH, DIM, hidden_dim=512)  # noqa: E731
        augmented, clean = _one_view, lambda features: features[:, 0].float()
    else:
        inputs = icons.images
        encoder = _whole_encoder
        augmented, clean = shifted_icons, lambda images: images
    icons.licences.to_csv(cache / "icons-sets.csv", index=False)
    # Trained classes first, numbered from 0.
    everything = Samples(inputs, place.argsort().argsort()[icons.labels])
    return Task(
        "icons",
        everything[trained & (style <= 0.6)],
        {key: everything[rows] for key, rows in parts.items()},
        int((place < 0.5).sum()),
        encoder,
        augmented,
        clean,
    )


def _whole_encoder() -> nn.Module:
    head = ProjectionHead(IMAGENET_WIDTH, DIM, hidden_dim=512)
    return nn.Sequential(OrderedDict(pretrained=EfficientNet(), head=head))


def _one_view(features: Tensor) -> Tensor:
    view = torch.randint(1, features.shape[1], (len(features),))
    return features[torch.arange(len(features)), view].float()


@torch.no_grad()
def _features(images: Tensor, stored: Path) -> Tensor:
    """``[N, 1 + AUGMENTED, F]`` in half precision, of each drawing and augmented views of it."""
    if not stored.exists():
        encoder = EfficientNet().eval()
        views = []
        with torch.random.fork_rng(), progress_bar() as bar:
            torch.manual_seed(SPLIT_SEED)
            task = bar.add_task("frozen features", total=len(images), note="")
            for batch in images.split(256):
                looks = [batch, *(shifted_icons(batch) for _ in range(AUGMENTED))]
                views.append(torch.stack([encoder(look).half() for look in looks], 1))
                bar.update(task, advance=len(batch), note="")
        torch.save(torch.cat(views), stored)
    return torch.load(stored)


def long_tailed(task: Task, imbalance: float) -> Task:
    """The task with class sizes that fall exponentially, from first to last by ``imbalance``.

    Measured as *tail*: on the styles never seen, where all classes are as frequent as before.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    labels = task.train.labels
    largest = int(labels.bincount().float().quantile(0.5))
    kept = []
    for k in range(task.num_classes):
        rows = (labels == k).nonzero()[:, 0]
        wanted = largest * imbalance ** (-k / (task.num_classes - 1))
        drawn = torch.randperm(len(rows), generator=generator)[: max(1, round(wanted))]
        kept.append(rows[drawn])
    source = "styles" if ("styles", "test") in task.held_out else "images"
    parts = {("tail", split): task.held_out[source, split] for split in ("validation", "test")}
    return replace(task, train=task.train[torch.cat(kept)], held_out=parts)
