"""Sessions over TLS: with both drivers, over connections that break, with peers that are not who
they should be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._clock import now
from gpuremote.errors import (
    AuthenticationFailed,
    ConfigError,
    DeadlineExceeded,
    NotAGpuRemoteServer,
    PeerCopyFailed,
    SessionLost,
    WorkerDied,
    error_from_wire,
)
from gpuremote.rpc import dial as dialling
from gpuremote.rpc.dial import dial, read_hello
from gpuremote.server import daemon, reception
from gpuremote.server.options import ServerOptions
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.transport import tls
from gpuremote.transport.certificates import TlsClient
from gpuremote.transport.tls import TlsSocket
from gpuremote.wire.hello import Challenge, Hello, Opened, Proof, Refusal, Route, Welcome
from gpuremote.wire.identity import client_proof, server_proof
from tests.certificates import Authority, Issued
from tests.faults.raw import fake_server
from tests.faults.sides import Side, in_order, pattern, slow

pytestmark = pytest.mark.timeout(60)

TOKEN = secrets.token_urlsafe(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    """Somebody whom nobody trusts."""
    return Authority(folder, "stranger")


@pytest.fixture(scope="module")
def own(authority: Authority) -> Issued:
    return authority.issue("server")


def serve(own: Issued, *arguments: str) -> contextlib.AbstractContextManager[RunningServer]:
    return device_server("--certfile", own.certfile, "--keyfile", own.keyfile, *arguments)


@pytest.fixture(scope="module")
def server(authority: Authority, own: Issued) -> Iterator[RunningServer]:
    with serve(own, "--warm", "2", "--cafile", authority.cafile) as running:
        yield running


@pytest.fixture(scope="module")
def token_file(folder: Path) -> str:
    path = folder / "token"
    path.write_text(TOKEN)
    return str(path)


def url(server: RunningServer | CuttingProxy, authority: Authority, **more: str) -> str:
    options = "".join(f"&{key}={value}" for key, value in more.items())
    return f"gpu://127.0.0.1:{server.port}?lanes=1&cafile={authority.cafile}{options}"


def works(side: Side, url: str) -> bool:
    with side.session(url) as session:
        return bool(side.do((session.devices[0].arange(3) + 1).tolist()) == [1, 2, 3])


# -- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1000, 100_000, 20_000_000])
def test_arrays_go_there_and_back(
    side: Side, server: RunningServer, authority: Authority, count: int
) -> None:
    with side.session(url(server, authority)) as session:
        data = pattern(count)
        array = session.devices[0].put(data)
        array = side.do(array) if hasattr(array, "__await__") else array
        doubled = array + array
        out = np.empty_like(data)
        side.do(array.get(out=out))
        assert np.array_equal(out, data)
        assert np.array_equal(side.do(doubled.get()), data + data)
        assert session.stats().reconnects == 0


def test_it_says_that_it_is_encrypted(
    side: Side, server: RunningServer, authority: Authority
) -> None:
    with side.session(url(server, authority)) as session:
        found = session.transport.explain()
        assert found.chosen == "tcp"
        assert "TLSv1.3" in str(found)
        assert f"server 127.0.0.1, verified by {authority.cafile}" in str(found)
        facts = found.connection["tls"]
        assert facts["version"] == "TLSv1.3"
        assert facts["cipher"].startswith("TLS_")


def test_many_small_ops(side: Side, server: RunningServer, authority: Authority) -> None:
    with side.session(url(server, authority)) as session:
        x = session.devices[0].zeros(5)
        for number in range(500):
            x = x + 1
            if number % 50 == 0:
                assert side.do(x[0].item()) == number + 1
        assert side.do(x.tolist()) == [500] * 5


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cut_in_the_middle_of_everything(
    side: Side, server: RunningServer, authority: Authority, direction: Any
) -> None:
    data = pattern(12_000_000)
    with (
        CuttingProxy(server.host, server.port) as proxy,
        side.session(url(proxy, authority)) as session,
    ):
        proxy.cut_after(3_000_001, direction, repeat=True)
        array = session.devices[0].put(data)
        array = side.do(array) if hasattr(array, "__await__") else array
        for _ in range(2):
            array, data = array + 1, data + np.uint8(1)
            assert np.array_equal(side.do(array.get()), data)
        proxy.cut()
        assert side.do(array[:3].get()).tolist() == data[:3].tolist()
        assert session.stats().reconnects >= 4
        assert "TLSv1.3" in str(session.transport.explain())


def test_a_get_that_runs_out_of_time(
    side: Side, server: RunningServer, authority: Authority
) -> None:
    data = pattern(8_000_000)
    with (
        CuttingProxy(server.host, server.port, bandwidth=40e6) as proxy,
        side.session(url(proxy, authority)) as session,
    ):
        array = session.devices[0].put(data)
        array = side.do(array) if hasattr(array, "__await__") else array
        memory = np.zeros_like(data)
        with pytest.raises(DeadlineExceeded):
            side.do(array.get(out=memory, timeout=0.05))
        memory[:] = 0
        assert side.do(array[:4].get()).tolist() == data[:4].tolist()
        assert not memory.any()
        proxy.bandwidth = None
        assert np.array_equal(side.do(array.get()), data)


def test_a_worker_that_is_killed(side: Side, server: RunningServer, authority: Authority) -> None:
    with side.session(url(server, authority)) as session:
        ordered = in_order(slow(session.devices[0]))
        session.flush()
        os.kill(session.worker_pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            side.do(ordered[:5].get())
    assert works(side, url(server, authority))


def test_keys_that_are_used_up(
    side: Side, server: RunningServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session gets new ones, and nothing is lost."""
    monkeypatch.setattr(tls, "KEY_BYTES", 5 << 20)
    data = pattern(12_000_000)
    with side.session(url(server, authority)) as session:
        array = session.devices[0].put(data)
        array = side.do(array) if hasattr(array, "__await__") else array
        assert np.array_equal(side.do(array.get()), data)
        assert session.stats().reconnects >= 1


def test_a_process_that_dies_before_it_says_welcome(
    side: Side, server: RunningServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another session is opened instead."""
    verified: list[str] = []
    verify = dialling._verify

    def failing(sock: TlsSocket, deadline: float, peer: str) -> None:
        verified.append(peer)
        if len(verified) == 2:
            raise NotAGpuRemoteServer("the connection broke during the TLS handshake")
        verify(sock, deadline, peer)

    monkeypatch.setattr(dialling, "_verify", failing)
    assert works(side, url(server, authority))
    assert len(verified) == 4


# -- who is there ---------------------------------------------------------------------------------


def refused(side: Side, url: str, match: str) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed, match=match) as caught:
        side.do(side.connect(url))
    assert not caught.value.retryable
    assert (caught.value.peer or "").startswith("127.0.0.1:")
    return caught.value


def test_a_server_that_nobody_vouches_for(
    side: Side, server: RunningServer, stranger: Authority
) -> None:
    refused(side, url(server, stranger), "not trusted .*cafile=")
    refused(side, server.url + "?tls=on", "nobody in the system's certificates")


def test_a_certificate_for_another_name(
    side: Side, authority: Authority, server: RunningServer
) -> None:
    other = authority.issue("other", "DNS:gpu.example,IP:192.0.2.1")
    with serve(other) as elsewhere:
        refused(side, url(elsewhere, authority), "not for '127.0.0.1'.*subjectAltName")


def test_a_certificate_that_has_expired(side: Side, authority: Authority) -> None:
    with serve(authority.issue("old", days=-1)) as old:
        refused(side, url(old, authority), "expired")


def test_a_certificate_that_is_trusted_itself(
    side: Side, server: RunningServer, own: Issued
) -> None:
    assert works(side, f"{server.url}?cafile={own.certfile}")


def test_a_client_without_tls(side: Side, server: RunningServer) -> None:
    refused(side, server.url, "TLS only.*cafile=")


def test_a_server_without_tls(side: Side, authority: Authority) -> None:
    with device_server() as plain:
        refused(side, url(plain, authority), "speaks no TLS.*--certfile")


def test_something_else_that_answers(side: Side, authority: Authority) -> None:
    def web(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with fake_server(web) as other:
        address = f"gpu://127.0.0.1:{other.port}?cafile={authority.cafile}"
        with pytest.raises(NotAGpuRemoteServer, match=r"HTTP/1\.1"):
            side.do(side.connect(address))
    with fake_server(lambda sock: sock.recv(4096)) as mute:
        address = f"gpu://127.0.0.1:{mute.port}?cafile={authority.cafile}"
        with pytest.raises(NotAGpuRemoteServer, match="during the TLS handshake"):
            side.do(side.connect(address))


def test_the_variable(
    side: Side, server: RunningServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_CAFILE", authority.cafile)
    assert works(side, server.url)
    assert works(side, "local://")
    refused(side, server.url + "?tls=off", "TLS only")


def test_files_that_can_not_be_used(
    side: Side, server: RunningServer, authority: Authority, own: Issued, folder: Path
) -> None:
    other = authority.issue("mismatch")
    for options, text in (
        (f"cafile={folder}/missing", "missing: can't be read"),
        (f"cafile={own.keyfile}", "no certificates in PEM format"),
        (
            f"cafile={authority.cafile}&certfile={own.certfile}&keyfile={other.keyfile}",
            "the key of",
        ),
        (f"cafile={authority.cafile}&certfile={own.certfile}", "no certificate and key"),
    ):
        with pytest.raises(ConfigError, match=text):
            side.do(side.connect(f"{server.url}?{options}"))


def test_both_ends_have_a_certificate(
    side: Side, authority: Authority, stranger: Authority, own: Issued
) -> None:
    with serve(own, "--client-ca", authority.cafile) as strict:
        mine = authority.issue("me")
        known = url(strict, authority, certfile=mine.certfile, keyfile=mine.keyfile)
        assert works(side, known)
        refused(side, url(strict, authority), "certfile= and keyfile=")
        forged = stranger.issue("me")
        unknown = url(strict, authority, certfile=forged.certfile, keyfile=forged.keyfile)
        refused(side, unknown, "--client-ca")
        old = authority.issue("late", days=-1)
        late = url(strict, authority, certfile=old.certfile, keyfile=old.keyfile)
        refused(side, late, "expired.*--client-ca")
        assert works(side, known)


# -- the token ------------------------------------------------------------------------------------


def test_a_token_over_tls(
    side: Side,
    authority: Authority,
    own: Issued,
    token_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(own, "--token-file", token_file) as guarded:
        refused(side, url(guarded, authority), "GPUREMOTE_TOKEN")
        monkeypatch.setenv("GPUREMOTE_TOKEN", secrets.token_urlsafe(32))
        refused(side, url(guarded, authority), "not the one that this server knows")
        monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)
        with (
            CuttingProxy(guarded.host, guarded.port) as proxy,
            side.session(url(proxy, authority)) as session,
        ):
            x = session.devices[0].arange(10)
            proxy.cut()
            assert side.do((x + 1).sum().item()) == 55
            assert session.stats().reconnects == 1


def call(server: RunningServer, authority: Authority, route: bytes = b"") -> TlsSocket:
    """A connection with its TLS handshake done."""
    raw = socket.create_connection((server.host, server.port), timeout=10)
    if route:
        raw.sendall(Route(route).encode())
    line = TlsSocket(raw, TlsClient(authority.cafile), "127.0.0.1")
    line.handshake(now() + 10)
    return line


def hear(line: TlsSocket) -> Any:
    return read_hello(line, now() + 10, "the server")


def say(line: TlsSocket, *messages: Any) -> None:
    line.settimeout(10)
    for message in messages:
        line.sendall(message.encode())


def test_a_proof_is_good_for_one_certificate(
    authority: Authority, own: Issued, token_file: str
) -> None:
    """Somebody in between, who is trusted too, can't pass it on."""
    token = TOKEN.encode()
    hello = Hello(nonce=secrets.token_bytes(32))
    with serve(own, "--token-file", token_file) as guarded:
        for certificate in (b"", b"another one"):
            with contextlib.closing(call(guarded, authority)) as line:
                say(line, hello)
                challenge = hear(line)
                assert isinstance(challenge, Challenge)
                say(line, Proof(client_proof(token, challenge.nonce, hello.encode(), certificate)))
                answer = hear(line)
                assert isinstance(answer, Refusal)
                assert isinstance(error_from_wire(answer.code, ""), AuthenticationFailed)
        with contextlib.closing(call(guarded, authority)) as line:
            say(line, hello)
            nonce, shown = hear(line).nonce, line.certificate
            say(line, Proof(client_proof(token, nonce, hello.encode(), shown)))
            assert hear(line).proof == server_proof(token, nonce, hello.encode(), shown)
            opened = hear(line)
            assert isinstance(opened, Opened)
        with contextlib.closing(call(guarded, authority, opened.session)) as line:
            say(line, replace(hello, session=opened.session, secret=opened.secret))
            assert isinstance(hear(line), Challenge)  # there too


# -- copies between servers -----------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [False, True])
def test_servers_that_copy_to_each_other(
    side: Side, server: RunningServer, authority: Authority, own: Issued, mutual: bool
) -> None:
    arguments = ["--client-ca", authority.cafile] if mutual else []
    mine = authority.issue("copier")
    there_too = {"certfile": mine.certfile, "keyfile": mine.keyfile} if mutual else {}
    with (
        serve(own, *arguments) as friend,
        side.session(url(server, authority)) as here,
        side.session(url(friend, authority, **there_too)) as there,
    ):
        copied = here.devices[0].arange(1_000_000).copy_to(there.devices[0])
        assert np.array_equal(side.do(copied.get()), np.arange(1_000_000))


def test_a_copy_to_a_server_that_is_not_trusted(
    side: Side, server: RunningServer, authority: Authority, stranger: Authority
) -> None:
    with (
        serve(stranger.issue("server")) as unknown,
        side.session(url(server, authority)) as here,
        side.session(url(unknown, stranger)) as there,
    ):
        copied = here.devices[0].arange(1000).copy_to(there.devices[0])
        with pytest.raises(PeerCopyFailed):
            side.do(copied.get())
        with pytest.raises(PeerCopyFailed, match="not trusted"):
            side.do(here.synchronize())


# -- strangers ------------------------------------------------------------------------------------


def test_a_session_needs_its_secret(
    side: Side, server: RunningServer, authority: Authority
) -> None:
    with side.session(url(server, authority)) as session:
        x = session.devices[0].arange(3)
        assert side.do(x.tolist()) == [0, 1, 2]
        ident = session._link.welcome.session
        wrong = Hello(session=ident, secret=b"s" * 32)
        for hello in (wrong, Hello(session=ident), Hello(), replace(wrong, session=b"x" * 16)):
            with contextlib.closing(call(server, authority, ident)) as line:
                say(line, hello)
                assert isinstance(hear(line), Refusal)
        assert side.do((x + 1).tolist()) == [1, 2, 3]
        assert session.stats().reconnects == 0


def test_a_session_that_is_not_there(server: RunningServer, authority: Authority) -> None:
    hello = Hello(session=b"n" * 16, secret=b"s" * 32)
    for route in (hello.session, b""):
        with contextlib.closing(call(server, authority, route)) as line:
            say(line, hello)
            answer = hear(line)
            assert isinstance(answer, Refusal)
            assert isinstance(error_from_wire(answer.code, ""), SessionLost)


GARBAGE = [b"", b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x01\xff\xff" + b"x" * 70_000]


def test_strangers_who_do_not_finish(
    side: Side, server: RunningServer, authority: Authority
) -> None:
    """At the daemon, and at the worker of a session whose number they know."""
    with (
        contextlib.ExitStack() as stack,
        CuttingProxy(server.host, server.port) as proxy,
        side.session(url(proxy, authority)) as session,
    ):
        x = session.devices[0].arange(3)
        route = Route(session._link.welcome.session).encode()
        for prefix in (b"", route):
            for data in GARBAGE * (reception.MAX_HANDSHAKES + 1):
                sock = stack.enter_context(
                    socket.create_connection((server.host, server.port), timeout=10)
                )
                with contextlib.suppress(ConnectionError):  # it may be refused by now
                    sock.sendall(prefix + data)
        assert side.do((x + 1).tolist()) == [1, 2, 3]
        assert session.stats().reconnects == 0
        proxy.cut()
        assert side.do((x + 2).tolist()) == [2, 3, 4]
        assert session.stats().reconnects == 1
        assert works(side, url(server, authority))


def test_what_is_refused_is_ended(server: RunningServer, authority: Authority) -> None:
    """No connection of a stranger stays open for good."""
    for data in (b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", Hello().encode()):
        with socket.create_connection((server.host, server.port), timeout=20) as sock:
            sock.sendall(data)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass


IMPATIENT = """
import sys
from gpuremote.cli.main import main
from gpuremote.server import daemon
daemon.UNCLAIMED = 0.5
sys.exit(main(sys.argv[1:]))
"""


def test_a_session_that_nobody_comes_for(authority: Authority, own: Issued) -> None:
    """It makes room for another one; one that somebody came for does not."""
    arguments = [
        "--certfile",
        own.certfile,
        "--keyfile",
        own.keyfile,
        "--max-sessions",
        "1",
        "--drain",
        "0",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "serve", "--listen", "127.0.0.1:0", "--json", *arguments],
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            server = RunningServer("127.0.0.1", port, process)

            def opened() -> Opened | None:
                with contextlib.closing(call(server, authority)) as line:
                    say(line, Hello())
                    answer = hear(line)
                    return answer if isinstance(answer, Opened) else None

            assert opened() is not None
            while (mine := opened()) is None:
                time.sleep(0.05)
            with contextlib.closing(call(server, authority, mine.session)) as line:
                say(line, Hello(session=mine.session, secret=mine.secret))
                assert isinstance(hear(line), Welcome)
                time.sleep(1.0)
                assert opened() is None
        finally:
            process.terminate()
            process.wait(10)


def test_dial_gives_up_in_time(authority: Authority) -> None:
    """A server that sends a byte now and then does not keep the client for longer."""

    def dripping(sock: socket.socket) -> None:
        for byte in b"\x16\x03\x03\x40\x00" + bytes(200):
            sock.sendall(bytes([byte]))
            time.sleep(0.02)

    with fake_server(dripping) as slow_one, pytest.raises(TimeoutError):
        dial(
            "127.0.0.1",
            slow_one.port,
            Hello(),
            timeout=0.3,
            blocking=True,
            tls=TlsClient(authority.cafile),
        )


def test_a_certificate_of_the_server_that_can_not_be_used(
    authority: Authority, own: Issued, folder: Path
) -> None:
    async def start(server: daemon.DeviceServer) -> None:
        async with server:
            pass

    for options, text in (
        (ServerOptions(port=0, certfile=str(folder / "missing")), "can't be read"),
        (ServerOptions(port=0, certfile=own.certfile), "no certificate and key"),
        (
            ServerOptions(
                port=0, certfile=own.certfile, keyfile=own.keyfile, client_ca=own.keyfile
            ),
            "no certificates",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            asyncio.run(start(daemon.DeviceServer(options)))
    with pytest.raises(ConfigError, match="without certfile"):
        ServerOptions(client_ca=authority.cafile)


def test_local_needs_none() -> None:
    with gpuremote.connect_sync("local://") as session:
        assert "TLS" not in str(session.transport.explain())
