"""``gpuremote devices``: what a server offers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuremote.client.connect import connect_sync

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "devices", help="list the devices of a server", description="List a server's devices."
    )
    parser.add_argument(
        "url", nargs="?", help="gpu://HOST:PORT or local:// (default: GPUREMOTE_URL)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with connect_sync(options.url) as session:
        facts = {
            "backend": session.backend,
            "session_memory_limit": session.memory_limit,
            "transport": session.transport.name,
            "devices": [
                {
                    "name": device.name,
                    "kind": device.kind,
                    "model": device.model,
                    "memory_bytes": device.memory_bytes,
                }
                for device in session.devices
            ],
        }
    if options.json:
        print(json.dumps(facts))
        return 0
    table = Table("device", "kind", "model", "memory", title=f"backend {facts['backend']}")
    for device in session.devices:
        table.add_row(device.name, device.kind, device.model, _size(device.memory_bytes))
    console = Console()
    console.print(table)
    console.print(
        f"transport {facts['transport']}; a session may hold {_size(session.memory_limit)}"
    )
    return 0


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
