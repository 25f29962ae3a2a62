"""Starts one program in a sandbox and waits for its end: run by itself, with the standard library alone.

Its job is on its command line, as `name=value`, a name again for each value of a list; the program's text comes by the
pipe `control`, whose other end whoever waits holds open for as long as it wants to know. Two processes run this. The
first stays outside, watches the clock, ends the program and all that it left, and writes to the pipe `status` one line:
`ended CODE LATE COMPUTED SECONDS`, or `broken REASON`. The second, its child, gives up one right after the other and
then becomes the program: another Python, in whose memory nothing of this is left.

It is started for every program, so it imports what is quick to import.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn  # slower to import than all of the above together

_OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8", "-c")
"""Of the program's Python: as `-I -S`, but for the environment, which has one variable."""
STARTER = (
    "import site; site.setquit(); del site; __file__ = 'program.py'; "
    "exec(compile(open(__file__, 'rb').read(), __file__, 'exec'))"
)
"""What it is told: the file, as if it were its argument, but with `exit` and `quit`, which packages would bring."""
UNKNOWN = 65534
"""The user that a program is within a user namespace."""
MIB = 1 << 20

_SIGKILL = 9
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER = 1, 22, 24, 36
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 1 << 30)
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_KEPT = 2 | 4 | 8 | 1024 | 2048 | 4096
"""ST_NOSUID and the like: flags of a mount that a user namespace may not take away."""
_RELATIME = 1 << 21
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK = 444
"""landlock_create_ruleset, on every machine; add_rule and restrict_self follow."""
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_MAKE_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11
"""Devices, sockets and pipes with a name."""
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
"""Version of Landlock from which on it knows these rights of files."""
_NO_TCP, _NO_ABSTRACT_SOCKETS, _NO_SIGNALS = 3, 1, 2


class Job:
    """What is to be run, and how."""

    def __init__(self, words: list[str]) -> None:
        named: dict[str, list[str]] = {}
        for name, _, value in (word.partition("=") for word in words):
            named.setdefault(name, []).append(value)

        def number(name: str) -> int:
            return int(named[name][0])

        self.control = number("control")
        self.status = number("status")
        self.size = number("size")
        """Bytes of the program's text."""
        self.level = named["level"][0]
        self.python = named["python"][0]
        self.environment = dict(word.split("=", 1) for word in named["environment"])
        self.root = named["root"][0]
        """An empty folder, where the file system of its own is put together."""
        self.box = named["box"][0]
        """The program's folder."""
        self.read = named["read"]
        self.devices = named["device"]
        self.filter = bytes.fromhex(named["filter"][0])
        self.own_id = number("own_id")
        """What stands for the program's process id among the operands of the filter."""
        self.seconds = float(named["seconds"][0])
        self.cpu_seconds = number("cpu_seconds")
        self.memory = number("memory")
        self.disk = number("disk")
        self.files = number("files")
        self.threads = number("threads")
        self.user: tuple[int, int] | None = None
        """The user and group to become, where that can be chosen."""


def main() -> None:
    """Run the job of the command line."""
    job = Job(sys.argv[1:])
    for pipe in (job.control, job.status):
        os.set_inheritable(pipe, False)
    with open(job.control, "rb", closefd=False) as file:
        text = file.read(job.size)
    try:
        if job.level == "namespaces":
            job.user = _unshare_processes()
        elif job.level == "rlimits":
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        watched, alive = os.pipe()
        began = time.monotonic()
        child = os.fork()
    except OSError as error:
        _tell(job, f"broken {_reason(error)}")
        return
    if child == 0:
        os.close(alive)
        _become_program(job, text, watched)
    late = _wait(job, child, began + job.seconds)
    _, status, usage = os.wait4(child, 0)
    if job.level == "rlimits":
        _end_descendants()
    computed = usage.ru_utime + usage.ru_stime
    _tell(job, f"ended {os.waitstatus_to_exitcode(status)} {late:d} {computed} {time.monotonic() - began}")


def _wait(job: Job, child: int, limit: float) -> bool:
    """Wait for the end of the program, and bring it about at the limit (True) or when nobody wants to know."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(job.control, 0)  # closing it is told in any case
    news = poll.poll(1000 * max(0.0, limit - time.monotonic()))
    if ended not in dict(news):
        os.kill(child, _SIGKILL)
    return not news


def _end_descendants() -> None:
    """End every process that the program has left, wherever it went: this process has inherited them all."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            left = [int(word) for word in file.read().split()]
        for process in left:
            os.kill(process, _SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _become_program(job: Job, text: bytes, watched: int) -> NoReturn:
    """Give up every right, and be the program."""
    try:
        _end_with_parent(watched)
        os.setsid()
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # the first to go when the machine's memory ends
        if job.level == "namespaces":
            _new_root(job)
        os.chdir(job.box)
        with open("program.py", "wb") as program:
            program.write(text)
        os.chmod("program.py", 0o644)
        _limit(job)
        os.umask(0o077)
        _drop_rights(job.user)
        _end_with_parent(watched)  # a change of user has undone it
        if job.level != "rlimits":
            _landlock(job)
            _filter(job.filter, job.own_id)
        os.execve(job.python, [job.python, *_OPTIONS, STARTER], job.environment)
    except BaseException as error:  # the process must not go on in its parent's code
        _tell(job, f"broken {_reason(error)}")
    finally:
        os._exit(1)


def _end_with_parent(watched: int) -> None:
    """Be killed when the waiting process ends; it holds the other end of a pipe, closed if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if select.select([watched], [], [], 0)[0]:
        os._exit(1)


def _unshare_processes() -> tuple[int, int] | None:
    """Let the child be alone among processes. The user and group it is to become, None where it has no choice."""
    if os.geteuid() == 0:
        try:
            _check("unshare", _libc.unshare(_NEWPID))
            return _nobody_else()
        except PermissionError:
            pass  # root without the right to: as everybody else
    user, group = os.geteuid(), os.getegid()
    _check("unshare", _libc.unshare(_NEWUSER | _NEWPID))
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{UNKNOWN} {user} 1"),
        ("gid_map", f"{UNKNOWN} {group} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, f"{name}: {error.strerror}") from error
    return None


def _nobody_else() -> tuple[int, int]:
    """A user that nobody is: what the kernel counts by user, it counts for this program alone."""
    own = (1 << 30) + struct.unpack("I", os.urandom(4))[0] % (1 << 29)
    return own, own


def _new_root(job: Job) -> None:
    """A file system with Python, its libraries, four devices and an empty folder in it."""
    _check("unshare", _libc.unshare(_NEWNS | _NEWNET | _NEWIPC | _NEWUTS))
    _mount(None, "/", None, _REC | _PRIVATE)
    root = job.root
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for path in job.read:
        _bind(path, root + path, _RDONLY)
    for path in job.devices:
        _bind(path, root + path, 0)
    box = root + job.box
    os.makedirs(box)
    own, group = job.user or (UNKNOWN, UNKNOWN)
    size = job.disk * MIB
    options = f"mode=700,uid={own},gid={group},size={size},nr_inodes=4096"
    _mount("tmpfs", box, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    os.chdir(root)
    _check("pivot_root", _libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
    _check("umount", _libc.umount2(b".", _DETACH))
    os.chdir("/")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind(path: str, target: str, flags: int) -> None:
    """Show a file or folder in the new root, or the symbolic link that it is."""
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _mount(path, target, None, _BIND | _REC)
    kept = os.statvfs(target).f_flag & _KEPT
    kept = kept & ~4096 | (_RELATIME if kept & 4096 else 0)
    _mount(None, target, None, _REMOUNT | _BIND | _NOSUID | kept | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    _check(f"mount {target}", _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def _limit(job: Job) -> None:
    """Resource limits, which no process can raise again without rights."""
    for name, most in (
        ("CPU", job.cpu_seconds),
        ("AS", job.memory * MIB),
        ("FSIZE", job.disk * MIB),
        ("NOFILE", job.files),
        # By user: where the program has a user of its own, its threads, else whatever that user runs elsewhere too.
        *([("NPROC", job.threads)] if job.level != "landlock" else []),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("RTPRIO", 0),
        ("STACK", 8 * MIB),
    ):
        number = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(number)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (least, least))


def _drop_rights(user: tuple[int, int] | None) -> None:
    """Become a user without rights, for good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(64):  # fails beyond the last one, and without the right to: then there is nothing to drop
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user[1], user[1], user[1])
        os.setresuid(user[0], user[0], user[0])
    header = struct.pack("Ii", 0x20080522, 0)
    _check("capset", _libc.syscall(_CAPSET[os.uname().machine], header, bytes(24)))


def _landlock(job: Job) -> None:
    """Of all files, leave it those of Python to read and its own folder; no TCP, no signals to others."""
    version = _check("landlock", _libc.syscall(_LANDLOCK, None, ctypes.c_size_t(0), 1))
    rights = _RIGHTS[max(known for known in _RIGHTS if known <= version)]
    attributes = struct.pack("QQQ", rights, _NO_TCP, _NO_ABSTRACT_SOCKETS | _NO_SIGNALS)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _check("landlock", _libc.syscall(_LANDLOCK, attributes, ctypes.c_size_t(len(attributes)), 0))
    read = _EXECUTE | _READ_FILE | _READ_DIR
    own = rights & ~_EXECUTE & ~_MAKE_SPECIAL
    for paths, granted in ((job.read, read), (job.devices, _READ_FILE | _WRITE_FILE), ([job.box], own)):
        for path in paths:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            of_this = granted if os.path.isdir(path) else granted & _OF_FILES
            rule = struct.pack("=Qi", of_this & rights, opened)
            _check(f"landlock {path}", _libc.syscall(_LANDLOCK + 1, rules, 1, rule, 0))
            os.close(opened)
    _check("landlock", _libc.syscall(_LANDLOCK + 2, rules, 0))
    os.close(rules)


def _filter(packed: bytes, own_id: int) -> None:
    """Install the filter of system calls, instructions of eight bytes."""
    own = os.getpid()
    lines = [(*line[:3], own if line[3] == own_id else line[3]) for line in struct.iter_unpack("HBBI", packed)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines), len(packed))
    header = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(text)))
    _check("seccomp", _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, 0, 0))


def _prctl(option: int, value: int) -> None:
    _check(f"prctl {option}", _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _check(what: str, result: int) -> int:
    """The result of a call of the C library; OSError if it failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    name = f" {error.filename}" if error.filename else ""
    return f"{error.strerror}{name} ({errno.errorcode.get(error.errno or 0, 'no number')})"


def _tell(job: Job, report: str) -> None:
    os.write(job.status, report.encode("utf-8", "replace") + b"\n")
