"""The launcher's own flags: from the command line and from train.py's ``-c`` file, in one line each
where something is wrong with them.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PROGRAM = "varcon-timm"
INSTALL_TIMM = "pip install 'timm>=1.0.27' tqdm"


def stop(message: object) -> NoReturn:
    """End with one line and exit code 2."""
    line = " ".join(str(message).split())
    print(f"{PROGRAM}: {line}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Whose errors are one line instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        """As in `argparse.ArgumentParser`, shorter."""
        stop(f"{message} (see {self.prog} --help)")


def installed(package: str) -> str | None:
    """Version of a package, if it is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


EXAMPLES = f"""examples:
  {PROGRAM} train.py DATA --model resnet50 --loss varcon
  {PROGRAM} train.py DATA --model resnet50 --loss varcon --mixup 0.2 --smoothing 0.1
  {PROGRAM} probe output/train/RUN/model_best.pth.tar DATA
"""


def where_train_py_is() -> str:
    """Where a user gets ``train.py``, which timm does not install."""
    version = installed("timm")
    tag = f"tag v{version}" if version else "the tag of your timm version"
    return (
        "timm's wheel does not carry train.py: it lies in the root of "
        f"https://github.com/huggingface/pytorch-image-models, at {tag}"
    )


def flag_parser() -> Parser:
    """All flags of ours."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} path/to/train.py [its own arguments] --loss varcon [--varcon-...]\n"
        f"       {PROGRAM} probe CHECKPOINT DATA [--help]\n"
        f"       {PROGRAM} --version",
        description="Run timm's train.py with VarCon. Every other flag keeps its meaning.",
        epilog=f"{EXAMPLES}\n{where_train_py_is()}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--loss", help="'varcon', or whatever your train.py knows")
    add("--varcon-temperature", type=float, default=0.1, metavar="T", help="tau1 (default 0.1)")
    add("--varcon-epsilon", type=float, default=0.02, metavar="E", help="default 0.02")
    add("--varcon-dim", type=int, default=128, metavar="D", help="embedding width (default 128)")
    add("--varcon-head", choices=("mlp-bn", "mlp", "linear"), default="mlp-bn",
        help="projection head (default mlp-bn, which starts most reliably)")  # fmt: skip
    add("--varcon-views", type=int, choices=(1, 2), default=2,
        help="augmented views an image; a step then sees that many images (default 2)")  # fmt: skip
    add("--varcon-probe-weight", type=float, default=1.0, metavar="W",
        help="weight of the online linear probe's loss (default 1)")  # fmt: skip
    add("--varcon-smoothing", type=float, metavar="S",
        help="smoothing of VarCon's own labels (default: --smoothing where the command line has "
        "it, else 0); the probe's is --smoothing")  # fmt: skip
    switch = argparse.BooleanOptionalAction
    add("--varcon-leave-one-out", action=switch, default=False,
        help="centroids without the sample itself")  # fmt: skip
    add("--varcon-global-centroids", action=switch, default=False,
        help="centroids over all ranks: what you want where a rank's batch holds few images of "
        "a class; a memory implies it")  # fmt: skip
    add("--varcon-centroid-momentum", type=float, metavar="M",
        help="remember centroids (an extension), 0 <= M < 1; off by default")  # fmt: skip
    return parser


class Config(NamedTuple):
    """The YAML file that train.py's ``-c`` names."""

    path: str
    ours: dict[str, Any]  # keys that only this launcher reads
    rest: dict[str, Any]  # what is left for the script


class CommandLine(NamedTuple):
    """What the user asked for."""

    flags: argparse.Namespace  # ours
    rest: list[str]  # the script's arguments, without ours and without -c
    everything: list[str]  # the script's arguments as given, without -c
    config: Config | None


def read_command_line(arguments: Sequence[str], script_text: str) -> CommandLine:
    """Separate our flags from the script's, and refuse what can only be a slip.

    Args:
        arguments: all that follows the script.
        script_text: the script itself: flags that it names are its own.
    """
    config, everything = _read_config(arguments)
    parser = flag_parser()
    from_file = _as_flags(config.ours, parser) if config else []
    flags, rest = parser.parse_known_args([*from_file, *everything])
    own = {name for action in parser._actions for name in action.option_strings}
    own -= {"--loss"}
    slips = _misspelt(rest, own, script_text)
    if slips:
        stop("; ".join(slips))
    if flags.loss != "varcon":
        _check_other_loss(flags.loss, everything, own, config, script_text)
    return CommandLine(flags, rest, everything, config)


def _read_config(arguments: Sequence[str]) -> tuple[Config | None, list[str]]:
    """The file that ``-c`` names, as train.py finds it, and the other arguments."""
    parser = Parser(prog=PROGRAM, add_help=False)
    parser.add_argument("-c", "--config", default="")
    known, others = parser.parse_known_args(list(arguments))
    if not known.config:
        return None, others
    import yaml

    try:
        content = yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read the config {known.config}: {error}")
    if not isinstance(content, dict):
        stop(f"the config {known.config} holds no 'name: value' lines")
    content = {str(key): value for key, value in content.items()}
    ours = {key: value for key, value in content.items() if _is_ours(key, value)}
    rest = {key: value for key, value in content.items() if key not in ours}
    if ours.get("varcon"):
        rest.pop("aug_splits", None)  # we asked the script for them; --varcon-views does it anew
    return Config(known.config, ours, rest), others


def _is_ours(key: str, value: Any) -> bool:
    return key.lower().startswith("varcon") or (key == "loss" and _means_varcon(value))


def _means_varcon(value: Any) -> bool:
    plain = str(value).lower().replace("-", "").replace("_", "")
    return bool(difflib.get_close_matches(plain, ["varcon"], cutoff=0.7))


def _as_flags(ours: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Keys of a config as if they had been typed, so that they pass the same checks."""
    known = {action.dest for action in parser._actions}
    typed = ["--loss=varcon"] if ours.get("varcon") else []
    for key, value in ours.items():
        name = "--" + key.replace("_", "-")
        if key == "varcon" or (value is None and key in known):
            continue
        if isinstance(value, bool):
            typed.append(name if value else name.replace("--", "--no-", 1))
        else:
            typed.append(f"{name}={value}")
    return typed


def _misspelt(rest: Sequence[str], own: set[str], script_text: str) -> list[str]:
    slips = []
    for position, argument in enumerate(rest):
        name, _, value = argument.partition("=")
        if not name.startswith("-") or f"'{name}'" in script_text or f'"{name}"' in script_text:
            continue
        plain = "--" + name.lstrip("-").lower().replace("_", "-")
        value = value or "".join(rest[position + 1 : position + 2])
        near = difflib.get_close_matches(plain, sorted(own), n=1, cutoff=0.75)
        if plain.startswith(("--varcon", "--no-varcon")):
            hint = f"did you mean {near[0]}?" if near else f"see {PROGRAM} --help"
            slips.append(f"unknown flag {name}: {hint}")
        elif difflib.get_close_matches(plain, own, cutoff=0.85):
            slips.append(f"unknown flag {name}: did you mean {near[0]}?")
        elif difflib.get_close_matches(plain, ["--loss"], cutoff=0.7) and _means_varcon(value):
            slips.append(f"unknown flag {name}: did you mean --loss varcon?")
    return slips


def _check_other_loss(
    loss: str | None,
    arguments: Sequence[str],
    own: set[str],
    config: Config | None,
    script_text: str,
) -> None:
    """Without ``--loss varcon`` nothing may look as if it were there."""
    if loss is not None and _means_varcon(loss):
        stop(f"--loss {loss}: did you mean --loss varcon?")
    names = [argument.partition("=")[0] for argument in arguments]
    given = [name for name in names if name in own]
    if given:
        stop(f"{', '.join(given)} without --loss varcon: add --loss varcon, or drop it")
    if loss is not None and "'--loss'" not in script_text and '"--loss"' not in script_text:
        stop(f"--loss {loss}: this script has no --loss of its own; did you mean --loss varcon?")
    if loss is None and config is not None and config.ours:
        stop(f"{config.path} has {', '.join(config.ours)} but not loss: varcon: add that line")
