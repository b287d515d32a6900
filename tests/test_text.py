"""VarCon as a loss of sentence-transformers and SetFit, in their real trainers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import MakeBatch
from varcon_loss import varcon_loss
from varcon_loss.integrations.text import VarConLoss

DOCS = Path(__file__).parent.parent / "docs" / "text.md"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ball", "goal", "team", "bank", "stock"]
WORDS += ["price", "vote", "law", "party"]
TOPICS = (WORDS[5:8], WORDS[8:11], WORDS[11:])


class Rows(torch.nn.Module):
    """The least that is a text model: rows of numbers as embeddings."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["rows"]}


def test_one_column_is_a_batch_and_several_are_views(make_batch: MakeBatch) -> None:
    x, y = make_batch()
    other, _ = make_batch(seed=1)
    options = {"temperature": 0.2, "epsilon": 0.05, "leave_one_out": True}
    criterion = VarConLoss(Rows(), **options)
    for columns, features in (([x], x), ([x, other], torch.stack([x, other], 1))):
        loss = criterion([{"rows": rows} for rows in columns], y)
        expected = varcon_loss(features, y, 0.2, epsilon=0.05, leave_one_out=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
    assert criterion.get_config_dict() == options
    assert "2506.07413" in criterion.citation


def test_a_memory_learns_with_the_model(make_batch: MakeBatch) -> None:
    x, y = make_batch(dtype=torch.float32)
    criterion = VarConLoss(Rows(), num_classes=5, feature_dim=16, centroid_momentum=0.9)
    criterion([{"rows": x}], y)
    before = criterion.criterion.centroids.clone()
    criterion.model.eval()  # what a trainer calls; the loss itself stays in training mode
    criterion([{"rows": -x}], y)
    assert torch.equal(criterion.criterion.centroids, before)


def test_what_is_refused(make_batch: MakeBatch) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, .* got 0.1"):
        VarConLoss(0.1)
    with pytest.raises(TypeError, match="temperatur"):
        VarConLoss(Rows(), temperatur=0.1)
    x, y = make_batch()
    with pytest.raises(TypeError, match="labels"):
        VarConLoss(Rows())([{"rows": x}], y.double())  # a column of scores


def test_importing_needs_no_host() -> None:
    code = (
        "import sys; sys.modules['sentence_transformers'] = sys.modules['transformers'] = None; "
        "import varcon_loss.integrations.text; assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(count)]
    picks = torch.randint(3, (count, 4), generator=generator).tolist()
    pairs = zip(labels, picks, strict=True)
    return [" ".join(TOPICS[label][i] for i in row) for label, row in pairs], labels


@pytest.fixture
def body(tmp_path: Path) -> torch.nn.Module:
    """A SentenceTransformer, random, from a configuration."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path / "bert"
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), **small)).save_pretrained(path)
    return sentence_transformers.SentenceTransformer(str(path), device="cpu")


def train(body: torch.nn.Module, folder: Path, resume: bool = False, **options: object) -> object:
    import sentence_transformers as st
    from datasets import Dataset

    texts, labels = sentences(48)
    settings = {
        "per_device_train_batch_size": 12, "num_train_epochs": 4, "learning_rate": 3e-3,
        "logging_steps": 4, "report_to": "none", "use_cpu": True, "save_steps": 8,
        "disable_tqdm": True, "batch_sampler": "group_by_label", **options,
    }  # fmt: skip
    dataset = Dataset.from_dict({"sentence": texts, "label": labels})
    trainer = st.SentenceTransformerTrainer(
        model=body, args=st.SentenceTransformerTrainingArguments(str(folder), **settings),
        train_dataset=dataset, eval_dataset=dataset, loss=VarConLoss(body, temperature=0.1),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8") if resume else None)
    return trainer


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_the_real_trainer(options: dict, body: torch.nn.Module, tmp_path: Path) -> None:
    trainer = train(body, tmp_path / "run", **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    texts, labels = sentences(30, seed=1)
    rows, classes = torch.tensor(body.encode(texts)), torch.tensor(labels)
    similar = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=2).fill_diagonal_(-1)
    assert (classes[similar.argmax(1)] == classes).float().mean() > 0.9


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(body, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    train(body, tmp_path / "run")
    whole = {name: value.clone() for name, value in body.state_dict().items()}
    resumed = SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    assert train(resumed, tmp_path / "run", resume=True).state.global_step == 16
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole[name], msg=name)


def test_setfit_by_the_documented_lines(body: torch.nn.Module, tmp_path: Path) -> None:
    """It is given texts with their classes, not pairs, in batches of several a class."""
    setfit = pytest.importorskip("setfit")
    from datasets import Dataset
    from sklearn.linear_model import LogisticRegression

    page = DOCS.read_text().split("\n## SetFit\n")[1]
    scope: dict = {"VarConLoss": VarConLoss, "Dataset": Dataset, "setfit": setfit}
    exec(re.findall(r"^```python\n(.*?)```", page, re.S | re.M)[0], scope)
    texts, labels = sentences(24)
    args = setfit.TrainingArguments(
        str(tmp_path / "run"), batch_size=12, num_epochs=6, body_learning_rate=3e-3,
        report_to="none", show_progress_bar=False,
    )  # fmt: skip
    model = setfit.SetFitModel(model_body=body, model_head=LogisticRegression())
    train_dataset = Dataset.from_dict({"text": texts, "label": labels})
    trainer = scope["VarConTrainer"](model=model, args=args, train_dataset=train_dataset)
    trainer.train()
    assert isinstance(trainer.st_trainer.loss, VarConLoss)
    texts, labels = sentences(30, seed=1)
    assert (torch.tensor(labels) == torch.as_tensor(model.predict(texts))).float().mean() > 0.9
