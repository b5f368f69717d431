"""Runs torch's own database of ops on a remote device and on the host, and compares.

    python -m tests.pytorch.opinfo [--dtypes float32,int64] [--forward] [--only NAME] [--json FILE]

Every op runs in a process that may crash or hang: that is charged to the op, and the rest goes on.
A pair (op, dtype) counts where the host itself runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Final

PROCESSES: Final = 2
SAMPLES: Final = 8
LIMIT: Final = 40.0
"""Seconds for all samples of a pair."""
DTYPES: Final = ("float32", "int64")


def main() -> int:
    parser = argparse.ArgumentParser(description="torch's database of ops on a remote device")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--json", default="", help="where to write what was found")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(not options.forward)
    found = run(options.dtypes.split(","), forward=options.forward, only=options.only)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    for one in found["pairs"]:
        if one["state"] not in ("pass", "skip"):
            print(f"{one['state']:7} {one['op']} {one['dtype']}: {one['why'][:300]}")
    print(json.dumps(found["totals"]))
    return 0


def run(dtypes: list[str], *, forward: bool = False, only: str = "") -> dict[str, Any]:
    """Run every op; what became of each pair, and how many of each kind."""
    begin = time.monotonic()
    names = _names(dtypes, only)
    children = [_Child(forward) for _ in range(PROCESSES)]
    pairs: list[dict[str, Any]] = []
    try:
        while names or any(child.busy for child in children):
            for child in children:
                if not child.busy and names:
                    child.give(names.pop())
            ready, _, _ = select.select([c.output for c in children if c.busy], [], [], 1.0)
            for k, child in enumerate(children):
                if not child.busy:
                    continue
                if child.output in ready:
                    answer = child.answer()
                elif child.late:
                    answer = child.fail("hang", f"no end within {LIMIT} s")
                else:
                    continue
                pairs.append(answer)
                if child.ended:
                    children[k] = _Child(forward)
    finally:
        for child in children:
            child.end()
    totals: dict[str, Any] = dict(Counter(one["state"] for one in pairs))
    totals["seconds"] = round(time.monotonic() - begin, 1)
    for key in ("samples", "gradients", "bad"):
        totals[key] = sum(one.get(key, 0) for one in pairs)
    pairs.sort(key=lambda one: (one["op"], one["dtype"]))
    return {"totals": totals, "pairs": pairs}


class _Child:
    """A process that runs the samples of one pair after the other."""

    def __init__(self, forward: bool) -> None:
        command = [sys.executable, "-m", "tests.pytorch.opinfo", "--child"]
        if forward:
            command.append("--forward")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
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
        assert self._process.stdin is not None
        self._given = pair
        self._since = time.monotonic()
        try:
            self._process.stdin.write(json.dumps(pair).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is seen when it is read from

    def answer(self) -> dict[str, Any]:
        line = self.output.readline()
        if not line:
            code = self._process.wait()
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode(errors="replace")
            return self.fail("crash", f"status {code}: {said[-1500:]}")
        self._given = None
        found: dict[str, Any] = json.loads(line)
        return found

    def fail(self, state: str, why: str) -> dict[str, Any]:
        assert self._given is not None
        _, name, dtype = self._given
        self._given = None
        self.end()
        return {"op": name, "dtype": dtype, "state": state, "why": why}

    def end(self) -> None:
        self.ended = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def _names(dtypes: list[str], only: str) -> list[tuple[int, str, str]]:
    import torch
    from torch.testing._internal.common_methods_invocations import op_db

    found = []
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        for index, op in enumerate(op_db):
            if op.supports_dtype(kind, "cpu") and op.formatted_name.startswith(only):
                found.append((index, op.formatted_name, dtype))
    return found[::-1]


def _child(gradients: bool) -> int:
    warnings.simplefilter("ignore")
    os.environ.setdefault("GPUREMOTE_URL", "local://?backend=torch")
    import torch
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db

    import gpuremote.torch

    torch.set_num_threads(1)
    # With every sample torch would also seed devices that are not there, and keep a list of that.
    common_utils.set_rng_seed = lambda seed=None, **_: torch.default_generator.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an op prints is no answer
    try:
        for line in sys.stdin:
            index, name, dtype = json.loads(line)
            found = _pair(op_db[index], getattr(torch, dtype), gradients)
            answers.write(json.dumps({"op": name, "dtype": dtype, **found}) + "\n")
            answers.flush()
    finally:
        gpuremote.torch.close()
    return 0


def _pair(op: Any, dtype: Any, gradients: bool) -> dict[str, Any]:
    wanted = gradients and op.supports_autograd and dtype.is_floating_point
    counts: Counter[str] = Counter()
    why = ""
    try:
        samples = list(op.sample_inputs("cpu", dtype, requires_grad=wanted))[:SAMPLES]
    except Exception as error:
        return {"state": "skip", "why": f"no samples: {error}"}
    for sample in samples:
        try:
            here = _outcome(op, sample, wanted)
        except Exception:
            counts["refused"] += 1  # by the host itself
            continue
        counts["samples"] += 1
        try:
            there = _outcome(op, _moved(op, sample), wanted)
            _compare(op, here, there)
            counts["gradients"] += len(here[1])
        except Exception as error:
            counts["bad"] += 1
            why = why or f"{type(error).__name__}: {error}"
    state = "skip" if not counts["samples"] else "fail" if counts["bad"] else "pass"
    return {"state": state, "why": why, **counts}


def _moved(op: Any, sample: Any) -> Any:
    """The sample on the remote device."""
    moved = sample.transform(_remote)
    if op.name == "tensor_split":  # takes its indices on the host, on any device
        moved.args = sample.args
    return moved


def _remote(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        held = value.untyped_storage().nbytes() // value.element_size()
        if value.layout == torch.strided and held != value.numel() and not value.is_conj():
            # A view of more than it shows: all of that goes over, as the op may look at it.
            whole = value.detach().as_strided((held,), (1,), 0).to("remote")
            there = whole.as_strided(value.shape, value.stride(), value.storage_offset())
            return there.requires_grad_(value.requires_grad)
        there = value.detach().to("remote")
        return there.requires_grad_(value.requires_grad)
    if isinstance(value, torch.device) or (isinstance(value, str) and value == "cpu"):
        return torch.device("remote")
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
            dense = one.to_dense() if one.layout != torch.strided else one
            torch.testing.assert_close(
                other.detach().cpu(),
                dense.detach(),
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
