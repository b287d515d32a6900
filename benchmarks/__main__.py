"""``python -m benchmarks``: one subcommand a question, each in the module of its name."""

import importlib
from typing import NoReturn


def _stop_for_want_of(error: ModuleNotFoundError) -> NoReturn:
    """End with one line that says how to install what is missing."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "benchmarks", "varcon_loss"):  # ours: a mistake in the code
        raise error
    raise SystemExit(
        f"python -m benchmarks needs {package}: pip install '.[bench]', in the checkout"
    ) from error


try:
    import typer
except ModuleNotFoundError as error:
    _stop_for_want_of(error)

QUESTIONS = {
    "quickstart": "Train a small CNN by VarCon and its rivals, compare, draw. Two minutes.",
    "speed": "Time and memory beside the plain equations, SupCon and NT-Xent.",
    "evaluate": "Unseen styles and classes, long tails, confidence: icons, pretrained encoder.",
    "large-batch": "A step in chunks beside one batch, and SupCon beside both.",
    "distributed": "Bytes and time of centroids over ranks, against gathered embeddings.",
    "paper": "The paper's CIFAR-100 recipe. Wants a GPU.",
    "gpu-proof": "Are the kernels right on a GPU, and faster? Tests, memcheck, one table.",
    "kernel-code": "What the compiler makes of the kernels: registers, spills. Wants no GPU.",
    "report": "Rebuild benchmarks/RESULTS.md and its pictures from the saved results.",
}

EXAMPLES = """Examples:

python -m benchmarks quickstart

python -m benchmarks speed --rows 256,8192 --classes 100,1000

python -m benchmarks large-batch --sizes 256,1024

python -m benchmarks COMMAND --help
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXAMPLES,
)


@app.callback()
def main() -> None:
    """Measure varcon-loss against what it replaces."""


def question(name: str) -> typer.Typer:
    """The command line of one question.

    Imported only now: what one question needs would make the help of all slow.
    """
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(module.command)
    return alone


def _register(name: str, line: str) -> None:
    @app.command(
        name,
        help=line,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def ask(context: typer.Context) -> None:
        try:
            question(name)(context.args, prog_name=f"python -m benchmarks {name}")
        except ModuleNotFoundError as error:  # some packages are imported where they are used
            _stop_for_want_of(error)


for _name, _line in QUESTIONS.items():
    _register(_name, _line)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
