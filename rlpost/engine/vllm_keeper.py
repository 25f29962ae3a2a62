"""The process between a run and the server that it started: when either ends, however, nothing of the server is left.

vLLM's server starts processes of its own, which outlive it when it is killed. They share its process group, which ends
here. A plain script: `python vllm_keeper.py PARENT COMMAND...`.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

LOOK = 0.2
"""Seconds between looks at the run and the server."""
GRACE = 5.0
"""Seconds that the server has to end by itself."""
_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    """Run `command` until it ends, or until stdin is closed or the process `parent` ends; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # through what follows `try`
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_keeper)
    try:
        while server.poll() is None and os.getppid() == parent:
            if select.select([0], [], [], LOOK)[0] and not os.read(0, 1):
                break
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    return server.returncode if server.returncode >= 0 else 128 - server.returncode  # as a shell says it


def _die_with_keeper() -> None:
    """Let Linux end the server when this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
