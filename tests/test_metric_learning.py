"""VarCon inside pytorch-metric-learning: everything that a built-in loss can do."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed

import varcon_loss as core_package
from benchmarks.common.ranks import run_ranks
from tests import oracle
from tests.conftest import IMPLEMENTATIONS, MakeBatch, gradient_of, same_step
from varcon_loss import varcon_loss
from varcon_loss.integrations import metric_learning
from varcon_loss.integrations.metric_learning import (
    CrossBatchMemory,
    SelfSupervisedLoss,
    VarConLoss,
)  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_values_and_gradients(impl: str, leave_one_out: bool, make_batch: MakeBatch) -> None:
    x, y = make_batch()
    loss = VarConLoss(0.2, epsilon=0.05, leave_one_out=leave_one_out, impl=impl)(x, y)
    core = varcon_loss(x, y, 0.2, epsilon=0.05, leave_one_out=leave_one_out)
    same_step(loss, core, x)
    rows = oracle.row_terms(x.tolist(), y.tolist(), 0.2, 0.05, leave_one_out=leave_one_out)
    assert loss.item() == pytest.approx(sum(r["loss"] for r in rows if r) / len(rows), rel=1e-10)


def test_the_minus_hundredth_class_is_a_class(make_batch: MakeBatch) -> None:
    """PML knows no ignored label."""
    x, y = make_batch()
    torch.testing.assert_close(VarConLoss()(x, y.masked_fill(y == 1, -100)), VarConLoss()(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=dtype)
    triplets = tuple(torch.randint(24, (3, 300)))
    reference = {"ref_emb": x.detach(), "ref_labels": y}
    for options in ({}, {"indices_tuple": triplets}, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
            loss = VarConLoss()(x, y, **options)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        gradient = gradient_of(loss, x)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_reference_set(make_batch: MakeBatch) -> None:
    x, y = make_batch(12, 6)
    ref_emb, ref_labels = make_batch(20, 4, seed=1)
    ref_emb = ref_emb.detach()
    loss = VarConLoss()(x, y, ref_emb=ref_emb, ref_labels=ref_labels)
    known = y < 4  # the reference lacks classes 4 and 5: their anchors are dropped
    expected = varcon_loss(x[known], y[known], ref_features=ref_emb, ref_labels=ref_labels)
    torch.testing.assert_close(loss, expected)
    assert (gradient_of(loss, x)[~known] == 0).all()
    copied = x.detach().clone()
    loss = VarConLoss()(x, y, ref_emb=copied, ref_labels=y)
    torch.testing.assert_close(loss, VarConLoss()(x, y))
    # Other labels of the same embeddings are a reference set, too.
    found = [VarConLoss()(x, y, ref_emb=ref, ref_labels=y.roll(1)) for ref in (x, copied)]
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="leave_one_out has no meaning with ref_emb"):
        VarConLoss(leave_one_out=True)(x, y, ref_emb=ref_emb, ref_labels=ref_labels)


@pytest.mark.parametrize("way", ["self-supervised", "ref_emb"])
def test_a_second_tower_that_does_not_learn_is_said_once(way: str) -> None:
    """No gradient flows through centroids: said in PML's terms, where one was asked for."""
    image_tower, text_tower = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    images, texts = torch.randn(2, 10, 6)
    each = torch.arange(10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as in a script: one line for a whole training
        for _ in range(3):
            if way == "ref_emb":
                reference = {"ref_emb": text_tower(texts), "ref_labels": each}
                loss = VarConLoss()(image_tower(images), each, **reference)
            else:
                one_way = SelfSupervisedLoss(VarConLoss(), symmetric=False)
                loss = one_way(image_tower(images), text_tower(texts))
            loss.backward()
    (only,) = caught
    assert only.category is UserWarning
    for part in ("ref_emb no gradient", "second tower", "symmetric=True", "ref_emb.detach()"):
        assert part in str(only.message)
    assert image_tower.weight.grad is not None
    assert text_tower.weight.grad is None


def test_where_no_gradient_is_lost_nothing_is_said(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    other, labels = make_batch(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VarConLoss()(x, y, ref_emb=other.detach(), ref_labels=labels)
        with torch.no_grad():
            VarConLoss()(x, y, ref_emb=other, ref_labels=labels)
        # DistributedLossWrapper(efficient=True): the batch, then what other ranks sent.
        pool = torch.cat([x, other.detach()])
        VarConLoss()(x, y, ref_emb=pool, ref_labels=torch.cat([y, labels]))
        CrossBatchMemory(VarConLoss(), 16, memory_size=40)(x, y)


def test_shapes_and_dtypes_are_refused_in_the_terms_of_pml(make_batch: MakeBatch) -> None:
    x, y = make_batch(8, 2, dim=4)
    each = torch.arange(8)
    views = x.view(4, 2, 4)
    cases = [
        (ValueError, r"embeddings must have shape \[N, D\], got \[4, 2, 4\]", (views, y[:4])),
        (ValueError, "ref_emb must have shape", (x, y, None, views, y[:4])),
        (ValueError, "ref_labels beside ref_emb", (x, y, None, x.detach())),
        (TypeError, "labels must be integers", (x, y.double())),
        (TypeError, "ref_labels must be integers", (x, y, None, x.detach(), y > 0)),
    ]
    for kind, match, arguments in cases:
        with pytest.raises(kind, match=match):
            VarConLoss()(*arguments)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int16, torch.int32):
        # A batch and a memory may differ in the dtype of labels.
        loss = VarConLoss()(x, y, ref_emb=x.detach(), ref_labels=y.to(dtype))
        torch.testing.assert_close(loss, VarConLoss()(x, y))
    flat = VarConLoss()(views.flatten(0, 1), each[:4].repeat_interleave(2))
    torch.testing.assert_close(flat, varcon_loss(views, each[:4]))


def test_degenerate_batches() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    each, nothing = torch.arange(5), torch.arange(0)
    for name, features, labels, options in (
        ("one class", x, 0 * each, {}), ("empty", x[:0], nothing, {}),
        ("no reference", x, each, {"ref_emb": x[:0], "ref_labels": nothing}),
        ("foreign reference", x, each, {"ref_emb": x.detach(), "ref_labels": each + 9}),
    ):  # fmt: skip
        loss = VarConLoss()(features, labels, **options)
        assert loss.item() == 0, name
        assert (gradient_of(loss, x) == 0).all(), name
    assert VarConLoss()(x, each).isfinite()
    assert VarConLoss(leave_one_out=True)(x, each).item() == 0
    with pytest.raises(ValueError, match="VarConLoss needs labels"):
        VarConLoss()(x)


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(), reducers.AvgNonZeroReducer(), reducers.SumReducer(),
        reducers.ThresholdReducer(low=0.1), reducers.ClassWeightedReducer(CLASS_WEIGHTS),
        reducers.PerAnchorReducer(), reducers.DoNothingReducer(),
    ],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
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
        "SumReducer": each.sum(), "ThresholdReducer": each[each > 0.1].mean(),
        "ClassWeightedReducer": (each * CLASS_WEIGHTS[y]).mean(),
    }.get(name, each.mean())  # fmt: skip
    torch.testing.assert_close(result, expected)
    assert gradient_of(result, x).isfinite().all()


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
    ref_emb = ref_emb.detach()
    others = (ref_emb, ref_labels)
    reference = {"ref_features": ref_emb, "ref_labels": ref_labels}
    for given, options in (((), {}), (others, reference)):
        if given and isinstance(miner, miners.HDCMiner):
            return  # refuses reference sets itself
        chosen = miner(x, y, *given)
        each = varcon_loss(x, y, reduction="none", **options)
        anchors = chosen[::2] if len(chosen) == 4 else chosen[:1]
        counts = torch.cat(anchors if given else chosen).bincount(minlength=24)
        weights = counts / counts.max().clamp(min=1)
        torch.testing.assert_close(VarConLoss()(x, y, chosen, *given), (each * weights).mean())


@pytest.mark.parametrize("columns", [3, 4], ids=["triplets", "pairs"])
def test_a_miner_that_chose_nobody(columns: int, make_batch: MakeBatch) -> None:
    """As PML's pair losses: 0, with a graph; not the loss of everybody."""
    x, y = make_batch()
    nobody = tuple(torch.empty(0, dtype=torch.int64) for _ in range(columns))
    reference = {"ref_emb": x.detach().clone(), "ref_labels": y}
    for loss_func, options in (
        (VarConLoss(), {}), (VarConLoss(), reference), (VarConLoss(leave_one_out=True), {}),
        (losses.SupConLoss(), {}),
    ):  # fmt: skip
        value = loss_func(x, y, nobody, **options)
        assert value.item() == 0
        assert (gradient_of(value, x) == 0).all()
    one = torch.tensor([3])
    some = (one, *nobody[1:]) if columns == 4 else (one, one, one)
    each = varcon_loss(x, y, reduction="none")
    torch.testing.assert_close(VarConLoss()(x, y, some), each[3] / 24)


def test_regularisers_and_multiple_losses(make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=torch.float32)
    plain = VarConLoss()(x, y)
    options = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1}
    regularised = VarConLoss(**options)
    torch.testing.assert_close(regularised(x, y), plain + 0.1 * x.norm(dim=1).mean())
    both = losses.MultipleLosses([VarConLoss(), losses.SupConLoss()], weights=[1.0, 0.5])
    torch.testing.assert_close(both(x, y), plain + 0.5 * losses.SupConLoss()(x, y))


def test_distances(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    raw = distances.DotProductSimilarity(normalize_embeddings=False)
    torch.testing.assert_close(VarConLoss(distance=raw)(x, y), varcon_loss(x, y, normalize=False))
    for distance in (distances.CosineSimilarity(), distances.DotProductSimilarity()):
        torch.testing.assert_close(VarConLoss(distance=distance)(x, y), varcon_loss(x, y))
    wrong = [distances.LpDistance(), distances.SNRDistance(), distances.CosineSimilarity(power=2)]
    for distance in (*wrong, distances.DotProductSimilarity(p=1)):
        with pytest.raises(ValueError, match="by cosine or dot product: distance must be"):
            VarConLoss(distance=distance)
        loss_func = VarConLoss()
        loss_func.distance = distance  # later
        with pytest.raises(ValueError, match="by cosine or dot product"):
            loss_func(x, y)
    VarConLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False, p=1))


def test_statistics_pickles_and_copies(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    loss_func = VarConLoss(collect_stats=True)
    value = loss_func(x, y)
    assert loss_func.num_classes == 5
    assert loss_func.num_anchors == 24
    assert loss_func.kl + loss_func.nll == pytest.approx(value.item())
    assert 0.08 <= loss_func.tau2 <= 0.12
    assert 0 < loss_func.confidence <= 1
    for twin in (pickle.loads(pickle.dumps(loss_func)), copy.deepcopy(loss_func)):
        assert torch.equal(twin(x, y), value)
    with pytest.raises(ValueError, match="epsilon must be smaller than temperature"):
        VarConLoss(temperature=0.1, epsilon=0.2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reference", [False, True])
def test_statistics_of_the_distance(normalize: bool, reference: bool, make_batch) -> None:
    """Those of a built-in loss, and only where they were asked for."""
    x, y = make_batch()
    ref_emb, ref_labels = make_batch(20, 5, seed=1)
    options = {"ref_emb": ref_emb.detach(), "ref_labels": ref_labels} if reference else {}
    found = []
    for make in (losses.SupConLoss, VarConLoss):
        kept = {"normalize_embeddings": normalize, "collect_stats": True}
        distance = distances.DotProductSimilarity(**kept)
        make(distance=distance)(x, y, **options)
        found.append({n: v for n, v in vars(distance).items() if n.endswith("_norm")})
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0])
    plain = VarConLoss(collect_stats=True)
    plain(x, y)
    assert not hasattr(plain.distance, "final_avg_ref_norm")


def test_every_option_of_the_core_is_taken_or_has_another_place() -> None:
    taken = inspect.signature(VarConLoss).parameters
    for name, option in inspect.signature(core_package.VarConLoss).parameters.items():
        kinds = (option.VAR_KEYWORD, option.VAR_POSITIONAL)
        if option.kind in kinds or name == "exchange":
            continue
        if name in taken:
            assert option.default == taken[name].default
            continue
        with pytest.raises(TypeError, match=rf"does not take {name}: (use|leave) "):
            VarConLoss(**{name: option.default})
    text = repr(CrossBatchMemory(VarConLoss(0.2, epsilon=0.05), 16))
    assert "temperature=0.2, epsilon=0.05, leave_one_out=False, impl='auto'" in text


@pytest.mark.parametrize("name", ["CrossBatchMemory", "SelfSupervisedLoss"])
def test_wrappers_that_compare_names(name: str, make_batch: MakeBatch) -> None:
    """PML's own refuse; ours take the adapter's loss, and what derives from it."""
    options = {"embedding_size": 16} if name == "CrossBatchMemory" else {}
    stock, ours = getattr(losses, name), getattr(metric_learning, name)
    with pytest.raises(Exception, match=f"{name} not supported for VarConLoss"):
        stock(VarConLoss(), **options)
    with pytest.raises(TypeError, match=rf"{name} got varcon_loss.VarConLoss: from .* import"):
        ours(core_package.VarConLoss(), **options)

    mine = type("Mine", (VarConLoss,), {})
    x, y = make_batch()
    for kind in (VarConLoss, mine, type("MineToo", (mine,), {})):
        wrapper = ours(kind(), **options)
        assert isinstance(wrapper, stock)
        assert wrapper(x, x if name == "SelfSupervisedLoss" else y).isfinite()


def test_self_supervised(make_batch: MakeBatch) -> None:
    a, b = make_batch(10, 2)[0], make_batch(10, 2, seed=1)[0]
    expected = varcon_loss(torch.cat([a, b]), torch.arange(10).repeat(2))
    torch.testing.assert_close(SelfSupervisedLoss(VarConLoss())(a, b), expected)
    one_way = SelfSupervisedLoss(VarConLoss(), symmetric=False)(a, b.detach())
    each = torch.arange(10)
    expected = varcon_loss(a, each, ref_features=b.detach(), ref_labels=each)
    torch.testing.assert_close(one_way, expected)
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
            same_step(loss, expected, x)

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
        options = {"num_classes": 5} if name == "MarginLoss" else {}
        make = getattr(losses, name)
        kinds = (CrossBatchMemory, losses.CrossBatchMemory)
        both = [kind(make(**options), 16, 40) for kind in kinds]
        both[0].load_state_dict(both[1].state_dict())
        for seed in range(4):
            x, y = make_batch(16, 5, dtype=torch.float32, seed=seed)
            found = []
            for memory in both:
                torch.manual_seed(seed)
                found.append(memory(x, y))
            assert torch.equal(*found)

    def test_miner_and_tuple(self, make_batch: MakeBatch) -> None:
        x, y = make_batch(16, 5, dtype=torch.float32)
        miner = miners.MultiSimilarityMiner()
        for options, chosen in (({"miner": miner}, None), ({}, miners.TripletMarginMiner()(x, y))):
            assert CrossBatchMemory(VarConLoss(), 16, 40, **options)(x, y, chosen).isfinite()

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="leave_one_out has no meaning with a memory"):
            CrossBatchMemory(VarConLoss(leave_one_out=True), 16)
        with pytest.raises(Exception, match="CrossBatchMemory not supported for ArcFaceLoss"):
            CrossBatchMemory(losses.ArcFaceLoss(5, 16), 16)


CASES = ("plain", "reference", "efficient", "memory")


def ranks_share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    labels = torch.tensor([0, 0, 1, 1, 2, 3]) + 3 * rank
    return torch.randn(6, 8, generator=g, dtype=torch.float64), labels


def arranged(case: str, x: torch.Tensor, y: torch.Tensor) -> tuple:
    """What every process makes, and the only one: network, loss, reference set."""
    torch.manual_seed(0)
    loss = CrossBatchMemory(VarConLoss(), 4, memory_size=24) if case == "memory" else VarConLoss()
    options = {"ref_emb": x[:, :4].clone(), "ref_labels": y} if case == "reference" else {}
    return torch.nn.Linear(8, 4).double(), loss, options


def on_rank(rank: int, world_size: int) -> dict:
    x, y = ranks_share(rank)
    results = {}
    for case in CASES:
        net, loss, options = arranged(case, x, y)
        model = DistributedDataParallel(net)
        wrapper = pml_distributed.DistributedLossWrapper(loss, efficient=case == "efficient")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "VarConLoss gives ref_emb no gradient")
            value = wrapper(model(x), y, **options)
        value.backward()
        results[case] = value.detach(), net.weight.grad.clone()
    dist.barrier()
    return results


def test_two_processes(tmp_path: Path) -> None:
    """DistributedLossWrapper returns world size times its share: DDP's average is the truth."""
    ranks = run_ranks(on_rank, 2, tmp_path)
    x, y = (torch.cat(part) for part in zip(*(ranks_share(r) for r in range(2)), strict=True))
    for case in CASES:
        net, loss, options = arranged(case, x, y)
        value = loss(net(x), y, **options)
        value.backward()
        mean = torch.stack([r[case][0] for r in ranks]).mean()
        # The efficient mode scales each rank's own mean by the world size.
        torch.testing.assert_close(mean, 2 * value.detach(), msg=case)
        for r in ranks:
            scale = 2.0 if case == "efficient" else 1.0
            torch.testing.assert_close(r[case][1], scale * net.weight.grad, msg=case)


def test_what_importing_says_where_the_host_is_missing_or_another(tmp_path: Path) -> None:
    """The installation is asked: PML 3 has no ``__version__``."""
    versions = ("3.0.0", "3.1.0rc1", "2.1.2", "1.7.3", "22.0")
    for version in versions:  # a PML that is no more than a name and an installed version
        info = tmp_path / version / f"pytorch_metric_learning-{version}.dist-info"
        info.mkdir(parents=True)
        (tmp_path / version / "pytorch_metric_learning.py").touch()
        (info / "METADATA").write_text(f"Name: pytorch-metric-learning\nVersion: {version}\n")
    folders = [str(tmp_path / version) for version in versions]
    script = f"""
import importlib.metadata, sys, types

def attempt():
    try:
        import varcon_loss.integrations.metric_learning
    except ImportError as error:
        print(error)

sys.modules["pytorch_metric_learning"] = None
attempt()
for folder in {folders!r}:
    del sys.modules["pytorch_metric_learning"]
    sys.path.insert(0, folder)
    attempt()

# Bundled into an application, with no record of what is installed.
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
attempt()
sys.modules["pytorch_metric_learning"].__version__ = "3.5"
attempt()
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "varcon_loss.integrations.metric_learning supports pytorch-metric-learning >=2.2,<3, "
        f"found {version}: pip install 'pytorch-metric-learning>=2.2,<3'"
        for version in ("none", *versions, "none", "3.5")
    ]
