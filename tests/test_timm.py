"""VarCon as a timm task, and timm's train.py with one word in front."""

import argparse
import copy
import csv
import itertools
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
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from varcon_loss.integrations import timm_train
from varcon_loss.integrations.timm_task import METRICS, TwoViews, VarConTask

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "data" / "mini_train.py"
VARCON = ("--num-classes", 3, "--loss", "varcon")

# One model a family, as small as the family goes.
ARCHITECTURES = {
    64: """
        resnet10t resnetv2_18 seresnet18 resnest14d res2net50_14w_8s regnetx_002 regnety_002
        convnext_atto convnextv2_atto efficientnet_b0 efficientnetv2_rw_t mobilenetv2_035
        mobilenetv3_small_050 mobilenetv4_conv_small_035 mnasnet_050 fbnetc_100 spnasnet_100
        tinynet_e lcnet_035 ghostnet_050 hardcorenas_a repvgg_a0 mobileone_s0 fastvit_t8
        densenet121 vgg11 dla34 selecsls42 hrnet_w18_small xception41 cspresnet50 darknet17
        dpn48b nf_regnet_b0 edgenext_xx_small poolformer_s12 pvt_v2_b0 repvit_m0_9 starnet_s1
        mobilevit_xxs
    """,
    96: "inception_v3",
    224: """
        efficientformer_l1 levit_128s vit_tiny_patch16_224 deit_tiny_patch16_224
        deit_tiny_distilled_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224
        swin_tiny_patch4_window7_224 mixer_s32_224 coat_tiny volo_d1_224 sequencer2d_s
        pit_ti_224 visformer_tiny gmixer_12_224
    """,
    240: "crossvit_tiny_240",
}


SIZES = {name: size for size, names in ARCHITECTURES.items() for name in names.split()}


@pytest.mark.parametrize("name", SIZES)
def test_probe_and_encoder_keep_apart(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"not in timm {timm.__version__}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
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
    logits = logits if isinstance(logits, tuple) else (logits,)
    parameters = dict(task.trainable_module.named_parameters())

    def reached(*outputs: torch.Tensor) -> set[str]:
        total = sum(output.square().sum() for output in outputs)
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {n for n, g in zip(parameters, grads, strict=True) if g is not None}

    by_probe, by_varcon = reached(*logits), reached(projections)
    for parameter in by_probe:
        shape = parameters[parameter].shape
        assert shape[0] == 5 or "head" in parameter or "fc" in parameter, parameter
    assert not any(".blocks." in n or ".stages." in n or "projection" in n for n in by_probe)
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


def make(num_classes: int = 4, model: str = "resnet10t", **options: object) -> VarConTask:
    torch.manual_seed(0)
    model = timm.create_model(model, num_classes=num_classes)
    return VarConTask(model, **{"dim": 16, "verbose": False, **options})


@pytest.fixture
def task() -> VarConTask:
    return make()


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
    soft = torch.rand(8, 4).softmax(1)
    soft[2:] = 0  # rows of no class are in no mean
    for mode in (False, True):
        task.trainable_module.train(mode)
        result = task(x, soft)
        torch.testing.assert_close(result["kl"] + result["nll"], result["varcon_loss"])
    soft = torch.rand(8, 4)  # of images that the caller has mixed
    result = task(x, soft)
    projections, logits = task.trainable_module(x)
    torch.testing.assert_close(result["varcon_loss"], task.contrast(projections, soft).detach())
    expected = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(result["probe_loss"], expected.detach())


def test_images_that_take_no_part_are_in_no_mean() -> None:
    """Neither within a step nor between steps, where they are 0."""
    task = make(20, leave_one_out=True)
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


def test_log_lines_are_means_since_the_last(task: VarConTask, caplog) -> None:
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
    task = make(centroid_momentum=0.9)
    assert task.contrast.process_group == "world"  # a memory is one over all ranks
    task.trainable_module.eval()
    task(*batch())
    assert not task.contrast.centroid_memory.any()
    task.eval()
    task.trainable_module.train()  # what train.py calls
    task(*batch())
    assert task.contrast.centroid_memory.any(1).all()


def test_checkpoints_ema_and_state(task: VarConTask, tmp_path: Path) -> None:
    def sgd(task: VarConTask) -> torch.optim.Optimizer:
        return create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, momentum=0.9)

    task.setup_ema(decay=0.5)
    optimizer = sgd(task)
    task(*batch())["loss"].backward()
    optimizer.step()
    task.update_ema(step=1)
    folders = dict.fromkeys(("checkpoint_dir", "recovery_dir"), str(tmp_path))
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, **folders)
    saver.save_checkpoint(0, metric=1.0)
    last = str(tmp_path / "last.pth.tar")
    plain = timm.create_model("resnet10t", num_classes=4, checkpoint_path=last)
    want_ema = task.get_eval_model(ema=True).state_dict()  # what timm prefers to load
    for name, value in plain.state_dict().items():
        assert torch.equal(value, want_ema[name])

    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    resume_task_checkpoint(other, last, optimizer=sgd(other))
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, last)
    ours, theirs = (
        [*t.trainable_module.state_dict().items(), *t.trainable_module_ema.state_dict().items()]
        for t in (task, other)
    )
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
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

    plain = timm.create_model("resnet10t", num_classes=4)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    projection = VarConTask(synced, verbose=False).trainable_module.projection
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in projection.modules())

    remembers, twin = make(centroid_momentum=0.9), make(centroid_momentum=0.8)
    remembers(*batch())
    twin.load_task_state(remembers.get_task_state())
    assert torch.equal(twin.contrast.centroids, remembers.contrast.centroids)
    for options in ({"dim": 8}, {"head": "linear"}, {"centroid_momentum": 0.9}):
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
            make(**options).load_task_state(make().get_task_state())

    with pytest.raises(ValueError, match="no classifier"):
        make(0)
    task = make(model="mobilenetv3_small_050")
    assert next(task.trainable_module.projection.parameters()).shape[1] == 1024


def test_compiles() -> None:
    torch._dynamo.reset()
    task = make()
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
    for part, label, i in itertools.product(("train", "validation"), range(3), range(8)):
        path = root / part / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40, 40, 3), np.uint8) // 2 + 40 * label
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def launch(*arguments: object, cwd: Path, launcher: tuple = ()) -> subprocess.CompletedProcess:
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


def test_the_launcher_trains_records_and_repeats(images: Path, tmp_path, varcon_timm) -> None:
    flags = ("--varcon-dim", 32, "--model-ema", "--varcon-temperature", 0.2)
    done = launch(SCRIPT, images, *VARCON, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batch 16 VarConTask" in done.stdout  # two views of 8
    assert "a step sees 2 x 8 images" in done.stdout
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


def test_resuming_and_a_run_without_a_step(images: Path, varcon_timm: Callable[..., Done]) -> None:
    common = (SCRIPT, images, *VARCON, "--output")
    assert varcon_timm(*common, "out", "--varcon-dim", 32).code == 0
    resume = ("--resume", "out/last.pth.tar")
    assert varcon_timm(*common, "more", "--varcon-dim", 32, *resume).code == 0
    done = varcon_timm(*common, "x", "--varcon-dim", 8, *resume)
    assert "cannot resume with other --varcon- flags" in done.refusal
    # Of a finished run nothing is left to train; of an unfinished one a step must be.
    assert varcon_timm(*common, "x", "--varcon-dim", 32, *resume, "--epochs", 0).code == 0
    done = varcon_timm(*common, "x", "--varcon-dim", 32, *resume, "--batch-size", 64)
    assert "no step was trained" in done.refusal
    for flags in (("--batch-size", 64), ("--epochs", 0)):
        done = varcon_timm(*common, "y", *flags)
        assert "no step was trained" in done.refusal
        assert "a smaller --batch-size" in done.err


def test_two_views_share_no_random_choice(images: Path) -> None:
    dataset = TwoViews(create_dataset("", root=str(images), split="train"), num_splits=2)
    loader = create_loader(
        dataset, (3, 32, 32), 8, is_training=True, num_aug_splits=2, color_jitter=0.0,
        num_workers=1, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    for x, y in loader:
        assert torch.equal(y[:8], y[8:])
        assert not (x[:8] == x[8:]).flatten(1).all(1).any()


def test_one_rank_speaks_at_the_scripts_interval(
    images: Path, varcon_timm: Callable[..., Done], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    for rank, flags, lines in (
        ("0", ("--log-interval", 5), 3),  # steps 1, 6, 11 of 12
        ("0", ("--log-interval", 2, "--grad-accum-steps", 2), 3),  # steps 1, 5, 9
        ("1", (), None),
    ):
        monkeypatch.setenv("RANK", rank)  # as torchrun does
        caplog.clear()
        done = varcon_timm(SCRIPT, images, *VARCON, "--batch-size", 2, "--epochs", 1, *flags)
        assert done.code == 0
        assert ("varcon-timm" in done.out) == (rank == "0")
        said = sum(r.getMessage().startswith("VarCon: ") for r in caplog.records)
        assert lines in (None, said)


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
    assert "batch 8 VarConTask" in varcon_timm(SCRIPT, images, *record, "--varcon-views", 1).out
    # An explicit other loss wins, in one view and without a key of ours.
    own = with_own_loss()
    assert "batch 8 ClassificationTask" in varcon_timm(own, images, *record, "--loss", "ce").out
    assert not any("varcon" in f"{k} {v}" for k, v in recorded("more").items())

    for text, message in (
        ("loss: varcon\nvarcon_tempreature: 0.2\n", "--varcon-tempreature (no such flag)"),
        ("loss: varcon\nvarcon_head: big\n", "kind must be"),
        ("loss: varcon\nvarcon_views: 3\n", "--varcon-views (give 1 or 2)"),
        ("loss: varcon\nvarcon_dim: [1]\n", "must be an int"),
        ("loss: Varcon\n", "--loss Varcon: did you mean --loss varcon?"),
        ("varcon_dim: 8\n", "varcon_dim without --loss varcon"),
        ("- loss\n", "cannot read 'name: value' lines from the config config.yaml"),
        ("loss: [\n", "cannot read 'name: value' lines from the config config.yaml"),
    ):
        config.write_text(text)
        assert message in varcon_timm(SCRIPT, images, "-c", config).refusal
    assert "the config nowhere: " in varcon_timm(SCRIPT, "-c", "nowhere").refusal


def with_own_loss(name: str = "own_loss.py") -> Path:
    """A script that has --loss, and checks its -c file against its arguments, as timm 1.0.31."""
    text = SCRIPT.read_text()
    for old, new in (
        (
            'parser.add_argument("--gp")',
            'parser.add_argument("--gp")\nparser.add_argument("--loss", choices=("ce", "bce"))',
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
            '    assert args.loss in (None, "ce"), args.loss\n    device = torch.device',
        ),
    ):
        assert old in text
        text = text.replace(old, new)
    Path(name).write_text(text)
    return Path(name)


def test_a_script_with_a_loss_of_its_own(images: Path, varcon_timm, monkeypatch) -> None:
    script = with_own_loss()
    done = varcon_timm(script, images, *VARCON)
    assert "batch 16 VarConTask" in done.out, done
    assert recorded("out")["loss"] == "varcon"
    # The checkpoint holds a plain Namespace, and resumes.
    args = torch.load("out/last.pth.tar", weights_only=False)["args"]
    assert type(args) is argparse.Namespace
    assert (args.loss, args.varcon_views) == ("varcon", 2)
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


def test_the_task_stays_a_class(images: Path, varcon_timm: Callable[..., Done]) -> None:
    script, text = Path("derives.py"), SCRIPT.read_text()
    derived = (
        "class Derived(ClassificationTask):\n    def forward(self, *given):\n"
        "        return super().forward(*given)\n\n\ndef main():"
    )
    kinds = (
        "task, ClassificationTask", "dataset, AugMixDataset", "dataset, torch.utils.data.Dataset",
    )  # fmt: skip
    checks = "".join(f"    assert isinstance({kind})\n" for kind in kinds)
    text = text.replace("def main():", derived)
    text = text.replace("    optimizer =", f"{checks}    optimizer =")
    script.write_text(text.replace("task = ClassificationTask(", "task = Derived("))
    done = varcon_timm(script, images, *VARCON)
    assert "batch 16 Derived" in done.out, done
    assert timm.task.ClassificationTask is VarConTask.__bases__[0]  # as it was before


def test_without_varcon_the_launcher_is_not_there(images: Path, varcon_timm) -> None:
    done = varcon_timm(SCRIPT, images, "--num-classes", 3)
    assert "batch 8 ClassificationTask" in done.out, done
    assert not any("varcon" in k for k in recorded("out"))


UNSUITABLE = (
    "--mixup 0.2", "--cutmix 1", "--cutmix-minmax 0.2 0.8", "--jsd-loss", "--bce-loss",
    "--kd-model-name resnet18", "--naflex-loader", "--torchscript", "--num-classes 0",
    "--aug-splits 3", "--smoothing 1", "--no-aug", "--no-prefetcher", "--train-img-sizes 32 48",
    "--dataset WDS/x",
)  # fmt: skip


def test_unsuitable_flags_are_listed_together(images: Path, varcon_timm) -> None:
    arguments = [word for flag in UNSUITABLE for word in flag.split()]
    said = varcon_timm(SCRIPT, images, "--loss", "varcon", *arguments).refusal
    for flag in UNSUITABLE:
        name = flag.split()[0]
        assert f"{name} (" in said
        alone = varcon_timm(SCRIPT, images, "--loss", "varcon", *flag.split()).refusal
        assert f"cannot be combined with --loss varcon: {name} (" in alone
        assert ";" not in alone
    one_view = (SCRIPT, images, *VARCON, "--varcon-views", 1, "--no-aug", "--no-prefetcher")
    assert "--mixup (" in varcon_timm(*one_view, "--mixup", 1).refusal
    assert varcon_timm(*one_view).code == 0
    # The documents name them.
    table = (ROOT / "docs/timm.md").read_text()
    table = table.partition("## What cannot be combined")[2].partition("## ")[0]
    for names, _, _ in timm_train.REFUSED + timm_train.REFUSED_WITH_TWO_VIEWS:
        for name in names.split():
            assert f"`--{name.replace('_', '-')}" in table, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss Varcon", "--loss Varcon: did you mean --loss varcon?"),
        ("--loss=varcom", "--loss varcom: did you mean --loss varcon?"),
        ("--loss VarConLoss", "did you mean --loss varcon?"),
        ("--loss supcon", "no --loss of its own"),
        ("--Loss=VarCon", "--Loss=VarCon: did you mean --loss varcon?"),
        ("--lss varcon", "--lss varcon: did you mean --loss varcon?"),
        ("--varcon-dim 8", "--varcon-dim without --loss varcon"),
        ("--varcon-dim=8 --varcon-leave-one-out",
         "--varcon-dim, --varcon-leave-one-out without --loss varcon"),
        ("--loss varcon --varcon-temprature 0.2", "unrecognized arguments: --varcon-temprature"),
        ("--loss varcon --varcon_dim=8", "unrecognized arguments: --varcon_dim=8"),
        ("--loss varcon --varcon-dim x", "argument --varcon-dim: invalid int value: 'x'"),
        ("--loss varcon --varcon-head big", "argument --varcon-head: invalid choice: 'big'"),
        ("--loss varcon --varcon-dim 0", "must be"),
        ("--loss varcon --varcon-epsilon 0.5", "epsilon must be smaller than temperature"),
        ("--loss", "argument --loss: expected one argument"),
    ],
)  # fmt: skip
def test_slips_end_in_one_line(arguments: str, message: str, images: Path, varcon_timm) -> None:
    assert message in varcon_timm(SCRIPT, images, *arguments.split()).refusal


def test_commands_in_the_documents_exist() -> None:
    own = {f"--varcon-{name.replace('_', '-')}" for name in timm_train.FLAGS} | {"--loss"}
    text = "".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
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

    def run(text: str) -> str:
        script.write_text(text)
        return varcon_timm(script, "--loss", "varcon").refusal

    imports = "from timm.task import ClassificationTask"
    for early in ("print('batch by cross-entropy')\n", f"{imports}\n"):
        assert "builds no ClassificationTask of timm 1.0.27 or newer" in run(early)
    never = f"{imports}  # get_trainable_module\n"
    assert "nothing was trained with VarCon" in run(never)
    parses = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--model')\n"
    assert "nothing was trained" in run(f"{never}{parses}p.parse_args()\nraise SystemExit(0)\n")
    assert varcon_timm(script, "--loss", "varcon", "--help").code == 0


def test_where_things_are(tmp_path: Path, varcon_timm: Callable[..., Done]) -> None:
    place = "github.com/huggingface/pytorch-image-models"
    for script in ("train.py", "--model"):
        said = varcon_timm(script, "--loss", "varcon").refusal
        assert f"no such script: {script}; it comes first" in said
        assert place in said
    assert "docs/timm.md, 'Reading out a checkpoint'" in varcon_timm("probe", "x", "y").refusal
    helped = varcon_timm("--help")
    assert helped.code == 0
    assert "--varcon-global-centroids" in helped.out
    assert place in "".join(helped.out.split())


def remember_over_ranks(rank: int, world_size: int) -> tuple[torch.Tensor | None, ...]:
    """Each rank sees classes of its own; DDP broadcasts buffers as train.py lets it."""
    task = make(2 * world_size, dim=8, centroid_momentum=0.9)
    task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=True)
    x, _ = batch(4)
    for _ in range(3):
        task(x, torch.tensor([0, 1, 0, 1]) + 2 * rank)["loss"].backward()
    parameters = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters()])
    return task.contrast.centroid_memory, parameters


def test_ranks_remember_the_same(tmp_path: Path) -> None:
    from benchmarks.common.ranks import run_ranks

    ours, theirs = run_ranks(remember_over_ranks, 2, tmp_path)
    assert ours[0].any(1).all()
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


def test_the_recipe_of_a_read_out(images: Path, varcon_timm, capsys) -> None:
    pytest.importorskip("sklearn")
    page = (ROOT / "docs/timm.md").read_text()
    (code,) = re.findall("^```py\n(.*?)```", page, re.S | re.M)
    assert len([line for line in code.splitlines() if line]) <= 34
    common = (SCRIPT, images, *VARCON, "--epochs", 2)
    assert varcon_timm(*common, "--model-ema", "--gp", "avgmax", "--img-size", 40).code == 0
    code = code.replace("output/train/RUN/model_best.pth.tar", "out/last.pth.tar")
    code = code.replace("/data/imagenet", str(images)).replace("(20, metric", "(3, metric")
    code = code.replace('"cuda"', '"cpu"').replace(
        "device=device", "device=device, num_workers=0, persistent_workers=False"
    )
    capsys.readouterr()
    scope: dict = {}
    exec(code, scope)
    scores = [float(score) for score in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    assert len(scores) == 2
    assert min(scores) > 50  # brightness tells them apart
    assert scope["config"]["input_size"] == (3, 40, 40)

    class Malicious:
        def __reduce__(self) -> tuple:
            return Path.touch, (Path("mark"),)

    torch.save({**scope["saved"], "extra": Malicious()}, "out/last.pth.tar")
    with pytest.raises(pickle.UnpicklingError):
        exec(code, {})
    assert not Path("mark").exists()


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
    for refused in (("--bce-loss",), ("--mixup", 0.2), ("--batch-size", 64)):
        done = launch(script, *common, *refused, cwd=tmp_path)
        assert done.returncode == 2
        assert "varcon-timm: " in done.stderr.splitlines()[-1]
    done = launch(script, *common, "--varcon-dim", 8, "--resume", last, cwd=tmp_path)
    assert done.returncode == 2
    assert "varcon-timm: cannot resume with other --varcon- flags" in done.stderr
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
    assert "train_varcon_loss" in (tmp_path / "out/f/summary.csv").read_text()


def test_without_timm_the_next_step_is_named() -> None:
    """It installs timm itself, which works whether varcon-loss came from a checkout or a wheel."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (requirement,) = pyproject["project"]["optional-dependencies"]["timm"]
    command = f"pip install '{requirement}'"

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
    task = "varcon_loss.integrations.timm_task"
    train = "import varcon_loss.integrations.timm_train as timm_train; timm_train.main"
    for rest, start in (
        (f"import {task}", f"ImportError: {task}"),
        (f"{train}(['{SCRIPT}', '--loss', 'varcon'])", f"varcon-timm: {task} needs timm 1.0.27"),
    ):
        done = subprocess.run([sys.executable, "-c", hidden + rest], capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(start)
        assert last.endswith(f": {command}")


def test_a_classifier_replaced_later_is_refused_and_the_model_alone_trains_as_before() -> None:
    for replace in (
        lambda model: model.reset_classifier(4),
        lambda model: setattr(model, "fc", torch.nn.Linear(model.num_features, 4)),
    ):
        task, (x, y) = make(), batch()
        model = task.trainable_module.model
        task(x, y)["loss"].backward()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        assert all(p.grad is not None for p in model.parameters())
        replace(model)
        with pytest.raises(RuntimeError, match="make a new VarConTask"):
            task(x, y)
