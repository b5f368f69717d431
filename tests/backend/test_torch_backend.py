"""What of torch runs on a server, and that it believes no definition."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpuremote.backend.torch_accelerator import AcceleratorTorchBackend
from gpuremote.backend.torch_accelerator import accelerator as accelerator_kind
from gpuremote.backend.torch_backend import TorchBackend
from gpuremote.backend.torch_calls import Block, find_op
from gpuremote.backend.torch_host import HostTorchBackend
from gpuremote.errors import InternalError, OpFailed, ShapeError, UnsupportedOp
from gpuremote.ops.torch_call import CONJ, Call, Result, View, Views

VIEWS = Views()
NOTHING: frozenset[str] = frozenset()


def view(shape: tuple[int, ...], dtype: str = "float32", offset: int = 0, flags: int = 0) -> View:
    stride = torch.empty(shape, device="meta").stride()
    return VIEWS.get(dtype, shape, tuple(stride), offset, flags)


def call(
    name: str,
    operands: Sequence[Any],
    results: Sequence[View | None],
    arguments: list[Any] | None = None,
    sizes: tuple[int | None, ...] | None = None,
) -> Call:
    slots = [["slot", k] for k in range(len(operands))] if arguments is None else arguments
    made = tuple(Result(k, v, v.dtype if v else "") for k, v in enumerate(results))
    bytes_ = tuple(v.end if v else None for v in results) if sizes is None else sizes
    return Call(70, name, 0, tuple(operands), [slots, {}], bytes_, made)


@pytest.fixture
def backend() -> HostTorchBackend:
    return HostTorchBackend()


def block(*values: float) -> Block:
    tensor = torch.tensor(values)
    return Block(tensor, 4 * len(values))


Run = Callable[[Sequence[Any]], Sequence[Any]]


@pytest.mark.parametrize(
    "name",
    [
        "aten::from_file",
        "aten::resize_",
        "aten::set_.source_Tensor",
        "aten::save",  # TorchScript's, and a file
        "aten::no_such_op",
        "aten::add.NoSuchOverload",
        "aten::_local_scalar_dense",
        "prim::Print",
        "os::system",
        "aten",
        "",
        "aten::__class__",
        "aten::add.__init__",
        "quantized::linear_prepack",
    ],
)
def test_what_does_not_run(name: str) -> None:
    with pytest.raises(UnsupportedOp):
        find_op(name, NOTHING)


def test_namespaces_that_the_operator_allows() -> None:
    library: Any = torch.library.Library("gpuremote_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    with pytest.raises(UnsupportedOp, match="operator can allow"):
        find_op("gpuremote_test::twice", NOTHING)
    assert find_op("gpuremote_test::twice", frozenset({"gpuremote_test"})) is not None


def test_a_call(backend: HostTorchBackend) -> None:
    x = view((2,))
    run, writes = backend.compile_call(call("aten::mul.Tensor", [x, x], [x]))
    assert writes == ()
    for factor in (2.0, 3.0):
        (made,) = run([block(1.0, 2.0), block(factor, factor)])
        assert made.view(x).tolist() == [factor, 2 * factor]
        assert made.nbytes == 8


def test_in_place(backend: HostTorchBackend) -> None:
    x = view((2,))
    run, writes = backend.compile_call(call("aten::add_.Tensor", [x, x], []))
    assert writes == (0,)
    there = block(1.0, 2.0)
    assert run([there, block(5.0, 5.0)]) == []
    assert there.view(x).tolist() == [6, 7]


def test_a_view_beyond_its_storage(backend: HostTorchBackend) -> None:
    run, _ = backend.compile_call(call("aten::neg", [view((3,), offset=1)], [view((3,))]))
    with pytest.raises(ShapeError, match="needs 16 bytes of a storage of 12"):
        run([block(1.0, 2.0, 3.0)])


def test_a_result_that_was_not_foretold(backend: HostTorchBackend) -> None:
    x = view((2,))
    for wrong in (view((3,)), view((2,), "float64")):
        run, _ = backend.compile_call(call("aten::neg", [x], [wrong]))
        with pytest.raises(InternalError, match="where the client expects"):
            run([block(1.0, 2.0)])
    run, _ = backend.compile_call(call("aten::neg", [x], [x, x]))
    with pytest.raises(InternalError, match="1 results and 2"):
        run([block(1.0, 2.0)])


def test_another_layout_than_torch_gives(backend: HostTorchBackend) -> None:
    turned = VIEWS.get("float32", (2, 2), (1, 2), 0, 0)
    run, _ = backend.compile_call(call("aten::neg", [view((2, 2))], [turned]))
    (made,) = run([block(1.0, 2.0, 3.0, 4.0)])
    assert made.view(turned).tolist() == [[-1, -2], [-3, -4]]
    assert made.view(view((4,))).tolist() == [-1, -3, -2, -4]


def test_a_result_has_a_storage_of_its_own(backend: HostTorchBackend) -> None:
    """Also where torch gives an argument back."""
    x = view((2,))
    run, _ = backend.compile_call(call("aten::contiguous", [x], [x]))
    source = block(1.0, 2.0)
    (made,) = run([source])
    made.view(x).fill_(9)
    assert source.view(x).tolist() == [1, 2]


def test_storages_do_not_grow(backend: HostTorchBackend) -> None:
    """``out=`` makes room where it finds too little; what is counted must not change."""
    operands = [view((4,)), view((0,))]
    definition = Call(70, "aten::neg.out", 0, tuple(operands), [[["slot", 0]], {}], (), ())
    definition.arguments[1]["out"] = ["slot", 1]
    run, writes = backend.compile_call(definition)
    assert writes == (1,)
    small = Block(torch.empty(0), 0)
    with pytest.raises(ShapeError, match="does not fit"):
        run([block(1.0, 2.0, 3.0, 4.0), small])
    assert small.tensor.untyped_storage().nbytes() == 0


def test_a_result_that_is_part_of_something_larger(backend: HostTorchBackend) -> None:
    """Only what is counted is kept, and it can be written to."""
    x, part = view((4,)), view((2,))
    slicing = [["slot", 0], 0, 0, 2]
    for promised in (part, None):
        run, _ = backend.compile_call(call("aten::slice.Tensor", [x], [promised], slicing))
        (made,) = run([block(1.0, 2.0, 3.0, 4.0)])
        assert made.tensor.untyped_storage().nbytes() == made.nbytes == 8
        write, _ = backend.compile_call(call("aten::add_.Tensor", [part, part], []))
        write([made, block(1.0, 1.0)])
        assert made.view(part).tolist() == [2, 3]


def test_memory_out_of_nothing_says_how_much(backend: HostTorchBackend) -> None:
    definition = call("aten::zeros", [], [None], [["list", 1 << 40]])
    with pytest.raises(UnsupportedOp, match="does not say how much"):
        backend.compile_call(definition)


def test_arguments_of_all_kinds(backend: HostTorchBackend) -> None:
    arguments = [["list", 2, 2], ["slot", 0]]
    definition = call("aten::full", ["c"], [view((2, 2), "complex64")], arguments)
    definition.arguments[1].update(dtype=["dtype", "complex64"], device=["device"])
    run, _ = backend.compile_call(definition)
    (made,) = run([1 + 2j])
    assert made.view(view((2, 2), "complex64")).tolist() == [[1 + 2j] * 2] * 2
    conjugated = view((2, 2), "complex64", flags=CONJ)
    assert made.view(conjugated).resolve_conj()[0, 0].item() == 1 - 2j
    definition = call("aten::rand", [], [view((3,))], [["list", 3]])
    definition.arguments[1]["generator"] = ["import", "os"]
    with pytest.raises(UnsupportedOp, match="can't be"):
        backend.compile_call(definition)


def test_arrays_are_storages_and_stay_arrays(backend: HostTorchBackend) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    held = backend.block(array)
    assert backend.block(held) is held
    held.view(view((6,))).mul_(2)
    assert array[1, 2] == 10
    assert backend.small_bytes(held) == array.tobytes()
    assert backend.describe(held) == ((24,), "uint8")
    made = Block(torch.ones(2, 2, dtype=torch.bfloat16), 8)
    assert backend.describe(made) == ((2, 2), "bfloat16")
    assert len(backend.small_bytes(made)) == 8


def test_errors(backend: HostTorchBackend) -> None:
    assert isinstance(backend.translate_error(RuntimeError("no")), OpFailed)
    assert isinstance(backend.translate_error(NotImplementedError("no")), UnsupportedOp)


class HostEvent:
    """Stands for an accelerator's event: on the host everything is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: Any = None) -> None:
        self.stream = stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Done already."""

    def elapsed_time(self, other: HostEvent) -> float:
        return 0.0


class HostStream:
    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        """Done already."""


@pytest.fixture
def accelerator() -> AcceleratorTorchBackend:
    """The backend of accelerators over the host's processors, as there is none here."""
    found = AcceleratorTorchBackend(kind="cpu")
    found._module = SimpleNamespace(
        Event=HostEvent,
        Stream=HostStream,
        current_stream=HostStream,
        default_stream=HostStream,
        device=lambda index: contextlib.nullcontext(),
        stream=lambda stream: contextlib.nullcontext(),
    )
    return found


def test_an_accelerators_memory(accelerator: AcceleratorTorchBackend) -> None:
    data = np.arange(6, dtype=np.float32)
    there = accelerator.empty((24,), np.dtype(np.uint8), 0)
    target = accelerator.receive_view(there)
    target[:] = data.tobytes()
    accelerator.received(there, target)
    assert there.view(view((6,))).tolist() == data.tolist()
    run, _ = accelerator.compile_call(call("aten::neg", [view((6,))], [view((6,))]))
    (made,) = run([there])
    found, private = accelerator.send_view(made)
    assert private
    assert np.array_equal(np.frombuffer(found, np.float32), -data)
    copied = accelerator.copy_to_device(made, 0)
    assert accelerator.storage_of(copied) is not accelerator.storage_of(made)
    assert accelerator.meta(copied) == ((24,), np.dtype(np.uint8))
    assert accelerator.small_bytes(copied) == (-data).tobytes()


def test_an_accelerators_streams(accelerator: AcceleratorTorchBackend) -> None:
    stream = accelerator.create_stream(0)
    with accelerator.activate(stream):
        assert not torch.is_grad_enabled()
    event = accelerator.record(stream)
    accelerator.wait(stream, event)
    assert stream[1].waited == event
    assert accelerator.reached(event)
    assert accelerator.elapsed(event, accelerator.record(None)) == 0.0
    accelerator.synchronize_event(event)
    accelerator.synchronize(None)


def test_which_backend_torch_is() -> None:
    accelerated = bool(accelerator_kind())
    assert TorchBackend is (AcceleratorTorchBackend if accelerated else HostTorchBackend)
    assert AcceleratorTorchBackend.probe()[0] == accelerated
    assert AcceleratorTorchBackend(kind="cpu").devices()[0].kind == "cpu"


def test_a_remote_device_is_no_accelerator_of_a_server() -> None:
    """Else a server could end up asking itself."""
    program = (
        "import gpuremote.torch, torch; assert torch.accelerator.is_available();"
        "from gpuremote.backend.torch_accelerator import accelerator; print(repr(accelerator()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.strip() != "'remote'"
