"""Icons of 191 sets as data: a class is a name, its samples are drawings by many designers.

The drawings come with the npm package ``@iconify/json``. They are rendered once and kept in a cache
folder; nothing of them is committed. Two things make the data honest: only sets under a licence
that allows it are read, and sets that copy one another count as one *family*.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor

from benchmarks.common.terminal import progress_bar

PACKAGE = "@iconify/json"
LICENCES = (
    "MIT", "Apache-2.0", "CC0-1.0", "ISC", "OFL-1.1", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0",
)  # fmt: skip
NO_PICTURES = ("Logos", "Flags / Maps")  # the same drawing in every set
SIZE = 64  # pixels
FEWEST = 30  # drawings that a class must have
# Parts of a name that say how an icon is drawn, not what it shows.
STYLE = (
    "outline", "outlined", "fill", "filled", "solid", "line", "linear", "bold", "light", "thin",
    "regular", "duotone", "round", "rounded", "sharp", "twotone", "broken", "bulk", "flat", "color",
    "colored", "stroke", "baseline", "two", "tone", "alt", "variant", "icon", "o", "s", "l",
    "1", "2", "3", "01", "02", "03", "10", "11", "12", "14", "15", "16", "18", "20", "24", "28",
    "32", "48", "64",
)  # fmt: skip
STYLE_IN_FRONT = ("outline", "baseline", "round", "sharp", "twotone", "ios", "md", "icon")
SAME = 0.97  # correlation of two drawings above which one is called a copy of the other
COPIES = 0.2  # share of copies among common classes that makes two sets one family


@dataclass(frozen=True)
class Icons:
    package: str  # its name with its version
    images: Tensor  # [N, 3, 64, 64] uint8
    labels: Tensor  # [N] int64
    families: Tensor  # [N] int64, of the set that a drawing comes from
    classes: list[str]
    licences: pd.DataFrame  # a row a set: prefix, name, author, licence, url, family, drawings


def load_icons(package: Path | None, cache: Path, *, fetch: bool = False) -> Icons:
    """The drawings, rendered at the first call and read from ``cache`` after it.

    Args:
        package: the package's .tgz file; None looks in ``cache`` and the working folder.
        cache: folder for what is rendered.
        fetch: get the package by ``npm pack`` where it is not there.

    Raises:
        ValueError: the package is not there, with what to type.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found = _find(package, cache, fetch)
    stored = cache / f"{found.stem}.pt"
    if not stored.exists():
        torch.save(vars(_render(found)), stored)
    return Icons(**torch.load(stored, weights_only=False))


def _find(package: Path | None, cache: Path, fetch: bool) -> Path:
    if package is not None and not package.is_file():
        raise ValueError(f"no file {package}: `npm pack {PACKAGE}` gets it")
    found = [*Path().glob("iconify-json-*.tgz"), *cache.glob("iconify-json-*.[pt]*")]
    here = [package] if package else sorted(found, key=lambda path: path.stem)
    if not here and fetch:
        if shutil.which("npm") is None:
            raise ValueError(f"--fetch needs npm: install it, or bring the .tgz of {PACKAGE}")
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True)
        here = sorted(cache.glob("iconify-json-*.tgz"))
    if not here:
        raise ValueError(
            f"the icons are not here: run `npm pack {PACKAGE}` and give --icons FILE, "
            "or --fetch to have it run for you (104 MB)"
        )
    return here[-1]


def class_of(name: str) -> str:
    """The name of an icon without what says how it is drawn: ``home-outline-24`` is ``home``."""
    parts = name.lower().split("-")
    while len(parts) > 1 and parts[-1] in STYLE:
        parts.pop()
    while len(parts) > 1 and parts[0] in STYLE_IN_FRONT:
        parts.pop(0)
    return "-".join(parts)


def _sets(package: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(package) as files:
        for member in files:
            if re.fullmatch(r"package/json/[\w-]+\.json", member.name):
                content = json.load(files.extractfile(member))  # type: ignore[arg-type]
                info = content["info"]
                allowed = info["license"].get("spdx") in LICENCES
                if allowed and info.get("category") not in NO_PICTURES:
                    yield content


def _render(package: Path) -> Icons:
    sets = {content["prefix"]: content for content in _sets(package)}
    chosen: dict[str, dict[str, str]] = defaultdict(dict)  # class -> set -> the plainest name
    for prefix, content in sets.items():
        for name, icon in content["icons"].items():
            known = chosen[class_of(name)].get(prefix)
            if not icon.get("hidden") and (known is None or len(name) < len(known)):
                chosen[class_of(name)][prefix] = name
    classes = sorted(name for name, drawings in chosen.items() if len(drawings) >= FEWEST)
    prefixes = sorted({prefix for name in classes for prefix in chosen[name]})
    images, labels, drawn_by = [], [], []
    with progress_bar() as bar:
        task = bar.add_task("rendering icons", total=len(classes), note="")
        for k, name in enumerate(classes):
            for prefix, drawing in sorted(chosen[name].items()):
                images.append(_picture(sets[prefix], drawing))
                labels.append(k)
                drawn_by.append(prefixes.index(prefix))
            bar.update(task, advance=1, note=name)
    pixels, k = torch.from_numpy(np.stack(images)), torch.tensor(labels)
    by = torch.tensor(drawn_by)
    family = _families(
        pixels, k, by, [sets[prefix]["info"]["author"]["name"] for prefix in prefixes]
    )
    licences = pd.DataFrame(
        {
            "prefix": prefix,
            "name": (info := sets[prefix]["info"])["name"],
            "author": info["author"]["name"],
            "licence": info["license"]["spdx"],
            "url": info["license"].get("url", info["author"].get("url", "")),
            "family": int(family[i]),
            "drawings": int((by == i).sum()),
        }
        for i, prefix in enumerate(prefixes)
    )
    return Icons(package.stem, pixels, k, family[by], classes, licences)


def _picture(content: dict[str, Any], name: str) -> np.ndarray:
    """``[3, SIZE, SIZE]``, black on white where the icon has no colours of its own."""
    import resvg_py

    icon = content["icons"][name]

    def of(key: str, otherwise: float) -> float:
        return icon.get(key, content.get(key, otherwise))

    left, top, width, height = of("left", 0), of("top", 0), of("width", 16), of("height", 16)
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{SIZE}" height="{SIZE}" color="#000">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=drawing, background="#fff"))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)


def _families(images: Tensor, labels: Tensor, by: Tensor, authors: list[str]) -> Tensor:
    """A number a set: equal for sets of one author, and for sets that copy one another."""
    small = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1)
    small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    count = len(authors)
    common, copies = torch.zeros(count, count), torch.zeros(count, count)
    for k in labels.unique():
        rows = labels == k
        sets = by[rows]
        alike = (small[rows] @ small[rows].T > SAME).float()
        where = (sets[:, None].expand_as(alike), sets[None, :].expand_as(alike))
        common.index_put_(where, torch.ones_like(alike), accumulate=True)
        copies.index_put_(where, alike, accumulate=True)
    one_family = DisjointSet(range(count))
    for i in range(count):
        for j in range(i):
            copied = common[i, j] >= 5 and copies[i, j] >= COPIES * common[i, j]
            if authors[i] == authors[j] or copied:
                one_family.merge(i, j)
    number = {root: n for n, root in enumerate(sorted({one_family[i] for i in range(count)}))}
    return torch.tensor([number[one_family[i]] for i in range(count)])
