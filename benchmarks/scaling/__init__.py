"""How a step scales over devices: `python -m benchmarks.scaling --help`."""
