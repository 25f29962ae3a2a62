"""Signals are noted once and obeyed at once the second time."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rlpost.run.interrupt import Interrupts


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Whoever runs the tests may ignore signals (nohup, a shell's background), and children inherit that."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_the_handlers_come_back(number, capfd):
    before = signal.signal(number, lambda *_: None)
    try:
        ours = signal.getsignal(number)
        with Interrupts() as stop:
            assert stop.requested is None
            os.kill(os.getpid(), number)
            assert stop.requested == number
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, before)
    assert f"{signal.Signals(number).name}: stopping after this step" in capfd.readouterr().err


def test_the_second_stops_at_once():
    with Interrupts() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested == signal.SIGTERM


def test_a_closing_terminal_may_say_so_twice():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work() -> None:
        with Interrupts() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_gone_terminal_does_not_stop_the_step():
    code = (
        "import os, signal\nfrom rlpost.run.interrupt import Interrupts\nos.close(2)\n"
        "with Interrupts() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print(stop.requested)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
