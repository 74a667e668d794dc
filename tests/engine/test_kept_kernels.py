"""What oneDNN keeps of the kernels that it makes for each shape."""

import os
import subprocess
import sys

from service.config.compute_threads import compute_environment
from tests.server.process import ROOT

BOUND_MIB = 120
GROWN = """
import ctypes, psutil, torch
from torch import nn
from service.placement import cpu_linears

grown = psutil.Process().memory_info
layer = nn.Linear(576, 3072, bias=False, dtype=torch.bfloat16)
assert cpu_linears.pack(nn.ModuleList([layer])) == 1
inputs = torch.randn(512, 576).bfloat16()
with torch.inference_mode():
    layer(inputs)
    before = grown().rss
    for rows in range(1, 513):
        layer(inputs[:rows])
ctypes.CDLL(None).malloc_trim(0)  # what is kept, without the holes between
print((grown().rss - before) // 2**20)
"""


def test_prompts_of_all_lengths_do_not_fill_the_memory_with_kernels() -> None:
    """With as many places as oneDNN has by itself, this layer alone keeps 300 MiB."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= compute_environment(2) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        (sys.executable, "-c", GROWN), env=env, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < BOUND_MIB
