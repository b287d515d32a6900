"""How good are embeddings of data that was not trained on? Each score by a library."""

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

SHOTS, DRAWS = (5, 1), 20  # labelled samples of a class, and how often they are drawn
BINS = 15  # of the calibration error


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``[C, D]``: sums of unit embeddings, made unit."""
    unit = F.normalize(embeddings, dim=1)
    return F.normalize(
        unit.new_zeros(num_classes, unit.shape[1]).index_add_(0, labels, unit), dim=1
    )


def linear_probe(embeddings: Tensor, labels: Tensor) -> Pipeline:
    """Multinomial logistic regression on standardised embeddings."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    return model.fit(embeddings.numpy(), labels.numpy())


def nearest_mean(means: Tensor, embeddings: Tensor) -> Tensor:
    """The class whose mean is most similar, ``[N]``."""
    return (F.normalize(embeddings, dim=1) @ means.T).argmax(1)


def few_labels(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int
) -> dict[str, float]:
    """Nearest mean of five and of one labelled sample a class, over draws that all share."""
    generator = torch.Generator().manual_seed(0)
    scores = dict.fromkeys(SHOTS, 0.0)
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        ordered = labels[order]
        # A sample's rank within its class, in this order.
        rank = torch.empty_like(ordered)
        for k in range(num_classes):
            where = ordered == k
            rank[where] = torch.arange(int(where.sum()))
        for shots in SHOTS:
            few = order[rank < shots]
            found = nearest_mean(class_means(train[few], labels[few], num_classes), test)
            scores[shots] += float((found == test_labels).float().mean()) / DRAWS
    return {f"top1_{shots}_shot": score for shots, score in scores.items()}


def retrieval(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall@1 and MAP@R among the samples themselves (Musgrave et al., ECCV 2020)."""
    wanted = {"precision_at_1": "recall_at_1", "mean_average_precision_at_r": "map_at_r"}
    calculator = AccuracyCalculator(
        include=tuple(wanted), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity(), 1024)
    )
    found = calculator.get_accuracy(embeddings, labels)
    return {ours: found[theirs] for theirs, ours in wanted.items()}


def confidence(
    logits: Tensor,
    labels: Tensor,
    unknown: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
) -> dict[str, float]:
    """Is the largest class probability the chance of being right, and low for unknown classes?

    Args:
        logits: of held-out samples ``[N, C]``.
        labels: of these ``[N]``.
        unknown: logits of samples of classes that were not trained ``[M, C]``.
        validation: logits on which one temperature is fitted ``[V, C]``.
        validation_labels: of these ``[V]``.
    """

    def loss(log_temperature: float) -> float:
        scaled = validation / torch.tensor(log_temperature).exp()
        return float(F.cross_entropy(scaled, validation_labels))

    fitted = float(torch.tensor(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x).exp())

    def ece(at: float) -> float:
        return float(
            multiclass_calibration_error(
                (logits / at).softmax(1), labels, logits.shape[1], n_bins=BINS
            )
        )

    known_sure, unknown_sure = ((x / fitted).softmax(1).amax(1) for x in (logits, unknown))
    is_known = torch.cat([torch.ones(len(known_sure)), torch.zeros(len(unknown_sure))]).numpy()
    sure = torch.cat([known_sure, unknown_sure]).numpy()
    false_rate, true_rate, _ = roc_curve(is_known, sure)
    return {
        "top1": float((logits.argmax(1) == labels).float().mean()),
        "ece": ece(1.0),
        "ece_fitted": ece(fitted),
        "fitted_temperature": fitted,
        "auroc": float(roc_auc_score(is_known, sure)),
        "fpr_at_95": float(false_rate[(true_rate >= 0.95).argmax()]),
    }


def by_frequency(found: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Accuracy overall, and on the third of classes with most, middling, fewest samples."""
    right = (found == labels).float()
    third = labels * 3 // num_classes
    names = ("head", "middle", "tail")
    return {"top1": float(right.mean())} | {
        name: float(right[third == i].mean()) for i, name in enumerate(names)
    }
