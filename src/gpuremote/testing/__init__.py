"""For tests of gpuremote, of what extends it, and of programs that use it. Nothing here is imported
by the library itself.

=====================  ==============================================================
``device_server``      a real device server as a child process
``CuttingProxy``       a network that breaks on purpose, between real processes
``EmulatedConnection``  delay, bandwidth and a loss at byte n, around any connection
``conformance``        the suite that every transport has to pass (needs pytest)
``fixtures``           fixtures for pytest
=====================  ==============================================================
"""

from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.transport.emulated import EmulatedConnection

__all__ = ["CuttingProxy", "EmulatedConnection", "RunningServer", "device_server"]
