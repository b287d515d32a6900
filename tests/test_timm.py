"""VarCon as a timm task, and timm's train.py with one word in front."""

import argparse
import copy
import csv
import logging
import os
import pickle
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

timm = pytest.importorskip("timm")
from timm.data import FastCollateMixup, Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import varcon_loss
from varcon_loss import VarConLoss
from varcon_loss.integrations import timm_flags, timm_train
from varcon_loss.integrations.timm_checkpoint import read_checkpoint
from varcon_loss.integrations.timm_classifier import embedding_width
from varcon_loss.integrations.timm_task import METRICS, VarConTask

SCRIPT = Path(__file__).parent / "data" / "mini_train.py"

# One model a family, as small as the family goes.
ARCHITECTURES = {
    "resnet10t": 64, "resnetv2_18": 64, "seresnet18": 64, "resnest14d": 64, "res2net50_14w_8s": 64,
    "regnetx_002": 64, "regnety_002": 64, "convnext_atto": 64, "convnextv2_atto": 64,
    "efficientnet_b0": 64, "efficientnetv2_rw_t": 64, "mobilenetv2_035": 64,
    "mobilenetv3_small_050": 64, "mobilenetv4_conv_small_035": 64, "mnasnet_050": 64,
    "fbnetc_100": 64, "spnasnet_100": 64, "tinynet_e": 64, "lcnet_035": 64, "ghostnet_050": 64,
    "hardcorenas_a": 64, "repvgg_a0": 64, "mobileone_s0": 64, "fastvit_t8": 64, "densenet121": 64,
    "vgg11": 64, "dla34": 64, "selecsls42": 64, "hrnet_w18_small": 64, "inception_v3": 96,
    "xception41": 64, "cspresnet50": 64, "darknet17": 64, "dpn48b": 64, "nf_regnet_b0": 64,
    "edgenext_xx_small": 64, "efficientformer_l1": 224, "poolformer_s12": 64, "pvt_v2_b0": 64,
    "levit_128s": 224, "repvit_m0_9": 64, "starnet_s1": 64, "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224, "deit_tiny_distilled_patch16_224": 224, "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224, "swin_tiny_patch4_window7_224": 224, "mixer_s32_224": 224,
    "coat_tiny": 224, "volo_d1_224": 224, "sequencer2d_s": 224, "mobilevit_xxs": 64,
    "pit_ti_224": 224, "visformer_tiny": 224, "crossvit_tiny_240": 240, "gmixer_12_224": 224,
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probe_and_encoder_keep_apart(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"not in timm {timm.__version__}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    size = ARCHITECTURES[name]
    x = torch.randn(2, 3, size, size)
    plain = copy.deepcopy(model).eval()
    task = VarConTask(model, dim=8, head="linear", verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(task.get_eval_model().eval()(x), plain(x))
        logits = task.trainable_module.eval()(x)[1]
        logits = torch.stack(logits).mean(0) if isinstance(logits, tuple) else logits
        torch.testing.assert_close(logits, plain(x), rtol=1e-4, atol=1e-5)

    # The probe reaches the classifier and nothing else; VarCon everything but the classifier.
    task.trainable_module.eval()
    projections, logits = task.trainable_module(x)
    probe = (
        sum(t.square().sum() for t in logits)
        if isinstance(logits, tuple)
        else logits.square().sum()
    )
    parameters = dict(task.trainable_module.named_parameters())
    probe_grads = torch.autograd.grad(probe, list(parameters.values()), allow_unused=True)
    by_probe = {n for n, g in zip(parameters, probe_grads, strict=True) if g is not None}
    for parameter in by_probe:
        shape = parameters[parameter].shape
        assert shape[0] == 5 or "head" in parameter or "fc" in parameter, parameter
    assert not any(".blocks." in n or ".stages." in n or "projection" in n for n in by_probe)
    wanted = projections.square().sum()
    grads = torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True)
    by_varcon = {n for n, g in zip(parameters, grads, strict=True) if g is not None}
    assert by_probe | by_varcon == set(parameters)
    assert not by_probe & by_varcon


def test_the_head_sees_each_batch_once() -> None:
    """Its norms count it once, and its dropout is the same for VarCon and for the probe."""
    torch.manual_seed(0)
    name = "mobilenetv4_conv_small_035"
    if name not in timm.list_models():
        pytest.skip(f"not in timm {timm.__version__}")
    model = timm.create_model(name, num_classes=4, drop_rate=0.5)
    task = VarConTask(model, dim=16, head="linear", verbose=False)
    seen: list[torch.Tensor] = []
    for layer in (model.get_classifier(), task.trainable_module.projection):
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    task(torch.randn(8, 3, 64, 64), torch.arange(8) % 4)["loss"].backward()
    counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert len(counts) > 10
    assert all(int(count) == 1 for count in counts)
    assert torch.equal(*seen)


@pytest.fixture
def task() -> VarConTask:
    torch.manual_seed(0)
    return VarConTask(timm.create_model("resnet10t", num_classes=4), dim=16, verbose=False)


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 4


def test_a_step(task: VarConTask) -> None:
    x, y = batch()
    result = task(x, y)
    assert set(result) == {"loss", "output", *METRICS}
    torch.testing.assert_close(
        result["loss"].detach(), result["varcon_loss"] + task.probe_weight * result["probe_loss"]
    )
    result["loss"] /= 2  # as train.py does
    result["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())
    means = task.pop_means()
    assert means["tau2"] == pytest.approx(float(result["tau2"]))
    soft = torch.rand(8, 4)  # of images that the caller has mixed
    result = task(x, soft)
    projections, logits = task.trainable_module(x)
    torch.testing.assert_close(result["varcon_loss"], task.contrast(projections, soft).detach())
    expected = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(result["probe_loss"], expected.detach())


def test_images_that_take_no_part_are_in_no_mean() -> None:
    """Neither within a step nor between steps, where they are 0."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=20)
    task = VarConTask(model, dim=8, leave_one_out=True, verbose=False)
    x, _ = batch(12)
    alone = torch.arange(12)
    paired = torch.tensor([0, 0, 1, 1, *range(2, 10)])
    ignored = torch.tensor([0, 0, 1, 1, *[-100] * 8])
    steps = [{n: float(task(x, y)[n]) for n in METRICS} for y in (paired, alone, ignored)]
    means = task.pop_means()
    assert steps[1]["varcon_loss"] == 0
    for said in (steps[0], steps[2], means):
        assert said["kl"] + said["nll"] == pytest.approx(said["varcon_loss"], rel=1e-4)
        assert 0.0799 < said["tau2"] < 0.1201
    for name in METRICS:
        counted = [steps[0], *([steps[1]] if name == "probe_loss" else []), steps[2]]
        assert means[name] == pytest.approx(np.mean([step[name] for step in counted]), rel=1e-5)
    task(x, alone)
    means = task.pop_means()
    assert np.isnan(means["tau2"])
    assert means["probe_loss"] > 0


def test_rows_of_no_class_are_in_no_mean(task: VarConTask) -> None:
    x, _ = batch()
    soft = torch.rand(8, 4).softmax(1)
    soft[2:] = 0
    for mode in (True, False):
        task.trainable_module.train(mode)
        result = task(x, soft)
        torch.testing.assert_close(result["kl"] + result["nll"], result["varcon_loss"])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_each_view_is_mixed_by_itself(mode: str) -> None:
    def mixup(**options: object) -> Mixup:
        return Mixup(0.4, 1.0, mode=mode, num_classes=4, **options)

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    options = {"criterion": SoftTargetCrossEntropy(), "dim": 16, "verbose": False}
    task = VarConTask(model, **options, mixup=mixup(label_smoothing=0.2), views=2)
    x, y = batch(8)
    kept = x.clone()

    def by_hand(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        np.random.seed(3)
        pairs = [mixup(**options)(x[i : i + 4].clone(), y[i : i + 4]) for i in (0, 4)]
        images, soft = zip(*pairs, strict=True)
        return torch.cat(images), torch.cat(soft)

    np.random.seed(3)
    result = task(x, y)
    assert torch.equal(x, kept)
    images, soft = by_hand(label_smoothing=0.0)
    assert not torch.equal(soft[:4], soft[4:])
    assert ((soft > 0) & (soft < 1)).any()
    projections, logits = task.trainable_module(images)
    expected = task.contrast(projections, soft)
    torch.testing.assert_close(result["varcon_loss"], expected.detach())
    expected = task.criterion(logits, by_hand(label_smoothing=0.2)[1])
    torch.testing.assert_close(result["probe_loss"], expected.detach())

    # Nothing is mixed where nothing is learned, of whatever length, and after the end of mixing.
    def is_plain(x: torch.Tensor, y: torch.Tensor) -> None:
        result = task(x, y)
        projections, logits = task.trainable_module(x)
        expected = task.contrast(projections, y).detach()
        torch.testing.assert_close(result["varcon_loss"], expected)
        smooth = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.2).detach()
        torch.testing.assert_close(result["probe_loss"], smooth)

    with torch.no_grad():
        is_plain(x[:7], y[:7])
    task.mixup.mixup_enabled = False
    is_plain(x, y)
    task.mixup.mixup_enabled = True
    task.trainable_module.eval()
    is_plain(x[:7], y[:7])


def test_smoothing_is_of_varcon_alone() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    task = VarConTask(model, dim=16, verbose=False, smoothing=0.1)
    x, y = batch()
    mixed = torch.tensor([[0.75, 0.25, 0, 0]]).expand(8, 4)
    smooth = torch.nn.functional.one_hot(y, 4) * 0.9 + 0.025
    for target, labels in ((y, smooth), (mixed, mixed * 0.9 + 0.025)):
        result = task(x, target)
        projections, logits = task.trainable_module(x)
        expected = task.contrast(projections, labels).detach()
        torch.testing.assert_close(result["varcon_loss"], expected)
        expected = torch.nn.functional.cross_entropy(logits, target).detach()
        torch.testing.assert_close(result["probe_loss"], expected)


def test_an_ignored_image_is_smoothed_to_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    task = VarConTask(model, dim=16, verbose=False, smoothing=0.1)
    x, y = batch()
    smooth = torch.nn.functional.one_hot(y, 4) * 0.9 + 0.025
    y[3], smooth[3] = -100, 0.0
    result = task(x, y)
    projections, _ = task.trainable_module(x)
    expected = task.contrast(projections, smooth).detach()
    torch.testing.assert_close(result["varcon_loss"], expected)
    assert result["loss"].isfinite()


def test_what_cannot_be_mixed() -> None:
    def make(**options: object) -> VarConTask:
        return VarConTask(timm.create_model("resnet10t", num_classes=4), verbose=False, **options)

    for options, message in (
        ({"mixup": Mixup(0.2, mode="half")}, "got mode 'half'"),
        ({"mixup": Mixup(0.2), "leave_one_out": True}, "leave_one_out has no meaning"),
        ({"mixup": Mixup(0.2)}, "num_classes=1000, and the model 4: make Mixup with num_classes"),
        ({"mixup": FastCollateMixup(0.2, num_classes=4)}, "mixup must be a Mixup"),
        ({"smoothing": 0.1, "leave_one_out": True}, "leave_one_out has no meaning"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and less than 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    task = make(mixup=Mixup(0.2, num_classes=4), views=2)
    x, y = batch()
    with pytest.raises(ValueError, match="2 views need a batch that divides by 4, got 6 images"):
        task(x[:6], y[:6])
    with pytest.raises(ValueError, match=r"one class index an image, got .* \[8, 4\]"):
        task(x, torch.rand(8, 4))


def test_log_lines_are_means_since_the_last(
    task: VarConTask, caplog: pytest.LogCaptureFixture
) -> None:
    task.verbose, task.log_interval = True, 3
    caplog.set_level(logging.INFO)
    values = [float(task(*batch())["varcon_loss"]) for _ in range(8)]
    task.eval()
    task.trainable_module.eval()
    task(*batch())  # evaluation counts in no mean
    with torch.no_grad():
        task.trainable_module.train()
        task(*batch())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("VarCon: ")]
    shown = [float(value) for value in re.findall(r"varcon_loss: (\S+)", " ".join(lines))]
    expected = [np.mean(values[:1]), np.mean(values[1:4]), np.mean(values[4:7])]
    assert shown == pytest.approx(expected, rel=1e-3)
    assert task.pop_means()["varcon_loss"] == pytest.approx(np.mean(values), rel=1e-5)


def test_the_loss_follows_the_mode_of_what_trains() -> None:
    model = timm.create_model("resnet10t", num_classes=4)
    task = VarConTask(model, dim=16, centroid_momentum=0.9, verbose=False)
    assert task.contrast.process_group == "world"  # a memory is one over all ranks
    task.trainable_module.eval()
    task(*batch())
    assert not task.contrast.centroid_seen.any()
    task.eval()
    task.trainable_module.train()  # what train.py calls
    task(*batch())
    assert task.contrast.centroid_seen.all()


def test_state_of_other_options_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def make(**options: object) -> VarConTask:
        model = timm.create_model("resnet10t", num_classes=4)
        return VarConTask(model, verbose=False, **{"dim": 16, **options})

    state = make().get_task_state()
    for options, message in (
        ({"dim": 8}, "dim was 16, is 8"),
        ({"head": "linear"}, "head was mlp-bn, is linear"),
        ({"centroid_momentum": 0.9}, "centroid_momentum was None, is 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options).load_task_state(state)
    with pytest.raises(ValueError, match=r"dim was 8, is 16; centroid_momentum was 0.9, is None"):
        make().load_task_state(make(dim=8, centroid_momentum=0.9).get_task_state())
    make(temperature=0.2).load_task_state(state)
    assert "temperature was 0.1, is 0.2" in caplog.text
    make(temperature=np.float64(0.2)).load_task_state(state)
    with pytest.raises(ValueError, match="probe_weight must be finite"):
        make(probe_weight=float("nan"))


def test_learns(task: VarConTask) -> None:
    x, y = batch(16)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3)
    losses = []
    for _ in range(12):
        result = task(x, y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(float(result["varcon_loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoints_ema_and_state(task: VarConTask, tmp_path: Path) -> None:
    from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
    from timm.utils import CheckpointSaver

    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9)
    task(*batch())["loss"].backward()
    optimizer.step()
    task.update_ema(step=1)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), task=task,
    )  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    last = str(tmp_path / "last.pth.tar")
    plain = timm.create_model("resnet10t", num_classes=4, checkpoint_path=last)
    want_ema = task.get_eval_model(ema=True).state_dict()  # what timm prefers to load
    for name, value in plain.state_dict().items():
        assert torch.equal(value, want_ema[name])

    torch.manual_seed(1)
    other = VarConTask(timm.create_model("resnet10t", num_classes=4), dim=16, verbose=False)
    other_optimizer = create_optimizer_v2(
        other.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9
    )
    resume_task_checkpoint(other, last, optimizer=other_optimizer)
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, last)
    for ours, theirs in (
        (task.trainable_module, other.trainable_module),
        (task.trainable_module_ema.module, other.trainable_module_ema.module),
    ):
        for (name, a), b in zip(
            ours.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def test_groups_clip_sync_batchnorm_and_memory() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    task = VarConTask(model, verbose=False)
    module = task.get_trainable_module()
    assert module.no_weight_decay() == {f"model.{n}" for n in model.no_weight_decay()}
    optimizer = create_optimizer_v2(module, opt="sgd", lr=0.1, layer_decay=0.5, weight_decay=0.1)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(module.named_parameters())
    assert scales[id(named["model.patch_embed.proj.weight"])] < 1e-3
    assert scales[id(named["projection.layers.0.weight"])] == 1.0
    clipped = task.get_clip_parameters(exclude_head=True)
    assert len(task.get_clip_parameters()) - len(clipped) == 2

    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(
        timm.create_model("resnet10t", num_classes=4)
    )
    projection = VarConTask(synced, verbose=False).trainable_module.projection
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in projection.modules())

    remembers = VarConTask(
        timm.create_model("resnet10t", num_classes=4), centroid_momentum=0.9, verbose=False
    )
    remembers(*batch())
    twin = VarConTask(
        timm.create_model("resnet10t", num_classes=4), centroid_momentum=0.9, verbose=False
    )
    twin.load_task_state(remembers.get_task_state())
    assert torch.equal(twin.contrast.centroids, remembers.contrast.centroids)

    with pytest.raises(ValueError, match="no classifier"):
        VarConTask(timm.create_model("resnet10t", num_classes=0), verbose=False)
    assert embedding_width(timm.create_model("mobilenetv3_small_050", num_classes=4)) == 1024


def test_compiles() -> None:
    torch._dynamo.reset()
    task = VarConTask(timm.create_model("resnet10t", num_classes=4), dim=16, verbose=False)
    expected = task(*batch())["loss"]
    task.compile(backend="aot_eager")
    torch.testing.assert_close(task(*batch())["loss"], expected, rtol=1e-4, atol=1e-4)
    assert task.get_eval_model()(batch()[0]).shape == (8, 4)
    assert "_orig_mod" not in " ".join(task.get_checkpoint_state()["state_dict"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part in ("train", "validation"):
        for label in range(3):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 255, (40, 40, 3), np.uint8) // 2 + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def launch(
    *arguments: object, cwd: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """As a user runs it; seconds to start, so most tests use `varcon_timm`."""
    command = launcher or (sys.executable,)
    return subprocess.run(
        [*command, "-m", "varcon_loss.integrations.timm_train", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that it ended with."""
        assert self.code == 2, self
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert self.err.startswith("varcon-timm: "), self.err
        assert not re.search("^batch", self.out, re.MULTILINE)  # nothing was trained
        return self.err


@pytest.fixture
def varcon_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The launcher in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            timm_train.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def recorded(folder: str) -> dict:
    return yaml.safe_load((Path(folder) / "args.yaml").read_text())


def test_the_launcher_trains_records_and_repeats(
    images: Path, tmp_path: Path, varcon_timm: Callable[..., Done]
) -> None:
    done = launch(
        SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--varcon-dim", 32, "--model-ema",
        "--varcon-temperature", 0.2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "batch 16 VarConTask" in done.stdout  # two views of 8
    assert "a step of batch size 8 sees 2 x 8 images" in done.stdout
    first = recorded(tmp_path / "out")
    assert first["loss"] == "varcon"
    assert first["varcon_dim"] == 32
    with (tmp_path / "out/summary.csv").open() as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row["train_tau2"]) < 0.25
    checkpoint = torch.load(tmp_path / "out/last.pth.tar", weights_only=False)
    assert vars(checkpoint["args"])["varcon_temperature"] == 0.2

    again = varcon_timm(SCRIPT, images, "-c", "out/args.yaml", "--output", "again")
    assert "VarConTask" in again.out, again
    assert recorded("again") | {"output": "out"} == first


def test_resuming(images: Path, varcon_timm: Callable[..., Done]) -> None:
    common = (SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--output")
    assert varcon_timm(*common, "out", "--varcon-dim", 32).code == 0
    resume = ("--resume", "out/last.pth.tar")
    assert varcon_timm(*common, "more", "--varcon-dim", 32, *resume).code == 0
    said = varcon_timm(*common, "x", "--varcon-centroid-momentum", 0.9, *resume).refusal
    assert "--varcon-dim was 32, is 128" in said
    assert "--varcon-centroid-momentum was off, is 0.9" in said
    assert "--initial-checkpoint" in said


def test_two_views_share_no_random_choice(images: Path) -> None:
    from timm.data import create_dataset, create_loader

    from varcon_loss.integrations.timm_launch import TwoViews

    dataset = TwoViews(create_dataset("", root=str(images), split="train"), num_splits=2)
    loader = create_loader(
        dataset, (3, 32, 32), 8, is_training=True, num_aug_splits=2, color_jitter=0.0,
        num_workers=1, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    for x, y in loader:
        assert torch.equal(y[:8], y[8:])
        assert not (x[:8] == x[8:]).flatten(1).all(1).any()


def test_what_a_step_sees_over_ranks(
    images: Path, varcon_timm: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    options = (SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--epochs", 0)
    done = varcon_timm(*options)
    assert "a step of batch size 8 sees 2 x 8 images on each of 2 ranks" in done.out
    assert "centroids of its own images" in done.out
    assert "implies" not in done.out
    done = varcon_timm(*options, "--varcon-centroid-momentum", 0.9)
    assert "over 2 ranks implies --varcon-global-centroids" in done.out
    assert "centroids of all ranks' images" in done.out
    assert recorded("out")["varcon_global_centroids"] is True
    monkeypatch.setenv("RANK", "1")
    assert varcon_timm(*options).out == ""


def test_log_lines_obey_the_scripts_interval(
    images: Path, varcon_timm: Callable[..., Done], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = ("--loss", "varcon", "--batch-size", 2, "--num-classes", 3, "--epochs", 1)
    for flags, lines in (
        (("--log-interval", 5), 3),  # steps 1, 6, 11 of 12
        (("--log-interval", 2, "--grad-accum-steps", 2), 3),  # steps 1, 5, 9
    ):
        caplog.clear()
        assert varcon_timm(SCRIPT, images, *options, *flags).code == 0
        said = [r.getMessage() for r in caplog.records]
        assert sum(line.startswith("VarCon: ") for line in said) == lines


def test_configs(images: Path, varcon_timm: Callable[..., Done]) -> None:
    config = Path("config.yaml")
    config.write_text("loss: varcon\nvarcon_dim: 8\nvarcon_leave_one_out: true\nnum_classes: 3\n")
    flags = ("--varcon-views", 1, "--no-varcon-leave-one-out")
    assert "batch 8 VarConTask" in varcon_timm(SCRIPT, images, f"-c{config}", *flags).out
    kept = recorded("out")
    assert (kept["varcon_dim"], kept["varcon_leave_one_out"], kept["varcon_views"]) == (8, False, 1)
    # Two views of a recorded run are the launcher's doing, not the user's.
    assert varcon_timm(SCRIPT, images, "--conf", config).code == 0
    record = ("--config", "out/args.yaml", "--output", "more")
    assert recorded("out")["aug_splits"] == 2
    assert "batch 8 VarConTask" in varcon_timm(SCRIPT, images, *record, "--varcon-views", 1).out
    # An explicit other loss wins, in one view and without a key of ours.
    own = with_own_loss()
    assert "batch 8 ClassificationTask" in varcon_timm(own, images, *record, "--loss", "ce").out
    assert not any("varcon" in f"{k} {v}" for k, v in recorded("more").items())

    for text, message in (
        ("loss: varcon\nvarcon_tempreature: 0.2\n", "did you mean --varcon-temperature?"),
        ("loss: varcon\nvarcon_head: big\n", "--varcon-head: invalid choice: 'big'"),
        ("loss: varcon\nvarcon_views: 3\n", "--varcon-views: invalid choice: 3"),
        ("loss: varcon\nvarcon_dim: [1]\n", "--varcon-dim: invalid int value"),
        ("loss: Varcon\n", "--loss Varcon: did you mean --loss varcon?"),
        ("varcon_dim: 8\n", "config.yaml has varcon_dim but not loss: varcon"),
        ("- loss\n", "holds no 'name: value' lines"),
        ("loss: [\n", "cannot read the config config.yaml"),
    ):
        config.write_text(text)
        assert message in varcon_timm(SCRIPT, images, "-c", config).refusal
    assert "cannot read the config nowhere" in varcon_timm(SCRIPT, "-c", "nowhere").refusal


def with_own_loss(name: str = "own_loss.py") -> Path:
    """A script that has --loss, and checks its -c file against its arguments, as timm 1.0.31."""
    text = SCRIPT.read_text()
    for old, new in (
        (
            'parser.add_argument("--gp")',
            'parser.add_argument("--gp")\n'
            'parser.add_argument("--loss", default=None, choices=("ce", "bce"))',
        ),
        (
            "            parser.set_defaults(**yaml.safe_load(file))",
            "            config = yaml.safe_load(file)\n"
            "        known = {a.dest: a for a in parser._actions}\n"
            "        for key, value in config.items():\n"
            "            choices = known[key].choices  # KeyError: no such argument\n"
            "            if choices and value not in (None, *choices):\n"
            '                parser.error(f"{key}: invalid choice {value}")\n'
            "        parser.set_defaults(**config)",
        ),
        (
            "    device = torch.device",
            '    assert args.loss in (None, "ce"), args.loss\n'
            '    args.loss = args.loss or "ce"\n'
            "    device = torch.device",
        ),
    ):
        assert old in text
        text = text.replace(old, new)
    Path(name).write_text(text)
    return Path(name)


def test_a_script_with_a_loss_of_its_own(
    images: Path, varcon_timm: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = with_own_loss()
    done = varcon_timm(script, images, "--num-classes", 3, "--loss", "varcon")
    assert "batch 16 VarConTask" in done.out, done
    assert recorded("out")["loss"] == "varcon"
    # The checkpoint holds a plain Namespace, and resumes.
    args = read_checkpoint("out/last.pth.tar").args
    assert (args["loss"], args["varcon_views"]) == ("varcon", 2)
    again = ("-c", "out/args.yaml", "--resume", "out/last.pth.tar", "--output", "again")
    assert "batch 16 VarConTask" in varcon_timm(script, images, *again).out
    assert recorded("again")["loss"] == "varcon"
    # Without the launcher the script refuses what was recorded, where it looks at its keys ...
    careless = Path("careless.py")
    text = script.read_text()
    careless.write_text(re.sub("        known = .*?(?=        parser.set)", "", text, flags=re.S))
    for path, error in ((script, SystemExit), (careless, AssertionError)):  # ... and where not
        monkeypatch.setattr(sys, "argv", [str(path), str(images), "-c", "out/args.yaml"])
        with pytest.raises(error, match=r"2|varcon"):
            runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def labels_seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What VarCon is given, step by step."""
    seen: list[torch.Tensor] = []
    terms = VarConLoss.terms

    def listen(self: VarConLoss, features: torch.Tensor, labels: torch.Tensor) -> object:
        seen.append(labels)
        return terms(self, features, labels)

    monkeypatch.setattr(VarConLoss, "terms", listen)
    return seen


@pytest.mark.parametrize("flags", ["", "--varcon-views 1", "--varcon-views 1 --no-prefetcher"])
def test_the_launcher_mixes_until_the_script_ends_it(
    flags: str,
    images: Path,
    varcon_timm: Callable[..., Done],
    labels_seen: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets: list[torch.Tensor] = []
    forward = SoftTargetCrossEntropy.forward

    def listen(self: SoftTargetCrossEntropy, x: torch.Tensor, target: torch.Tensor) -> object:
        targets.append(target)
        return forward(self, x, target)

    monkeypatch.setattr(SoftTargetCrossEntropy, "forward", listen)
    mixing = ("--mixup", 0.4, "--cutmix", 1.0, "--mixup-off-epoch", 2)
    common = (SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--epochs", 3)
    done = varcon_timm(*common, *mixing, *flags.split())
    assert done.code == 0, done
    views = 1 if flags else 2
    assert f"batch {8 * views} VarConTask" in done.out
    how = "each view by itself" if views == 2 else "the images"
    assert f"mixes {how}, for VarCon and the probe alike: --mixup 0.4 --cutmix 1.0" in done.out
    rest = "--mixup-mode batch --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-off-epoch 2"
    assert f"{rest}\n" in done.out
    assert "smooths the labels of VarCon by 0, those of the probe by 0.1\n" in done.out

    mixed, plain = labels_seen[:6], labels_seen[6:]
    assert [labels.dtype for labels in plain] == [torch.int64] * 3
    for labels in mixed:
        assert labels.shape == (8 * views, 3)
        assert (labels > 0).sum(1).max() <= 2  # not smoothed
        torch.testing.assert_close(labels.sum(1), torch.ones(8 * views))
    assert ((torch.cat(mixed) > 0).sum(1) == 2).any()
    if views == 2:
        assert any(not torch.equal(*labels.chunk(2)) for labels in mixed)
    for labels, target in zip(labels_seen, targets, strict=True):
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, 3)
        torch.testing.assert_close(target, labels * 0.9 + 0.1 / 3)

    # Recorded as it was given, in plain numbers, and repeated from there.
    first = recorded("out")
    assert (first["mixup"], first["cutmix"], first["mixup_off_epoch"]) == (0.4, 1.0, 2)
    assert first["aug_splits"] == (2 if views == 2 else 0)
    args = read_checkpoint("out/last.pth.tar").args
    assert {key: args[key] for key in first} == first
    labels_seen.clear()
    again = ("-c", "out/args.yaml", "--resume", "out/last.pth.tar", "--output", "again")
    assert varcon_timm(SCRIPT, images, *again).code == 0
    assert recorded("again") | {"output": "out", "resume": ""} == first
    assert [labels.ndim for labels in labels_seen] == [2] * 6 + [1] * 3


def test_labels_of_varcon_are_smoothed_where_smoothing_was_typed(
    images: Path, varcon_timm: Callable[..., Done], labels_seen: list[torch.Tensor]
) -> None:
    Path("plain.yaml").write_text("smoothing: 0.3\n")
    Path("ours.yaml").write_text("loss: varcon\nsmoothing: 0.3\nvarcon_smoothing: 0.15\n")
    for flags, ours, probes in (
        ("", 0, 0.1),
        ("--smoothing 0.2", 0.2, 0.2),
        ("--smooth=0.1", 0.1, 0.1),  # argparse completes it
        ("--smoothing 0", 0, 0),
        ("--smoothing 0.2 --varcon-smoothing 0", 0, 0.2),
        ("--varcon-smoothing 0.3", 0.3, 0.1),
        ("-c plain.yaml", 0, 0.3),  # a recorded run holds every default
        ("-c ours.yaml", 0.15, 0.3),
    ):
        labels_seen.clear()
        done = varcon_timm(
            SCRIPT, images, "--num-classes", 3, "--loss", "varcon", *flags.split(), "--epochs", 1
        )
        assert done.code == 0, done
        line = f"smooths the labels of VarCon by {ours:g}, those of the probe by {probes:g}"
        assert (line in done.out) == bool(ours or probes), (flags, done.out)
        assert recorded("out")["varcon_smoothing"] == ours
        for labels in labels_seen:
            assert labels.is_floating_point() == bool(ours), flags
            if ours:
                torch.testing.assert_close(labels.amax(1), torch.full((16,), 1 - ours * 2 / 3))


def test_mixing_reaches_workers_as_a_function() -> None:
    from timm.data.loader import fast_collate

    from varcon_loss.integrations.timm_launch import varcon_in_timm

    flags = timm_flags.flag_parser().parse_args(["--loss", "varcon"])
    plain = timm.data.Mixup, timm.data.FastCollateMixup
    with varcon_in_timm(flags) as launch:
        mixing = timm.data.FastCollateMixup(mixup_alpha=0.2, num_classes=3)
        assert isinstance(mixing, timm.data.FastCollateMixup)
        # As where workers are spawned, not forked.
        assert pickle.loads(pickle.dumps(mixing)) is fast_collate
        assert type(launch.mixup) is Mixup
        mixing.mixup_enabled = False
        assert not launch.mixup.mixup_enabled
    assert (timm.data.Mixup, timm.data.FastCollateMixup) == plain


def test_the_task_stays_a_class(images: Path, varcon_timm: Callable[..., Done]) -> None:
    script = Path("derives.py")
    script.write_text(
        SCRIPT.read_text()
        .replace(
            "def main():",
            "class Derived(ClassificationTask):\n"
            "    def forward(self, input, target):\n"
            "        return super().forward(input, target)\n\n\n"
            "def main():",
        )
        .replace("task = ClassificationTask(", "task = Derived(")
        .replace(
            "    optimizer =",
            "    assert isinstance(task, ClassificationTask), type(task)\n"
            "    assert isinstance(dataset, AugMixDataset), type(dataset)\n"
            "    assert isinstance(dataset, torch.utils.data.Dataset), type(dataset)\n"
            "    optimizer =",
        )
    )
    done = varcon_timm(script, images, "--num-classes", 3, "--loss", "varcon")
    assert "batch 16 Derived" in done.out, done
    assert timm.task.ClassificationTask is VarConTask.__bases__[0]  # as it was before


def test_without_varcon_the_launcher_is_not_there(
    images: Path, varcon_timm: Callable[..., Done]
) -> None:
    done = varcon_timm(SCRIPT, images, "--num-classes", 3)
    assert "batch 8 ClassificationTask" in done.out, done
    assert not any("varcon" in k for k in recorded("out"))


UNSUITABLE = {
    "--jsd-loss": "--jsd-loss (VarCon replaces it, drop it)",
    "--bce-loss": "--bce-loss (",
    "--kd-model-name resnet18": "--kd-model-name resnet18 (distillation",
    "--naflex-loader": "--naflex-loader (",
    "--torchscript": "--torchscript (",
    "--num-classes 0": "--num-classes 0 (the probe needs a classifier",
    "--aug-splits 3": "--aug-splits 3 (--varcon-views makes the views",
    "--no-aug": "--no-aug (two views would be identical",
    "--no-prefetcher": "--no-prefetcher (drop it or use --varcon-views 1)",
    "--train-img-sizes 32 48": "--train-img-sizes 32 48 (",
    "--dataset WDS/x": "--dataset WDS/x (it is iterable",
    "--smoothing 1 --varcon-smoothing 0": "--smoothing 1.0 (a share, give 0 or more and",
    "--varcon-smoothing -1": "--varcon-smoothing -1.0 (a share,",
    "--mixup 0.2 --batch-size 7": "--batch-size 7 (mixing pairs images, give an even number)",
    "--cutmix 1 --mixup-mode half": "--mixup-mode half (give one of batch, pair, elem)",
    "--cutmix-minmax 0.3": "--cutmix-minmax 0.3 (give two numbers",
    "--mixup 0.2 --varcon-leave-one-out": "--varcon-leave-one-out (an image of several classes",
}


def test_unsuitable_flags_are_listed_together(
    images: Path, varcon_timm: Callable[..., Done]
) -> None:
    arguments = [word for flag in UNSUITABLE for word in flag.split()]
    said = varcon_timm(SCRIPT, images, "--loss", "varcon", *arguments).refusal
    for expected in UNSUITABLE.values():
        assert expected in said
    for flag, expected in UNSUITABLE.items():
        alone = varcon_timm(SCRIPT, images, "--loss", "varcon", *flag.split()).refusal
        assert expected in alone
        assert ";" not in alone
    smooth = (SCRIPT, images, "--loss", "varcon", "--smoothing", 0.1)
    for flag, expected in (
        ("--varcon-leave-one-out", "--varcon-leave-one-out (an image of several classes"),
    ):
        assert expected in varcon_timm(*smooth, flag).refusal
    with_one_view = ("--no-aug", "--no-prefetcher", "--num-classes", 3, "--varcon-views", 1)
    assert varcon_timm(SCRIPT, images, "--loss", "varcon", *with_one_view).code == 0


def test_the_documents_name_what_is_refused() -> None:
    from varcon_loss.integrations import timm_launch

    page = (Path(__file__).parent.parent / "docs/timm.md").read_text()
    table = page.partition("## What cannot be combined")[2].partition("## ")[0]
    rules = [rule for name, rule in vars(timm_launch).items() if name.startswith("_REFUSED")]
    assert len(rules) == 4
    for name, _, _ in (entry for rule in rules for entry in rule):
        assert f"`--{name.replace('_', '-')}" in table, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss Varcon", "--loss Varcon: did you mean --loss varcon?"),
        ("--loss=varcom", "--loss varcom: did you mean --loss varcon?"),
        ("--loss VarConLoss", "did you mean --loss varcon?"),
        ("--loss supcon", "no --loss of its own"),
        ("--los varcon", "unknown flag --los: did you mean --loss varcon?"),
        ("--Loss=VarCon", "unknown flag --Loss: did you mean --loss varcon?"),
        ("--varcon-dim 8", "--varcon-dim without --loss varcon"),
        ("--varcon-dim=8 --varcon-leave-one-out",
         "--varcon-dim, --varcon-leave-one-out without --loss varcon"),
        ("--loss varcon --varcon-temprature 0.2", "did you mean --varcon-temperature?"),
        ("--loss varcon --varcon_dim=8", "unknown flag --varcon_dim: did you mean --varcon-dim?"),
        ("--loss varcon --vacron-dim 8", "unknown flag --vacron-dim: did you mean --varcon-dim?"),
        ("--loss varcon --varcon-nonsense 1 --Varcon-head linear",
         "--varcon-nonsense: see varcon-timm --help; unknown flag --Varcon-head: did you mean"),
        ("--loss varcon --varcon-dim x", "argument --varcon-dim: invalid int value: 'x'"),
        ("--loss varcon --varcon-head big", "argument --varcon-head: invalid choice: 'big'"),
        ("--loss varcon --varcon-dim 0", "feature_dim must be"),
        ("--loss varcon --varcon-epsilon 0.5", "epsilon must be smaller than temperature"),
        ("--loss varcon --varcon-probe-weight nan --num-classes 3", "probe_weight must be finite"),
        ("--loss", "argument --loss: expected one argument"),
    ],
)  # fmt: skip
def test_slips_end_in_one_line(
    arguments: str, message: str, images: Path, varcon_timm: Callable[..., Done]
) -> None:
    assert message in varcon_timm(SCRIPT, images, *arguments.split()).refusal


def test_no_flag_of_a_script_looks_like_a_slip() -> None:
    own = set(timm_flags.flag_parser()._option_string_actions) - {"--loss"}
    for script in (SCRIPT, Path(os.environ.get("TIMM_TRAIN_PY", SCRIPT))):
        names = re.findall(r"""['"](--[a-z][\w-]+)['"]""", script.read_text())
        assert len(names) > 20
        assert timm_flags._misspelt(names, own, "") == []


def test_commands_in_the_documents_exist() -> None:
    own = set(timm_flags.flag_parser()._option_string_actions)
    root = Path(__file__).parent.parent
    text = "".join(path.read_text() for path in (root / "README.md", *root.glob("docs/*.md")))
    assert set(re.findall(r"--varcon-[a-z-]+[a-z]", text)) <= own
    if "TIMM_TRAIN_PY" not in os.environ:
        return
    script = Path(os.environ["TIMM_TRAIN_PY"]).read_text()
    commands = re.findall(r"^.*timm_train (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert commands
    for command in commands:
        flags = set(re.findall(r" (--[a-z][a-z-]+)", command.partition("train.py")[2])) - own
        assert flags <= set(re.findall(r"--[a-z][a-z-]+", script)), command


def test_unsuitable_scripts(tmp_path: Path, varcon_timm: Callable[..., Done]) -> None:
    script = tmp_path / "train.py"

    def run(text: str, *arguments: str) -> str:
        script.write_text(text)
        return varcon_timm(script, *(arguments or ("--loss", "varcon"))).refusal

    assert "builds no timm task" in run("print('batch by cross-entropy')\n")
    imports = "from timm.task import ClassificationTask"
    assert "projection head untrained" in run(f"{imports}\n")
    never = f"{imports}  # get_trainable_module\n"
    assert "nothing was trained with VarCon" in run(never)
    parses = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--model')\n"
    ends = "p.add_argument('--opt')\np.parse_args()\nraise SystemExit(0)\n"
    assert "nothing was trained with VarCon" in run(never + parses + ends)
    assert "before it parses its arguments" in run(f"{never}ClassificationTask(None)\n")
    mixes = "p.add_argument('--opt')\np.add_argument('--mixup', type=float)\np.parse_args()\n"
    early = f"{never}{parses}{mixes}ClassificationTask(None)\n"
    said = run(early, "--loss", "varcon", "--mixup", "1")
    assert "builds its task before it sets up mixup" in said
    script.write_text(never + parses + "p.parse_args()\n")
    assert varcon_timm(script, "--loss", "varcon", "--help").code == 0


def test_where_train_py_is_and_versions(tmp_path: Path, varcon_timm: Callable[..., Done]) -> None:
    place = "github.com/huggingface/pytorch-image-models"
    said = varcon_timm("train.py", "--loss", "varcon").refusal
    assert "no such script: train.py" in said
    assert f"{place}, at tag v{timm.__version__}" in said
    assert "the script comes first" in varcon_timm("--model", "resnet50").refusal
    assert "did you mean varcon-timm probe" in varcon_timm("prob", "x", "y").refusal
    (tmp_path / "train.py").touch()
    assert f"did you mean {tmp_path}/train.py?" in varcon_timm(tmp_path).refusal
    helped = varcon_timm("--help")
    assert "--loss varcon --mixup 0.2 --smoothing 0.1" in helped.out
    assert helped.code == 0
    assert "--varcon-global-centroids" in helped.out
    assert place in "".join(helped.out.split("\n"))
    assert varcon_timm("--version").out == (
        f"varcon-loss {varcon_loss.__version__}, timm {timm.__version__}, "
        f"torch {torch.__version__.partition('+')[0]}\n"
    )


PROBE = ("--workers", 1, "--epochs", 20, "--neighbours", 3, "--device", "cpu")


def scores(out: str) -> list[float]:
    words = out.split()
    return [float(words[words.index(name) + 1]) for name in ("top-1", "top-5", "kNN")]


def test_the_probe_reads_out_what_was_trained(
    images: Path, varcon_timm: Callable[..., Done]
) -> None:
    size = ("--img-size", 40, "--crop-pct", 1.0, "--interpolation", "bilinear", "--gp", "avgmax")
    pixels = ("--mean", 0.4, 0.5, 0.6, "--std", 0.3)
    done = varcon_timm(
        SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--epochs", 2, "--model-ema",
        *size, *pixels,
    )  # fmt: skip
    assert done.code == 0, done.err
    done = varcon_timm("probe", "out/last.pth.tar", images, *PROBE)
    assert done.code == 0, done.err
    assert "model resnet10t: state_dict_ema of out/last.pth.tar" in done.out
    assert "images of 3x40x40, crop 1 bilinear, mean 0.4 0.5 0.6, std 0.3 0.3 0.3\n" in done.out
    assert f"data {images} (folders): 24 of train, 24 of validation" in done.out
    top1, top5, knn = scores(done.out)
    assert top5 == 100.0  # three classes
    assert top1 > 50  # brightness tells them apart
    assert knn > 50
    other = varcon_timm("probe", "out/last.pth.tar", images, *PROBE, "--img-size", 32)
    assert "images of 3x32x32, crop 1 bilinear" in other.out

    # A file of weights alone says nothing; what was recorded, said again, gives the same.
    state = read_checkpoint("out/last.pth.tar").state
    torch.save(state, "weights.pth")
    assert "names no model: give --model" in varcon_timm("probe", "weights.pth", images).refusal
    done = varcon_timm("probe", "weights.pth", images, "--model", "resnet10t", *PROBE)
    assert "the model's own, none recorded" in done.out


def test_the_probe_computes_the_features_of_training(
    images: Path, varcon_timm: Callable[..., Done]
) -> None:
    from varcon_loss.integrations.timm_checkpoint import rebuild

    flags = ("--num-classes", 3, "--loss", "varcon", "--gp", "avgmax", "--img-size", 40)
    assert varcon_timm(SCRIPT, images, *flags).code == 0
    trained = timm.create_model("resnet10t", num_classes=3, global_pool="avgmax",
                                checkpoint_path="out/last.pth.tar").eval()  # fmt: skip
    rebuilt = rebuild(read_checkpoint("out/last.pth.tar"), None).eval()
    x = torch.randn(2, 3, 40, 40)
    a, b = (m.forward_head(m.forward_features(x), pre_logits=True) for m in (trained, rebuilt))
    assert torch.equal(a, b)


def test_the_probe_of_one_channel(images: Path, varcon_timm: Callable[..., Done]) -> None:
    state = timm.create_model("resnet10t", num_classes=3, in_chans=1).state_dict()
    args = argparse.Namespace(model="resnet10t", num_classes=3, in_chans=1, img_size=32)
    torch.save({"state_dict": state, "args": args}, "grey.pth")
    done = varcon_timm("probe", "grey.pth", images, *PROBE)
    assert done.code == 0, done.err
    assert "images of 1x32x32" in done.out


def test_probe_refusals(images: Path, varcon_timm: Callable[..., Done], tmp_path: Path) -> None:
    done = varcon_timm(SCRIPT, images, "--num-classes", 3, "--loss", "varcon")
    assert done.code == 0
    last, file = "out/last.pth.tar", Path("notes.txt")
    file.write_text("hello")
    torch.save([1], "list.pth")
    one_split = tmp_path / "one"
    one_split.mkdir()
    (one_split / "train").symlink_to(images / "train")
    fewer = tmp_path / "fewer"
    (fewer / "validation").mkdir(parents=True)
    (fewer / "train").symlink_to(images / "train")
    (fewer / "validation/1").symlink_to(images / "validation/1")
    (tmp_path / "empty/train").mkdir(parents=True)
    for arguments, message in (
        (("nowhere.pth", images), "no such checkpoint: nowhere.pth"),
        (("out", images), "out is a folder: give a checkpoint, such as out/model_best.pth.tar"),
        ((images, last), f"the checkpoint comes first: varcon-timm probe {last} {images}"),
        ((file, images), "notes.txt is no checkpoint"),
        (("list.pth", images), "is no checkpoint: it holds a list"),
        ((last, "nowhere"), "no such data set: nowhere"),
        ((last, images / "train"), "no folder for the split train"),
        ((last, one_split), "no folder for the split validation"),
        ((last, "empty"), "cannot read the train images of empty: Found 0 images"),
        ((last, fewer), "have different classes"),
        ((last, images, "--val-split", "train"), "split are the same: train"),
        ((last, images, "--model", "resnet18"), "is not a resnet18"),
        ((last, images, "--model", "resnt10"), "cannot make the model resnt10"),
        ((last, images, "--mean", 0.5, 0.5), "one number, or one for each channel"),
        ((last,), "the following arguments are required: data"),
    ):
        assert message in varcon_timm("probe", *arguments).refusal


class Malicious:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_code_of_a_checkpoint_is_run(
    images: Path, tmp_path: Path, varcon_timm: Callable[..., Done]
) -> None:
    mark = tmp_path / "mark"
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    args = argparse.Namespace(model="resnet10t", num_classes=3, img_size=32)
    content = {"state_dict": state, "args": args, "extra": Malicious(mark)}
    torch.save(content, "evil.pth")
    said = varcon_timm("probe", "evil.pth", images).refusal
    assert "--unsafe-load" in said
    assert "touch" in said or "pathlib" in said
    Path("plain.pkl").write_bytes(pickle.dumps(Malicious(mark)))
    assert "plain.pkl" in varcon_timm("probe", "plain.pkl", images).refusal
    assert not mark.exists()
    done = varcon_timm("probe", "evil.pth", images, "--unsafe-load", *PROBE)
    assert done.code == 0, done.err
    assert "images of 3x32x32" in done.out
    assert mark.exists()


def remember_over_ranks(
    rank: int, world_size: int, **options: object
) -> tuple[torch.Tensor | None, ...]:
    """Each rank sees classes of its own; DDP broadcasts buffers as train.py lets it."""
    torch.manual_seed(0)
    task = VarConTask(
        timm.create_model("resnet10t", num_classes=2 * world_size),
        dim=8,
        centroid_momentum=0.9,
        verbose=False,
        **options,
    )
    task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=True)
    x, _ = batch(4)
    for _ in range(3):
        task(x, torch.tensor([0, 1, 0, 1]) + 2 * rank)["loss"].backward()
    parameters = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters()])
    return task.contrast.centroid_seen, task.contrast.centroid_memory, parameters


def mix_over_ranks(rank: int, world_size: int) -> tuple[torch.Tensor | None, ...]:
    """Each rank mixes as it likes."""
    np.random.seed(rank)
    mixup = Mixup(0.4, 1.0, mode="elem", num_classes=2 * world_size)
    return remember_over_ranks(rank, world_size, mixup=mixup, views=2)


@pytest.mark.parametrize("step", [remember_over_ranks, mix_over_ranks])
def test_ranks_remember_the_same(step: Callable[..., tuple], tmp_path: Path) -> None:
    from benchmarks.common.ranks import run_ranks

    (seen, *ours), (_, *theirs) = run_ranks(step, 2, tmp_path)
    assert seen.all()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


real_train_py = pytest.mark.skipif(
    "TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY: path of a train.py"
)
SMALL = (
    "--model", "resnet10t", "--num-classes", 3, "--img-size", 32, "--batch-size", 8,
    "--workers", 1, "--device", "cpu", "--lr", 0.05, "--warmup-epochs", 0, "--output", "out",
    "--epochs", 1, "--loss", "varcon",
)  # fmt: skip


@real_train_py
def test_the_real_train_py(images: Path, tmp_path: Path) -> None:
    script = Path(os.environ["TIMM_TRAIN_PY"]).resolve()
    common = [images, *SMALL]
    done = launch(script, *common, "--model-ema", "--experiment", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_varcon_loss" in (tmp_path / "out/a/summary.csv").read_text()
    last = tmp_path / "out/a/last.pth.tar"
    timm.create_model("resnet10t", num_classes=3, checkpoint_path=str(last))
    for extra in (
        ["--epochs", 2, "--resume", last, "--model-ema", "--experiment", "b"],
        ["--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2, "--experiment", "c"],
        ["--layer-decay", 0.8, "--experiment", "d"],
    ):
        done = launch(script, *common, *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = launch(script, *common, "--bce-loss", "--no-aug", cwd=tmp_path)
    assert done.returncode == 2
    assert "--bce-loss (" in done.stderr
    assert "--no-aug (" in done.stderr
    done = launch(script, *common, "--varcon-dim", 8, "--resume", last, cwd=tmp_path)
    assert done.returncode == 2
    assert "varcon-timm: cannot resume with other flags: --varcon-dim was 128, is 8" in done.stderr
    again = ("-c", "out/a/args.yaml", "--experiment", "e", "--log-interval", 1)
    done = launch(script, images, *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_varcon_loss" in (tmp_path / "out/e/summary.csv").read_text()
    assert done.stderr.count("Train: ") == done.stderr.count("VarCon: ") == 3
    # The recipe of the documents, over two ranks, and a memory.
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    recipe = (
        "--varcon-centroid-momentum", 0.99, "--opt", "momentum", "--weight-decay", 8e-4, "--sched",
        "cosine", "--amp", "--amp-dtype", "bfloat16", "--scale", 0.2, 1.0, "--color-jitter", 0.4,
        "--color-jitter-prob", 0.8, "--grayscale-prob", 0.2, "--experiment", "f",
    )  # fmt: skip
    done = launch(script, *common, *recipe, cwd=tmp_path, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert "implies --varcon-global-centroids" in done.stdout
    assert "train_varcon_loss" in (tmp_path / "out/f/summary.csv").read_text()
    probe = ("probe", tmp_path / "out/f/last.pth.tar", images, *PROBE)
    done = launch(*probe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images of 3x32x32" in done.stdout


@real_train_py
def test_the_real_train_py_mixes(
    images: Path,
    tmp_path: Path,
    varcon_timm: Callable[..., Done],
    labels_seen: list[torch.Tensor],
) -> None:
    script = Path(os.environ["TIMM_TRAIN_PY"]).resolve()
    mixing = ("--mixup", 0.2, "--cutmix", 1.0, "--mixup-mode", "elem")
    # Its workers live on from epoch to epoch, and so would mixing in them.
    off = ("--epochs", 3, "--mixup-off-epoch", 2, "--model-ema", "--experiment", "a")
    done = varcon_timm(script, images, *SMALL, *mixing, *off)
    assert done.code == 0, done
    assert "--mixup 0.2 --cutmix 1.0 --mixup-mode elem" in done.out
    assert "VarConTask: criterion=SoftTargetCrossEntropy" in done.err
    assert [labels.ndim for labels in labels_seen] == [2] * 6 + [1] * 3
    assert all(not torch.equal(*labels.chunk(2)) for labels in labels_seen[:6])
    first = recorded("out/a")
    assert (first["mixup"], first["mixup_mode"], first["aug_splits"]) == (0.2, "elem", 2)

    last = "out/a/last.pth.tar"
    timm.create_model("resnet10t", num_classes=3, checkpoint_path=last)
    amp = ("--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2, "--channels-last")
    for flags, kinds in (
        (("-c", "out/a/args.yaml", "--resume", last, "--epochs", 4), [1]),
        ((*SMALL, *mixing, "--epochs", 4, "--resume", last, "--model-ema"), [2]),
        ((*SMALL, *mixing, *amp, "--split-bn", "--reprob", 0.5, "--resplit"), [2]),
        ((*SMALL, "--cutmix-minmax", 0.2, 0.8, "--varcon-views", 1, "--no-prefetcher"), [2]),
        ((*SMALL, "--smoothing", 0.2), [2]),
        (SMALL, [1]),
    ):
        labels_seen.clear()
        done = varcon_timm(script, images, *flags, "--experiment", "b")
        assert done.code == 0, done
        assert [labels.ndim for labels in labels_seen] == kinds * 3, flags

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    memory = ("--varcon-centroid-momentum", 0.9, "--experiment", "c")
    ranks = launch(
        script, images, *SMALL, *mixing, *memory, "--batch-size", 4, cwd=tmp_path, launcher=torchrun
    )
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout.count("mixes each view by itself") == 1
    assert "train_varcon_loss" in (tmp_path / "out/c/summary.csv").read_text()


def test_without_timm_the_next_step_is_named() -> None:
    """It installs timm itself, which works whether varcon-loss came from a checkout or a wheel."""
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    command = timm_flags.INSTALL_TIMM.replace("'", "")
    assert command.split()[2:] == pyproject["project"]["optional-dependencies"]["timm"]

    hidden = """
import importlib.metadata, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
version = importlib.metadata.version
def without(name):
    if name == "timm":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without
"""
    for rest, start in (
        (
            "import varcon_loss.integrations.timm_task",
            "ImportError: varcon_loss.integrations.timm_",
        ),
        (
            "from varcon_loss.integrations import timm_train; timm_train.main(['probe'])",
            "varcon-timm: timm is not installed",
        ),
    ):
        done = subprocess.run([sys.executable, "-c", hidden + rest], capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(start)
        assert last.endswith(f": {timm_flags.INSTALL_TIMM}")


@pytest.mark.parametrize("way", ["reset_classifier", "assigned"])
def test_a_classifier_replaced_later_is_refused(task: VarConTask, way: str) -> None:
    model = task.trainable_module.model
    if way == "assigned":
        model.fc = torch.nn.Linear(model.num_features, 4)
    else:
        model.reset_classifier(4)
    with pytest.raises(RuntimeError, match="make a new VarConTask"):
        task(*batch())


def test_the_model_alone_trains_as_before_the_task() -> None:
    model = timm.create_model("resnet10t", num_classes=4)
    x, y = batch()
    VarConTask(model, dim=16, verbose=False)(x, y)["loss"].backward()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
