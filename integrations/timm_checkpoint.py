"""Checkpoints of train.py, read without running what a file may hold, and what they record."""

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from varcon_loss.integrations.timm_flags import stop

# In the order in which timm prefers them.
_WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")


class Checkpoint(NamedTuple):
    """One file."""

    path: str
    state: dict[str, Tensor]
    weights: str  # which of the file's weights `state` is
    args: dict[str, Any]  # what train.py was run with; empty where nothing is recorded
    arch: str | None


def read_checkpoint(path: str, *, unsafe: bool = False) -> Checkpoint:
    """Read ``path`` as tensors, numbers and strings; nothing else, unless ``unsafe``.

    A checkpoint is a pickle, and a pickle may run code. ``argparse.Namespace``, in which train.py
    records its arguments, is let through.
    """
    content = _load(Path(path), unsafe)
    key = next((key for key in _WEIGHTS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    state = clean_state_dict({k: v for k, v in state.items() if isinstance(v, Tensor)})
    if not state:
        stop(f"{path} holds no weights")
    args = content.get("args") if key is not None else None
    recorded = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(
        path,
        state,
        key or "weights",
        recorded if isinstance(recorded, dict) else {},
        content.get("arch") if isinstance(content.get("arch"), str) else None,
    )


def _load(path: Path, unsafe: bool) -> dict[str, Any]:
    if path.is_dir():
        names = ("model_best.pth.tar", "last.pth.tar")
        found = next((path / name for name in names if (path / name).is_file()), None)
        stop(f"{path} is a folder: give a checkpoint{f', such as {found}' if found else ''}")
    if not path.is_file():
        stop(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of a file that is refused, or read, all the same: our one line says it.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        names = _needed_globals(path)
        if not names:
            stop(f"{path} is no checkpoint: {_first_line(error)}")
        stop(
            f"{path} holds more than tensors, numbers and strings: {', '.join(names)}. Reading it "
            "may run code: add --unsafe-load only if you trust whoever wrote it"
        )
    except Exception as error:  # whatever a file that is none makes torch or safetensors raise
        stop(f"{path} is no checkpoint: {type(error).__name__}: {_first_line(error)}")
    if not isinstance(content, dict):
        stop(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def _needed_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not even the outside is that of a checkpoint
        return []


def rebuild(checkpoint: Checkpoint, name: str | None) -> nn.Module:
    """The timm model of a checkpoint with its weights, as train.py built it.

    The classifier's own weights are left out: a probe reads what comes before them.
    """
    recorded = checkpoint.args
    name = name or recorded.get("model") or checkpoint.arch
    if not name:
        stop(f"{checkpoint.path} names no model: give --model")
    channels = recorded.get("in_chans") or (recorded.get("input_size") or [3])[0]
    try:
        model = timm.create_model(
            name,
            num_classes=recorded.get("num_classes"),
            in_chans=channels,
            global_pool=recorded.get("gp"),
            bn_eps=recorded.get("bn_eps"),
            **(recorded.get("model_kwargs") or {}),
        )
    except Exception as error:
        stop(f"cannot make the model {name}: {_first_line(error)}")
    own = model.state_dict()
    readout = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    prefixes = tuple(f"{p}." for p in ([readout] if isinstance(readout, str) else readout))
    state = {
        key: value
        for key, value in checkpoint.state.items()
        # Split BatchNorm has statistics of its own for each view but the first.
        if not key.startswith(prefixes) and ".aux_bn." not in key
    }
    lacks = [key for key in own if key not in state and not key.startswith(prefixes)]
    besides = [key for key in state if key not in own]
    if lacks or besides:
        what = f"lacks {lacks[0]}" if lacks else f"has {besides[0]} besides"
        stop(f"{checkpoint.path} is not a {name}: it {what}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        stop(f"{checkpoint.path} is not this {name}: {' '.join(str(error).split())}")
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
