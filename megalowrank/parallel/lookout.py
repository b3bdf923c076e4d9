"""A rank that ends badly takes the others down at once, whoever launched them, and its error is what is shown last.

Every rank keeps a TCP connection to rank 0. A process that dies, kill -9 included, drops its connection, one that fails
says why, and a machine that vanishes is noticed within a minute; rank 0 tells all. Without it the others would wait in
a collective until its timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from megalowrank.errors import EXIT_PEER, TrainingError
from megalowrank.parallel.collectives import all_true, from_first_rank

GRACE = 3.0  # seconds in which a rank may end by its own error after another has failed
SILENT = "ended without a word (killed, or out of memory?)"
_CONNECT = 20.0


class Lookout:
    """Watches the other ranks from ``start`` to ``close``; ``world`` of them, this one is ``rank``.

    ``on_failure`` is called with the verdict, on a thread, before the process ends.
    """

    def __init__(self, rank: int, world: int, on_failure: Callable[[str], None] = lambda verdict: None) -> None:
        self.rank, self.world, self.on_failure = rank, world, on_failure
        self.verdict: str | None = None
        self._known, self._done, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._printed = False
        self._socket: socket.socket | None = None
        self._hub: _Hub | None = None

    def start(self, group: Any) -> None:
        """Connect. Every rank of ``group`` (all of the job) calls it; TrainingError on all if one cannot connect."""
        if self.world == 1:
            return
        address = from_first_rank(self._open_hub, group, self.rank)
        port, token = address.split()
        problem = ""
        try:
            self._socket = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_CONNECT)
            self._socket.settimeout(None)
            _keep_alive(self._socket)
            self._socket.sendall(f"{token}{self.rank}\n".encode())
        except OSError as error:
            problem = f"rank {self.rank} cannot reach rank 0 at {os.environ['MASTER_ADDR']} port {port}: {error}"
        if not all_true(not problem, group):
            raise TrainingError(problem or "another rank cannot reach rank 0")
        threading.Thread(target=self._listen, name="lookout", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Tell all ranks that this one cannot go on; they end."""
        self._send({"failed": self.rank, "reason": " ".join(reason.split())})
        self._pass_on()

    def wait(self, seconds: float) -> str | None:
        """What another rank ended of, once it is known; None if nothing is known after ``seconds``."""
        self._known.wait(seconds)
        return self.verdict

    def close(self) -> None:
        """This rank is done, well or with an error that it shows itself."""
        self._done.set()
        self._send({"bye": self.rank})
        if self._hub is not None:
            self._hub.finish()

    def leave(self) -> None:
        """End this process because of the verdict: one rank shows it, all have the exit code for it."""
        self.show()
        self._pass_on()
        sys.stdout.flush()
        os._exit(EXIT_PEER)

    def show(self) -> None:
        """Print the verdict, once in the job: on rank 0, or on the last rank if it was rank 0 that died."""
        with self._lock:
            shown, self._printed = self._printed, True
        speaker = self.world - 1 if (self.verdict or "").startswith("rank 0 ") else 0
        if not shown and self.rank == speaker:
            print(f"stopped: {self.verdict}", file=sys.stderr, flush=True)

    def _pass_on(self) -> None:
        """Before rank 0 ends: let all ranks know first, which only it can tell them."""
        if self._hub is not None:
            self._hub.over.wait(GRACE)

    def _open_hub(self) -> str:
        self._hub = _Hub(self.world)
        return f"{self._hub.port} {self._hub.token}"

    def _leave_unless_done(self) -> None:
        if not self._done.is_set():
            self.leave()

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError), self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        """Wait for a verdict; the connection to rank 0 breaking is one too."""
        assert self._socket is not None
        lines = self._socket.makefile("rb")
        line = b""
        with contextlib.suppress(OSError):
            line = lines.readline()
        if self._done.is_set() or line.strip() == b"end":
            return
        self.verdict = json.loads(line) if line else f"rank 0 {SILENT}"
        self._known.set()
        leave = threading.Timer(GRACE, self._leave_unless_done)
        leave.daemon = True
        leave.start()
        if self.verdict.endswith(SILENT):
            self.show()
        self.on_failure(self.verdict)


def _keep_alive(connection: socket.socket) -> None:
    """Have the system notice within a minute that a whole machine is gone, which closes nothing."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class _Hub:
    """Rank 0's end of all connections."""

    def __init__(self, world: int) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world)
        self.port: int = self.server.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.selector = selectors.DefaultSelector()
        self.ranks: dict[socket.socket, int] = {}
        self.buffers: dict[socket.socket, bytes] = {}
        self.missing = set(range(world))
        self.over = threading.Event()
        self.selector.register(self.server, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="lookout hub", daemon=True).start()

    def finish(self) -> None:
        """Give the others a moment to be done, then say that this is no death."""
        if not self.over.wait(GRACE):
            for peer in list(self.ranks):
                self._tell(peer, b"end\n")

    def _serve(self) -> None:
        while self.missing:
            for key, _ in self.selector.select():
                if key.fileobj is self.server:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)
        for peer in self.ranks:
            self._tell(peer, b"end\n")
        self.over.set()

    def _accept(self) -> None:
        peer, _ = self.server.accept()
        _keep_alive(peer)
        self.buffers[peer] = b""
        self.selector.register(peer, selectors.EVENT_READ)

    def _read(self, peer: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = peer.recv(65536)
        *lines, self.buffers[peer] = (self.buffers[peer] + data).split(b"\n")
        for line in lines:
            self._take(peer, line)
        if not data:
            self._lost(peer)

    def _take(self, peer: socket.socket, line: bytes) -> None:
        """A message; a stranger without the token is not listened to."""
        if peer not in self.ranks:
            if line.startswith(self.token.encode()):
                self.ranks[peer] = int(line[len(self.token) :])
            return
        message = json.loads(line)
        if "failed" in message:
            self._announce(f"rank {self.ranks[peer]} failed: {message['reason']}")
        elif "bye" in message:
            self.missing.discard(self.ranks[peer])

    def _lost(self, peer: socket.socket) -> None:
        self.selector.unregister(peer)
        rank = self.ranks.pop(peer, None)
        if rank in self.missing:
            self._announce(f"rank {rank} {SILENT}")
        peer.close()

    def _announce(self, verdict: str) -> None:
        """Tell every rank; later verdicts follow from the first one and are not told."""
        for peer in self.ranks:
            self._tell(peer, json.dumps(verdict).encode() + b"\n")
        self.missing.clear()

    def _tell(self, peer: socket.socket, line: bytes) -> None:
        with contextlib.suppress(OSError):
            peer.sendall(line)
