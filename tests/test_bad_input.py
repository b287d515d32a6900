"""What a user gets wrong, and what they are told."""

import warnings

import pytest
import torch

from varcon_loss import ProjectionHead, VarConLoss, varcon_loss, varcon_terms

X, Y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
PIXELS = torch.zeros(2, 3, 5).long()
VIEWS = X[:, None].repeat(1, 3, 1)


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (X.long(), Y, TypeError, "must be float16, bfloat16, float32 or float64, got torch.int64"),
        (X.tolist(), Y, TypeError, "features must be a tensor, got list"),
        (X[0], Y, ValueError, r"features must have shape \[N, D\] or \[B, V, ...\], got \[4\]"),
        (X, None, ValueError, "labels is None: VarCon is a supervised loss"),
        (X, Y.tolist(), TypeError, "labels must be a tensor, got list"),
        (X, Y[:5], ValueError, r"labels must have shape \[6\].*got \[5\]"),
        (X, Y.float(), TypeError, "labels must be integers.*got torch.float32"),
        (X, Y.bool(), TypeError, "labels must be integers.*got torch.bool"),
        (X, Y.to(torch.uint64), TypeError, "but uint64.*got torch.uint64"),
        (X, Y.to("meta"), ValueError, "labels are on meta but features are on cpu"),
        (X[:, :0], Y, ValueError, "have an empty dimension"),
        (X[:, :, None], Y, ValueError, "4 views of width 1: give features.flatten"),
        (X[:, None, :][:, :0], Y, ValueError, "have an empty dimension"),
        (X[:, :, None, None], Y, ValueError, r"4 views of width 1: give features.flatten\(1\)"),
        (X.to_sparse(), Y, TypeError, r"dense, got torch.sparse_coo: give features.to_dense\(\)"),
        (X.to_mkldnn(), Y, TypeError, "dense, got torch._mkldnn"),
        (torch.nested.as_nested_tensor([X, X]), Y[:2], TypeError, "dense, got nested"),
        (VIEWS, Y[:, None].repeat(1, 3), TypeError, r"\[6, 3\] .* each view .*flatten\(\)"),
    ],
)  # fmt: skip
def test_samples(features, labels, error, message, impl) -> None:
    with pytest.raises(error, match=message):
        VarConLoss(impl=impl)(features, labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": torch.nan}, ValueError, "temperature must be positive.* got nan"),
        ({"temperature": torch.inf}, ValueError, "temperature must be positive.* got inf"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -0.1}, ValueError, "temperature must be positive"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a number, got str"),
        ({"temperature": torch.tensor(0.1)}, TypeError, "temperature must be a number, got Tensor"),
        ({"epsilon": -0.01}, ValueError, "epsilon must be >= 0, got -0.01"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be >= 0, got nan"),
        ({"epsilon": 0.1}, ValueError, "epsilon must be smaller than temperature.*tau2"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .*got 'avg'"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int or None, got float"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 3.0}, TypeError, "num_classes must be an int or None, got float"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight must be a tensor.*got list"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"a floating-point tensor \[num_classes\]"),
        ({"weight": torch.ones(3).long()}, ValueError, "weight must be a floating-point tensor"),
        ({"weight": torch.ones(4), "num_classes": 3}, ValueError, "got 4 but num_classes=3"),
        ({"process_group": "all"}, ValueError, "process_group must be 'world'.*got 'all'"),
        ({"process_group": 3}, TypeError, "process_group must be 'world'.*got int"),
    ],
)  # fmt: skip
def test_options_fail_when_the_loss_is_made_and_in_the_function(options, error, message) -> None:
    with pytest.raises(error, match=message):
        VarConLoss(**options)
    with pytest.raises(error, match=message):
        varcon_loss(X, Y, **options)


@pytest.mark.parametrize("bad", [3, -1])
def test_labels_out_of_range(bad: int, impl: str) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, bad])
    for options in ({"num_classes": 3}, {"weight": torch.ones(3)}):
        with pytest.raises(ValueError, match=rf"lie in \[0, 3\).*-100\), got {bad}") as caught:
            varcon_loss(X, labels, impl=impl, **options)
        # A negative label is perhaps none.
        assert ("give ignore_index=-1" in str(caught.value)) == (bad == -1)
        assert bad != -1 or "raise num_classes" not in str(caught.value)


LACKING = torch.full((6,), -100)


@pytest.mark.parametrize(
    ("ref_features", "ref_labels", "options", "error", "message"),
    [
        (X, None, {}, ValueError, "ref_features given without ref_labels"),
        (None, Y, {}, ValueError, "ref_labels given without ref_features"),
        (X[:, :3], Y, {}, ValueError, "ref_features have width 3 but features have 4"),
        (X, Y[:2], {}, ValueError, r"ref_labels must have shape \[6\]"),
        (X, Y.float(), {}, TypeError, "ref_labels must be integers"),
        (X.to("meta"), Y.to("meta"), {}, ValueError, "ref_features are on meta but features"),
        (X, Y.tolist(), {}, TypeError, "ref_labels must be a tensor"),
        (X, Y.numpy(), {}, TypeError, "ref_labels must be a tensor"),
        (X, Y, {"leave_one_out": True}, ValueError, "leave_one_out has no meaning with ref_featur"),
        (X[:4], Y[:4], {}, ValueError, "ref_labels lack label 2, which labels contain"),
        (X[:4], Y[:4], {"num_classes": 7}, ValueError, "ref_labels lack label 2, which labels con"),
        (X, LACKING, {}, ValueError, "ref_labels lack label 0, 1, 2"),
        (X, LACKING, {"num_classes": 7}, ValueError, "ref_labels lack label 0, 1, 2"),
        (X, Y + 1, {"num_classes": 3}, ValueError, r"ref_labels must lie in \[0, 3\)"),
    ],
)  # fmt: skip
def test_reference_set(ref_features, ref_labels, options, error, message, impl) -> None:
    with pytest.raises(error, match=message):
        varcon_loss(X, Y, ref_features=ref_features, ref_labels=ref_labels, impl=impl, **options)


def test_weight_on_another_device() -> None:
    with pytest.raises(ValueError, match="weight is on meta but features are on cpu"):
        varcon_loss(X, Y, weight=torch.ones(3, device="meta"))
    with torch.device("meta"), pytest.warns(UserWarning, match="meta device and has no values"):
        VarConLoss(weight=torch.ones(3))


@pytest.mark.parametrize("name", ["normalize", "leave_one_out"])
def test_a_text_is_no_switch(name: str) -> None:
    for call in (varcon_loss, varcon_terms, lambda *_, **options: VarConLoss(**options)):
        for given in ("False", 0, None):
            with pytest.raises(TypeError, match=f"{name} must be True or False, got {given!r}"):
                call(X, Y, **{name: given})


@pytest.mark.parametrize(
    ("features", "labels", "advice"),
    [
        (X, Y.tolist(), r"give torch.as_tensor\(labels\)"), (X, Y.float(), r"give labels.long\(\)"),
        (X, torch.eye(3).long()[Y], r"give a table \[N, C\].*float.*argmax\(1\)"),
        (torch.randn(2, 4, 5), PIXELS[:, 0], r"features.transpose\(1, 2\).*\(0, 1\) and labels"),
        (torch.randn(2, 4, 3, 5), PIXELS, r"features.movedim\(1, -1\).*\(0, 2\) and labels"),
        (X, torch.tensor([[3.0, 5.0]] * 6), r"from 0 to 1, got .*\.long\(\)"),
        (X, 2 * torch.eye(3)[Y], r"class probabilities, from 0 to 1, got .*\.long\(\)"),
        (X, torch.tensor([[0.5, 1.5]] * 6), r"from 0 to 1, got .*\.long\(\)"),
        (X, Y[:3], r"2 views, one after the other, give labels.repeat\(2\)"),
        (X.view(3, 2, 4), Y, "views of an image share its label"),
        (X.view(2, 3, 4), Y[:3], r"features.transpose\(0, 1\)"),
        ([X, X], Y, r"torch.stack\(features, dim=1\)"),
        (Y, X, "labels are the second argument"),
    ],
)  # fmt: skip
def test_what_to_give_instead(features, labels, advice) -> None:
    with pytest.raises((TypeError, ValueError), match=advice):
        VarConLoss()(features, labels)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VarConLoss()(X, Y, indices_tuple=None), TypeError, "pytorch-metric-learning"),
        (lambda: VarConLoss()(X, Y, ref_emb=None), TypeError, "pytorch-metric-learning"),
        (lambda: VarConLoss(reducer=None), TypeError, "pytorch-metric-learning"),
        (lambda: VarConLoss(distance=None), TypeError, "pytorch-metric-learning"),
        (lambda: VarConLoss(embedding_size=None), TypeError, "pytorch-metric-learning"),
        (lambda: VarConLoss(label_smoothing=0.1), TypeError, "class probabilities"),
        (lambda: VarConLoss(0.01), ValueError, "Give epsilon too, as a fifth"),
        (lambda: VarConLoss(torch.tensor(0.1)), TypeError, r"not learned: give .item\(\)"),
        (lambda: varcon_loss(X, Y, ignore_index=2**70), ValueError, "int64 labels can have"),
        (lambda: ProjectionHead(8, kind="mlp2"), ValueError, "kind must be one of .*got 'mlp2'"),
        (lambda: ProjectionHead(8, 0), ValueError, "must be at least 1, got in_dim=8, dim=0"),
        (lambda: ProjectionHead(8)(X), ValueError, r"\[..., 8\], the head's in_dim, got \[6, 4\]"),
        (lambda: ProjectionHead(torch.nn.Linear(2, 2)), TypeError, "in_dim must be an int"),
    ],
)
def test_other_slips(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1.0])
def test_weights_that_cannot_be(bad: float) -> None:
    with pytest.raises(ValueError, match=r"finite and at least 0, got .* for class 1"):
        VarConLoss(weight=torch.tensor([1.0, bad]))
    criterion = VarConLoss(weight=torch.ones(2))
    with pytest.raises(ValueError, match="for class 1"):
        criterion.weight = torch.tensor([1.0, bad])


def test_batches_from_which_nothing_is_learned_are_told() -> None:
    with pytest.warns(UserWarning, match="alone in its class") as caught:
        VarConLoss()(X, torch.arange(6))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="of one class"):
        varcon_loss(X, torch.zeros(6, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VarConLoss()(X, Y)
        VarConLoss()(X.view(3, 2, 4), torch.arange(3))  # pairs of views
        VarConLoss(leave_one_out=True)(X, torch.arange(6))
        VarConLoss()(X[:1], Y[:1])
        with torch.no_grad():
            VarConLoss()(X, torch.arange(6))


MASK = Y[:, None] == Y


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK.long()], ids=["bool", "float", "int"])
def test_a_mask_of_pairs_is_refused(mask: torch.Tensor, views: bool) -> None:
    features = X[:, None].repeat(1, 2, 1) if views else X
    for call in (VarConLoss(), varcon_loss, varcon_terms):
        with pytest.raises(TypeError, match=r"mask of samples .* labels=mask.int\(\).argmax\(1\)"):
            call(features, mask)
    labels = mask.int().argmax(1)
    torch.testing.assert_close(VarConLoss()(features, labels), VarConLoss()(features, Y))


def test_an_identity_matrix_is_a_mask_and_one_hot_labels() -> None:
    with pytest.warns(UserWarning, match="SupCon's mask of samples of one class"):
        VarConLoss()(X, torch.eye(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VarConLoss()(X, torch.rand(6, 6))


def test_what_changes_nothing_is_taken() -> None:
    expected = VarConLoss(0.2, epsilon=0.04)(X, Y)
    same = VarConLoss(0.2, epsilon=0.04, contrast_mode="all", base_temperature=0.2)
    for loss in (
        same(X, Y), same(X, Y, None), same(X, Y, mask=None), same.terms(X, Y, mask=None).reduced,
        same(X, Y[:, None]), same(X, labels=Y, mask=None),
    ):  # fmt: skip
        assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: VarConLoss(0.1, 0.07), ("epsilon", "base_temperature")),
        (lambda: VarConLoss(0.2, 0.2, 0.2), ("epsilon", "base_temperature", "contrast_mode")),
        (lambda: VarConLoss(0.07, "all", 0.07), ("contrast_mode", "base_temperature")),
        (lambda: varcon_loss(X, Y, 0.1, 0.07), ("epsilon", "base_temperature")),
        (lambda: varcon_terms(X, Y, 0.1, 0.07), ("epsilon", "base_temperature")),
        (lambda: VarConLoss()(X, Y, (Y, Y, Y)), ("pytorch-metric-learning", "mask")),
        (lambda: VarConLoss()(X, X, Y, Y), ("ref_features",)),
        (lambda: VarConLoss()(X, None, MASK), ("mask", "labels")),
        (lambda: VarConLoss()(X, Y, reduction="sum"), ("reduction", "made")),
        (lambda: VarConLoss()(X, targets=Y), ("labels",)),
        (lambda: VarConLoss()(X, target_labels=Y), ("labels",)),
        (lambda: VarConLoss()(X, indexes=Y), ("labels",)),
        (lambda: VarConLoss(tau=0.1), ("temperature",)),
        (lambda: VarConLoss(temp=0.1), ("temperature",)),
        (lambda: VarConLoss(contrast_mode="one"), ("ref_features", "every view is an anchor")),
        (lambda: VarConLoss(base_temperature=0.07), ("temperature / base_temperature",)),
        (lambda: VarConLoss(torch.device("cpu")), ("features' device",)),
        (lambda: VarConLoss(torch.nn.Linear(2, 2)), ("integrations.text",)),
        (lambda: VarConLoss()(X), ("SupConLoss", "labels is None: VarCon is a supervised loss")),
        (lambda: VarConLoss().terms(X), ("labels is None: VarCon is a supervised loss",)),
        (lambda: varcon_loss(X), ("labels is None: VarCon is a supervised loss",)),
        (lambda: varcon_terms(X), ("labels is None: VarCon is a supervised loss",)),
        (lambda: VarConLoss()(X, mask=MASK), ("'mask': samples are compared with classes",)),
        (lambda: VarConLoss().terms(X, mask=MASK), ("'mask': samples are compared with", "labels")),
        (lambda: VarConLoss()(X, None, ref_label=X), ("'ref_label': did you mean ref_labels",)),
        (lambda: VarConLoss(temprature=0.07), ("'temprature': did you mean temperature",)),
        (lambda: VarConLoss(momentum=0.9), ("'momentum': did you mean centroid_momentum",)),
        (lambda: VarConLoss()(X, bogus=1), ("bogus", "features, labels, ref_features, ref_lab")),
    ],
)
def test_every_form_of_other_losses_is_answered(call, names) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    for name in names:
        assert name in str(caught.value)
