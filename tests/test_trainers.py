"""The examples of docs/trainers.md, in two real processes each."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common.ranks import run_ranks
from varcon_loss import ProjectionHead, VarConLoss, backward_in_chunks, varcon_terms

DOCS = Path(__file__).parent.parent / "docs" / "trainers.md"


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(8, 6, generator=g), torch.randint(5, (8,), generator=g)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def example(title: str, number: int = 0) -> str:
    """A code block under a heading of the documentation, as it stands there."""
    section = DOCS.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)```", section, re.S | re.M)[number]


def after_one_step() -> torch.Tensor:
    """One process on the concatenated batch, plain SGD."""
    model = net()
    x, y = (torch.cat(part) for part in zip(*(share(r) for r in range(2)), strict=True))
    varcon_terms(model(x), y).reduced.backward()
    return (model.weight - 0.1 * model.weight.grad).detach()


def launched(rank: int, world_size: int) -> None:
    """The environment that torchrun gives a process."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), GROUP_RANK="0",
        LOCAL_WORLD_SIZE=str(world_size), TORCHELASTIC_RUN_ID="test",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip


def fit_by_lightning(module: Any, rank: int, world_size: int) -> None:
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
        barebones=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([share(rank)], batch_size=None))


def lightning_on_rank(rank: int, world_size: int) -> torch.Tensor:
    launched(rank, world_size)
    scope: dict = {"torch": torch, "VarConLoss": VarConLoss}
    exec(example("Lightning"), scope)
    module = scope["Encoder"](net())
    fit_by_lightning(module, rank, world_size)
    return module.net.weight.detach()


def accelerate_on_rank(rank: int, world_size: int) -> torch.Tensor:
    launched(rank, world_size)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = net()
    scope = {"accelerator": accelerator, "VarConLoss": VarConLoss, "net": model}
    scope |= {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loader": [share(rank)]}
    exec(example("Accelerate", 1), scope)
    return model.weight.detach()


def chunks_on_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """One step by each example of batches in chunks, here of three samples, and with FSDP2."""
    launched(rank, world_size)
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(number: int, scope: dict) -> None:
        code = example("A larger batch, in chunks", number)
        assert "chunk_size=32" in code
        exec(code.replace("chunk_size=32", "chunk_size=3"), scope)

    scope = {"torch": torch, "VarConLoss": VarConLoss, "loader": [share(rank)], "net": net()}
    run(0, scope)
    weights = {"ddp": scope["net"].weight.detach()}

    accelerator = scope["accelerator"] = Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope["net"], scope["optimizer"] = accelerator.prepare(model, optimizer)
    run(1, scope)
    weights["accelerate"] = model.weight.detach()

    sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (world_size,)))
    loss = VarConLoss(process_group="world")
    backward_in_chunks(sharded, loss, *share(rank), chunk_size=3)
    torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    weight, _ = sharded.parameters()
    weights["fsdp2"] = weight.full_tensor().detach()

    exec(example("Lightning"), scope)
    run(2, scope)
    module = scope["EncoderInChunks"](net())
    fit_by_lightning(module, rank, world_size)
    return weights | {"lightning": module.net.weight.detach()}


def test_the_documented_chunks_take_the_step_of_one_batch(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    for weights in run_ranks(chunks_on_rank, 2, tmp_path):
        for weight in weights.values():
            torch.testing.assert_close(weight, after_one_step())


class Backbone(nn.Module):
    """What a model of Transformers gives back; `net()` on whole "texts"."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=4)
        self.net = net()

    def forward(self, input_ids: torch.Tensor, attention_mask: None) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.net(input_ids)[:, None])


def text_encoder() -> type[nn.Module]:
    scope: dict = {"nn": nn, "VarConLoss": VarConLoss, "ProjectionHead": ProjectionHead}
    exec(example("Hugging Face Trainer"), scope)
    return scope["TextEncoder"]


def train_by_transformers(
    kind: type[nn.Module], rank: int, world_size: int, *, accumulate: int
) -> torch.Tensor:
    launched(rank, world_size)
    import transformers

    model = kind(Backbone(), num_classes=5)
    model.head = nn.Identity()  # its BatchNorm sees the samples of a rank
    parts = [zip(*share(r), strict=True) for r in range(world_size)]
    args = transformers.TrainingArguments(
        "out", use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=8 // accumulate,
        max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    assert args.world_size == 2
    data = [{"input_ids": x, "labels": y} for part in parts for x, y in part]
    transformers.Trainer(model=model, args=args, train_dataset=data).train()
    return model.backbone.net.weight.detach()


def transformers_on_rank(rank: int, world_size: int) -> torch.Tensor:
    return train_by_transformers(text_encoder(), rank, world_size, accumulate=1)


def accumulate_on_rank(rank: int, world_size: int) -> tuple[torch.Tensor, list]:
    """The page's model with ``**kwargs``; and the batches that it saw."""
    seen = []

    class WithKwargs(text_encoder()):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            seen.append((input_ids, labels))
            return super().forward(input_ids, attention_mask, labels)

    return train_by_transformers(WithKwargs, rank, world_size, accumulate=2), seen


@pytest.mark.parametrize("on_rank", [lightning_on_rank, accelerate_on_rank, transformers_on_rank])
def test_the_documented_example_takes_the_true_step(on_rank, tmp_path: Path) -> None:
    pytest.importorskip(on_rank.__name__.removesuffix("_on_rank"))
    for weight in run_ranks(on_rank, 2, tmp_path):
        torch.testing.assert_close(weight, after_one_step())


def test_a_model_with_kwargs_takes_the_true_step_under_accumulation(tmp_path: Path) -> None:
    """Trainer asks such a model whether it divides its loss by the accumulated batch itself."""
    pytest.importorskip("transformers")
    (weight, mine), (other_weight, others) = run_ranks(accumulate_on_rank, 2, tmp_path)
    assert len(mine) == len(others) == 2
    model = net()
    for both in zip(mine, others, strict=True):
        x, y = (torch.cat(part) for part in zip(*both, strict=True))
        (varcon_terms(model(x), y).reduced / 2).backward()
    expected = (model.weight - 0.1 * model.weight.grad).detach()
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(other_weight, expected)


def test_a_pretrained_model_starts_with_an_empty_memory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scope = {"nn": nn, "VarConLoss": VarConLoss, "ProjectionHead": ProjectionHead}
    scope |= {"BertModel": transformers.BertModel}
    exec(example("Hugging Face Trainer"), scope)
    exec(example("Hugging Face Trainer", 2), scope)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**small, vocab_size=50)
    scope["BertModel"](config).save_pretrained(tmp_path / "backbone")
    # Where a checkpoint lacks a buffer, Transformers 5 allocates one like this.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", torch.ones_like)
        model = scope["PretrainedTextEncoder"].from_pretrained(tmp_path / "backbone")
    assert not model.criterion.centroid_memory.any()

    model.train()(torch.randint(50, (8, 3)), labels=torch.arange(8) % 5)["loss"].backward()
    model.save_pretrained(tmp_path / "trained")
    again = scope["PretrainedTextEncoder"].from_pretrained(tmp_path / "trained")
    assert again.criterion.centroid_memory.any(1).all()
    assert torch.equal(again.criterion.centroid_memory, model.criterion.centroid_memory)
