"""How the site reads docstrings: "Example:" is a section of examples, as it is to a reader."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Griffe knows the section as "Examples:" only, and takes "Example:" for a note."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rename it before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = HEADING.sub(r"\1Examples:", obj.docstring.value)
