"""``python -m benchmarks``: one subcommand a question."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.kernel_code import kernel_code

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.callback()
def main() -> None:
    """Measure varcon-loss against what it replaces."""


@app.command()
def quickstart(
    epochs: Annotated[int, typer.Option(min=1, help="training epochs of each method")] = 30,
    seed: Annotated[int, typer.Option(help="of weights, order and augmentation")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the picture")] = Path("runs/quickstart"),
) -> None:
    """Train a small CNN on real digits with VarCon, SupCon and cross-entropy, and compare."""
    from benchmarks.quickstart import quickstart as run

    run(out, epochs=epochs, seed=seed, console=console)


@app.command()
def speed(
    rows: Annotated[str, typer.Option(help="batch sizes N")] = "64,256,1024,4096,16384,65536",
    classes: Annotated[str, typer.Option(help="numbers of classes K")] = "10,100,1000",
    dims: Annotated[str, typer.Option(help="embedding widths D")] = "128",
    dtypes: Annotated[str, typer.Option(help="torch dtypes")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    contenders: Annotated[
        str, typer.Option(help="comma-separated parts of names; all by default")
    ] = "",
    compiled: Annotated[bool, typer.Option(help="include the torch.compile contenders")] = True,
    budget: Annotated[float, typer.Option(help="seconds of timing at each size and mode")] = 8.0,
    max_repeats: Annotated[int, typer.Option(help="repeats at most")] = 200,
    cell_timeout: Annotated[float, typer.Option(help="slower contenders are left out, s")] = 20.0,
    memory_gib: Annotated[
        float, typer.Option(help="address space of a measuring process (CPU); 0: no limit")
    ] = 8.0,
    name: Annotated[str, typer.Option(help="of the result files")] = "speed-cpu",
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/speed"),
    resume: Annotated[bool, typer.Option(help="keep sizes already measured")] = False,
) -> None:
    """Time and memory: this package, the plain equations, SupCon and NT-Xent, side by side."""
    from benchmarks import speed as harness
    from benchmarks.contenders import CONTENDERS

    _require(device)
    wanted = [part.strip() for part in contenders.split(",") if part.strip()]
    chosen = [
        title
        for title in CONTENDERS
        if (compiled or "compiled" not in title)
        and (not wanted or title == harness.OURS or any(part in title for part in wanted))
    ]
    harness.run(
        name,
        harness.problems(
            _numbers(rows), _numbers(classes), _numbers(dims), dtypes.split(","), device
        ),
        chosen,
        out=out,
        resume=resume,
        console=console,
        budget=budget,
        max_repeats=max_repeats,
        cell_timeout=cell_timeout,
        memory_limit=int(memory_gib * 2**30) if memory_gib and device == "cpu" else None,
    )


@app.command()
def quality(
    data: Annotated[
        str, typer.Option(help="digits, mnist5k, mnist-pairs, cifar10, cifar100, folder")
    ] = "mnist-pairs",
    methods: Annotated[
        str, typer.Option(help="comma-separated; variants: other temperatures and heads")
    ] = "",
    batch_sizes: Annotated[
        str, typer.Option(help="images a step (each seen in two views)")
    ] = "16,64,128,512",
    learning_rates: Annotated[
        str, typer.Option(help="grid, the same for every method")
    ] = "0.05,0.15,0.45",
    seeds: Annotated[int, typer.Option(min=1, help="reported runs of each method")] = 5,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    noise: Annotated[str, typer.Option(help="shares of wrong training labels")] = "0",
    workers: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    root: Annotated[Path | None, typer.Option(help="folder of cifar10, cifar100, folder")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/quality"),
) -> None:
    """Linear probe and kNN of VarCon, SupCon and cross-entropy over batch sizes, with intervals.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    from benchmarks import quality as harness
    from benchmarks.methods import METHODS, VARIANTS
    from benchmarks.plots import draw_quality

    _require(device)
    chosen = [part.strip() for part in methods.split(",") if part.strip()] or list(METHODS)
    if chosen == ["variants"]:
        chosen = list(VARIANTS)
    store = harness.Store(out / f"{data}.jsonl")
    rows = harness.sweep(
        data,
        chosen,
        _numbers(batch_sizes),
        [float(rate) for rate in learning_rates.split(",")],
        seeds,
        epochs,
        store,
        noises=[float(share) for share in noise.split(",")],
        workers=workers,
        root=root,
        device=device,
    )
    harness.show(rows, console)
    harness.save(rows, out / f"{data}.csv")
    console.print(f"saved: {store.path}, {out / f'{data}.csv'}")
    for picture in draw_quality(rows, out):
        console.print(f"picture: {picture}")


@app.command()
def evolution(
    data: Annotated[str, typer.Option(help="as for quality")] = "mnist5k",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=2)] = 256,
    learning_rate: Annotated[float, typer.Option()] = 0.15,
    snapshots: Annotated[str, typer.Option(help="epochs after which to look")] = "1,2,5,10",
    seed: Annotated[int, typer.Option(help="of weights, order and augmentation")] = 0,
    root: Annotated[Path | None, typer.Option(help="folder of cifar10, cifar100, folder")] = None,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/evolution"),
) -> None:
    """t-SNE of held-out images and the density of τ2 while VarCon and SupCon train."""
    import pandas as pd

    from benchmarks import evolution as harness
    from benchmarks import results
    from benchmarks.data import load
    from benchmarks.progress import progress_bar
    from benchmarks.training import Recipe

    wanted = _numbers(snapshots)
    if not all(1 <= epoch <= epochs for epoch in wanted):
        raise typer.BadParameter(f"snapshots must lie in 1 ... {epochs}, got {snapshots}")
    recipe = Recipe(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    with progress_bar() as bar:
        task = bar.add_task("evolution", total=epochs * len(harness.METHODS), note="")
        rows = harness.follow(
            load(data, root), recipe, seed, wanted, out,
            lambda method, epoch: bar.update(task, advance=1, note=f"{method} epoch {epoch + 1}"),
        )  # fmt: skip
    console.print(pd.DataFrame(rows).dropna(subset=["knn"]).to_string(index=False))
    env = results.environment() | {"seed": seed, **recipe.as_dict()}
    console.print(f"saved: {results.save(f'evolution-{data}', rows, env, out)}")


@app.command(name="metric-learning")
def metric_learning(
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    seed: Annotated[int, typer.Option(help="of weights, order and augmentation")] = 0,
    cost: Annotated[bool, typer.Option(help="also measure CrossBatchMemory against PML's")] = False,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path(
        "runs/metric-learning"
    ),
) -> None:
    """VarCon beside SupCon in pytorch-metric-learning: retrieval among unseen classes."""
    from benchmarks import metric_learning as example
    from benchmarks import results

    env = results.environment()
    rows = example.compare(epochs=epochs, seed=seed, console=console)
    console.print(f"saved: {results.save('metric-learning', rows, env, out)}")
    if cost:
        rows = example.memory_cost()
        rows.append({"loss": "adapter over core", "ratio": example.adapter_overhead()})
        for row in rows:
            console.print(row)
        console.print(f"saved: {results.save('metric-learning-memory', rows, env, out)}")


@app.command()
def distributed(
    ranks: Annotated[str, typer.Option(help="gloo processes on this machine")] = "2,4",
    rows: Annotated[int, typer.Option(help="samples a rank")] = 256,
    classes: Annotated[str, typer.Option(help="numbers of classes")] = "100,1000,100000",
    dim: Annotated[int, typer.Option(help="embedding width")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="steps measured")] = 20,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path(
        "runs/distributed"
    ),
) -> None:
    """Bytes and time of global centroids against gathered embeddings; then 8 to 1024 ranks."""
    import pandas as pd

    from benchmarks import distributed as harness
    from benchmarks import results
    from benchmarks.progress import progress_bar

    measured = []
    sizes = [(w, c) for w in _numbers(ranks) for c in _numbers(classes)]
    with progress_bar() as bar:
        task = bar.add_task("distributed", total=len(sizes), note="")
        for world_size, num_classes in sizes:
            bar.update(task, note=f"{world_size} ranks, C={num_classes}")
            measured += harness.measure(
                world_size, rows, num_classes, dim, steps, out.absolute() / "work"
            )
            bar.advance(task)
    console.print(pd.DataFrame(measured).to_string(index=False))
    expected = harness.extrapolate(rows, dim)
    console.print(pd.DataFrame(expected).to_string(index=False))
    env = results.environment()
    console.print(f"saved: {results.save('distributed', measured, env, out)}")
    console.print(f"saved: {results.save('distributed-model', expected, env, out)}")
    harness.draw(expected, out / "distributed-model.png")


@app.command()
def momentum(
    momenta: Annotated[str, typer.Option(help="of the centroid memory")] = "0.5,0.9,0.99,0.999",
    batch_sizes: Annotated[str, typer.Option(help="images a step")] = "16,64,256",
    classes: Annotated[str, typer.Option(help="numbers of classes")] = "20,100",
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    learning_rate: Annotated[float, typer.Option()] = 0.15,
    workers: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/quality"),
) -> None:
    """A good momentum of the centroid memory for a batch size and number of classes."""
    from benchmarks import quality as harness
    from benchmarks.plots import draw_momentum

    rows = harness.momentum_sweep(
        [float(m) for m in momenta.split(",")],
        _numbers(batch_sizes),
        _numbers(classes),
        seeds,
        epochs,
        learning_rate,
        harness.Store(out / "momentum.jsonl"),
        workers=workers,
    )
    table = harness.momentum_table(rows)
    console.print(table.to_string(index=False))
    table.to_csv(out / "momentum.csv", index=False)
    console.print(f"saved: {out / 'momentum.csv'}; picture: {draw_momentum(table, out)}")


@app.command(name="memory-cost")
def memory_cost(
    rows: Annotated[int, typer.Option(help="batch size N")] = 512,
    classes: Annotated[str, typer.Option(help="numbers of classes C")] = "1000,100000",
    dim: Annotated[int, typer.Option(help="embedding width")] = 128,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/speed"),
) -> None:
    """The centroid memory beside plain VarCon, and SupCon with a queue of the same bytes."""
    from benchmarks import memory_cost as harness
    from benchmarks import results
    from benchmarks.progress import progress_bar

    measured = []
    with progress_bar() as bar:
        task = bar.add_task("memory-cost", total=len(_numbers(classes)), note="")
        for num_classes in _numbers(classes):
            measured += harness.compare(rows, num_classes, dim)
            bar.advance(task)
    for row in measured:
        console.print(row)
    console.print(f"saved: {results.save('memory-cost', measured, results.environment(), out)}")


@app.command()
def paper(
    root: Annotated[Path, typer.Option(help="folder with torchvision's CIFAR-100 files")],
    epochs: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=2)] = 1024,
    probe_epochs: Annotated[int, typer.Option(min=1)] = 100,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/paper"),
) -> None:
    """The paper's CIFAR-100 recipe: ResNet-50, 200 epochs, then a linear probe. Wants a GPU."""
    from benchmarks import results
    from benchmarks.data import load
    from benchmarks.paper import reproduce
    from benchmarks.progress import progress_bar

    _require(device)
    with progress_bar() as bar:
        task = bar.add_task("CIFAR-100", total=epochs, note="")

        def show(_: int, log: dict[str, float], __: object) -> None:
            bar.update(task, advance=1, note=f"loss {log['loss']:.3f} τ2 {log['tau2']:.3f}")

        row = reproduce(
            load("cifar100", root),
            seed=seed,
            device=device,
            epochs=epochs,
            batch_size=batch_size,
            probe_epochs=probe_epochs,
            on_epoch=show,
        )
    console.print(f"top-1 of the linear probe: {row['top1']:.2%}")
    console.print(
        f"saved: {results.save('paper-cifar100', [row], results.environment(device), out)}"
    )


@app.command(name="gpu-proof")
def gpu_proof(
    only: Annotated[str, typer.Option(help="comma-separated stages; all by default")] = "",
    out: Annotated[Path, typer.Option(help="folder of the result files")] = Path("runs/gpu-proof"),
) -> None:
    """What only a GPU can show: tests, sanitizers, launches, times against floors and targets.

    Each stage takes under seven minutes; one that passed is not run again.
    """
    from rich.table import Table

    from benchmarks import gpu_proof as harness
    from benchmarks import results

    _require("cuda")
    rows = harness.run(out, "cuda", [part for part in only.split(",") if part] or None)
    table = Table("stage", "outcome", "seconds", "last line")
    for row in rows:
        table.add_row(row["stage"], row["status"], str(row["seconds"]), row["last_line"])
    console.print(table)
    env = results.environment("cuda") | harness.environment("cuda")
    saved = results.save("gpu-proof", rows, env, out)
    console.print(f"saved: {saved}; copy it to {results.RESULTS} and run report")
    if any(row["status"] != "passed" for row in rows):
        raise typer.Exit(1)


app.command(name="kernel-code")(kernel_code)


@app.command()
def report() -> None:
    """Rebuild benchmarks/RESULTS.md and its pictures from benchmarks/results/."""
    from benchmarks.report import write

    console.print(f"written: {write()}")


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this needs a CUDA device, and torch finds none here")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected integers separated by commas, got {text!r}") from None


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
