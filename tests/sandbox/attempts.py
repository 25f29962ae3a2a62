"""Attempts to get out of a sandbox: programs, to be run in one.

Each is the body of a function that returns what tells that it got out, or raises OSError. All of them touch only what
the test has made: a folder `there` with files in it, a process `victim`, sockets. `NAKED` are those that do get out of
a process without a sandbox, as the test proves.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

FILES = {
    "read": "return open(secret).read()",
    "read by going up": "return open('../' * 30 + secret[1:]).read()",
    "read from an open root": "return open(os.open(secret[1:], os.O_RDONLY, dir_fd=os.open('/', os.O_PATH))).read()",
    "read through a symbolic link": "os.symlink(secret, 'soft'); return open('soft').read()",
    "read through a hard link": "os.link(secret, 'hard'); return open('hard').read()",
    "copy by sendfile": "return os.sendfile(os.open('copy', 66), os.open(secret, 0), 0, 9)",
    "read the password file": "return open('/etc/passwd').read()",
    "list the root": "return os.listdir('/')",
    "list a folder": "return os.listdir(there)",
    "create": "return open(f'{there}/new', 'w')",
    "append": "return open(secret, 'a')",
    "empty by opening": "os.open(f'{there}/to_empty', os.O_RDONLY | os.O_TRUNC); return True",
    "empty by its path": "os.truncate(f'{there}/to_cut', 0); return True",
    "empty by opening for nothing": "os.open(f'{there}/to_void', 3 | os.O_TRUNC); return True",
    "open for nothing": "return os.open(secret, 3)",
    "delete": "os.unlink(f'{there}/to_delete'); return True",
    "rename": "os.rename(f'{there}/to_rename', f'{there}/renamed'); return True",
    "take away": "os.rename(f'{there}/to_take', 'taken'); return True",
    "bring": "open('mine', 'w'); os.rename('mine', f'{there}/brought'); return True",
    "make a folder": "os.mkdir(f'{there}/folder'); return True",
    "link into": "os.symlink('/', f'{there}/link'); return True",
    "change rights": "os.chmod(secret, 0o644); return True",
    "change the owner": "os.chown(secret, os.getuid(), os.getgid()); return True",
    "change times": "os.utime(secret, (1, 1)); return True",
    "change an attribute": "os.setxattr(secret, 'user.x', b'x'); return True",
    "write to Python": "return open(os.__file__, 'a')",
    "write beside Python": "return open(f'{os.path.dirname(os.__file__)}/sitecustomize.py', 'x')",
    "write to shared memory": "return open(f'/dev/shm/{os.path.basename(there)}', 'w')",
    "read the kernel's messages": "return os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)",
    "make a device": "os.mknod('device', 0o20600, os.makedev(1, 1)); return True",
    "make a program of another user": "open('s', 'w'); os.chmod('s', 0o4755); return True",
}
PROCESSES = {
    "read its environment": "return os.environ.get('RLPOST_SECRET')",
    "read a process's environment": "return open(f'/proc/{victim}/environ').read()",
    "read a process's memory": "return open(f'/proc/{victim}/mem', 'rb')",
    "read its own memory map": "return open('/proc/self/maps').read()",
    "open a process's stdin": "return os.open(f'/proc/{victim}/fd/0', os.O_RDWR)",
    "list processes": "return os.listdir('/proc')",
    "read the system": "return os.listdir('/sys')",
    "fork": "child = os.fork(); child or os._exit(0); os.waitpid(child, 0); return True",
    "spawn": "return os.posix_spawn('/bin/true', ['true'], {}) and os.wait()",
    "spawn Python": "import subprocess; return subprocess.run([sys.executable, '-c', '']).returncode == 0",
    "signal a process": "os.kill(victim, 0); return True",
    "signal all processes": "os.kill(-1, 0); return True",
    "signal its group": "os.kill(0, 0); return True",
    "signal a group": "os.killpg(victim, 0); return True",
    "signal the one that waits": "os.kill(os.getppid() or 1 << 20, 0); return True",
    "be the owner's signal": "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, victim); return True",
    "see a process's limits": "import resource; return resource.prlimit(victim, resource.RLIMIT_NOFILE)",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40,) * 2); return True",
    "dump core": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (1 << 20,) * 2); return True",
    "take another core": "os.sched_setaffinity(0, os.sched_getaffinity(0)); return True",
    "change its priority": "os.setpriority(os.PRIO_PROCESS, 0, 19); return True",
    "become root": "os.setuid(0); return True",
    "change its root": "os.mkdir('root'); os.chroot('root'); return True",
    "leave its user namespace": "return libc('unshare', 0x10000000) == 0",
    "leave its mounts": "return libc('unshare', 0x20000) == 0",
    "mount": "return libc('mount', b'none', b'.', b'tmpfs', 0, None) == 0",
    "be traced": "return libc('ptrace', 0, 0, None, None) == 0",
    "trace": "return libc('ptrace', 0x4206, victim, None, None) == 0",
    "change what ends it": "return libc('prctl', 1, 0, 0, 0, 0) == 0",
    "regain rights": "return libc('prctl', 47, 2, 0, 0, 0) == 0",
}
NETWORK = {
    "connect by TCP": "return socket.create_connection(('127.0.0.1', port), 5)",
    "listen": "return socket.create_server(('127.0.0.1', 0))",
    "send by UDP": "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "send by IPv6": "return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "connect to a socket in a folder": "s = socket.socket(socket.AF_UNIX); s.connect(f'{there}/socket'); return s",
    "connect to an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + there); return s",
    "send from one of a pair": "return socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', f'{there}/datagrams')",
    "ask the kernel by netlink": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "use the kernel's ciphers": "return socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "read raw packets": "return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
}
AMOUNTS = {
    "fill the disk": "return write('large', 100) == 100",
    "open many files": "return [open('/dev/null') for _ in range(200)]",
    "take much memory": "return memory(1 << 30)",
}
KINDS = {
    "files and devices": FILES,
    "processes, signals, rights, namespaces, mounts": PROCESSES,
    "network": NETWORK,
    "more memory, disk or files than allowed": AMOUNTS,
}
BODIES = {name: body for bodies in KINDS.values() for name, body in bodies.items()}

SYSTEM_CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "memfd_create": (319, 279),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "seccomp": (317, 277),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "clone3": (435, 435),
    "setuid": (105, 146),
    "setgroups": (116, 159),
    "capset": (126, 91),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "shmget": (29, 194),
    "vmsplice": (278, 75),
    "splice": (275, 76),
    "move_pages": (279, 239),
    "sched_setscheduler": (144, 119),
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "settimeofday": (164, 170),
    "sethostname": (170, 161),
    "mincore": (27, 232),
    "setsockopt": (54, 208),
    "execveat": (322, 281),
    "a call of tomorrow": (600, 600),
    "a call of x32": (0x40000000 | 41, 600),
}
"""Numbers on x86-64 and aarch64; called with -1 for every argument, so that none does anything even if it is let."""

NAKED = frozenset(BODIES) - {
    *("read its environment", "make a device", "raise a limit", "dump core", "become root", "change its root", "mount"),
    *("write beside Python", "be traced", "trace", "signal all processes", "leave its mounts", "regain rights"),
    *("leave its user namespace", "read raw packets", "fill the disk", "open many files", "take much memory"),
    *("read the kernel's messages", "use the kernel's ciphers", "change the owner"),
    *("read a process's environment", "read a process's memory", "open a process's stdin"),
}
"""Not among them: what would do harm, what a kernel may lack, and what limits or a lack of rights hold back."""

_HEAD = """
import ctypes, errno, json, os, socket, sys

given = json.load(sys.stdin)
there, victim, port = given["there"], given["victim"], given["port"]
secret = there + "/secret"
library = ctypes.CDLL(None, use_errno=True)

def libc(name, *arguments):
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
    return 0

def write(name, mib):
    with open(name, "wb", buffering=0) as file:
        return sum(file.write(bytes(1 << 20)) for _ in range(mib)) >> 20

def memory(size):
    try:
        return len(bytearray(size))
    except MemoryError:
        raise OSError(errno.ENOMEM, "memory") from None

"""


@contextmanager
def outside(folder: Path) -> Iterator[dict[str, Any]]:
    """What a program should not reach: files in `folder`, a process, sockets and a word in the environment."""
    for name in ("secret", "to_empty", "to_void", "to_cut", "to_delete", "to_rename", "to_take"):
        (folder / name).write_text("not for programs")
    victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, process_group=0)
    os.environ["RLPOST_SECRET"] = "not for programs"
    try:
        with ExitStack() as opened:
            tcp = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            for address in (f"{folder}/socket", f"\0{folder}"):
                local = opened.enter_context(socket.socket(socket.AF_UNIX))
                local.bind(address)
                local.listen()
            opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(f"{folder}/datagrams")
            yield {"there": str(folder), "victim": victim.pid, "port": tcp.getsockname()[1]}
    finally:
        del os.environ["RLPOST_SECRET"]
        victim.kill()
        victim.communicate()


def together(names: frozenset[str]) -> str:
    """One program of many attempts, which prints the names of those that got out."""
    program = _HEAD
    calls = []
    for i, name in enumerate(sorted(names)):
        program += f"def attempt_{i}():\n{textwrap.indent(BODIES[name], '    ')}\n\n"
        calls.append(f"({name!r}, attempt_{i})")
    return f"""{program}
out = []
for name, attempt in [{", ".join(calls)}]:
    try:
        if attempt():
            out.append(name)
    except (OSError, ValueError):  # ValueError: what `resource` raises
        pass
print(json.dumps(out))
"""


def raw() -> str:
    """A program that calls the kernel by itself, and prints the calls that were not refused."""
    which = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = {name: both[which] for name, both in SYSTEM_CALLS.items()}
    return f"""
import ctypes, errno, json
library = ctypes.CDLL(None, use_errno=True)
out = []
for name, number in {numbers}.items():
    ctypes.set_errno(0)
    result = library.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    if result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        out.append(name)
print(json.dumps(out))
"""
