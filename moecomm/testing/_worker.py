"""What runs in each process of the launcher: obey requests, answer each with its token, never outlive the parent."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import importlib.util
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

_IMPORTED_IN = os.getpid()  # a process that serves, and is another one, was forked


@dataclass(frozen=True, slots=True)
class Join:
    """Form a process group, leaving the last one; a new generation never meets messages of an old one."""

    token: str
    backend: str | None
    world_size: int
    generation: int
    store_port: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Call a function: `call` is the pickled (function, args), `module` and `path` say where it is defined."""

    token: str
    module: str
    path: str | None
    call: bytes


@dataclass(frozen=True, slots=True)
class Leave:
    """End the process in the ordinary way."""

    token: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request: it went well if `failure` is None."""

    token: str
    result: Any = None
    failure: str | None = None
    error: bytes | None = None  # the pickled exception, where it can be pickled


def serve(fd: int, rank: int) -> None:
    """Serve the launcher at the other end of a connection as this rank, until it says leave."""
    os.set_inheritable(fd, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    parent = Connection(fd)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(parent, requests), daemon=True, name="launcher").start()

    import torch

    torch.set_num_threads(1)
    while True:
        request = requests.get()
        if isinstance(request, Leave):
            _leave_group()
            _send(parent, Answer(request.token))
            if os.getpid() != _IMPORTED_IN:
                _end()
            return
        _send(parent, _obey(request, rank))
        gc.collect()  # what a failed function left behind must not meet the next one


def _end() -> None:
    """End as the interpreter does, but for the teardown of all modules: in a fork that copies every page of theirs.

    It took half a second of processor time for each rank, where a rank needs some milliseconds otherwise.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as `multiprocessing` does in its forks
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _listen(parent: Connection, requests: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            requests.put(pickle.loads(parent.recv_bytes()))
        except (EOFError, OSError):
            # The parent is gone, however it ended: take along this process and whatever it started.
            os.killpg(os.getpgid(0), signal.SIGKILL)


def _obey(request: Join | Run, rank: int) -> Answer:
    try:
        if isinstance(request, Join):
            _join_group(request, rank)
            return Answer(request.token)
        _load_module(request.module, request.path)
        fn, args = pickle.loads(request.call)
        result = fn(rank, *args)
        pickle.dumps(result)  # fail here, where the message can name the rank
        return Answer(request.token, result=result)
    except BaseException as error:
        failure = "".join(traceback.format_exception(error))
        pickled = None
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        return Answer(request.token, failure=failure, error=pickled)


def _join_group(request: Join, rank: int) -> None:
    import torch.distributed as dist

    _leave_group()
    if request.backend is None:
        return
    timeout = datetime.timedelta(seconds=request.timeout_s)
    store = dist.TCPStore("127.0.0.1", request.store_port, is_master=False, timeout=timeout)
    dist.init_process_group(
        request.backend,
        store=dist.PrefixStore(f"generation_{request.generation}", store),
        rank=rank,
        world_size=request.world_size,
        timeout=timeout,
    )


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _load_module(name: str, path: str | None) -> ModuleType:
    """Import the module that defines a function, by name where that leads to the same file, else from the file."""
    if name == "__main__":
        assert path is not None, "the launcher refuses functions of an interactive session"
        module = _load_file("__mp_main__", path)
        sys.modules["__main__"] = module
        return module
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)
        found = getattr(module, "__file__", None)
        if path is None or (found is not None and Path(found).resolve() == Path(path).resolve()):
            return module
    assert path is not None, f"module {name} cannot be imported and has no file"
    return _load_file(name, path)


def _load_file(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _send(parent: Connection, answer: Answer) -> None:
    parent.send_bytes(pickle.dumps(answer))
