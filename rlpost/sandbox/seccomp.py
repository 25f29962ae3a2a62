"""The filter of system calls: what a Python program needs is allowed, all else fails (classic BPF for seccomp).

A list of what is allowed, not of what is forbidden: a call that a kernel of tomorrow adds is refused. The numbers are
those of Linux for x86-64 and aarch64 (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h);
the form of the program is that of linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

Line = tuple[int, int, int, int]
"""(code, jump if true, jump if false, operand)."""
OWN_ID = 0xFFFFFFFF
"""Stands for the program's process id among the operands, until it has one."""

ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -,
dup3 292 24, pipe 22 -, pipe2 293 59, sendfile 40 71, copy_file_range 326 285,
creat 85 -, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17,
chdir 80 49, fchdir 81 50,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, ftruncate 77 46, fallocate 285 47,
fsync 74 82, fdatasync 75 83, flock 73 32, umask 95 166, fadvise64 221 223,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, msync 26 227,
futex 202 98, futex_waitv 449 449, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293,
sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, gettid 186 178, getpid 39 172, getppid 110 173,
getpgrp 111 -, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
getresgid 120 150, getgroups 115 158,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133,
rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102,
restart_syscall 219 128,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, gettimeofday 96 169, time 201 -,
nanosleep 35 101, times 100 153, getrusage 98 165, getrlimit 97 163, uname 63 160, sysinfo 99 179,
getrandom 318 278, arch_prctl 158 -,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19,
timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87,
sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockopt 55 209,
getsockname 51 204, getpeername 52 205,
wait4 61 260, waitid 247 95, execve 59 221, exit 60 93, exit_group 231 94
"""
"""Name and number on x86-64 and aarch64; - where there is none."""
ARGUMENTS = {
    "open": (2, None),
    "openat": (257, 56),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "prctl": (157, 167),
    "socketpair": (53, 199),
}
"""Calls that are allowed for some arguments, with their numbers on x86-64 and aarch64."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> (which number of the two, AUDIT_ARCH)."""
LAST = 466
"""The last number that had a meaning when this was written. Later calls do not exist for a program, so that a C
library does without them; earlier ones that are not allowed fail."""

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x10000
_NEW_NAMESPACES = 0x7E020080
"""Every CLONE_NEW flag, of time too."""
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
"""Descriptors, flags and locks; not who gets the signals of a descriptor (F_SETOWN), which could be any process."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_PRCTL = (15, 16)
"""PR_SET_NAME and PR_GET_NAME."""
_O_TRUNC, _O_ACCMODE = 0o1000, 0o3


def program(machine: str) -> bytes | None:
    """The filter for a machine as `platform.machine` names it, packed; None if its numbers are not known.

    Where an operand is `OWN_ID`, the program's process id belongs.
    """
    if machine not in ARCHITECTURES:
        return None
    which, arch = ARCHITECTURES[machine]
    lines: list[Line] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),  # the numbers would be those of other calls
        (_LOAD, 0, 0, _NUMBER),
    ]
    for entry in ALLOWED.replace("\n", " ").split(","):
        number = entry.split()[1 + which]
        if number != "-":
            lines += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _ALLOW)]
    for name, block in _by_arguments().items():
        known = ARGUMENTS[name][which]
        if known is not None:
            lines += [(_EQUAL, 0, len(block), known), *block]
    lines += [(_AT_LEAST, 0, 1, LAST + 1), _fail(errno.ENOSYS), _fail(errno.EPERM)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _by_arguments() -> dict[str, list[Line]]:
    """What decides on each call of `ARGUMENTS`: lines that end with a return.

    Operands are compared in their lower 32 bits, which are all that the kernel reads of these arguments.
    """
    # Emptying a file without opening it for writing, which Landlock lets pass before its third version, and opening
    # for neither reading nor writing (the mode 3), for which it asks no right at all.
    mode = _AND, 0, 0, _O_TRUNC | _O_ACCMODE
    refused = _one_of([_O_TRUNC, _O_TRUNC | _O_ACCMODE, _O_ACCMODE], _fail(errno.EPERM), _allow())
    return {
        "open": [_argument(1), mode, *refused],
        "openat": [_argument(2), mode, *refused],
        # Threads, no processes: nothing is left when the program ends.
        "clone": [
            _argument(0),
            (_AND, 0, 0, _CLONE_THREAD | _NEW_NAMESPACES),
            *_one_of([_CLONE_THREAD], _allow(), _fail(errno.EPERM)),
        ],
        "clone3": [_fail(errno.ENOSYS)],  # its flags lie in memory, out of sight; the C library then calls clone
        "kill": [_argument(0), *_one_of([OWN_ID], _allow(), _fail(errno.EPERM))],
        "tgkill": [_argument(0), *_one_of([OWN_ID], _allow(), _fail(errno.EPERM))],
        "prlimit64": [_argument(0), *_one_of([0, OWN_ID], _allow(), _fail(errno.EPERM))],
        "fcntl": [_argument(1), *_one_of(_FCNTL, _allow(), _fail(errno.EPERM))],
        "ioctl": [_argument(1), *_one_of(_IOCTL, _allow(), _fail(errno.ENOTTY))],
        "prctl": [_argument(0), *_one_of(_PRCTL, _allow(), _fail(errno.EPERM))],
        # A pair of streams cannot be connected to anything else; datagrams could be sent to any socket.
        "socketpair": [
            _argument(0),
            (_EQUAL, 1, 0, int(socket.AF_UNIX)),
            _fail(errno.EPERM),
            _argument(1),
            (_AND, 0, 0, 0xF),
            *_one_of([int(socket.SOCK_STREAM)], _allow(), _fail(errno.EPERM)),
        ],
    }


def _argument(number: int) -> Line:
    return _LOAD, 0, 0, _FIRST_ARGUMENT + 8 * number


def _allow() -> Line:
    return _RETURN, 0, 0, _ALLOW


def _fail(code: int) -> Line:
    return _RETURN, 0, 0, _FAIL | code


def _one_of(values: Sequence[int], then: Line, otherwise: Line) -> list[Line]:
    """Return `then` if what was loaded is one of the values."""
    tests: list[Line] = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*tests, otherwise, then]
