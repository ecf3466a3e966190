"""Modules that need packages which are not there for every platform: pytest does not look for doctests in them."""

from importlib.util import find_spec

_NEEDS = {"triton": "gpu*.py", "numba": "loops*.py"}

collect_ignore_glob = [
    f"src/ssdir/model/kernels/{files}" for package, files in _NEEDS.items() if find_spec(package) is None
]
