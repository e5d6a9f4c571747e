"""Python processes that have imported SGLang already: forked from one that did it once.

Importing SGLang is 18 s of CPU, in the process that launches a server and again in every process which that
one spawns, and nearly all of a small server's start. Run as a program, this file takes the place of
``python``: ``-m MODULE``, ``-c CODE`` or a script, with its arguments, variables, working folder, standard
streams and exit status. What a process spawns with ``multiprocessing`` is not forked from it but from a
process that has SGLang imported and nothing else done, with the spawning one's variables: as after a spawn,
nothing but what was pickled arrives. The plug-in is never loaded beforehand.

What SGLang reads while it is imported (another release on ``PYTHONPATH``, another ``libcuda.so.1``) is as it
was for the first process: what needs another gets a Python of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

MODULES = ("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler")
SOCKET = "PRELOADED_SOCKET"


@contextlib.contextmanager
def started(folder: Path, environment: Mapping[str, str], gpu_arch: str = "") -> Iterator[tuple[str, ...]]:
    """Start the first process; yields the command that takes ``python``'s place.

    Args:
        folder: for the socket on which it is asked.
        environment: its variables, on top of this process's.
        gpu_arch: let a GPU of this architecture be there, as `dry_run` does, when SGLang is imported.
    """
    address = folder / "preloaded"
    first = subprocess.Popen(
        [sys.executable, __file__, "--first", str(address), gpu_arch],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        assert first.stdout is not None
        said = []
        while not (line := first.stdout.readline()).startswith("READY"):
            said.append(line)
            assert line, "SGLang cannot be imported:\n" + "".join(said)
        yield (sys.executable, "-S", "-E", __file__, str(address))
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def ask(address: str, argv: list[str]) -> None:
    """Have ``argv`` run by a fork of the first process, and end as that ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = json.dumps({"argv": argv, "environ": dict(os.environ), "cwd": os.getcwd()}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(64)
    status = int(answer) if answer else 1
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str, gpu_arch: str) -> None:
    """Import SGLang, and fork for each that asks until killed."""
    import gc
    import importlib

    _end_with_parent()
    if gpu_arch:
        from sglang_hicache.io_backends.sglang.no_gpu.stand_in_gpu import stand_in_gpu

        stand_in_gpu(gpu_arch)
    for module in MODULES:
        importlib.import_module(module)
    assert "sglang_hicache.io_backends.sglang.plugin" not in sys.modules
    _let_spawned_processes_be_forked()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "only a process with one thread can be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("READY", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> None:
    """Run what is asked for in a child, tell how it ended, and kill what is left of it at the end."""
    _end_with_parent()
    length, fds, _, _ = socket.recv_fds(connection, 8, 3)
    data = b""
    while len(data) < int.from_bytes(length, "big"):
        data += connection.recv(1 << 16)
    request = json.loads(data)
    leader = os.fork()
    if leader == 0:
        connection.close()
        _run(request, fds)
    for each in fds:
        os.close(each)
    pidfd = os.pidfd_open(leader)
    readable, _, _ = select.select([connection, pidfd], [], [])
    if pidfd in readable:
        status = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(str(status).encode())
        connection.close()
        deadline = time.monotonic() + 3
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(leader, 0)
                time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    os._exit(0)


def _run(request: Mapping[str, object], fds: list[int]) -> None:
    """Be the process that was asked for."""
    import atexit
    import gc
    import runpy
    import threading

    from faults import injected

    _end_with_parent()
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _set_environ(request["environ"])  # type: ignore[arg-type]
    os.chdir(str(request["cwd"]))
    sys.path[0] = ""
    sys.path[1:1] = [each for each in os.environ.get("PYTHONPATH", "").split(":") if each]
    _fork_the_fork_server()
    injected.inject(injected.LAUNCHER)
    code = 0
    try:
        match request["argv"]:
            case ["-m", module, *more]:
                sys.argv = [str(module), *map(str, more)]
                runpy.run_module(str(module), run_name="__main__", alter_sys=True)
            case ["-c", text, *more]:
                sys.argv = ["-c", *map(str, more)]
                exec(compile(str(text), "<string>", "exec"), vars(sys.modules["__main__"]))
            case [script, *more]:
                sys.argv = [str(script), *map(str, more)]
                sys.path[0] = os.path.dirname(os.path.abspath(str(script)))
                runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        held = error  # with its frames, as where an interpreter ends: ZeroMQ waits in its destructors
        sys.excepthook(type(held), held, held.__traceback__)
        code = 1
    gc.disable()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _set_environ(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def _let_spawned_processes_be_forked() -> None:
    """Make ``spawn`` a fork of what `_fork_the_fork_server` starts, with the asking process's variables."""
    import multiprocessing
    from multiprocessing import spawn

    from faults import injected

    set_start_method, describe, prepare = (
        multiprocessing.set_start_method,
        spawn.get_preparation_data,
        spawn.prepare,
    )

    def set_other_method(method: str | None, force: bool = False) -> None:
        set_start_method("forkserver" if method == "spawn" else method, force)

    def describe_with_environ(name: str) -> dict[str, object]:
        return {**describe(name), "environ": dict(os.environ)}

    def prepare_with_environ(data: dict[str, object]) -> None:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        _set_environ(data.pop("environ"))  # type: ignore[arg-type]
        prepare(data)
        injected.inject(injected.CHILDREN)

    multiprocessing.set_start_method = set_other_method  # type: ignore[assignment]
    spawn.get_preparation_data = describe_with_environ  # type: ignore[assignment]
    spawn.prepare = prepare_with_environ  # type: ignore[assignment]


def _fork_the_fork_server() -> None:
    """Start multiprocessing's fork server as a fork of this process, which has done nothing yet."""
    import tempfile
    from multiprocessing import forkserver

    launcher = os.getpid()
    address = os.path.join(tempfile.mkdtemp(), "forkserver")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive_w)
        # A spawned process ends with its parent, and tells it when it fails.
        _end_with_parent()
        signal.signal(signal.SIGQUIT, lambda *_: os.kill(launcher, signal.SIGQUIT))
        try:
            forkserver.main(listener.detach(), alive_r, preload=None)
        finally:
            os._exit(0)
    listener.close()
    os.close(alive_r)
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


if __name__ == "__main__":
    if sys.argv[1] == "--first":
        serve(*sys.argv[2:])
    else:
        ask(sys.argv[1], sys.argv[2:])
