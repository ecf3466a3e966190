"""What pytest does not look into for doctests: programs for old versions of the package."""

collect_ignore_glob = ["tests/fixtures/make_*.py"]
