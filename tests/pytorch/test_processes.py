"""Processes that end, and what a process finds that has just begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

import gpuremote.torch
from gpuremote.errors import GpuRemoteError, SessionLost
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._tier import native
from tests.pytorch.device import remote_device

ONCE = pytest.mark.skipif(native is None, reason="the same for both parts, and slow")


@ONCE
def test_a_killed_worker_is_an_error(torch_server: RunningServer) -> None:
    with remote_device(f"{torch_server.url}?memory=256MiB") as device:
        _lose(device)


def _lose(device: torch.device) -> None:
    x = torch.ones(3).to(device)
    os.kill(_homes.home().session.worker_pid, signal.SIGKILL)
    with pytest.raises(SessionLost):
        (x + 1).sum().item()
    with pytest.raises(GpuRemoteError):
        (x + 1).sum().item()
    gpuremote.torch.close()
    assert (torch.ones(3).to(device) + 1).sum().item() == 6


@ONCE
@pytest.mark.parametrize("url", ["", "local://?backend=torch"])
def test_torch_finds_the_device_by_itself_where_it_is_told(url: str) -> None:
    program = "import sys, torch; print('gpuremote' in sys.modules, hasattr(torch, 'remote'))"
    environment = {k: v for k, v in os.environ.items() if k != "GPUREMOTE_URL"}
    if url:
        environment["GPUREMOTE_URL"] = url
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert done.stdout.split() == ["True" if url else "False"] * 2


@ONCE
def test_compiling_right_after_connecting(torch_server: RunningServer) -> None:
    """Both load torch's compiler, in a thread each; its modules import each other in a circle."""
    program = f"""
import torch, gpuremote.torch
gpuremote.torch.connect({torch_server.url!r})
x = torch.ones(3).to("remote")
print(torch.compile(lambda x: x + 1, backend="gpuremote")(x).tolist())
gpuremote.torch.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout.strip() == "[2.0, 2.0, 2.0]", done.stderr


def test_a_backward_of_the_host_opens_nothing() -> None:
    """torch's engine asks for devices when it starts; no session opens for that."""
    program = """
import torch, gpuremote.torch
from gpuremote.torch import _homes
torch.ones((), requires_grad=True).backward()
assert not _homes.opened()
x = torch.ones(3, device="remote", requires_grad=True)
(x * 2).sum().backward()
assert x.grad.sum().item() == 6
gpuremote.torch.close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=50)


def test_a_backward_before_the_import() -> None:
    """torch has started its threads then, without one for a remote device."""
    program = """
import torch, warnings
torch.ones((), requires_grad=True).backward()
import gpuremote.torch
from gpuremote.torch._tier import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.ones(3, device="remote", requires_grad=True)
    y = x * 2
told = [str(one.message) for one in caught]
if native is None:
    assert "import gpuremote.torch first" in told[0], told
else:
    assert not told
y.sum().backward()
assert x.grad.sum().item() == 6
gpuremote.torch.close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=50)


@ONCE
def test_a_server_without_torch_says_so() -> None:
    gpuremote.torch.close()
    gpuremote.torch.connect("local://?backend=numpy")
    try:
        with pytest.raises(GpuRemoteError, match="--backend torch"):
            torch.ones(2).to("remote")
    finally:
        gpuremote.torch.connect()
