"""``gpuremote serve``: a device server until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gpuremote.backend import registry
from gpuremote.config import check_token, parse_address, parse_size
from gpuremote.errors import ConfigError
from gpuremote.server.daemon import DeviceServer, new_loop
from gpuremote.server.options import ServerOptions
from gpuremote.transport.certificates import TlsClient

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="offer this machine's devices",
        description="Offer this machine's devices to sessions. SIGTERM and SIGINT let the "
        "sessions that exist end (--drain), a second one stops at once.",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:7700",
        metavar="HOST:PORT",
        help="where to listen (default %(default)s; port 0 takes a free one)",
    )
    parser.add_argument(
        "--token-file",
        metavar="PATH",
        help="clients have to know the token in this file (GPUREMOTE_TOKEN on their side)",
    )
    parser.add_argument(
        "--certfile",
        metavar="PATH",
        help="speak TLS 1.3, with this certificate (PEM, with those that lead to its CA)",
    )
    parser.add_argument("--keyfile", metavar="PATH", help="its key (default: in --certfile)")
    parser.add_argument(
        "--client-ca",
        metavar="PATH",
        help="clients have to show a certificate that one in this file has signed",
    )
    parser.add_argument(
        "--cafile",
        metavar="PATH",
        help="whom to trust in copies to other servers (default: --certfile, or the system's CAs)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow an address that other hosts can reach without TLS, a token, or both: what is "
        "missing lets others read and change what travels, or use the devices",
    )
    parser.add_argument("--backend", default="numpy", help="what executes (default %(default)s)")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        metavar="N",
        help="devices to offer (default: all; numpy: 1)",
    )
    parser.add_argument(
        "--memory-limit",
        default="0",
        metavar="SIZE",
        help="device memory per session, such as 8GiB (default: 80%% of what the devices have)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a session outlives a lost connection (default %(default)s)",
    )
    parser.add_argument(
        "--max-sessions", type=int, default=64, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--warm",
        type=int,
        default=1,
        metavar="N",
        help="worker processes that wait for a session (default %(default)s)",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long sessions may go on after SIGTERM (default %(default)s)",
    )
    parser.add_argument(
        "--advertise",
        default="",
        metavar="HOST:PORT",
        help="how other servers reach this one, for copies between servers",
    )
    parser.add_argument(
        "--allow-ops",
        action="append",
        metavar="NAME[=MODULE]",
        help="with --backend torch: a namespace of custom ops that sessions may run, and the "
        "module that makes them (default: of the same name); may be given several times",
    )
    parser.add_argument(
        "--allow-kernels",
        action="store_true",
        help="with --backend cupy: sessions may bring kernels in CUDA C++ (RawKernel, ...), which "
        "can do on the device, and include from this machine, whatever this user may",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="FOLDER",
        help="with --backend torch: safetensors files that sessions may load from here",
    )
    parser.add_argument(
        "--content-cache",
        default=None,
        metavar="BYTES",
        help="memory for uploads, such as 4GiB, that further sessions of the same tenant then need "
        "not send; 0: none (default: 1GiB with a token or --client-ca, else 0)",
    )
    parser.add_argument("--json", action="store_true", help="say where it listens as JSON")
    parser.add_argument("--verbose", action="store_true", help="log every session")
    parser.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--lifeline-fd", type=int, default=-1, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    host, port = parse_address(options.listen)
    exposed = _exposure(options) if not _loopback(host) else []
    if exposed and not options.insecure:
        raise ConfigError(
            f"{host} can be reached by other hosts, so it takes TLS (--certfile, --keyfile) and a "
            f"token (--token-file): {'; '.join(exposed)}. Give what is missing, or listen on "
            "127.0.0.1, or pass --insecure if the network is yours alone"
        )
    if options.advertise:
        parse_address(options.advertise)
    registry.check(options.backend)
    server_options = ServerOptions(
        host=host,
        port=port,
        backend=options.backend,
        devices=options.devices,
        memory_limit=parse_size(options.memory_limit),
        grace=options.grace,
        max_sessions=options.max_sessions,
        warm=options.warm,
        drain=options.drain,
        advertise=options.advertise,
        token=_token(options.token_file) if options.token_file else b"",
        certfile=options.certfile or "",
        keyfile=options.keyfile or "",
        client_ca=options.client_ca or "",
        cafile=options.cafile or "",
        allow_ops=tuple(options.allow_ops or ()),
        allow_kernels=options.allow_kernels,
        weights=options.weights,
        content_cache=-1 if options.content_cache is None else parse_size(options.content_cache),
    )
    if server_options.cafile:
        TlsClient(server_options.cafile).context()  # workers would find out one by one
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if exposed:
        logging.getLogger("gpuremote").warning(
            "--insecure: %s:%d: %s", host, port, "; ".join(exposed)
        )
    with asyncio.Runner(loop_factory=new_loop()) as runner:
        return runner.run(_serve(server_options, options))


def _exposure(options: argparse.Namespace) -> list[str]:
    """What other hosts could do on an address that they can reach."""
    found = []
    if not options.certfile:
        found.append(
            "without TLS everything travels in the clear, and who is on the way can change it and "
            "take sessions over"
        )
    if not options.token_file:
        found.append("without a token anyone who can reach it can use these devices")
    return found


def _token(path: str) -> bytes:
    """The token in a file, without the white space around it.

    Raises
    ------
    ConfigError
        It can't be read, is no text, or is too short.
    """
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: can't be read: {error}") from error
    return check_token(text, f"--token-file {path}")


async def _serve(server_options: ServerOptions, options: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    signals = 0
    first, second = asyncio.Event(), asyncio.Event()

    def told() -> None:
        nonlocal signals
        signals += 1
        (first if signals == 1 else second).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    if options.lifeline_fd >= 0:
        _end_with_parent(loop, options.lifeline_fd, second)
    async with DeviceServer(server_options) as server:
        _announce(server, options)
        waits = [asyncio.create_task(event.wait()) for event in (first, second)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not second.is_set():
            draining = asyncio.create_task(server.drain())
            await asyncio.wait([draining, waits[1]], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return 0


def _announce(server: DeviceServer, options: argparse.Namespace) -> None:
    facts = {
        "host": server.options.host,
        "port": server.port,
        "backend": server.options.backend,
        "pid": os.getpid(),
    }
    if options.ready_fd >= 0:
        os.write(options.ready_fd, json.dumps(facts).encode() + b"\n")
        os.close(options.ready_fd)
    elif options.json:
        print(json.dumps(facts), flush=True)
    else:
        print(
            f"gpuremote: serving {facts['backend']} devices on gpu://{server.address}", flush=True
        )


def _end_with_parent(loop: asyncio.AbstractEventLoop, descriptor: int, over: asyncio.Event) -> None:
    """End when the other end of the pipe is closed, which is when the parent ends."""
    os.set_blocking(descriptor, False)

    def readable() -> None:
        if not os.read(descriptor, 1):
            loop.remove_reader(descriptor)
            over.set()

    loop.add_reader(descriptor, readable)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
