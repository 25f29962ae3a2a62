import platform
import subprocess
import sys

import pytest

from rlpost.policy.memory import keep_freed_memory

COUNT = """
import resource, sys
if sys.argv[1] == "keep":
    from rlpost.policy.memory import keep_freed_memory
    assert keep_freed_memory()
def fill(n):
    for _ in range(n):
        b"x" * (64 << 20)
fill(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_large_buffers_are_reused():
    assert page_faults("keep") * 10 < page_faults("as it is")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert keep_freed_memory() is False
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert keep_freed_memory() is False
