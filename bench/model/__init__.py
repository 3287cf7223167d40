"""The fused block, and a model of such blocks, beside PyTorch's: `python3 -m bench.model`."""
