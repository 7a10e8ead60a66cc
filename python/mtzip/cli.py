"""The command ``mtzip``: ``demo``, ``zip``, ``show`` and ``export``. What goes wrong is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

FAILURE = 2  # exit code of everything that goes wrong, as click has it for wrong usage

EXAMPLE = """\b
Example: the module nets.py here has a class LeNet with a forward, mnist.pt and fashion.pt are state dicts of it, and
the .npy files are images as the networks see them, [n, 1, 28, 28] in float32.

\b
  mtzip zip --network mnist=nets:LeNet   --weights mnist=mnist.pt     --inputs mnist=mnist.npy \\
            --network fashion=nets:LeNet --weights fashion=fashion.pt --inputs fashion=fashion.npy \\
            --share 0.9 --output zipped.safetensors
  mtzip show zipped.safetensors
"""


class Named(click.ParamType):
    """``TASK=VALUE``."""

    name = "TASK=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The task and its value."""
        if isinstance(value, tuple):
            return value
        task, separator, rest = value.partition("=")
        if not (task and separator and rest):
            self.fail(f"must be TASK=VALUE, got {value!r}", param, ctx)
        return task, rest


class Share(click.ParamType):
    """A fraction, or ``AXIS=FRACTION`` or ``AXIS=COUNT``."""

    name = "FRACTION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, Any]:
        """The axis (None for all of them) and its fraction or count."""
        if isinstance(value, tuple):
            return value
        axis, _, amount = value.rpartition("=")
        try:
            number = int(amount) if axis and amount.isdigit() and amount != "1" else float(amount)
        except ValueError:
            self.fail(f"must be a fraction from 0 to 1, AXIS=FRACTION or AXIS=COUNT, got {value!r}", param, ctx)
        if isinstance(number, float) and not 0 <= number <= 1:
            self.fail(f"must be a fraction from 0 to 1, got {value!r}", param, ctx)
        return axis or None, number


@click.group(epilog="Start with: mtzip demo", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mtzip", message="%(prog)s %(version)s")
def cli() -> None:
    """Zips pretrained networks for different tasks into one network that stores the weights they share once."""


@cli.command()
@click.option(
    "--data",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with mnist/ and fashion-mnist/, each with its four original idx .gz files. Without it, the "
    "handwritten digits that scikit-learn ships.",
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the zipped network and the picture.",
)
def demo(data: Path | None, output: Path) -> None:
    """Zips two networks trained on real images at several share levels.

    Trains one network a task (once: they are cached), zips, retrains a hundred steps, prints test errors and stored
    parameters, and writes the zipped network and a picture of share against error.
    """
    try:
        from .demo.run import demonstrate
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; the demonstration needs more: pip install 'mtzip[demo]'") from error
    demonstrate(data, output)


@cli.command(name="zip", epilog=EXAMPLE)
@click.option(
    "--network",
    "networks",
    type=Named(),
    required=True,
    multiple=True,
    metavar="TASK=MODULE:CALLABLE",
    help="The class or function that makes the task's network, called without arguments. Modules are looked for in "
    "the working directory first. Give one for each task, at least two.",
)
@click.option(
    "--weights",
    type=Named(),
    multiple=True,
    metavar="TASK=FILE",
    help="Its state dict, .pt or .safetensors; no code in it is executed. Without it, the weights that the callable "
    "gives.",
)
@click.option(
    "--inputs",
    type=Named(),
    required=True,
    multiple=True,
    metavar="TASK=FILE",
    help="Unlabelled inputs of the task to calibrate on, as the network sees them: .npy, .npz, .pt or .safetensors, "
    "one sample a row; about 1,000 will do. FILE:NAME takes one of several arrays.",
)
@click.option(
    "--share",
    type=Share(),
    multiple=True,
    metavar="FRACTION",
    help="How many neurons the tasks store together, of the smaller width: 1 (the default) for all. AXIS=FRACTION or "
    "AXIS=COUNT for one axis, by the name that `mtzip show` prints; may be repeated.",
)
@click.option(
    "--method",
    type=click.Choice(["refit", "mtz", "average"]),
    default="refit",
    show_default=True,
    help="refit: merged weights fitted to the original networks' activations. mtz: the paper's. average: plain mean.",
)
@click.option(
    "--follow/--no-follow",
    default=True,
    show_default=True,
    help="Whether a task may take over another's trunk as it is, where that keeps their outputs better than merging.",
)
@click.option(
    "--keep-zeros",
    type=click.Choice(["no", "yes", "count"]),
    default="no",
    show_default=True,
    help="For pruned networks. yes: a weight is stored as zero where all tasks that store it have one. count: and "
    "shared neurons have no more weights than the task with most has there.",
)
@click.option(
    "--slots",
    type=click.Choice(["all", "some"]),
    default="all",
    show_default=True,
    help="Of three and more tasks, which share a stored neuron: all that have it, or any two or more of them.",
)
@click.option(
    "--steps",
    metavar="COUNT",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Retraining steps afterwards: the zipped network learns from the originals on the calibration inputs.",
)
@click.option(
    "--batch",
    metavar="COUNT",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Inputs a task in a retraining step.",
)
@click.option(
    "--seed", metavar="NUMBER", type=int, default=0, show_default=True, help="Of the order of inputs in retraining."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    metavar="FILE",
    help="Where to write the zipped network, .safetensors.",
)
def zip_command(
    networks, weights, inputs, share, method, follow, keep_zeros, slots, steps, batch, seed, output
) -> None:
    """Zips pretrained networks, one a task, into one file."""
    if not output.parent.is_dir():
        raise click.UsageError(f"--output must be in a folder that exists, got {output}")
    networks = _by_task("--network", networks)
    if len(networks) < 2:
        raise click.UsageError(f"--network must be given for at least two tasks, got {', '.join(networks)}")
    weights, inputs = _by_task("--weights", weights), _by_task("--inputs", inputs)
    for option, given in (("--weights", weights), ("--inputs", inputs)):
        if unknown := [task for task in given if task not in networks]:
            raise click.UsageError(f"{option} must be for one of the tasks {', '.join(networks)}, got {unknown[0]}")
    if missing := [task for task in networks if task not in inputs]:
        raise click.UsageError(f"--inputs must be given for every task, got none for {missing[0]}")

    from . import retrain, save, zip_networks
    from .files import load_inputs, load_weights, make_network

    made = {task: make_network(target) for task, target in networks.items()}
    for task, file in weights.items():
        load_weights(made[task], file)
    for network in made.values():
        network.eval()
    calibration = {task: load_inputs(inputs[task], network) for task, network in made.items()}
    bars = sys.stderr.isatty()
    zipped = zip_networks(
        made,
        calibration,
        share=_shares(share),
        method=method,
        follow=follow,
        slots=slots,
        keep_zeros={"no": False, "yes": True, "count": "count"}[keep_zeros],
        progress=bars,
    )
    click.echo(zipped.report)
    if steps:
        retrain(zipped, calibration, steps, batch_size=batch, seed=seed)
    save(zipped, output)
    click.echo(f"wrote {output}: {output.stat().st_size:,} bytes; look at it with: mtzip show {output}")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--html",
    "page",
    metavar="PAGE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a page for the browser there instead: one file, nothing else needed.",
)
def show(file: Path, page: Path | None) -> None:
    """Prints what is in a zipped network: its tasks, what they share, and sizes."""
    from .show import describe, describe_html

    if page is None:
        click.echo(describe(file))
        return
    from .reports.page import write_page

    write_page(page, describe_html(file))
    click.echo(f"wrote {page}: {page.stat().st_size:,} bytes; open it in a browser")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--network",
    "networks",
    type=Named(),
    required=True,
    multiple=True,
    metavar="TASK=MODULE:CALLABLE",
    help="The class or function that makes the task's network, as for `mtzip zip`. Give one for each task in the file.",
)
@click.option(
    "--task", "tasks", metavar="TASK", multiple=True, help="Export this one alone; may be given several times."
)
@click.option("--same-input", is_flag=True, help="One input for all tasks; what they compute alike is computed once.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    metavar="FILE",
    help="Where to write the graph, .onnx.",
)
def export(file: Path, networks, tasks, same_input, output: Path) -> None:
    """Writes a zipped network as one ONNX graph, shared weights once."""
    from . import export_onnx, load
    from .files import make_network

    made = {task: make_network(target).eval() for task, target in _by_task("--network", networks).items()}
    zipped = load(file, made)
    if unknown := [task for task in tasks if task not in zipped]:
        raise click.UsageError(f"--task must be one of {', '.join(zipped.tasks)}, got {unknown[0]}")
    export_onnx(zipped, output, tasks or None, same_input=same_input)
    click.echo(f"wrote {output}: {output.stat().st_size:,} bytes")


def _by_task(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for task, value in pairs:
        if task in values:
            raise click.UsageError(f"{option} must be given once for a task, got {task} twice")
        values[task] = value
    return values


def _shares(given: Sequence[tuple[str | None, Any]]) -> Any:
    """A fraction, or a mapping from axis to fraction or count."""
    whole = [amount for axis, amount in given if axis is None]
    axes = {axis: amount for axis, amount in given if axis is not None}
    if len(whole) > 1 or (whole and axes):
        raise click.UsageError("--share must be one fraction, or AXIS=FRACTION as often as there are axes, got both")
    return axes or (whole[0] if whole else 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. ``MTZIP_DEBUG=1`` shows the traceback of what went wrong."""
    return _guarded(lambda: cli.main(args=arguments, prog_name="mtzip", standalone_mode=False))


def _guarded(run: Callable[[], Any]) -> int:
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return FAILURE
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("mtzip: interrupted", err=True)
        return 130
    except BrokenPipeError:
        # `mtzip show FILE | head`: the reader has gone, and there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("MTZIP_DEBUG"):
            raise
        click.echo(f"mtzip: error: {_one_line(error)}", err=True)
        return FAILURE


def _one_line(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        text = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            text = f"{text.rstrip('.')}; see {error.ctx.command_path} --help"
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str() of a KeyError is the repr of its message
    else:
        text = str(error)
    text = " ".join(text.split())
    expected = isinstance(error, (click.ClickException, ValueError, OSError, KeyError))
    return text if expected and text else f"{type(error).__name__}: {text}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main())
