"""Programs to read and to run: `python3 -m fuzzytok_kernels.examples.NAME`."""
