"""Several labels an image: the two digits of a pair, as two of twenty classes."""

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.common.data import ImageData
from benchmarks.common.readouts import accuracy, knn_predictions


def multi_hot(data: ImageData, labels: Tensor) -> Tensor:
    """``[N, 20]`` float32, a one for each digit: 0 to 9 on the left, then 0 to 9 on the right.

    Raises:
        ValueError: the labels of ``data`` have no parts.
    """
    if not data.parts_of_label:
        raise ValueError(f"several labels need images in pairs, got {data.name!r}")
    parts = [F.one_hot(labels // divisor % 10, 10) for divisor in data.parts_of_label.values()]
    return torch.cat(parts, dim=1).float()


def several_scores(
    features: Tensor, hot: Tensor, test: Tensor, test_hot: Tensor
) -> dict[str, float | None]:
    """A probe a label on frozen features.

    Args:
        features: ``[N, F]`` of training images.
        hot: their `multi_hot` labels.
        test: ``[M, F]`` of held-out images.
        test_hot: their `multi_hot` labels.

    Returns:
        The share of labels told right by a linear probe each and by kNN; of images whose labels
        are all told right; and the probes' average precision, a mean over labels. None where
        features are not finite.
    """
    if not bool(features.isfinite().all() and test.isfinite().all()):
        return dict.fromkeys(("linear", "knn", "all labels", "average precision"))
    probe = make_pipeline(
        StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=300))
    )
    probe.fit(features.numpy(), hot.numpy())
    predicted = probe.predict(test.numpy())
    scores = probe.predict_proba(test.numpy())
    return {
        "linear": accuracy(predicted, test_hot),
        "knn": accuracy(knn_predictions(features, hot, test), test_hot),
        "all labels": float((predicted == test_hot.numpy()).all(1).mean()),
        "average precision": float(average_precision_score(test_hot.numpy(), scores)),
    }
