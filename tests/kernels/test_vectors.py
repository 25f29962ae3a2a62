"""The compiled functions for processors with narrower vectors than this machine's."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler's options are those of x86-64")
@pytest.mark.parametrize("option", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_with_narrower_vectors_they_pass_the_same_tests(option: str, tmp_path: Path):
    env = {**os.environ, "CC": f"cc {option}", "XDG_CACHE_HOME": str(tmp_path)}
    tests = Path(__file__).with_name("test_compiled.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert list(tmp_path.glob("rlpost/kernels-*.so"))
