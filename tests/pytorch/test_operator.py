"""What the operator of a server allows: files of weights, ops of other namespaces; and what a
program finds out about its waits."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpuremote.torch
from gpuremote.errors import ConfigError, InvalidBuffer, UnsupportedOp
from gpuremote.server.options import ServerOptions
from gpuremote.testing.servers import device_server
from gpuremote.torch import _homes
from tests.pytorch.custom_ops import twice_and

REMOTE: Any = torch.get_device_module("remote")
ROOT = Path(__file__).parent.parent.parent
same = torch.testing.assert_close
WEIGHTS = {
    "0.weight": torch.randn(8, 4),
    "0.bias": torch.randn(8).to(torch.bfloat16),
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 3),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As the library safetensors writes them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    data = b""
    for name, tensor in tensors.items():
        part = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("offered")
    write(found / "model.safetensors", WEIGHTS)
    (found / "notes.txt").write_text("no weights")
    (found / "broken.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    (found.parent / "secret.safetensors").write_bytes((found / "model.safetensors").read_bytes())
    (found / "way-out.safetensors").symlink_to(found.parent / "secret.safetensors")
    return found


@pytest.fixture(scope="module", autouse=True)
def server(folder: Path) -> Iterator[None]:
    options = ["--backend", "torch", "--weights", str(folder)]
    options += ["--allow-ops", "gpuremote_custom=tests.pytorch.custom_ops"]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        with device_server(*options) as running:
            gpuremote.torch.connect(running.url)
            try:
                _homes.home(0)
                yield
            finally:
                gpuremote.torch.close()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_server", [True, False])
def test_weights(folder: Path, on_server: bool) -> None:
    name = "model.safetensors" if on_server else folder / "model.safetensors"
    session = _homes.home(0).session
    session.flush()
    before = session.stats()
    found = gpuremote.torch.load_file(name, on_server=on_server, progress=True)
    session.flush()
    sent = session.stats().bytes_sent - before.bytes_sent
    assert found.keys() == WEIGHTS.keys()
    for key, tensor in found.items():
        assert (tensor.device.type, tensor.dtype) == ("remote", WEIGHTS[key].dtype)
        same(tensor.cpu(), WEIGHTS[key])
    if on_server:
        assert sent < 4000
        again = session.stats().payload_sent
        assert again == before.payload_sent


def test_weights_of_a_model_that_never_was_here() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8))
    found = gpuremote.torch.load_file("model.safetensors", on_server=True)
    state = {key: found[key].float() for key in ("0.weight", "0.bias")}
    model.load_state_dict(state, assign=True)
    x = torch.randn(3, 4)
    expected = nn.functional.linear(x, WEIGHTS["0.weight"], WEIGHTS["0.bias"].float())
    same(model(x.to("remote")).detach().cpu(), expected)


@pytest.mark.parametrize(
    "name",
    [
        "missing.safetensors",
        "notes.txt",
        "broken.safetensors",
        "../secret.safetensors",
        "way-out.safetensors",
        "/etc/passwd",
        "",
    ],
)
def test_other_files_are_not_offered(name: str) -> None:
    with pytest.raises(UnsupportedOp, match="weights"):
        gpuremote.torch.load_file(name, on_server=True)


def test_files_of_this_host_that_are_none(folder: Path) -> None:
    with pytest.raises(InvalidBuffer, match="no safetensors file"):
        gpuremote.torch.load_file(folder / "notes.txt")
    with pytest.raises(InvalidBuffer, match="no safetensors file"):
        gpuremote.torch.load_file(folder / "broken.safetensors")
    with pytest.raises(FileNotFoundError):
        gpuremote.torch.load_file(folder / "missing.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [100, 104]}}',
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InvalidBuffer):
        gpuremote.torch.load_file(path)


# -- ops of other namespaces ---------------------------------------------------------------------


def test_custom_ops() -> None:
    gpuremote.torch.allow_ops("gpuremote_custom")
    gpuremote.torch.allow_ops("gpuremote_custom")  # once more is nothing
    x, y = torch.randn(3), torch.randn(3)
    made = twice_and(x.to("remote"), y.to("remote"), 0.5)
    assert made.device.type == "remote"
    same(made.cpu(), twice_and(x, y, 0.5))
    with pytest.raises(ValueError, match="no ops of the namespace"):
        gpuremote.torch.allow_ops("gpuremote_unknown")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        ServerOptions(weights=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="neither NAME"):
        ServerOptions(allow_ops=("a b",))


# -- waits ---------------------------------------------------------------------------------------


def test_profile_names_the_lines_that_wait() -> None:
    x = torch.ones(100, device="remote")
    with gpuremote.torch.profile() as found:
        for _ in range(3):
            (x * 2).sum().item()  # this line
        REMOTE.synchronize()
    first = found.waits if found.waits[0].count == 3 else found.waits[::-1]
    assert [wait.count for wait in first] == [3, 1]
    assert all(wait.place.startswith(f"{__file__}:") for wait in first)
    assert found.ops == 6
    assert found.seconds >= sum(wait.seconds for wait in found.waits) > 0
    assert found.bytes_sent > 0
    assert "waited 4 times" in str(found)
    slower = found.predict(1.0)
    assert found.seconds + 4 * (1 - found.round_trip) == pytest.approx(slower)
    assert found.predict(0.0) == found.seconds
    assert found.predict(0.0, bandwidth=found.bytes_received / 50) >= 50


def test_profile_of_what_does_not_wait() -> None:
    x = torch.ones(100, device="remote")
    with gpuremote.torch.profile() as found:
        x + 1
    assert (found.waits, found.ops) == ([], 1)
    assert found.predict(1.0) == found.seconds
