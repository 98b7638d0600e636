"""The benchmarks: `make bench`, or `python -m tests.bench --help`. docs/performance.md says what each row means."""
