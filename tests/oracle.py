"""VarCon in plain Python scalar loops: shares no code, and no torch, with the package."""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _unit(a: Vector) -> list[float]:
    length = math.hypot(*a)
    return [x / length for x in a] if length > 0 else [0.0] * len(a)


def _mean_direction(vectors: Sequence[Vector]) -> list[float]:
    return _unit([math.fsum(column) for column in zip(*vectors, strict=True)])


def class_terms(
    z: Vector, w: dict[int, list[float]], label: int, temperature: float, epsilon: float
) -> dict[str, float]:
    """Eq. 7-13 of one row: loss, kl, nll, confidence, tau2."""
    logits = {k: _dot(z, centroid) / temperature for k, centroid in w.items()}
    top = max(logits.values())
    partition = math.fsum(math.exp(u - top) for u in logits.values())
    log_p = {k: u - top - math.log(partition) for k, u in logits.items()}
    confidence = math.exp(log_p[label])
    tau2 = (temperature - epsilon) + 2 * epsilon * confidence
    # q_y = e^{1/tau2} / (e^{1/tau2} + K - 1), each part scaled by e^{-1/tau2}
    scale = math.exp(-1 / tau2)
    normaliser = 1 + (len(w) - 1) * scale
    q = {k: (1.0 if k == label else scale) / normaliser for k in w}
    log_q = {k: (0.0 if k == label else -1 / tau2) - math.log(normaliser) for k in w}
    kl = math.fsum(q[k] * (log_q[k] - log_p[k]) for k in w)
    nll = -log_p[label]
    return {"loss": kl + nll, "kl": kl, "nll": nll, "confidence": confidence, "tau2": tau2}


def row_terms(
    features: Sequence[Vector], labels: Sequence[int], temperature: float = 0.1,
    epsilon: float = 0.02, *, normalize: bool = True, ignore_index: int | None = -100,
    leave_one_out: bool = False, ref_features: Sequence[Vector] | None = None,
    ref_labels: Sequence[int] | None = None,
) -> list[dict[str, float] | None]:  # fmt: skip
    """One dict (loss, kl, nll, confidence, tau2) a sample; None where it takes no part."""
    prepare = _unit if normalize else list
    rows = [prepare(x) for x in features]
    pool = rows if ref_features is None else [prepare(x) for x in ref_features]
    pool_labels = labels if ref_labels is None else ref_labels
    members: dict[int, list[int]] = {}
    for j, label in enumerate(pool_labels):
        if label != ignore_index:
            members.setdefault(label, []).append(j)
    centroids = {label: _mean_direction([pool[j] for j in js]) for label, js in members.items()}

    results: list[dict[str, float] | None] = []
    for i, (z, label) in enumerate(zip(rows, labels, strict=True)):
        if label == ignore_index or (leave_one_out and len(members[label]) == 1):
            results.append(None)
            continue
        mine = dict(centroids)
        if leave_one_out:
            mine[label] = _mean_direction([pool[j] for j in members[label] if j != i])
        results.append(class_terms(z, mine, label, temperature, epsilon))
    return results
