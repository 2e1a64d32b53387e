"""The folder that a command writes to: what cannot work is said before the work, not after it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sgp.train.errors import UserError


def check_folder(out: Path, *, files: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Refuse an output folder that cannot be made or written, or has something else in the way.

    Args:
        out: the folder of `--out`; it need not be there yet.
        files, folders: names of what will be written into it.

    Raises:
        UserError: what stands there instead.
    """
    nearest = out.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {nearest} is a file, not a folder; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write in {nearest}")
    for name in files:
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a folder, where a file will be written")
    for name in folders:
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"--out {out}: {out / name} is a file, where a folder will be written")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system refuses meanwhile (a full disk), as a line for the user.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise UserError(f"--out {out}: cannot write {where}: {error.strerror or error}") from error
