"""``varcon-timm train.py ... --loss varcon``: timm's own, unmodified ``train.py`` with VarCon.

The launcher takes its own flags out of the command line, puts `VarConTask` where the script finds
``timm.task.ClassificationTask``, and runs the script as ``python train.py`` would. Without
``--loss varcon`` it only runs the script.
"""

import argparse
import difflib
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from varcon_loss import ProjectionHead, VarConLoss, __version__
from varcon_loss.integrations.timm_flags import (
    INSTALL_TIMM,
    PROGRAM,
    CommandLine,
    flag_parser,
    installed,
    read_command_line,
    stop,
    where_train_py_is,
)

OLDEST_TIMM = (1, 0, 27)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``varcon-timm`` and ``python -m varcon_loss.integrations.timm_train``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        flag_parser().print_help()
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        others = (f"{name} {installed(name) or 'not installed'}" for name in ("timm", "torch"))
        print(", ".join([f"varcon-loss {__version__}", *others]))
    elif arguments[0] == "probe":
        _check_timm()
        from varcon_loss.integrations import timm_probe

        timm_probe.main(arguments[1:])
    else:
        script = _find_script(arguments[0])
        text = script.read_text(encoding="utf-8", errors="replace")
        _launch(script, text, read_command_line(arguments[1:], text))


def _launch(script: Path, text: str, given: CommandLine) -> None:
    with_varcon = given.flags.loss == "varcon"
    with _config_for_the_script(given) as config:
        if not with_varcon:
            _run(script, [*config, *given.everything])
            return
        _check_timm()
        _check_script(script, text)
        _check_values(given.flags)
        from varcon_loss.integrations.timm_launch import varcon_in_timm

        with varcon_in_timm(given.flags) as launch:
            try:
                _run(script, [*config, *given.rest])
            except SystemExit as end:
                if end.code or launch.arguments is None:  # its own error, or its --help
                    raise
            launch.finish()


@contextmanager
def _config_for_the_script(given: CommandLine) -> Iterator[list[str]]:
    """``-c FILE``, where our keys are in it a copy without them: some scripts refuse those."""
    if given.config is None:
        yield []
    elif not given.config.ours:
        yield ["--config", given.config.path]
    else:
        import yaml

        with tempfile.TemporaryDirectory(prefix=PROGRAM) as folder:
            path = Path(folder) / Path(given.config.path).name
            path.write_text(yaml.safe_dump(given.config.rest), encoding="utf-8")
            yield ["--config", str(path)]


def _find_script(name: str) -> Path:
    script = Path(name)
    if script.is_file():
        return script
    if (script / "train.py").is_file():
        stop(f"{name} is a folder: did you mean {script / 'train.py'}?")
    plain = name.lstrip("-").lower()
    if not script.exists() and difflib.get_close_matches(plain, ["probe", "version"], cutoff=0.75):
        stop(f"no such script: {name}; did you mean {PROGRAM} probe or {PROGRAM} --version?")
    if name.startswith("-"):
        stop(f"the script comes first, flags such as {name} after it; {where_train_py_is()}")
    stop(f"no such script: {name}; {where_train_py_is()}")


def _check_timm() -> None:
    version = installed("timm")
    if version is None:
        stop(f"timm is not installed: {INSTALL_TIMM}")
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers and tuple(int(number) for number in numbers.groups()) < OLDEST_TIMM:
        stop(f"timm {version} is too old: {INSTALL_TIMM}")


def _check_script(script: Path, text: str) -> None:
    if "ClassificationTask" not in text:
        stop(f"{script} builds no timm task: use train.py of timm 1.0.27 or newer; "
             f"{where_train_py_is()}")  # fmt: skip
    if "get_trainable_module" not in text:
        stop(f"{script} would leave the projection head untrained: use train.py of timm >= 1.0.27; "
             f"{where_train_py_is()}")  # fmt: skip


def _check_values(flags: argparse.Namespace) -> None:
    try:
        VarConLoss(
            flags.varcon_temperature,
            flags.varcon_epsilon,
            num_classes=2,
            feature_dim=flags.varcon_dim,
            leave_one_out=flags.varcon_leave_one_out,
            centroid_momentum=flags.varcon_centroid_momentum,
        )
        ProjectionHead(1, flags.varcon_dim, flags.varcon_head)
    except (TypeError, ValueError) as error:
        stop(error)


def _run(script: Path, arguments: Sequence[str]) -> None:
    """As ``python script arguments`` would."""
    before = sys.argv, sys.path[0]
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[0] = before


if __name__ == "__main__":
    main()
