"""The folder that a command writes to: what cannot work is said before the work, not after it."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sgp.data.reading import needed
from sgp.train.errors import UserError


def check_folder(out: Path, *, files: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Refuse an output folder that cannot be made or written, or has something else in the way.

    It is made and, unless it was there, removed again: nothing else says whether it can be.

    Args:
        out: the folder of `--out`; it need not be there yet.
        files, folders: names of what will be written into it.

    Raises:
        UserError: what stands there instead, or what the system refuses.
    """
    try:
        nearest = out.absolute()
        while not nearest.exists():
            nearest = nearest.parent
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {str(out)[:80]}: {reason}") from error
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {nearest} is a file, not a folder; name another folder")
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
            for name in filter(lambda name: (out / name).is_file(), files):
                (out / name).open("ab").close()
    finally:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
    for name in files:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a folder, where a file will be written")
    for name in folders:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a file, where a folder will be written")


@contextlib.contextmanager
def writing(out: Path, *, option: str = "--out") -> Iterator[None]:
    """What the system refuses meanwhile (a full disk), as a line for the user.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        where, said = error.filename or out, error.strerror or error
        raise UserError(f"{option} {out}: cannot write {where}: {said}") from error


def require(*packages: str) -> None:
    """Refuse to begin without these packages.

    Raises:
        UserError: which are missing, and how to install them.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise UserError(needed(*missing))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # None stands in its place
        return False
