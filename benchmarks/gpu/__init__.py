"""Everything that needs a GPU, in stages of which each has a time and a file of its own: `benchmarks/gpu.sh`."""
