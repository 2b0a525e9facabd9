"""The allocator's one setting: where it applies, what switches it off, and that freed blocks are kept."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, torch
from lssl.utils.allocator import keep_freed_memory
changed = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(changed, faults())
"""
glibc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def run(**extra: str) -> tuple[bool, int]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    changed, faults = done.stdout.split()
    return changed == "True", int(faults)


@glibc
def test_freed_blocks_are_kept():
    changed, faults = run()
    assert changed
    assert faults < 4_000  # one block of 16 MB has 3906 pages of 4 kB; mapped anew twenty times, 78,000


@glibc
def test_a_variable_of_the_users_switches_it_off():
    changed, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not changed
    assert faults > 20 * 16_000_000 / (2 << 20) / 2  # mapped anew each time, even in pages of 2 MB
