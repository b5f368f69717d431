"""The proxy that cuts connections."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gpuremote.errors import ConfigError
from gpuremote.testing.cutting import CuttingProxy, Direction

DATA = bytes(range(256)) * 40


class Echo:
    """A server that sends everything back, a connection at a time."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.received = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                while data := sock.recv(1 << 20):
                    self.received += len(data)
                    sock.sendall(data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[CuttingProxy]:
    with CuttingProxy("127.0.0.1", echo.port) as proxy:
        yield proxy


def receive(sock: socket.socket, size: int) -> tuple[bytes, str]:
    """Up to ``size`` bytes, and how it ended: "full", "end" or "reset"."""
    got = b""
    while len(got) < size:
        try:
            data = sock.recv(size - len(got))
        except ConnectionResetError:
            return got, "reset"
        if not data:
            return got, "end"
        got += data
    return got, "full"


def connect(proxy: CuttingProxy) -> socket.socket:
    return socket.create_connection(proxy.address, timeout=10)


def is_refused(proxy: CuttingProxy) -> bool:
    """Whether a connection is reset, be it before ``connect`` returns or right after."""
    try:
        with connect(proxy) as sock:
            return receive(sock, 1) == (b"", "reset")
    except ConnectionResetError:
        return True


def test_forwards_both_ways_and_counts(proxy: CuttingProxy) -> None:
    for _ in range(3):
        with connect(proxy) as sock:
            sock.sendall(DATA)
            assert receive(sock, len(DATA)) == (DATA, "full")
            sock.shutdown(socket.SHUT_WR)
            assert receive(sock, 1) == (b"", "end")
    assert proxy.connections == 3
    assert proxy.bytes_up == proxy.bytes_down == 3 * len(DATA)
    assert proxy.cuts == 0


def test_large_transfer(proxy: CuttingProxy) -> None:
    data = DATA * 2000
    with connect(proxy) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        assert receive(sock, len(data)) == (data, "full")
        sender.join()


@pytest.mark.parametrize("count", [1, 2, 7, 255, 1000, 9999])
def test_cuts_behind_the_exact_byte_down(proxy: CuttingProxy, count: int) -> None:
    proxy.cut_after(count, "down")
    with connect(proxy) as sock:
        sock.sendall(DATA)
        assert receive(sock, len(DATA)) == (DATA[:count], "reset")
    assert (proxy.bytes_down, proxy.cuts) == (count, 1)
    with connect(proxy) as sock:  # only once
        sock.sendall(DATA)
        assert receive(sock, len(DATA)) == (DATA, "full")


@pytest.mark.parametrize("count", [1, 2, 7, 255, 1000, 9999])
def test_cuts_behind_the_exact_byte_up(echo: Echo, proxy: CuttingProxy, count: int) -> None:
    proxy.cut_after(count, "up")
    with connect(proxy) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(DATA)
        assert receive(sock, len(DATA))[1] == "reset"
    assert (proxy.bytes_up, proxy.cuts) == (count, 1)
    deadline = time.monotonic() + 5
    while echo.received < count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert echo.received == count


def test_counts_over_all_connections(proxy: CuttingProxy) -> None:
    proxy.cut_after(25, "down")
    for _ in range(2):
        with connect(proxy) as sock:
            sock.sendall(DATA[:10])
            assert receive(sock, 10)[1] == "full"
    with connect(proxy) as sock:
        sock.sendall(DATA[:10])
        assert receive(sock, 10) == (DATA[:5], "reset")


def test_cut_at_zero_refuses_one_connection(proxy: CuttingProxy) -> None:
    proxy.cut_after(0, "up")
    # The reset may come before connect() has returned.
    with contextlib.suppress(ConnectionResetError), connect(proxy) as sock:
        assert receive(sock, 1) == (b"", "reset")
    with connect(proxy) as sock:
        sock.sendall(DATA)
        assert receive(sock, len(DATA)) == (DATA, "full")
    assert (proxy.connections, proxy.cuts) == (2, 1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cuts_repeatedly_and_fast(proxy: CuttingProxy, direction: Direction) -> None:
    proxy.cut_after(100, direction, repeat=True)
    for number in range(1, 51):
        with connect(proxy) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(DATA)
            assert receive(sock, len(DATA))[1] == "reset"
        assert proxy.cuts == number
    proxy.cut_never()
    with connect(proxy) as sock:
        sock.sendall(DATA)
        assert receive(sock, len(DATA)) == (DATA, "full")


def test_cut_now_and_refusing(proxy: CuttingProxy) -> None:
    with connect(proxy) as sock:
        sock.sendall(b"x")
        assert receive(sock, 1) == (b"x", "full")
        assert proxy.open_connections == 1
        proxy.cut()
        assert receive(sock, 1) == (b"", "reset")
    assert proxy.open_connections == 0
    proxy.refusing = True
    assert is_refused(proxy)
    assert proxy.cuts == 1


def test_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with CuttingProxy("127.0.0.1", port) as proxy:
        assert is_refused(proxy)


def test_reset_by_one_side_reaches_the_other(proxy: CuttingProxy) -> None:
    with connect(proxy) as sock:
        sock.sendall(b"x")
        receive(sock, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    deadline = time.monotonic() + 5
    while proxy.open_connections and time.monotonic() < deadline:
        time.sleep(0.001)
    assert proxy.open_connections == 0
    assert proxy.cuts == 0


def test_delay(proxy: CuttingProxy) -> None:
    proxy.delay = 0.05
    with connect(proxy) as sock:
        begin = time.monotonic()
        sock.sendall(DATA)
        assert receive(sock, len(DATA)) == (DATA, "full")
        # There and back, all bytes under way at the same time.
        assert 0.1 <= time.monotonic() - begin < 0.5


def test_bandwidth(proxy: CuttingProxy) -> None:
    proxy.bandwidth = 1e6
    with connect(proxy) as sock:
        begin = time.monotonic()
        sock.sendall(DATA * 20)
        assert receive(sock, len(DATA) * 20) == (DATA * 20, "full")
        assert 0.15 <= time.monotonic() - begin < 1.5


def test_refuses_nonsense() -> None:
    with pytest.raises(ConfigError):
        CuttingProxy("127.0.0.1", 1, delay=-1)
    with pytest.raises(ConfigError):
        CuttingProxy("127.0.0.1", 1, bandwidth=0)
    with CuttingProxy("127.0.0.1", 1) as proxy:
        with pytest.raises(ConfigError):
            proxy.cut_after(-1, "up")
        with pytest.raises(ConfigError):
            proxy.cut_after(0, "up", repeat=True)
        proxy.close()
