"""The expected loss by definition, in plain Python: one loss for each class a sample may have."""

import math
from collections.abc import Sequence

from tests.oracle import Vector, _unit, class_terms

NAMES = ("loss", "kl", "nll", "confidence", "tau2")


def centroids(rows: Sequence[Vector], soft: Sequence[Vector]) -> dict[int, list[float]]:
    """Of the classes that have a share of any row."""
    return {
        r: _unit(
            [
                math.fsum(y[r] * z[d] for z, y in zip(rows, soft, strict=True))
                for d in range(len(rows[0]))
            ]
        )
        for r in range(len(soft[0]))
        if any(y[r] > 0 for y in soft)
    }


def row_terms(
    features: Sequence[Vector], soft: Sequence[Vector], temperature: float = 0.1,
    epsilon: float = 0.02, *, normalize: bool = True, weight: Vector | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """One dict a sample, the loss under weighted shares; all zeros for a row of zeros."""
    rows = [_unit(x) if normalize else list(x) for x in features]
    # A row of zeros takes no part, whatever its features.
    kept = [(z, y) for z, y in zip(rows, soft, strict=True) if any(y)]
    if not kept:
        return [dict.fromkeys(NAMES, 0.0) for _ in rows]
    w = centroids(*zip(*kept, strict=True))
    results = []
    for z, y in zip(rows, soft, strict=True):
        expected = dict.fromkeys(NAMES, 0.0)
        for r, share in enumerate(y):
            if share > 0:
                terms = class_terms(z, w, r, temperature, epsilon)
                for name in NAMES:
                    scale = weight[r] if name == "loss" and weight is not None else 1.0
                    expected[name] += share * scale * terms[name]
        results.append(expected)
    return results
