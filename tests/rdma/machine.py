#!/usr/bin/env python3
"""Runs a command on a kernel that has RDMA, on a machine that has none.

::

    python3 tests/rdma/machine.py [--limit SECONDS] [--memory MIB] -- COMMAND [ARGUMENT...]

QEMU boots Debian's stock kernel in software (no /dev/kvm is needed). The guest sees this machine's
files, with a layer of memory above them that takes what is written and is gone at the end, and runs
the command there, as root, in the current folder. It has software RoCE v2: the devices ``rxe0`` on
the interface ``ve0`` (10.77.0.1 and 10.77.0.2) and ``rxe1`` on ``ve1`` (10.78.0.1).

The exit status is the command's; 124 if the limit passed, 125 if the machine did not get that far.
Python runs 10 to 20 times slower in it: it is there for correctness.

Only the standard library is used, so any Python 3.11 will do.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    "qemu-system-x86": "qemu-system-x86_64",
    "linux-image-amd64": None,
    "busybox-static": "busybox",
    "kmod": "modprobe",
    "iproute2": "rdma",
    "rdma-core": None,
    "python3-pyverbs": None,
}
"""Debian's packages, and a command by which one is recognised where dpkg does not know it."""
BOOT = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
GUEST = ("rdma_rxe", "ib_uverbs", "veth", "sch_netem")
EXPIRED, FAILED = 124, 125

INIT = """\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /order); do insmod /modules/$module; done
share() { mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,$3 $1 $2; }
share files /below ro,cache=loose || poweroff -f
mount -t tmpfs -o size=75% above /above
mkdir /above/new /above/work
mount -t overlay -o lowerdir=/below,upperdir=/above/new,workdir=/above/work root /root
mount -t tmpfs run /root/run
cp /command /root/run/command
for place in proc sys dev; do mount --move /$place /root/$place; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
exec switch_root /root /bin/bash /run/command
"""

COMMAND = """\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
finish() {{ sync; echo "$1" > /dev/ttyS1; /bin/busybox poweroff -f; }}
echo /sbin/modprobe > /proc/sys/kernel/modprobe
ulimit -l unlimited
hostname machine
ip link set lo up
for module in {modules}; do modprobe $module || finish {failed}; done
ip link add ve0 type veth peer name ve1
ip addr add 10.77.0.1/24 dev ve0
ip addr add 10.77.0.2/24 dev ve0
ip addr add 10.78.0.1/24 dev ve1
ip link set ve0 mtu 4200 up
ip link set ve1 mtu 4200 up
rdma link add rxe0 type rxe netdev ve0 || finish {failed}
rdma link add rxe1 type rxe netdev ve1 || finish {failed}
{environment}
export GPUREMOTE_RDMA_MACHINE=1
cd {folder}
echo "== machine: up after $(cut -d' ' -f1 /proc/uptime) s, Linux $(uname -r)"
rdma link
{command}
finish $?
"""


def say(text: str) -> None:
    print(f"== machine: {text}", flush=True)


def install() -> None:
    """Install what is missing, if this is Debian (or one of its children)."""
    missing = [name for name, command in PACKAGES.items() if not present(name, command)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        sys.exit(f"machine: install what Debian calls {' '.join(missing)}, and try again")
    say(f"installing {' '.join(missing)}")
    root = [] if os.geteuid() == 0 else ["sudo", "-E"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    asked = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
    try:
        subprocess.run([*root, "apt-get", "update", "-qq"], check=True, env=quiet)
        subprocess.run([*root, *asked], check=True, env=quiet, stdout=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        sys.exit(f"machine: {' '.join(missing)} can't be installed, so nothing is tested: {error}")


def present(name: str, command: str | None) -> bool:
    try:
        asked = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
        done = subprocess.run(asked, capture_output=True, text=True)
    except FileNotFoundError:
        return command is not None and shutil.which(command) is not None
    return done.stdout == "installed"


def newest_kernel() -> tuple[Path, str]:
    """The newest kernel whose modules are there too, and its version."""
    found = []
    for image in Path("/boot").glob("vmlinuz-*"):
        version = image.name.removeprefix("vmlinuz-")
        if (Path("/lib/modules") / version / "modules.dep").exists():
            found.append(([int(n) for n in re.findall(r"\d+", version)], image, version))
    if not found:
        sys.exit("machine: no kernel in /boot that has its modules in /lib/modules")
    _, image, version = max(found)
    return image, version


def modules(version: str) -> Iterator[tuple[str, bytes]]:
    """What the guest needs to reach this machine's files, in the order of loading."""
    seen = set()
    for name in BOOT:
        asked = ["/sbin/modprobe", "-S", version, "--show-depends", name]
        done = subprocess.run(asked, check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            words = line.split()
            if words[0] != "insmod" or words[1] in seen:
                continue
            seen.add(words[1])
            path = Path(words[1])
            data = path.read_bytes()
            yield (
                path.name.removesuffix(".xz"),
                lzma.decompress(data) if path.suffix == ".xz" else data,
            )


class Archive:
    """A cpio archive ("newc"), as a kernel unpacks it into its first file system."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._number = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._number += 1
        text = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + text
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def folder(self, name: str) -> None:
        self.add(name, 0o040755)

    def file(self, name: str, data: bytes) -> None:
        self.add(name, 0o100755, data)

    def packed(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return gzip.compress(b"".join(self._parts), compresslevel=1)


def first_files(version: str, command: str) -> bytes:
    archive = Archive()
    for folder in ("bin", "proc", "sys", "dev", "modules", "below", "above", "root"):
        archive.folder(folder)
    busybox = shutil.which("busybox") or "/bin/busybox"
    archive.file("bin/busybox", Path(busybox).read_bytes())
    order = []
    for name, data in modules(version):
        archive.file(f"modules/{name}", data)
        order.append(name)
    archive.file("order", "\n".join(order).encode())
    archive.file("command", command.encode())
    archive.file("init", INIT.encode())
    return archive.packed()


def guest_command(command: list[str]) -> str:
    # The guest's shell has no terminal, and this process's descriptors mean nothing there.
    left_out = {"PWD", "OLDPWD", "SHLVL", "TERM", "_"}
    environment = "\n".join(
        f"export {name}={shlex.quote(value)}"
        for name, value in os.environ.items()
        if name.isidentifier() and name not in left_out
    )
    return COMMAND.format(
        modules=" ".join(GUEST),
        failed=FAILED,
        environment=environment,
        folder=shlex.quote(os.getcwd()),
        command=shlex.join(command),
    )


def run(command: list[str], *, memory: int, processors: int, limit: float) -> int:
    kernel, version = newest_kernel()
    with tempfile.TemporaryDirectory(prefix="machine-") as folder:
        initrd, status = Path(folder) / "initrd", Path(folder) / "status"
        initrd.write_bytes(first_files(version, guest_command(command)))
        files = "local,path=/,mount_tag=files,security_model=none,readonly=on,multidevs=remap"
        arguments = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-m", str(memory), "-smp", str(processors)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-net", "none"),
            *("-serial", "stdio", "-serial", f"file:{status}"),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", "console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off"),
            *("-virtfs", files),
        ]
        say(f"booting Linux {version} with software RoCE; at most {limit:.0f} s")
        began = time.monotonic()
        machine = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        killed = show(machine, began + limit)
        if killed:
            say(f"stopped after {limit:.0f} s, the limit")
            return EXPIRED
        said = status.read_text().strip() if status.exists() else ""
        say(f"off after {time.monotonic() - began:.0f} s")
        return int(said) if said.isdigit() else FAILED


def show(machine: subprocess.Popen[bytes], deadline: float) -> bool:
    """Pass on what the guest prints; whether it had to be killed at the deadline."""
    assert machine.stdout is not None
    os.set_blocking(machine.stdout.fileno(), False)
    try:
        while time.monotonic() < deadline:
            data = machine.stdout.read()
            if data:
                sys.stdout.write(data.replace(b"\r", b"").decode(errors="replace"))
                sys.stdout.flush()
            elif machine.poll() is not None:
                return False
            else:
                time.sleep(0.05)
        return True
    finally:
        machine.kill()
        machine.wait()
        machine.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=float, default=360.0, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB")
    parser.add_argument("--processors", type=int, default=2, metavar="COUNT")
    parser.add_argument("command", nargs="+")
    wanted = parser.parse_args()
    install()
    return run(
        wanted.command, memory=wanted.memory, processors=wanted.processors, limit=wanted.limit
    )


if __name__ == "__main__":
    sys.exit(main())
