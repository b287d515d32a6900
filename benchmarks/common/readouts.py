"""How good are frozen features? Read out by nearest neighbours and by a linear classifier."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor, nn

from benchmarks.common.methods import embeddings
from varcon_loss import VarConLoss

PROBE_IMAGES = 10_000  # of larger training sets, drawn once: the fit takes most of a short run


def knn_predictions(train: Tensor, labels: Tensor, test: Tensor, k: int = 10) -> np.ndarray:
    """Majority of the ``k`` most similar training features, by cosine similarity."""
    model = make_pipeline(Normalizer(), KNeighborsClassifier(min(k, len(train))))
    return model.fit(train.numpy(), labels.numpy()).predict(test.numpy())


def linear_predictions(train: Tensor, labels: Tensor, test: Tensor) -> np.ndarray:
    """Multinomial logistic regression on standardised features of at most `PROBE_IMAGES`."""
    return linear_model(train, labels).predict(test.numpy())


def linear_model(train: Tensor, labels: Tensor) -> Pipeline:
    """The fitted probe of `linear_predictions`."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    if len(train) > PROBE_IMAGES:
        kept = np.random.default_rng(0).choice(len(train), PROBE_IMAGES, replace=False)
        train, labels = train[kept], labels[kept]
    return model.fit(train.numpy(), labels.numpy())


def centroid_predictions(objective: nn.Module, test: Tensor) -> np.ndarray | None:
    """The nearest remembered centroid, for objectives whose loss remembers centroids."""
    criterion = getattr(objective, "criterion", None)
    if not isinstance(criterion, VarConLoss) or criterion.centroid_momentum is None:
        return None
    objective.eval()
    return criterion.predict(embeddings(objective, test)).label.numpy()


def class_mean_predictions(train: Tensor, labels: Tensor, test: Tensor) -> np.ndarray:
    """The class whose mean of unit training features is most similar: nothing is learned."""
    unit = F.normalize(train, dim=1)
    sums = unit.new_zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, unit)
    return (F.normalize(test, dim=1) @ F.normalize(sums, dim=1).T).argmax(1).numpy()


def flat_map(features: Tensor) -> np.ndarray:
    """``[N, 2]`` by t-SNE, whose axes mean nothing."""
    few = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", random_state=0, perplexity=few).fit_transform(features.numpy())


def few_of_each(labels: Tensor, order: Tensor, shots: int, num_classes: int) -> Tensor:
    """Which samples are the first ``shots`` of each class in this ``order`` ``[N]``."""
    ordered = labels[order]
    return torch.cat([order[ordered == k][:shots] for k in range(num_classes)])


def accuracy(predictions: np.ndarray, labels: Tensor) -> float:
    return float(np.mean(predictions == labels.numpy()))
