"""The command line: `sgp train`, `sgp audit`, `sgp verify`, `sgp doctor`.

Only the standard library is imported here; each command imports what it needs when it runs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C.

    Args:
        argv: The words after `sgp`; None takes them from the command line.

    Raises:
        SystemExit: `--help`, `--version`, or arguments that argparse refuses (code 2).

    Example:
        >>> main(["train", "--data", "missing.jsonl"])  # one line on standard error
        2
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print(f"sgp {arguments.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgp", description="Selective Gradient Propagation: the loss of the output tokens."
    )
    parser.add_argument("--version", action="version", version=f"sgp {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(
        commands.add_parser("train", help="train a small model, PyTorch's loss beside sgp's")
    )
    _add_audit(
        commands.add_parser("audit", help="look for wrong masks in a file, and at its gradient")
    )
    verify = commands.add_parser("verify", help="check the kernels against the reference")
    verify.add_argument("--quick", action="store_true", help="a small part of the checks")
    verify.add_argument("--output", type=Path, metavar="FILE.json", help="write the results too")
    verify.set_defaults(run=_verify)
    doctor = commands.add_parser("doctor", help="say what runs on this machine, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a small causal language model on prompt/completion pairs, once with PyTorch's "
        "loss and once with another, on the same batches; print both side by side and save the "
        "model, a picture of both loss curves and a summary. By default the data are the "
        "functions of the Python standard library."
    )
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"prompt": ..., "completion": ...}',
    )
    add("--model", metavar="PATH", help="folder or hub name of a causal model, else a tiny Llama")
    add("--steps", type=_count, default=60, metavar="N", help="optimizer steps")
    add("--batch-size", type=_count, default=4, metavar="B", help="sequences a step")
    add(
        "--loss",
        choices=("pytorch", "sgp", "sgp-linear"),
        default="sgp-linear",
        help="of the second copy, which is saved: the usual loss (a control), sgp's on the kept "
        "rows' logits, or sgp's with the head inside",
    )
    add("--seed", type=int, default=0, help="of the weights and the order of the data")
    add("--out", type=Path, default=Path("sgp-out"), metavar="FOLDER", help="where files are saved")
    add("--max-length", type=_count, metavar="T", help="window in tokens, 128 if not given")
    add("--lr", type=_positive, help="largest learning rate; 4e-3, or 5e-5 with --model")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from sgp.train.errors import UserError  # noqa: PLC0415  # only this command needs it
    from sgp.train.options import Options  # noqa: PLC0415  # same reason
    from sgp.train.run import run  # noqa: PLC0415  # same reason

    options = Options(
        data=arguments.data,
        model=arguments.model,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        out=arguments.out,
        max_length=arguments.max_length,
        lr=arguments.lr,
        loss=arguments.loss,
    )
    try:
        return run(options)
    except UserError as error:
        print(f"sgp train: {error}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:  # later ones end the training early and are not raised
        print("sgp train: interrupted before the first step; nothing was saved", file=sys.stderr)
        return _INTERRUPTED


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at every sample's labels for masks that were lost, shifted or cover the wrong "
        "tokens, and at the gradient of the first few. Exit code 1 if there are errors."
    )
    add = parser.add_argument
    add(
        "data",
        type=Path,
        metavar="FILE.jsonl",
        help="lines of input_ids and labels (-100: no loss; not shifted), as a collator makes "
        "them, or of prompt and completion, which the tokenizer turns into both",
    )
    add("--model", metavar="PATH", help="folder or hub name of a causal model, else a tiny Llama")
    add("--tokenizer", metavar="PATH", help="folder or hub name; default: the model's")
    add("--rows", type=_count, default=4, metavar="B", help="samples for a backward pass (4)")
    add("--max-length", type=_count, default=512, metavar="T", help="their tokens, at most (512)")
    add("--out", type=Path, metavar="FOLDER", help="write audit.png, audit.html and audit.json")
    parser.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from sgp.auditing import command  # noqa: PLC0415  only this command needs it
    from sgp.train.errors import UserError  # noqa: PLC0415  same reason

    try:
        return command.run(arguments)
    except UserError as error:
        print(f"sgp audit: {error}", file=sys.stderr)
        return _USAGE


def _verify(arguments: argparse.Namespace) -> int:
    from sgp import verify  # noqa: PLC0415  # only this command needs it

    return verify.run(quick=arguments.quick, output=arguments.output)


def _doctor(_: argparse.Namespace) -> int:
    from sgp import doctor  # noqa: PLC0415  # only this command needs it

    return doctor.run()


def _version() -> str:
    try:
        return metadata.version("sgp-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
