"""Modules in which pytest does not look for doctests: they need packages that are not there for every platform, or an
old version of this one."""

from importlib.util import find_spec

_NEEDS = {"triton": "gpu*.py", "numba": "loops*.py"}

collect_ignore_glob = [
    f"src/ssdir/model/kernels/{files}" for package, files in _NEEDS.items() if find_spec(package) is None
]
collect_ignore_glob.append("tests/fixtures/make_*.py")
