"""What is timed: one block, and the batches, depths and channels of the sections."""

from bench.grid import Shape

BLOCK = Shape(32, 2048, 256, 256, 3, 4)
GATED = BLOCK._replace(c_out=2 * BLOCK.c_out)  # a gate halves the channels
BATCHES = ((32, 2048), (16, 1024))
DILATIONS = (1, 2, 4)
DEPTHS = (2, 4, 8, 12, 16, 24)
RULE_SHAPES = tuple(BLOCK._replace(c_in=channels, c_out=channels) for channels in (256, 512, 1024))
