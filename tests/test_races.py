"""Threads, streams and processes at once: every result has the bits of the first. `make repeats` does it ten thousand times."""

import torch
from modes import needs_cuda, not_interpreted, run_python

DIGEST = """
import hashlib, multiprocessing, sys, torch
from oracle import Problem, make_inputs, with_gradients
from fuzzytok_kernels import causal_conv1d
def conv(x, w, b, d):
    return causal_conv1d(x, w, b, dilation=d)
def digest(device, gradients=True):
    torch.manual_seed(0)
    inputs = make_inputs(Problem(2, 24, 40, 70, 3, 4), torch.float32, torch.device("cpu"), "channels-last", "channels-last")
    inputs = inputs.map(lambda value: value.to(device))
    results = with_gradients(conv, inputs) if gradients else {"y": conv(inputs.x, inputs.weight, inputs.bias, inputs.dilation)}
    return hashlib.sha256(b"".join(value.cpu().contiguous().numpy().tobytes() for value in results.values())).hexdigest()
def child(device, gradients, answers):
    torch.set_num_threads(1)
    try:
        answers.put(digest(device, gradients))
    except RuntimeError as error:
        answers.put(str(error))
def in_a_child(method, device, gradients=True):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=child, args=(device, gradients, answers))
    process.start()
    answer = answers.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    return answer
"""


@not_interpreted
def test_forked_workers():
    """As a DataLoader's, after the parent has used the ops; forward only, for PyTorch's autograd refuses forks where there is a GPU."""
    run_python(f"""{DIGEST}
torch.set_num_threads(1)
want = digest("cpu", gradients=False)
answers = [in_a_child("fork", "cpu", gradients=False) for _ in range(3)]
assert answers == [want] * 3, answers
""")


@not_interpreted
def test_spawned_workers(tmp_path):
    """The child imports the file anew."""
    (tmp_path / "spawned.py").write_text(DIGEST)
    run_python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from spawned import digest, in_a_child
import torch
torch.set_num_threads(1)
assert in_a_child("spawn", "cpu") == digest("cpu")
""")


@needs_cuda
def test_workers_forked_before_cuda_is_touched():
    run_python(f"""{DIGEST}
digest("cpu", gradients=False)
first = in_a_child("fork", "cuda")
assert first == in_a_child("fork", "cuda") == digest("cuda"), first
""")


@needs_cuda
def test_workers_forked_after_cuda_was_used():
    """PyTorch's own words, not a crash and not a result."""
    run_python(
        DIGEST + "digest('cuda'); answer = in_a_child('fork', 'cuda'); assert 'Cannot re-initialize CUDA in forked' in answer, answer"
    )


@needs_cuda
def test_spawned_workers_on_a_gpu(tmp_path):
    (tmp_path / "spawned.py").write_text(DIGEST)
    run_python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from spawned import digest, in_a_child
assert in_a_child("spawn", "cuda") == digest("cuda")
""")


@needs_cuda
def test_streams_in_threads(device):
    """Eight threads, each on a stream of its own, forward and backward, while the others run: each time the bits of its first."""
    run_python("""
import torch
from concurrent.futures import ThreadPoolExecutor
from oracle import Problem, assert_same_bits, make_inputs, with_gradients
from fuzzytok_kernels import causal_conv1d
device = torch.device("cuda")
def run(inputs):
    return with_gradients(lambda x, w, b, d: causal_conv1d(x, w, b, dilation=d, activation="gelu"), inputs)
def work(number):
    dtype, layout = (torch.bfloat16, torch.float32)[number % 2], ("channels-first", "channels-last")[number // 2 % 2]
    with torch.cuda.stream(torch.cuda.Stream()):
        inputs = make_inputs(Problem(2, 64 + 8 * number, 96, 500 + number, 3, 4), dtype, device, layout, layout)
        first = run(inputs)
        for _ in range(50):
            assert_same_bits(run(inputs), first)
    return number
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(work, range(8))) == list(range(8))
torch.cuda.synchronize()
""")


def test_the_digest_tells_bits_apart(device):
    """The helpers above compare bytes: a value that is off by its last bit is another."""
    x = torch.ones(3, device=device)
    nearby = torch.nextafter(x, 2 * x)
    assert x.cpu().numpy().tobytes() != nearby.cpu().numpy().tobytes()
