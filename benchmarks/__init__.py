"""What is timed, against what: ``python -m benchmarks`` (``make bench``) runs all of it; see docs/performance.md."""
