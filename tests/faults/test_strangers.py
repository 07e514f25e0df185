"""The channel of a job is its own: strangers are refused, by key and by user, and the job goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.faults._ranks import Nursery, World, results_of
from tests.faults._scenes import build, catch, right_step


def sockets_of(pid: int) -> list[str]:
    """Names of the abstract sockets on which moecomm listens in that process."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    entries = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    listening = [entry for entry in entries if entry[3] == "00010000" and entry[6] in inodes]
    return ["\0" + entry[7][1:] for entry in listening if "@moecomm" in entry[-1]]


def attack(pid: int) -> list[str]:
    """Connect to the socket of that process and say everything but the right thing; what became of each try."""
    while not (names := sockets_of(pid)):
        time.sleep(0.01)
    speeches: list[Callable[[socket.socket], Any]] = [
        lambda sock: sock.send(b"hello"),
        lambda sock: sock.send(b"0123456789abcdef0123456789abcdef 1"),
        lambda sock: sock.send("\u00e9\u00e9\u00e9 1".encode()),
        lambda sock: sock.send(b"\xff\xfe 1"),
        lambda sock: sock.send(b"a b c d"),
        lambda sock: sock.send(b"x" * 100_000),
        lambda sock: sock.close(),
        lambda sock: sock.fileno(),  # says nothing and stays
    ]
    ends = []
    for speak in speeches:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(5.0)
        sock.connect(names[0])
        speak(sock)
        try:
            ends.append("refused" if not sock.recv(1024) else "answered")
        except ConnectionResetError:
            ends.append("refused")
        except OSError as error:
            ends.append("closed" if sock.fileno() < 0 else repr(error))
        sock.close()
    return ends


def meet_strangers(world: World) -> list[str]:
    """Rank 0 listens for rank 1, which attacks before it comes."""
    from moecomm.memory import handshake

    dial, ends = handshake.dial, []
    world.mark("here")
    (pid,) = world.wait_for("here", 0)

    def attack_first(*args: Any) -> Any:
        ends.extend(attack(pid))
        return dial(*args)

    with mock.patch.object(handshake, "dial", attack_first), build(timeout_s=10.0) as buffer:
        right_step(buffer, world)
        assert sockets_of(os.getpid()) == [], "nobody listens any more"
        right_step(buffer, world, 1)
        world.meet("done")
    return ends


def test_strangers_are_refused_and_the_job_goes_on(nursery: Nursery) -> None:
    nobody, ends = results_of(nursery.run(meet_strangers, 2))
    assert nobody == [] and ends == ["refused"] * 6 + ["closed", "refused"]


def be_another_user(pid: int) -> None:
    """Connect as a user who may not, with the right key even."""
    name = sockets_of(pid)[0]
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(20.0)
        while True:
            with contextlib.suppress(BlockingIOError):
                sock.connect(name)
                break
            time.sleep(0.01)
        with contextlib.suppress(BrokenPipeError):
            sock.send(b"whatever")
        try:
            answer = sock.recv(1024)
        except ConnectionResetError:
            answer = b""
        readable = [path for path in Path(f"/proc/{pid}").glob("map_files/*") if os.access(path, os.R_OK)]
        os._exit(0 if not answer and not readable else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def keep_quiet(world: World) -> int:
    """Rank 0 listens for rank 1, which first fills the place with connections that say nothing, as two users."""
    from moecomm.memory import handshake

    dial = handshake.dial
    crowd: list[socket.socket] = []
    world.mark("here")
    (pid,) = world.wait_for("here", 0)

    def crowd_first(*args: Any) -> Any:
        while not (names := sockets_of(pid)):
            time.sleep(0.01)
        for _ in range(150):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            crowd.append(sock)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the line is full: the next one tries
                sock.connect(names[0])
        be_another_user(pid)
        return dial(*args)

    with mock.patch.object(handshake, "dial", crowd_first), build(timeout_s=60.0) as buffer:
        right_step(buffer, world)
        world.meet("done")
    for sock in crowd:
        sock.close()
    return len(crowd)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can play two users")
def test_a_crowd_that_says_nothing_and_another_user_are_refused(nursery: Nursery) -> None:
    assert results_of(nursery.run(keep_quiet, 2)) == [0, 150]


def dial_an_impostor(world: World) -> str:
    """Rank 1 finds a listener of another user (so the kernel is made to say) and tells it nothing."""
    from moecomm.memory import handshake

    other = mock.patch.object(handshake, "_user_of", lambda sock: os.getuid() + world.rank)
    with other:
        return catch(lambda: build(timeout_s=1.5)).text


def test_a_rank_tells_its_key_to_no_listener_of_another_user(nursery: Nursery) -> None:
    kept_waiting, refused = results_of(nursery.run(dial_an_impostor, 2))
    assert "rank 1 did not connect" in kept_waiting or "is gone" in kept_waiting
    assert "rank 0 is gone" in refused


def test_memory_is_open_to_its_user_only() -> None:
    from moecomm.memory.host import HostMemory

    fd = HostMemory.create(4096)
    try:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
    finally:
        os.close(fd)
