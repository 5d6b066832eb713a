"""The other processes of a run: one that is gone ends the run with one line, within a time that is known.

JAX's own C++ client ends the process with a stack dump, at once where process 0's connection is closed and after its
heartbeats otherwise. So that it is we who tell, a process reaches process 0 through a relay of its own, which keeps the
connection open when process 0 is gone; and `Watch` gives up on a silent process before JAX's heartbeats do.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

_BEAT = 2.0  # seconds between signs of life
_ALIVE = "wavelet_jax/alive"
_ENDED = "ended"  # the last sign of a process that ends with an error
_GRACE = 3  # signs of life that a process lets pass before it ends for that reason
_RETRY = 0.2  # seconds between tries to reach process 0, which may start later


class Store(Protocol):
    """The key-value store that process 0 keeps for all: JAX's distributed client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Watch:
    """Threads that show the others that this process lives, and that call `leave` when one of them no longer does.

    Args:
      store: where signs of life are kept; its calls may hang once process 0 is gone.
      number, count: which process this is, and how many there are.
      patience: seconds without a sign of life after which a process is taken for gone.
      leave: called once with what happened, from a thread of its own.
      beat: seconds between signs of life.
    """

    def __init__(
        self, store: Store, number: int, count: int, patience: float, leave: Callable[[str], None], beat: float = _BEAT
    ):
        self._store, self._number, self._patience, self._leave = store, number, patience, leave
        self._beat_every = min(beat, patience / 10)
        self._others = [each for each in range(count) if each != number]
        self._closed = threading.Event()
        self._beats, self._signs = 0, {}
        self._ended: float | None = None  # since when one of the others is known to have ended
        self._forgive()

    def start(self) -> None:
        for act in (self.show, self.look):
            threading.Thread(target=self._repeat, args=(act,), name="peers", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def wait(self) -> None:
        """Returns when a process that is gone by now would have been found out."""
        self._closed.wait(self._patience + 5 * self._beat_every)

    def show(self) -> None:
        """Gives a sign of life, and notes those of the others."""
        self._beats += 1
        with contextlib.suppress(Exception):  # the silence will tell
            self._store.key_value_set(f"{_ALIVE}/{self._number}", str(self._beats), allow_overwrite=True)
            signs = {int(key.rpartition("/")[2]): value for key, value in self._store.key_value_dir_get(_ALIVE)}
            self._answered = time.monotonic()
            for number in self._others:
                if signs.get(number) != self._signs.get(number):
                    self._heard[number] = self._answered
            self._signs = signs

    def say_ended(self) -> None:
        """Tells the others that this process ends with an error, so that they need not wait for its signs of life."""
        self.close()
        key = f"{_ALIVE}/{self._number}"
        say = threading.Thread(target=self._store.key_value_set, args=(key, _ENDED, True), name="peers", daemon=True)
        say.start()
        say.join(self._beat_every)  # the store may be gone
        if self._number == 0:  # and the store with it: the others read it at their next sign of life
            time.sleep(2 * self._beat_every)

    def look(self) -> None:
        """Leaves where a process has ended with an error, or has given no sign of life for too long."""
        now = time.monotonic()
        if ended := [number for number in self._others if self._signs.get(number) == _ENDED]:
            self._ended = self._ended or now
            if now - self._ended > _GRACE * self._beat_every:  # each reports an error that all have
                self.close()
                self._leave(f"process {ended[0]} of {len(self._others) + 1} ended with an error: see its output")
            return
        if now - self._looked > self._patience / 2:  # this process was frozen itself, perhaps with all the others
            self._forgive()
        self._looked = now
        silent = [number for number in self._others if self._heard[number] < now - self._patience]
        if self._answered < now - self._patience:
            silent = [0]  # without it nothing is known of the others
        if silent:
            self.close()
            which = f"process{'es' * (len(silent) > 1)} {', '.join(map(str, silent))} of {len(self._others) + 1}"
            self._leave(f"{which} did not respond for {self._patience:g} s: ended, frozen, or out of reach")

    def _forgive(self) -> None:
        self._looked = self._answered = time.monotonic()  # when this process last looked, and the store last answered
        self._heard = dict.fromkeys(self._others, self._answered)  # when each of the others last gave a sign of life

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._closed.wait(self._beat_every):
            act()


def relay(address: str) -> str:
    """Starts a thread that passes connections on to HOST:PORT; returns the address of this machine where it listens.

    Where the other side closes a connection, ours stays open and silent. One that is not there yet is tried again.
    """
    host, _, port = address.rpartition(":")
    started: list[str] = []
    ready = threading.Event()

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port))
                break
            except OSError:
                if reader.at_eof():
                    return
                await asyncio.sleep(_RETRY)
        back = asyncio.ensure_future(_copy(far_reader, writer))
        await _copy(reader, far_writer)
        back.cancel()
        far_writer.close()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(passed_on, "127.0.0.1", 0)
        started.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        await server.serve_forever()

    threading.Thread(target=asyncio.run, args=(serve(),), name="relay", daemon=True).start()
    ready.wait()
    return started[0]


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Passes bytes on until there are no more; what the sink no longer takes is dropped."""
    takes = True
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            try:
                if takes:
                    sink.write(data)
                    await sink.drain()
            except OSError:
                takes = False


@contextlib.contextmanager
def in_time(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    """Calls `late`, from a thread of its own, when what is inside takes longer."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
