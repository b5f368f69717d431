"""``gpuremote devices``: what a server offers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gpuremote.cli._console import say, show, size
from gpuremote.client.connect import connect_sync

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "devices", help="list the devices of a server", description="List a server's devices."
    )
    parser.add_argument(
        "url",
        nargs="?",
        help="gpu://HOST:PORT or local:// (default: GPUREMOTE_URL, else local://)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with connect_sync(options.url) as session:
        explanation = session.transport.explain()
        facts: dict[str, Any] = {
            "backend": session.backend,
            "session_memory_limit": session.memory_limit,
            "transport": explanation.chosen,
            "transport_reason": explanation.reason,
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
    show(
        ("device", "backend", "kind", "model", "memory"),
        [
            (d["name"], facts["backend"], d["kind"], d["model"], size(d["memory_bytes"]))
            for d in facts["devices"]
        ],
    )
    say(f"a session may hold {size(facts['session_memory_limit'])}")
    say(f"transport {facts['transport']}: {facts['transport_reason']}")
    return 0
