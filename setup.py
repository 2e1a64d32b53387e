"""The one choice that pyproject.toml cannot make; all others are there.

An editable install adds `.editable/` to the import path: a folder with a link to `sgp/` and nothing
else, so that type checkers find the package (they do not follow setuptools' import hook), and
`kernels/`, `tests/` and `bench/` do not become importable everywhere.
"""

import sys

from setuptools import setup

EDITABLE = {"": ".editable"}
BUILT = {"sgp": "sgp", "sgp.kernels": "kernels"}

setup(package_dir=EDITABLE if "editable_wheel" in sys.argv else BUILT)
