"""Several GPUs, on `torch.distributed`. Importing it registers DTensor's sharding rules for the ops."""

from fuzzytok_kernels.distributed.exchange import history_bytes
from fuzzytok_kernels.distributed.gradients import average_gradients
from fuzzytok_kernels.distributed.sequence import causal_conv1d
from fuzzytok_kernels.distributed.styles import ColwiseConv1d, RowwiseConv1d, TimeParallel

__all__ = ["ColwiseConv1d", "RowwiseConv1d", "TimeParallel", "average_gradients", "causal_conv1d", "history_bytes"]
