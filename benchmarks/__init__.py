"""Measurements of padless beside its peers: one script a table, one JSON record a run.

`python -m benchmarks.<script> --help` says what each takes; `python -m benchmarks.render` makes
docs/performance.md from the records.
"""
