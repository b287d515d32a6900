"""VarCon as a timm task, and timm's train.py with one word in front."""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

timm = pytest.importorskip("timm")
from timm.optim import create_optimizer_v2

from varcon_loss.integrations.timm_task import METRICS, VarConTask, embedding_width

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
    with pytest.raises(ValueError, match="VarCon needs one class index an image"):
        task(x, torch.rand(8, 4))


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
    command = launcher or (sys.executable,)
    return subprocess.run(
        [*command, "-m", "varcon_loss.integrations.timm_train", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_launcher_trains_records_and_repeats(images: Path, tmp_path: Path) -> None:
    done = launch(
        SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--varcon-dim", 32, "--model-ema",
        "--varcon-temperature", 0.2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "batch 16 VarConTask" in done.stdout  # two views of 8
    assert "a step of batch size 8 sees 2 x 8 images" in done.stdout
    recorded = yaml.safe_load((tmp_path / "out/args.yaml").read_text())
    assert recorded["loss"] == "varcon"
    assert recorded["varcon_dim"] == 32
    with (tmp_path / "out/summary.csv").open() as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row["train_tau2"]) < 0.25
    checkpoint = torch.load(tmp_path / "out/last.pth.tar", weights_only=False)
    assert vars(checkpoint["args"])["varcon_temperature"] == 0.2

    again = launch(SCRIPT, images, "-c", "out/args.yaml", "--output", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "VarConTask" in again.stdout
    repeated = yaml.safe_load((tmp_path / "again/args.yaml").read_text())
    assert {k: v for k, v in repeated.items() if k != "output"} == {
        k: v for k, v in recorded.items() if k != "output"
    }
    resumed = launch(
        SCRIPT, images, "-c", "out/args.yaml", "--output", "more", "--resume", "out/last.pth.tar",
        cwd=tmp_path,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr


def test_the_probe_reads_out_a_checkpoint(images: Path, tmp_path: Path) -> None:
    done = launch(
        SCRIPT, images, "--num-classes", 3, "--loss", "varcon", "--epochs", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    options = (
        "--img-size",
        32,
        "--workers",
        1,
        "--epochs",
        20,
        "--neighbours",
        3,
        "--device",
        "cpu",
    )
    done = launch(
        "probe", "out/last.pth.tar", images, "--model", "resnet10t", *options, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    top1, top5, knn = (float(words[words.index(w) + 1]) for w in ("top-1", "top-5", "kNN"))
    assert top5 == 100.0  # three classes
    assert top1 > 50  # brightness tells them apart
    assert knn > 50
    wrong = launch(
        "probe", "out/last.pth.tar", images, "--model", "resnet18", *options, cwd=tmp_path
    )
    assert "the checkpoint is not a resnet18" in wrong.stderr


def test_without_varcon_the_launcher_is_not_there(images: Path, tmp_path: Path) -> None:
    done = launch(SCRIPT, images, "--num-classes", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batch 8 ClassificationTask" in done.stdout
    assert not any("varcon" in k for k in yaml.safe_load((tmp_path / "out/args.yaml").read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixup", "0.2"], "--mixup cannot be combined with --loss varcon.*--mixup 0"),
        (["--cutmix", "1.0"], "--cutmix cannot be combined"),
        (["--jsd-loss"], "drop --jsd-loss"),
        (["--bce-loss"], "drop --bce-loss"),
        (["--kd-model-name", "resnet18"], "drop --kd-model-name"),
        (["--naflex-loader"], "drop --naflex-loader"),
        (["--torchscript"], "drop --torchscript"),
        (["--num-classes", "0"], "--num-classes 0 leaves no classifier"),
        (["--aug-splits", "3"], "--varcon-views makes the views"),
        (["--no-aug"], "drop --no-aug or use --varcon-views 1"),
        (["--no-prefetcher"], "drop --no-prefetcher"),
        (["--train-img-sizes", "32"], "drop --train-img-sizes"),
        (["--dataset", "wds/x"], "--dataset wds/x is iterable"),
        (["--varcon-epsilon", "0.5"], "epsilon must be smaller than temperature"),
        (["--varcon-nonsense", "1"], "unknown flag --varcon-nonsense"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_refusals_come_before_training(
    arguments: list[str], message: str, images: Path, tmp_path: Path
) -> None:
    import re

    done = launch(SCRIPT, images, "--loss", "varcon", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "batch" not in done.stdout


def test_unsuitable_scripts(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy_train.py"
    legacy.write_text("print('trained with cross-entropy')\n")
    done = launch(legacy, "--loss", "varcon", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "builds no timm task" in done.stderr
    old = tmp_path / "train.py"
    old.write_text("from timm.task import ClassificationTask\n")
    assert "projection head untrained" in launch(old, "--loss", "varcon", cwd=tmp_path).stderr
    never = tmp_path / "never.py"
    never.write_text("from timm.task import ClassificationTask  # get_trainable_module\n")
    done = launch(never, "--loss", "varcon", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing was trained with VarCon" in done.stderr
    assert "no such script" in launch("nowhere.py", cwd=tmp_path).stderr
    helped = launch("--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "--varcon-global-centroids" in helped.stdout


@pytest.mark.skipif("TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY: path of a train.py")
def test_the_real_train_py(images: Path, tmp_path: Path) -> None:
    script = Path(os.environ["TIMM_TRAIN_PY"]).resolve()
    common = [
        images, "--model", "resnet10t", "--num-classes", 3, "--img-size", 32, "--batch-size", 8,
        "--workers", 1, "--device", "cpu", "--lr", 0.05, "--warmup-epochs", 0, "--output", "out",
        "--epochs", 1, "--loss", "varcon",
    ]  # fmt: skip
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
    done = launch(script, *common, "--mixup", 0.1, cwd=tmp_path)
    assert done.returncode == 2
    done = launch(script, images, "-c", "out/a/args.yaml", "--experiment", "e", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_varcon_loss" in (tmp_path / "out/e/summary.csv").read_text()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    done = launch(
        script, *common, "--varcon-global-centroids", "--experiment", "f", cwd=tmp_path,
        launcher=torchrun,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train_varcon_loss" in (tmp_path / "out/f/summary.csv").read_text()
