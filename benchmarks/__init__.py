"""What mpisjax costs in time and memory, measured: `python -m benchmarks --help`."""
