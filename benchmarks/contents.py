"""A model that the server has already: `python -m benchmarks.contents`.

Arrays of the sizes that the weights of GPT-2 small have are uploaded, one after the other as
``model.to("remote")`` does, and several with one wait as ``load_file`` does. In turns, each time in
a session of its own: as if the server kept nothing (``dedupe=off``), to a server that has nothing
yet, and by a second session. A round has a server of its own, and a way: through a relay that
carries 125 MB/s with a round trip of 30 ms, where it is so by itself (``auto``); over loopback and
through shared memory, to show what it would cost where it does not pay (``on``).

What counts are ratios within a round, and the bytes of payload, which are counted and not timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import gpuremote
from benchmarks.contenders.base import RelayProcess
from benchmarks.machine import facts
from gpuremote.testing.servers import RunningServer, device_server

Array = npt.NDArray[Any]

ROUNDS: Final = 3
TOGETHER: Final = 64 << 20
RESULT: Final = Path(__file__).parent / "results" / "contents.json"
WIDTH: Final = 768
WAYS: Final[dict[str, tuple[float, str, str]]] = {
    "125 MB/s, 30 ms": (30.0, "transport=tcp", "auto"),
    "loopback": (-1.0, "transport=tcp", "on"),
    "shared memory": (-1.0, "transport=shm", "on"),
}
"""Round trip in milliseconds through a relay (negative: there is none), transport, and how digests
are told."""
HASHES: Final = ("sha256", "sha512", "blake2b", "blake2s", "sha3_256")


def weights() -> list[Array]:
    """Arrays as large as the weights of GPT-2 small, 498 MB."""
    shapes: list[tuple[int, ...]] = [(50257, WIDTH), (1024, WIDTH)]
    for _ in range(12):
        for rows, columns in ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)):
            shapes += [(rows, columns), (columns,)]
        shapes += [(4 * WIDTH, WIDTH), *(5 * [(WIDTH,)])]
    chance = np.random.default_rng(1)
    return [chance.random(shape, np.float32) for shape in shapes]


def hash_speeds() -> dict[str, float]:
    """Of `hashlib`'s functions here, in GB/s: the best of five."""
    data = np.random.default_rng(1).bytes(16 << 20)
    found = {}
    for name in HASHES:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            hashlib.new(name, data).digest()
            times.append(time.perf_counter() - begin)
        found[name] = round(len(data) / min(times) / 1e9, 2)
    return found


def together(device: Any, arrays: list[Array]) -> list[Any]:
    """Several with one wait."""
    made: list[Any] = []
    group: list[Array] = []
    for array in arrays:
        if group and sum(one.nbytes for one in group) + array.nbytes > TOGETHER:
            made += device.put_many(group)
            group = []
        group.append(array)
    return made + device.put_many(group)


def upload(url: str, arrays: list[Array], how: str) -> dict[str, float]:
    with gpuremote.connect_sync(url) as session:
        device = session.devices[0]
        device.put(np.ones(4)).get()  # whatever is done once
        before = session.stats()
        begin = time.perf_counter()
        if how == "one by one":
            made = [device.put(array) for array in arrays]
        else:
            made = together(device, arrays)
        session.synchronize()
        seconds = time.perf_counter() - begin
        after = session.stats()
        for k in (0, len(arrays) // 2, -1):
            assert np.array_equal(made[k].get(), arrays[k])
    return {
        "seconds": seconds,
        "payload, MB": (after.payload_sent - before.payload_sent) / 1e6,
        "spared, MB": (after.payload_spared - before.payload_spared) / 1e6,
        "round trips": after.round_trips.total() - before.round_trips.total(),
    }


@contextmanager
def way(server: RunningServer, delay: float, transport: str) -> Iterator[str]:
    if delay < 0:
        yield f"{server.url}?{transport}"
        return
    relay = RelayProcess(server.port, delay)
    try:
        yield f"gpu://127.0.0.1:{relay.port}?{transport}"
    finally:
        relay.close()


def measure(rounds: int, arrays: list[Array]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for title, (delay, transport, wish) in WAYS.items():
        for how in ("one by one", "64 MiB at a time"):
            turns: dict[str, list[dict[str, float]]] = {}
            for _ in range(rounds):
                with (
                    device_server("--warm", "2", "--content-cache", "1GiB") as server,
                    way(server, delay, transport) as url,
                ):
                    for name, dedupe in (
                        ("nothing is kept", "off"),
                        ("first session", wish),
                        ("second session", wish),
                    ):
                        turn = upload(f"{url}&dedupe={dedupe}", arrays, how)
                        turns.setdefault(name, []).append(turn)
            found[f"{title}, {how}"] = summed_up(turns)
    return found


def summed_up(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base = turns["nothing is kept"]
    for name, list_ in turns.items():
        found[name] = {key: round(median(turn[key] for turn in list_), 2) for key in list_[0]}
        ratios = [turn["seconds"] / b["seconds"] for turn, b in zip(list_, base, strict=True)]
        found[name]["of the time where nothing is kept"] = {
            "median": round(median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="a model that the server has already")
    parser.add_argument("--out", default=str(RESULT), help="a file for the figures as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    arrays = weights()
    found = {
        "bytes": sum(array.nbytes for array in arrays),
        "arrays": len(arrays),
        "of 1 MiB or more": sum(array.nbytes >= 1 << 20 for array in arrays),
        "rounds": options.rounds,
        "machine": facts(),
        "hashes, GB/s": hash_speeds(),
        "ways": measure(options.rounds, arrays),
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
