"""gpupool_sync beside its peers, measured alternately on one machine: ``python -m benchmarks --help``."""
