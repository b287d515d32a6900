"""Values and gradients of the authors' own implementation, run in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from varcon_loss import varcon_terms

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "official_varcon.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['case']}-{c['kind']}")
@pytest.mark.parametrize("known_classes", [False, True])
def test_agrees_with_the_authors(case: dict, known_classes: bool, impl: str) -> None:
    with np.load(DATA / "official_varcon.npz") as arrays:
        golden = {
            key.removeprefix(case["case"] + "_"): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(case["case"])
        }
    features = golden["features"].requires_grad_()
    terms = varcon_terms(
        features, golden["labels"], case["temperature"], epsilon=case["epsilon"],
        normalize=False,  # the authors' gradient does not go through a normalisation
        num_classes=int(golden["labels"].max()) + 1 if known_classes else None,
        impl=impl,
    )  # fmt: skip
    terms.reduced.backward()

    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(terms.reduced, golden["total_loss"], **close)
    torch.testing.assert_close(terms.kl.mean(), golden["kl_div"], **close)
    torch.testing.assert_close(terms.nll.mean(), golden["nll"], **close)
    torch.testing.assert_close(terms.confidence.mean(), golden["avg_confidence"], **close)
    torch.testing.assert_close(terms.tau2, golden["tau2"], **close)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, golden["grad"], rtol=1e-10, atol=1e-15)
    assert terms.num_classes == len(golden["labels"].unique())
