"""Tables of class probabilities: how they are read, and what they sum to."""

import pytest
import torch
from torch import Tensor

from tests.counting import LargestWritten
from varcon_loss import soft_labels as module
from varcon_loss.soft_labels import SoftLabels, class_masses, in_slots, read_soft_labels, soft_sums

F64 = torch.float64


def mixed(num_rows: int, num_classes: int, background: float = 0.0, seed: int = 0) -> Tensor:
    """Two classes a row, perhaps the same, the rest of each row ``background``."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.full((num_rows, num_classes), background, dtype=F64)
    for share in (0.3, 0.7):
        classes = torch.randint(num_classes, (num_rows, 1), generator=generator)
        table.scatter_(1, classes, share)
    return table


@pytest.mark.parametrize("num_classes", [12, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("background", [0.0, 0.001])
@pytest.mark.parametrize("contiguous", [True, False])
def test_few_entries_are_found(num_classes: int, background: float, contiguous: bool) -> None:
    table = mixed(50, num_classes, background)
    table[3] = 0
    table[4] = background
    table[5, -1], table[6, 0] = 0.5, 0.25
    given = table if contiguous else table.T.contiguous().T
    soft, valid, broken = read_soft_labels(given, F64, name="labels")
    assert soft.slots is not None
    assert soft.slots.shape[1] <= 3
    assert (soft.background is None) == (background == 0)
    assert torch.equal(soft.table(num_classes, F64), table)
    ordered = soft.slots.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert broken is None
    assert valid is not None
    assert torch.equal(valid, table.sum(1) > 0)


def test_a_full_table_stays_where_it_is() -> None:
    for table in (torch.rand(40, 100), torch.ones(3, 3)):
        soft, valid, _ = read_soft_labels(table, torch.float32, name="labels")
        assert soft.values.data_ptr() == table.data_ptr()
        assert soft.slots is None
        assert valid is None


def test_one_full_row_among_few_entries() -> None:
    table = mixed(100, 64)
    table[50] = torch.rand(64, dtype=F64)
    assert read_soft_labels(table, F64, name="labels")[0].slots is None


@pytest.mark.parametrize("table", [mixed(300, 1000), mixed(300, 1000, 0.01), torch.rand(300, 1000)])
def test_nothing_of_the_tables_size_is_made(table: Tensor) -> None:
    with LargestWritten() as largest:
        read_soft_labels(table, torch.float32, name="labels")
    assert largest.elements <= table.numel() / 10


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("table", [mixed(40, 100).float(), torch.rand(40, 100)])
def test_an_unusable_entry_is_named(bad: float, table: Tensor) -> None:
    table = table.clone()
    table[20, 7] = bad
    with pytest.raises(ValueError, match=rf"ref_labels .*got {bad} for sample 20 and class 7"):
        read_soft_labels(table, torch.float32, name="ref_labels")


def test_unusable_entries_are_marked_where_values_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "values_may_be_read", lambda _: False)
    table = torch.rand(6, 5)
    table[0, 1], table[1, 2], table[2, 3], table[3] = -1.0, torch.nan, torch.inf, 0.0
    _, valid, broken = read_soft_labels(table, torch.float32, views=2, name="labels")
    assert valid is not None
    assert broken is not None
    assert broken.tolist() == [True] * 6 + [False] * 6
    assert valid.tolist() == [True] * 6 + [False] * 2 + [True] * 4


def test_no_value_is_read_on_a_device() -> None:
    table = torch.empty(6, 5, device="meta")
    soft, *_ = read_soft_labels(table, torch.float32, name="labels")
    assert class_masses(soft, 5, torch.float32).shape == (5,)
    assert soft_sums(soft, torch.empty(6, 3, device="meta"), 5).shape == (5, 3)


@pytest.mark.parametrize("background", [0.0, 0.01])
@pytest.mark.parametrize("form", ["entries", "table"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kept", [None, [0, 3, 4, 30, 39], [7]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_sums(background: float, form: str, views: int, kept: list | None, dtype) -> None:
    table, unit = mixed(30, 40, background).to(dtype), torch.randn(30 * views, 6, dtype=F64)
    soft = SoftLabels(table, views=views)
    if form == "entries":
        soft, *_ = read_soft_labels(table, F64, views, name="labels")
        assert soft.slots is not None
    size, exact = 40, table.double()
    if kept is not None:
        soft, size, exact = in_slots(soft, torch.tensor(kept)), len(kept), exact[:, kept]
        if form == "entries":
            assert soft.slots is not None
            ordered = soft.slots.sort(1).values
            assert (ordered[:, 1:] > ordered[:, :-1]).all()
    exact = exact.repeat_interleave(views, 0)
    torch.testing.assert_close(soft.table(size, F64), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(class_masses(soft, size, F64), exact.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(soft_sums(soft, unit, size), exact.T @ unit, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("background", [0.0, 0.01])
@pytest.mark.parametrize("form", ["entries", "table"])
def test_many_rows_add_up(background: float, form: str) -> None:
    """Added one by one in float32, 600,000 numbers would be off by 1e-3."""
    num_rows = 600_000
    table = torch.full((num_rows, 8), background)
    table[:, 2], table[:, 5] = 0.3, 0.7
    soft = SoftLabels(table)
    if form == "entries":
        soft, *_ = read_soft_labels(table, torch.float32, name="labels")
        assert soft.slots is not None
    unit = torch.full((num_rows, 2), 0.7)
    exact = table.double().sum(0)
    masses, sums = class_masses(soft, 8, torch.float32), soft_sums(soft, unit, 8)
    torch.testing.assert_close(masses.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(sums.double(), exact[:, None] * unit[:1].double(), rtol=3e-4, atol=0)
