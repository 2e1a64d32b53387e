"""The command line: `sgp train`, `sgp audit`, `sgp plan`, `sgp verify`, `sgp doctor`.

Only the standard library is imported here; each command imports what it needs when it runs.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path

from sgp import interrupt

_USAGE = 2

_MODEL = "folder or hub name of a causal language model (default: a tiny Llama)"

_LARGEST = 1 << 40  # tokens, classes or features: more than anyone has
_UNITS = {
    "": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6,
    "gb": 10**9,
}  # fmt: skip

_Job = Callable[[], int]


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
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    from sgp.data.reading import needed  # noqa: PLC0415  # only commands need it
    from sgp.train.errors import UserError  # noqa: PLC0415  # same reason

    try:
        job: _Job = arguments.prepare(arguments)  # imports what it needs
        with interrupt.raising():
            return job()
    except UserError as error:
        print(f"sgp {arguments.command}: {error}", file=sys.stderr)
        return _USAGE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "sgp"):
            raise
        print(f"sgp {arguments.command}: {needed(package)}", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt as stop:
        words = ["sgp", f"{arguments.command}:", "interrupted", *map(str, stop.args)]
        print(" ".join(words), file=sys.stderr)
        return interrupt.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgp", description="Selective Gradient Propagation: the loss of the output tokens."
    )
    parser.add_argument("--version", action="version", version=f"sgp {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_train(
        commands.add_parser("train", help="train a small model, PyTorch's loss beside sgp's")
    )
    _add_audit(
        commands.add_parser("audit", help="look for wrong masks in a file, and at its gradient")
    )
    _add_plan(
        commands.add_parser("plan", help="say what a head needs: memory and time, way by way")
    )
    verify = commands.add_parser("verify", help="check the kernels against the reference")
    verify.add_argument("--quick", action="store_true", help="a small part of the checks")
    verify.add_argument("--output", type=Path, metavar="FILE.json", help="write the results too")
    verify.set_defaults(prepare=_verify)
    doctor = commands.add_parser("doctor", help="say what runs on this machine, and why")
    doctor.set_defaults(prepare=_doctor)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a small causal language model on prompt/completion pairs, once with PyTorch's "
        "loss and once with another, on the same batches; print both side by side and save the "
        "model, a picture of both loss curves and a summary. By default the data are the "
        "functions of the Python standard library."
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='JSON lines of {"prompt": ..., "completion": ...} or {"messages": ...}, compressed '
        "or not, Parquet, or - for standard input (default: the standard library)",
    )
    add("--model", metavar="PATH", help=_MODEL)
    add(
        "--steps",
        type=_count,
        default=60,
        metavar="N",
        help="optimizer steps (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_count,
        default=4,
        metavar="B",
        help="sequences a step (default: %(default)s)",
    )
    add(
        "--loss",
        choices=("pytorch", "sgp", "sgp-linear"),
        default="sgp-linear",
        help="of the second copy, which is saved: the usual loss (a control), sgp's on the kept "
        "rows' logits, or sgp's with the head inside (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the weights and the order of the data (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("sgp-out"),
        metavar="FOLDER",
        help="where files are saved (default: %(default)s)",
    )
    add(
        "--max-length",
        type=_count,
        metavar="T",
        help="window in tokens (default: 128, or less if the model has less)",
    )
    add("--lr", type=_positive, help="largest learning rate (default: 4e-3, with --model 5e-5)")
    parser.set_defaults(prepare=_train)


def _train(arguments: argparse.Namespace) -> _Job:
    from sgp.train.options import Options  # noqa: PLC0415  # only this command needs it
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
    return lambda: run(options)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at every row's labels for masks that were lost, shifted or cover the wrong tokens, "
        "and at the gradient of a few, those with findings first. Exit code 0: no errors, though "
        "warnings and notes may stand; 1: errors, or with --repair, errors in what is left; 2: it "
        "could not run."
    )
    add = parser.add_argument
    add(
        "data",
        type=Path,
        metavar="FILE",
        help="JSON lines, compressed or not, Parquet, or - for standard input: input_ids and "
        "labels (-100: no loss; not shifted) or masks, as a collator has them, or prompt and "
        "completion, messages or text, which are tokenized as sgp.Collator does",
    )
    add("--model", metavar="PATH", help=_MODEL)
    add("--tokenizer", metavar="PATH", help="folder or hub name (default: the model's)")
    add(
        "--rows",
        type=_count,
        default=4,
        metavar="B",
        help="rows for a backward pass (default: %(default)s)",
    )
    add(
        "--max-length",
        type=_count,
        metavar="T",
        help="window in tokens, at which rows are cut (default: the model's positions; the "
        "backward pass then has 512 tokens of a row, or 64 beyond the first with loss where no "
        "row has any before)",
    )
    add("--out", type=Path, metavar="FOLDER", help="write audit.png, audit.html and audit.json")
    add(
        "--ignore",
        action="append",
        metavar="WORD",
        help='a finding, or modules as "*.visual.*" whose gradient may be missing; repeatable',
    )
    for level in ("error", "warning", "note"):
        add(
            f"--{level}",
            action="append",
            metavar="CODE",
            help=f"let this finding be {'an' if level == 'error' else 'a'} {level}; repeatable",
        )
    add(
        "--generate",
        type=_count_or_none,
        default=0,
        metavar="N",
        help="let the model answer N of these rows, greedily; needs --model",
    )
    add(
        "--repair",
        type=Path,
        metavar="FILE",
        help="write input_ids and labels with what can be mended without a guess",
    )
    add("--autocast", choices=("bf16", "fp16"), help="of the backward pass, as training has it")
    parser.set_defaults(prepare=_audit)


def _audit(arguments: argparse.Namespace) -> _Job:
    from sgp.commands import audit  # noqa: PLC0415  # only this command needs it

    return lambda: audit.run(arguments)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from sgp.head.gpus import GPUS  # noqa: PLC0415  # `import sgp` has it

    parser.description = (
        "List the ways in which linear_cross_entropy can make its logits on a GPU: memory, "
        "operations, bytes moved and milliseconds on paper, and which way a call takes. Exit code "
        "1 if no way fits the budget."
    )
    add = parser.add_argument
    add("--tokens", type=_size, required=True, metavar="N", help="of a batch")
    add(
        "--kept",
        type=_fraction,
        default=1.0,
        metavar="F",
        help="share of them that carries loss, above 0 and at most 1 (default: %(default)s)",
    )
    add("--vocab", type=_size, required=True, metavar="V", help="classes; of one rank's part")
    add("--width", type=_size, required=True, metavar="D", help="of the hidden states")
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "autocast"),
        default="bf16",
        help="of hidden states and weight; autocast: both in fp32 and matmuls in bf16 "
        "(default: %(default)s)",
    )
    add(
        "--budget",
        type=_bytes,
        metavar="BYTES",
        help="memory_budget=, as 512MiB, 1.5GiB, 2GB or a number of bytes (default: the "
        "call's own, which is printed)",
    )
    add(
        "--gpu",
        choices=tuple(GPUS),
        default="h100",
        help="whose data sheet the milliseconds are from (default: %(default)s)",
    )
    add("--frozen-head", action="store_true", help="the weight has no gradient, as under LoRA")
    add(
        "--teacher-width",
        type=_size,
        default=0,
        metavar="D_t",
        help="linear_distillation, from a teacher's head of this width and the same dtype",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--per-token",
        action="store_true",
        help="gradients in backward, with a factor a token: reduction none, a loss a sequence, "
        "log-probabilities",
    )
    add(
        "--own-loss",
        type=_size,
        default=0,
        metavar="M",
        help="linear_loss, with M tokens that carry loss at once: 1 by row, else those of the "
        "longest sequence or group",
    )
    parser.set_defaults(prepare=_plan)


def _plan(arguments: argparse.Namespace) -> _Job:
    from sgp.commands import plan  # noqa: PLC0415  # only this command needs it
    from sgp.train.errors import UserError  # noqa: PLC0415  # same reason

    if arguments.own_loss and arguments.teacher_width:
        raise UserError(
            f"--own-loss {arguments.own_loss} and --teacher-width {arguments.teacher_width}: "
            "linear_loss has no teacher; pass one of them"
        )
    return lambda: plan.run(arguments)


def _verify(arguments: argparse.Namespace) -> _Job:
    from sgp.commands import verify  # noqa: PLC0415  # only this command needs it

    return lambda: verify.run(quick=arguments.quick, output=arguments.output)


def _doctor(_: argparse.Namespace) -> _Job:
    from sgp.commands import doctor  # noqa: PLC0415  # only this command needs it

    return doctor.run


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


def _count_or_none(text: str) -> int:
    return 0 if text.strip() == "0" else _count(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _size(text: str) -> int:
    value = _count(text)
    if value > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_LARGEST}")
    return value


def _fraction(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1, which is all tokens")
    return value


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    unit = _UNITS.get(found[2].lower()) if found else None
    value = int(Fraction(found[1]) * unit) if found and unit else 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write 512MiB, 1.5GiB, 2GB or a number of bytes"
        )
    return value
