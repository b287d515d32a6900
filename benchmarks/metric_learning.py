"""VarCon beside SupCon in pytorch-metric-learning (PML), with PML's own pieces.

`train_and_score` is the documented example: a plain loop with PML's sampler, a miner and its
`AccuracyCalculator`, on classes that the test set does not share. `memory_cost` measures our
`CrossBatchMemory` against PML's.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pytorch_metric_learning import losses, miners, samplers
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn

from benchmarks.common import measure, options, results
from benchmarks.common.data import ImageData, Split, load
from benchmarks.common.encoders import SmallCNN, make_augmentation
from benchmarks.common.terminal import console, print_table, progress_bar, written
from varcon_loss import ProjectionHead
from varcon_loss import varcon_loss as core_loss
from varcon_loss.integrations.metric_learning import CrossBatchMemory, VarConLoss

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "VarConLoss": lambda: VarConLoss(temperature=0.1),
    "SupConLoss": lambda: losses.SupConLoss(temperature=0.1),
}


def command(
    epochs: options.Epochs = 15,
    seed: options.Seed = 0,
    cost: Annotated[bool, typer.Option(help="also measure CrossBatchMemory against PML's")] = False,
    out: options.Out = Path("runs/metric-learning"),
) -> None:
    """VarCon beside SupCon in pytorch-metric-learning: retrieval among unseen classes."""
    env = results.environment()
    saved = [results.save("metric-learning", compare(epochs=epochs, seed=seed), env, out)]
    if cost:
        rows = memory_cost()
        print_table(
            "One forward and backward with a full memory of 65,536, N = 256, D = 128",
            ("loss", "time, ms", "peak extra memory, MiB"),
            [(row["loss"], *measure.time_and_memory(row)) for row in rows],
        )
        ratio = adapter_overhead()
        console.print(f"The adapter takes {ratio:.2f}x the core's time at N = 4096, K = 1000.")
        rows.append({"loss": "adapter over core", "ratio": ratio})
        saved.append(results.save("metric-learning-memory", rows, env, out))
    written(*saved, *(path.with_suffix(".csv") for path in saved))


def train_and_score(
    data: ImageData,
    loss_func: nn.Module,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> dict[str, float]:
    """Learn from the first half of the classes; retrieve among the second half.

    Returns:
        ``precision_at_1`` and ``mean_average_precision_at_r`` on classes never seen in training.
    """
    torch.manual_seed(seed)
    half = data.num_classes // 2
    seen = data.train.labels < half
    images, labels = data.train.images[seen], data.train.labels[seen]
    encoder = SmallCNN()
    model = nn.Sequential(encoder, ProjectionHead(encoder.out_dim, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    miner = miners.MultiSimilarityMiner()
    augment = make_augmentation(flips=data.flips)
    sampler = samplers.MPerClassSampler(
        labels, m=4, batch_size=200, length_before_new_iter=len(labels)
    )
    for _ in range(epochs):
        model.train()
        for batch in torch.tensor(list(sampler)).split(200):
            embeddings = model(augment(images[batch]))
            hard_pairs = miner(embeddings, labels[batch])
            loss = loss_func(embeddings, labels[batch], hard_pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        on_epoch(loss.item())

    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
    )
    unseen = _unseen(data.test, half)
    model.eval()
    with torch.no_grad():
        embeddings = model(unseen.images)
    return calculator.get_accuracy(embeddings, unseen.labels)


def _unseen(split: Split, half: int) -> Split:
    kept = split.labels >= half
    return Split(split.images[kept], split.labels[kept])


def compare(*, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Train with each of `LOSSES` on ``mnist-pairs`` and print retrieval on unseen classes."""
    data = load("mnist-pairs")
    console.print(
        "two MNIST digits side by side: trained on 50 classes, scored on images of 50 others"
    )
    rows = []
    with progress_bar() as bar:
        for name, make in LOSSES.items():
            task = bar.add_task(name, total=epochs, note="")

            def show(loss: float, task=task) -> None:
                bar.update(task, advance=1, note=f"loss {loss:.3f}")

            start = time.perf_counter()
            scores = train_and_score(data, make(), epochs=epochs, seed=seed, on_epoch=show)
            seconds = time.perf_counter() - start
            rows.append(
                {"loss": name, "seed": seed, "epochs": epochs, **scores, "seconds": seconds}
            )
    print_table(
        "Retrieval among unseen classes, one seed",
        ("loss", "precision@1, %", "MAP@R, %", "training time, s"),
        [
            (
                row["loss"], f"{100 * row['precision_at_1']:.1f}",
                f"{100 * row['mean_average_precision_at_r']:.1f}", f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    return rows


class StockMemory(losses.CrossBatchMemory):
    """PML's memory as it is; only its list of names is widened, to accept VarCon."""

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that may be wrapped."""
        return CrossBatchMemory.supported_losses()


MEMORIES: dict[str, Callable[[int, int], nn.Module]] = {
    "VarConLoss, our CrossBatchMemory": lambda d, m: CrossBatchMemory(VarConLoss(), d, m),
    "VarConLoss, PML's CrossBatchMemory": lambda d, m: StockMemory(VarConLoss(), d, m),
    "SupConLoss, PML's CrossBatchMemory": lambda d, m: StockMemory(losses.SupConLoss(), d, m),
}


def memory_cost(
    num_rows: int = 256, memory_size: int = 65536, dim: int = 128, num_classes: int = 1000
) -> list[dict[str, Any]]:
    """Time and peak memory of one forward and backward with a full memory, a process each."""
    rows = []
    for name in MEMORIES:
        result = measure.in_child(
            _weigh_memory, name, num_rows, memory_size, dim, num_classes,
            timeout=600, memory_limit=None,
        )  # fmt: skip
        rows.append({"loss": name, "N": num_rows, "memory": memory_size, "D": dim, **result})
    return rows


def _weigh_memory(
    name: str, num_rows: int, memory_size: int, dim: int, num_classes: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, dim, generator=generator, requires_grad=True)
    y = torch.randint(num_classes, (num_rows,), generator=generator)
    loss_func = MEMORIES[name](dim, memory_size)
    loss_func.embedding_memory.copy_(torch.randn(memory_size, dim, generator=generator))  # type: ignore[operator]
    loss_func.label_memory.copy_(torch.randint(num_classes, (memory_size,), generator=generator))  # type: ignore[operator]
    loss_func.has_been_filled = True  # type: ignore[assignment]
    fresh = copy.deepcopy(loss_func.state_dict())
    before = measure.reset_peak("cpu")
    measure.step(loss_func, x, y)
    extra = measure.peak("cpu") - before
    loss_func.load_state_dict(fresh)
    loss_func.queue_idx = 0  # type: ignore[assignment]
    value = float(loss_func(x, y).detach())
    times = []
    for _ in range(7 if "our" in name else 3):
        x.grad = None
        start = time.perf_counter()
        measure.step(loss_func, x, y)
        times.append(time.perf_counter() - start)
    return {"value": value, "median": sorted(times)[len(times) // 2], "peak_bytes": extra}


def adapter_overhead(num_rows: int = 4096, num_classes: int = 1000, dim: int = 128) -> float:
    """Time of the adapter over time of the core, forward and backward, interleaved medians."""
    x = torch.randn(num_rows, dim, requires_grad=True)
    y = torch.randint(num_classes, (num_rows,))
    adapter = VarConLoss()
    times: dict[str, list[float]] = {"adapter": [], "core": []}
    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "adapter": adapter,
        "core": core_loss,
    }
    torch.testing.assert_close(adapter(x, y), core_loss(x, y))
    for _ in range(41):
        for name, loss in candidates.items():
            x.grad = None
            start = time.perf_counter()
            measure.step(loss, x, y)
            times[name].append(time.perf_counter() - start)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return medians["adapter"] / medians["core"]
