"""VarCon inside pytorch-metric-learning: everything that a built-in loss can do."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed

from benchmarks.common.ranks import run_ranks
from tests import oracle
from tests.conftest import IMPLEMENTATIONS, MakeBatch
from varcon_loss import varcon_loss
from varcon_loss.integrations.metric_learning import (
    CrossBatchMemory,
    SelfSupervisedLoss,
    VarConLoss,
)


def grad(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_values_and_gradients(impl: str, leave_one_out: bool, make_batch: MakeBatch) -> None:
    x, y = make_batch()
    loss = VarConLoss(0.2, 0.05, leave_one_out=leave_one_out, impl=impl)(x, y)
    core = varcon_loss(x, y, 0.2, 0.05, leave_one_out=leave_one_out)
    torch.testing.assert_close(loss, core)
    torch.testing.assert_close(grad(loss, x), grad(core, x))
    rows = oracle.row_terms(x.tolist(), y.tolist(), 0.2, 0.05, leave_one_out=leave_one_out)
    assert float(loss) == pytest.approx(sum(r["loss"] for r in rows if r) / len(rows), rel=1e-10)


def test_the_minus_hundredth_class_is_a_class(make_batch: MakeBatch) -> None:
    """PML knows no ignored label."""
    x, y = make_batch()
    torch.testing.assert_close(VarConLoss()(x, y.masked_fill(y == 1, -100)), VarConLoss()(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=dtype)
    _, anchors, positives, negatives = (None, *torch.randint(24, (3, 300)))
    for options in (
        {},
        {"indices_tuple": (anchors, positives, negatives)},
        {"ref_emb": x.detach(), "ref_labels": y},
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
            loss = VarConLoss()(x, y, **options)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        gradient = grad(loss, x)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_reference_set(make_batch: MakeBatch) -> None:
    x, y = make_batch(12, 6)
    ref_emb, ref_labels = make_batch(20, 4, seed=1)
    loss = VarConLoss()(x, y, ref_emb=ref_emb, ref_labels=ref_labels)
    known = y < 4  # the reference lacks classes 4 and 5: their anchors are dropped
    expected = varcon_loss(x[known], y[known], ref_features=ref_emb, ref_labels=ref_labels)
    torch.testing.assert_close(loss, expected)
    assert (grad(loss, x)[~known] == 0).all()
    torch.testing.assert_close(
        VarConLoss()(x, y, ref_emb=x.detach().clone(), ref_labels=y), VarConLoss()(x, y)
    )
    with pytest.raises(ValueError, match="leave_one_out has no meaning with ref_emb"):
        VarConLoss(leave_one_out=True)(x, y, ref_emb=ref_emb, ref_labels=ref_labels)


def test_degenerate_batches() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    cases = {
        "one class": (x, torch.zeros(5, dtype=torch.int64), {}),
        "empty": (x[:0], torch.empty(0, dtype=torch.int64), {}),
        "no reference": (x, torch.arange(5), {"ref_emb": x[:0], "ref_labels": torch.arange(0)}),
        "foreign reference": (
            x,
            torch.arange(5),
            {"ref_emb": x.detach(), "ref_labels": torch.arange(5) + 9},
        ),
    }
    for name, (features, labels, options) in cases.items():
        loss = VarConLoss()(features, labels, **options)
        assert loss.item() == 0, name
        assert (grad(loss, x) == 0).all(), name
    assert VarConLoss()(x, torch.arange(5)).isfinite()
    assert VarConLoss(leave_one_out=True)(x, torch.arange(5)).item() == 0
    with pytest.raises(ValueError, match="VarConLoss needs labels"):
        VarConLoss()(x)


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.AvgNonZeroReducer(),
        reducers.SumReducer(),
        reducers.ThresholdReducer(low=0.1),
        reducers.ClassWeightedReducer(torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0])),
        reducers.PerAnchorReducer(),
        reducers.DoNothingReducer(),
    ],
    ids=lambda r: type(r).__name__,
)
def test_reducers(reducer: torch.nn.Module, make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=torch.float32)
    each = varcon_loss(x, y, reduction="none")
    result = VarConLoss(reducer=copy.deepcopy(reducer))(x, y)
    name = type(reducer).__name__
    if name == "DoNothingReducer":
        torch.testing.assert_close(result["loss"]["losses"], each)
        assert torch.equal(result["loss"]["indices"], torch.arange(24))
        return
    expected = {
        "SumReducer": each.sum(),
        "ThresholdReducer": each[each > 0.1].mean(),
        "ClassWeightedReducer": (each * torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0])[y]).mean(),
    }.get(name, each.mean())
    torch.testing.assert_close(result, expected)
    assert grad(result, x).isfinite().all()


@pytest.mark.parametrize(
    "miner",
    [
        miners.AngularMiner(), miners.BatchEasyHardMiner(), miners.BatchHardMiner(),
        miners.DistanceWeightedMiner(), miners.HDCMiner(), miners.MultiSimilarityMiner(),
        miners.PairMarginMiner(), miners.TripletMarginMiner(), miners.UniformHistogramMiner(),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_miners_weigh_anchors(miner: torch.nn.Module, make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=torch.float32)
    ref_emb, ref_labels = make_batch(30, 5, dtype=torch.float32, seed=1)
    each = varcon_loss(x, y, reduction="none")
    chosen = miner(x, y)
    counts = torch.zeros(24)
    for index in torch.cat(chosen):
        counts[index] += 1
    weights = counts / counts.max() if counts.max() > 0 else torch.ones(24)
    torch.testing.assert_close(VarConLoss()(x, y, chosen), (each * weights).mean())

    if isinstance(miner, miners.HDCMiner):
        return  # refuses reference sets itself
    chosen = miner(x, y, ref_emb, ref_labels)
    each = varcon_loss(x, y, reduction="none", ref_features=ref_emb, ref_labels=ref_labels)
    counts = torch.zeros(24)
    anchors = torch.cat([chosen[0]] if len(chosen) == 3 else [chosen[0], chosen[2]])
    for index in anchors:
        counts[index] += 1
    weights = counts / counts.max() if counts.max() > 0 else torch.ones(24)
    loss = VarConLoss()(x, y, chosen, ref_emb, ref_labels)
    torch.testing.assert_close(loss, (each * weights).mean())


def test_regularisers_and_multiple_losses(make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=torch.float32)
    plain = VarConLoss()(x, y)
    regularised = VarConLoss(
        embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.1
    )
    torch.testing.assert_close(regularised(x, y), plain + 0.1 * x.norm(dim=1).mean())
    both = losses.MultipleLosses([VarConLoss(), losses.SupConLoss()], weights=[1.0, 0.5])
    torch.testing.assert_close(both(x, y), plain + 0.5 * losses.SupConLoss()(x, y))


def test_distances(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    raw = distances.DotProductSimilarity(normalize_embeddings=False)
    torch.testing.assert_close(VarConLoss(distance=raw)(x, y), varcon_loss(x, y, normalize=False))
    for distance in (distances.CosineSimilarity(), distances.DotProductSimilarity()):
        torch.testing.assert_close(VarConLoss(distance=distance)(x, y), varcon_loss(x, y))
    for distance in (
        distances.LpDistance(),
        distances.SNRDistance(),
        distances.CosineSimilarity(power=2),
    ):
        with pytest.raises(ValueError, match="must be CosineSimilarity"):
            VarConLoss(distance=distance)


def test_statistics_pickles_and_copies(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    loss_func = VarConLoss(collect_stats=True)
    value = loss_func(x, y)
    assert loss_func.num_classes == 5
    assert loss_func.num_anchors == 24
    assert loss_func.kl + loss_func.nll == pytest.approx(float(value))
    assert 0.08 <= loss_func.tau2 <= 0.12
    assert 0 < loss_func.confidence <= 1
    for twin in (pickle.loads(pickle.dumps(loss_func)), copy.deepcopy(loss_func)):
        assert torch.equal(twin(x, y), value)
    with pytest.raises(ValueError, match="epsilon must be smaller than temperature"):
        VarConLoss(temperature=0.1, epsilon=0.2)


def test_self_supervised(make_batch: MakeBatch) -> None:
    a, b = make_batch(10, 2)[0], make_batch(10, 2, seed=1)[0]
    expected = varcon_loss(torch.cat([a, b]), torch.arange(10).repeat(2))
    torch.testing.assert_close(SelfSupervisedLoss(VarConLoss())(a, b), expected)
    one_way = SelfSupervisedLoss(VarConLoss(), symmetric=False)(a, b)
    each = torch.arange(10)
    torch.testing.assert_close(one_way, varcon_loss(a, each, ref_features=b, ref_labels=each))
    assert SelfSupervisedLoss(losses.NTXentLoss())(a, b).isfinite()


class TestMemory:
    def test_follows_its_definition(self, make_batch: MakeBatch) -> None:
        memory = CrossBatchMemory(VarConLoss(), 16, memory_size=40)
        queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        for seed in range(5):
            x, y = make_batch(16, 5, seed=seed)
            queue.append((x.detach(), y))
            pool = [torch.cat(part)[-40:] for part in zip(*queue, strict=True)]
            loss = memory(x, y)
            expected = varcon_loss(x, y, ref_features=pool[0], ref_labels=pool[1])
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(grad(loss, x), grad(expected, x))

    def test_the_shortcut_changes_no_value(self, make_batch: MakeBatch) -> None:
        """Against PML's own memory, which lists all pairs; only its check of names is silenced."""

        class Stock(losses.CrossBatchMemory):
            @classmethod
            def check_loss_support(cls, name: str) -> None:
                pass

        ours, stock = (kind(VarConLoss(), 16, memory_size=40) for kind in (CrossBatchMemory, Stock))
        for seed in range(5):
            x, y = make_batch(16, 5, seed=seed)
            torch.testing.assert_close(ours(x, y), stock(x, y))
        mask = torch.arange(16) < 8
        x, y = make_batch(16, 5, seed=9)
        torch.testing.assert_close(ours(x, y, enqueue_mask=mask), stock(x, y, enqueue_mask=mask))

    @pytest.mark.parametrize("name", losses.CrossBatchMemory.supported_losses())
    def test_other_losses_are_untouched(self, name: str, make_batch: MakeBatch) -> None:
        make = {"MarginLoss": lambda: losses.MarginLoss(num_classes=5)}.get(
            name, getattr(losses, name)
        )
        torch.manual_seed(0)
        ours = CrossBatchMemory(make(), 16, memory_size=40)
        stock = losses.CrossBatchMemory(make(), 16, memory_size=40)
        for seed in range(4):
            x, y = make_batch(16, 5, dtype=torch.float32, seed=seed)
            torch.manual_seed(seed)
            a = ours(x, y)
            torch.manual_seed(seed)
            b = stock(x, y)
            assert torch.equal(a, b)

    def test_miner_and_tuple(self, make_batch: MakeBatch) -> None:
        x, y = make_batch(16, 5, dtype=torch.float32)
        mined = CrossBatchMemory(
            VarConLoss(), 16, memory_size=40, miner=miners.MultiSimilarityMiner()
        )
        assert mined(x, y).isfinite()
        tuples = miners.TripletMarginMiner()(x, y)
        assert CrossBatchMemory(VarConLoss(), 16, memory_size=40)(x, y, tuples).isfinite()

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="leave_one_out has no meaning with a memory"):
            CrossBatchMemory(VarConLoss(leave_one_out=True), 16)
        with pytest.raises(Exception, match="CrossBatchMemory not supported for ArcFaceLoss"):
            CrossBatchMemory(losses.ArcFaceLoss(5, 16), 16)


def ranks_share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(6, 8, generator=g, dtype=torch.float64), torch.tensor(
        [0, 0, 1, 1, 2, 3]
    ) + 3 * rank


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4).double()


def on_rank(rank: int, world_size: int) -> dict:
    x, y = ranks_share(rank)
    results = {}
    for title in ("plain", "reference", "efficient", "memory"):
        model = DistributedDataParallel(net())
        loss = VarConLoss()
        options = {}
        if title == "reference":
            options = {"ref_emb": x[:, :4].clone(), "ref_labels": y}
        if title == "memory":
            loss = CrossBatchMemory(loss, 4, memory_size=24)
        wrapper = pml_distributed.DistributedLossWrapper(loss, efficient=title == "efficient")
        value = wrapper(model(x), y, **options)
        value.backward()
        results[title] = value.detach(), model.module.weight.grad.clone()
    dist.barrier()
    return results


def test_two_processes(tmp_path: Path) -> None:
    """DistributedLossWrapper returns world size times its share: DDP's average is the truth."""
    ranks = run_ranks(on_rank, 2, tmp_path)
    x, y = (torch.cat(part) for part in zip(*(ranks_share(r) for r in range(2)), strict=True))
    for title in ("plain", "reference", "efficient", "memory"):
        model = net()
        loss = (
            CrossBatchMemory(VarConLoss(), 4, memory_size=24) if title == "memory" else VarConLoss()
        )
        options = {"ref_emb": x[:, :4].clone(), "ref_labels": y} if title == "reference" else {}
        value = loss(model(x), y, **options)
        value.backward()
        mean = torch.stack([r[title][0] for r in ranks]).mean()
        # The efficient mode scales each rank's own mean by the world size.
        torch.testing.assert_close(mean, 2 * value.detach(), msg=title)
        for r in ranks:
            scale = 2.0 if title == "efficient" else 1.0
            torch.testing.assert_close(r[title][1], scale * model.weight.grad, msg=title)


def test_what_importing_says_where_the_host_is_missing_or_too_new() -> None:
    def run(version: str | None) -> str:
        script = f"""
import sys, types
version = {version!r}
if version is None:
    sys.modules["pytorch_metric_learning"] = None
else:
    fake = types.ModuleType("pytorch_metric_learning"); fake.__version__ = version
    sys.modules["pytorch_metric_learning"] = fake
try:
    import varcon_loss.integrations.metric_learning
except ImportError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "pip install 'varcon-loss[metric-learning]'" in run(None)
    assert "supports pytorch-metric-learning >=2.2,<3, found 3.0.1" in run("3.0.1")
