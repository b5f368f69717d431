"""Runs torch's own database of ops on a remote device and on the host, and compares.

    python -m tests.pytorch.opinfo [--dtypes float32,int64] [--forward] [--only NAME] [--json FILE]

of the part that GPUREMOTE_TORCH_TIER names. On a machine with a GPU, where the server has it too:

    python -m tests.pytorch.opinfo --processes 12
    python -m tests.pytorch.opinfo --processes 12 --forward --against cuda

(no gradients there: torch has one accelerator in a process, and that is ``remote``).

Every op runs in a process that may crash or hang: that is charged to the op, and the rest goes on.
A pair (op, dtype) counts where the host itself runs it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

from gpuremote.testing.servers import device_server

PROCESSES: Final = 2
SAMPLES: Final = 4
"""Of a pair, spread over all there are."""
LIMIT: Final = 40.0
"""Seconds for all samples of a pair."""
DTYPES: Final = ("float32", "int64")


def main() -> int:
    parser = argparse.ArgumentParser(description="torch's database of ops on a remote device")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="of a pair, half with gradients"
    )
    parser.add_argument("--every", type=int, default=1, help="only each so many-th pair")
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--against", default="cpu", help="device here to compare with")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", default="", help="where to write what was found")
    options = parser.parse_args()
    most = options.samples, 0 if options.forward else (options.samples + 1) // 2
    found = run(
        options.dtypes.split(","),
        most,
        only=options.only,
        every=options.every,
        against=options.against,
        processes=options.processes,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    for one in found["pairs"]:
        if one["state"] not in ("pass", "skip"):
            print(f"{one['state']:7} {one['op']} {one['dtype']}: {one['why'][:300]}")
    print(json.dumps(found["totals"]))
    return 0


def run(
    dtypes: list[str],
    most: tuple[int, int],
    *,
    only: str = "",
    every: int = 1,
    against: str = "cpu",
    processes: int = PROCESSES,
) -> dict[str, Any]:
    """Run every op, with so many samples of a pair and so many of these with gradients; what became
    of each pair, and how many of each kind."""
    begin = time.monotonic()
    # The server starts while this process loads the database.
    with device_server("--backend", "torch", "--warm", str(processes)) as server:
        os.environ["GPUREMOTE_URL"] = server.url
        names = _names(dtypes, only, against)[::every]
        pairs = _run_all(names, _Task(most, against), processes)
    totals: dict[str, Any] = dict(Counter(one["state"] for one in pairs))
    totals["seconds"] = round(time.monotonic() - begin, 1)
    for key in ("samples", "gradients", "bad"):
        totals[key] = sum(one.get(key, 0) for one in pairs)
    pairs.sort(key=lambda one: (one["op"], one["dtype"]))
    return {"totals": totals, "pairs": pairs}


class _Task(NamedTuple):
    """What every process does: with so many samples of a pair, and so many of these with gradients,
    beside that device of this host."""

    most: tuple[int, int]
    against: str


def _run_all(
    names: list[tuple[int, str, str]], task: _Task, processes: int
) -> list[dict[str, Any]]:
    children = [_Child(task) for _ in range(processes)]
    pairs: list[dict[str, Any]] = []
    try:
        while names or any(child.busy for child in children):
            for child in children:
                if not child.busy and names:
                    child.give(names.pop())
            ready = wait([c.pipe for c in children if c.busy], 1.0)
            for k, child in enumerate(children):
                if not child.busy:
                    continue
                if child.pipe in ready:
                    pairs.append(child.answer())
                elif child.late:
                    pairs.append(child.fail("hang", f"no end within {LIMIT} s"))
                if child.ended:
                    children[k] = _Child(task)
    finally:
        for child in children:
            child.end()
    return pairs


class _Child:
    """A process that runs the samples of one pair after the other. It is forked, with the database
    loaded and no session open; made anew where torch may use CUDA, which does not survive that."""

    def __init__(self, task: _Task) -> None:
        context: Any = multiprocessing.get_context(_method())
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, task))
        self._process.start()
        theirs.close()
        self._given: tuple[int, str, str] | None = None
        self._since = 0.0
        self.ended = False

    @property
    def busy(self) -> bool:
        return self._given is not None

    @property
    def late(self) -> bool:
        return time.monotonic() - self._since > LIMIT

    def give(self, pair: tuple[int, str, str]) -> None:
        self._given = pair
        self._since = time.monotonic()
        try:
            self.pipe.send(pair)
        except BrokenPipeError:
            pass  # its end is seen when it is read from

    def answer(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.pipe.recv()
        except EOFError:
            self._process.join()
            return self.fail("crash", f"status {self._process.exitcode}")
        self._given = None
        return found

    def fail(self, state: str, why: str) -> dict[str, Any]:
        assert self._given is not None
        _, name, dtype = self._given
        self._given = None
        self.end()
        return {"op": name, "dtype": dtype, "state": state, "why": why}

    def end(self) -> None:
        self.ended = True
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _method() -> str:
    import torch

    return "fork" if torch.version.cuda is None else "spawn"


def _database() -> Any:
    """torch's database of ops, and what else takes long to load."""
    import torch
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db

    from gpuremote.torch import _inference

    _inference.mode()
    # With every sample torch would also seed devices that are not there, and keep a list of that.
    common_utils.set_rng_seed = lambda *_, **__: torch.default_generator.manual_seed(0)
    return op_db


def _names(dtypes: list[str], only: str, against: str) -> list[tuple[int, str, str]]:
    import torch

    # Loaded here, once for all the processes that are forked.
    op_db = _database()
    found = []
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        for index, op in enumerate(op_db):
            if op.supports_dtype(kind, against) and op.formatted_name.startswith(only):
                found.append((index, op.formatted_name, dtype))
    return found[::-1]


def _child(pipe: Connection[Any, Any], task: _Task) -> None:
    import torch

    import gpuremote.torch

    warnings.simplefilter("ignore")
    op_db = _database()
    torch.set_num_threads(1)
    try:
        while True:
            index, name, dtype = pipe.recv()
            found = _pair(op_db[index], getattr(torch, dtype), task)
            pipe.send({"op": name, "dtype": dtype, **found})
    except (EOFError, BrokenPipeError):
        gpuremote.torch.close()


def _pair(op: Any, dtype: Any, task: _Task) -> dict[str, Any]:
    most, against = task
    wanted = op.supports_autograd and dtype.is_floating_point
    counts: Counter[str] = Counter()
    why = ""
    try:
        every = list(op.sample_inputs("cpu", dtype, requires_grad=wanted))
        samples = every[:: -(-len(every) // most[0]) or 1]
    except Exception as error:
        return {"state": "skip", "why": f"no samples: {error}"}
    for number, sample in enumerate(samples):
        both = wanted and number < most[1]
        try:
            at_home = sample if against == "cpu" else _moved(op, sample, against)
            here = _outcome(op, at_home, both)
        except Exception:
            counts["refused"] += 1  # by the host itself
            continue
        counts["samples"] += 1
        try:
            there = _outcome(op, _moved(op, sample, "remote"), both)
            _compare(op, here, there)
            counts["gradients"] += len(here[1])
        except Exception as error:
            counts["bad"] += 1
            why = why or f"{type(error).__name__}: {error}"
    state = "skip" if not counts["samples"] else "fail" if counts["bad"] else "pass"
    return {"state": state, "why": why, **counts}


def _moved(op: Any, sample: Any, place: str) -> Any:
    """The sample on another device."""
    moved = sample.transform(lambda value: _placed(value, place))
    if op.name == "tensor_split":  # takes its indices on the host, on any device
        moved.args = sample.args
    return moved


def _placed(value: Any, place: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        held = value.untyped_storage().nbytes() // value.element_size()
        if value.layout == torch.strided and held != value.numel() and not value.is_conj():
            # A view of more than it shows: all of that goes over, as the op may look at it.
            whole = value.detach().as_strided((held,), (1,), 0).to(place)
            there = whole.as_strided(value.shape, value.stride(), value.storage_offset())
            return there.requires_grad_(value.requires_grad)
        there = value.detach().to(place)
        return there.requires_grad_(value.requires_grad)
    if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu"):
        return torch.device(place)
    return value


def _outcome(op: Any, sample: Any, gradients: bool) -> tuple[list[Any], list[Any]]:
    import torch

    torch.default_generator.manual_seed(0)
    made = op(sample.input, *sample.args, **sample.kwargs)
    flat = _tensors(made)
    if not gradients:
        return flat, []
    if sample.output_process_fn_grad is not None:
        made = sample.output_process_fn_grad(made)
    outputs = [t for t in _tensors(made) if t.requires_grad]
    inputs = [t for t in _tensors((sample.input, sample.args, sample.kwargs)) if t.requires_grad]
    if not outputs or not inputs:
        return flat, []
    total = sum(t.abs().sum() if t.is_complex() else t.sum() for t in outputs)
    return flat, list(torch.autograd.grad(total, inputs, allow_unused=True))


def _tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _compare(op: Any, here: tuple[Any, Any], there: tuple[Any, Any]) -> None:
    import torch

    loose = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
    for expected, found in zip(here, there, strict=True):
        assert len(expected) == len(found), "another number of results"
        for one, other in zip(expected, found, strict=True):
            if one is None or other is None:
                assert one is other, "a gradient on one side only"
                continue
            assert one.shape == other.shape, f"shape {tuple(other.shape)} for {tuple(one.shape)}"
            assert one.dtype == other.dtype, f"dtype {other.dtype} for {one.dtype}"
            if _is_random(op):
                continue
            assert one.layout == other.layout, f"layout {other.layout} for {one.layout}"
            sparse = one.layout != torch.strided
            torch.testing.assert_close(
                (other.to_dense() if sparse else other).detach().cpu(),
                (one.to_dense() if sparse else one).detach().cpu(),
                rtol=loose.get(one.dtype, 1e-3),
                atol=loose.get(one.dtype, 1e-4),
                equal_nan=True,
            )


def _is_random(op: Any) -> bool:
    """Whether the values are anybody's guess: random ones, and memory as it was found."""
    return (
        op.name.startswith(("empty", "new_empty"))
        or "nondeterministic_seeded" in str(getattr(op.aten_name, "tags", ""))
        or op.name in RANDOM
    )


RANDOM: Final = frozenset(
    (
        "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial",
        "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
        "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout",
        "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
        "nn.functional.multi_head_attention_forward", "nn.functional.rrelu",
        "nn.functional.scaled_dot_product_attention", "normal", "rand_like", "randint",
        "randint_like", "randn", "randn_like", "uniform", "pca_lowrank", "svd_lowrank", "empty",
        "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
        "torch.ops.aten._flash_attention_forward", "torch.ops.aten._efficient_attention_forward",
    )
)  # fmt: skip
"""Ops with random results: only their shapes and dtypes are compared."""

if __name__ == "__main__":
    sys.exit(main())
