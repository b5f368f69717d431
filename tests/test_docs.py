"""The pages say what the code does."""

from __future__ import annotations

import argparse
import configparser
import dataclasses
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from gpuremote import errors
from gpuremote.cli import main as cli
from gpuremote.cli import serve
from gpuremote.client import core, issuing, known, link, uploading
from gpuremote.config import DEFAULT_PORT, Settings, Target, parse_url
from gpuremote.errors import GpuRemoteError, InvalidURL
from gpuremote.memory import shared, staging
from gpuremote.ops.meta import DTYPES
from gpuremote.ops.operands import WEAK
from gpuremote.ops.plan import PlanCaps
from gpuremote.server import daemon, options, reception, stock, worker
from gpuremote.transport import (
    _framing,
    _looking,
    _outgoing,
    _pieces,
    _sending,
    _sockets,
    base,
    congestion,
    shm,
    shm_setup,
    tcp,
    tls,
)
from gpuremote.transport.lanes import compression, rule, striping
from gpuremote.transport.lanes import connection as lanes
from gpuremote.transport.lanes import frames as lane_frames
from gpuremote.transport.lanes import setup as lanes_setup
from gpuremote.transport.rdma import control as rdma_control
from gpuremote.transport.rdma import inbound as rdma_inbound
from gpuremote.transport.rdma import memory as rdma_memory
from gpuremote.transport.rdma import payload as rdma_payload
from gpuremote.transport.rdma import setup as rdma_setup
from gpuremote.transport.verbs import pyverbs_provider
from gpuremote.wire import caps, digests
from gpuremote.wire.batch import FIRST_PLAN, Op
from gpuremote.wire.frames import CANCELLED, CONTINUED, IGNORABLE, Kind
from gpuremote.wire.hello import (
    MAX_VERSION,
    Attach,
    Challenge,
    Hello,
    Opened,
    Proof,
    Refusal,
    Route,
    Welcome,
)
from gpuremote.wire.state import diagram

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]

# A fence of ``python`` on these pages is a whole program; a fragment is fenced as ``py``.
RUNNABLE = [
    pytest.param(block, output, id=f"{page.stem}-{number}")
    for page in (README, DOCS / "quickstart.md")
    for number, (block, output) in enumerate(
        re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.DOTALL)
    )
]


def text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def row(page: str, first: str) -> list[str]:
    """The cells of the table row whose first cell begins with ``first``."""
    rows = re.findall(rf"^\| ({re.escape(first)}[^|]*(?:\|[^|\n]*)+)\|$", page, re.MULTILINE)
    assert len(rows) == 1, f"{len(rows)} rows for {first}"
    return [cell.strip() for cell in rows[0].split("|")]


# -- the pages themselves ------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What can be linked to on a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_local_is_named(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(root|home|work|tmp)/", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_tables(page: Path) -> None:
    """Each row has as many cells as the head of its table."""
    expected = 0
    for line in page.read_text().splitlines():
        cells = line.count("|") if line.startswith("|") and line.endswith("|") else 0
        if cells and expected:
            assert cells == expected, line
        expected = cells


def test_the_readme_leads_to_every_page() -> None:
    readme = README.read_text()
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in readme


# -- what they show ------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GPUREMOTE_")}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *arguments],
        capture_output=True,
        text=True,
        timeout=55,
        env=inherited | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize(("block", "output"), RUNNABLE)
def test_code_runs_and_prints_what_is_shown(block: str, output: str) -> None:
    done = run("-c", block)
    assert done.returncode == 0, done.stderr
    assert not output or done.stdout == output


def test_the_readme_shows_programs_with_their_output() -> None:
    shown = [p.id for p in RUNNABLE if p.values[1]]
    assert shown == ["README-0", "README-1"]


def test_the_readme_shows_what_the_demo_prints(tmp_path: Path) -> None:
    readme = README.read_text()
    (shown,) = re.findall(r"```text\n(Handwritten digits.*?)```", readme, re.DOTALL)
    done = run("examples/digits.py", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stderr
    printed = {varying(line) for line in done.stdout.splitlines()}
    for line in shown.splitlines():
        assert line.strip() == "..." or varying(line) in printed, line


def varying(line: str) -> str:
    """A line of the demo's output without what differs from run to run."""
    if line.startswith(("  bytes ", "  messages ", "  ops ", "  time ", "  device ")):
        line = re.sub(r"\d[\d.,]*", "#", line)
    return re.sub(r"^(  picture +).*", r"\1#", line)


def test_the_readme_shows_the_headings_of_make_test() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = re.findall(r"^== .*$", README.read_text(), re.MULTILINE)
    assert len(shown) == 5
    for line in shown:
        assert f'"{line}"' in makefile, line


def test_the_tests_that_transports_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", text("transports")))
    places = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "src/gpuremote/testing").glob("*.py")]
    there = {name for p in places for name in re.findall(r"def (test_\w+)", p.read_text())}
    assert len(named) > 40
    assert not named - there


# -- operations ----------------------------------------------------------------------------------


def tree(cls: type[GpuRemoteError]) -> list[type[GpuRemoteError]]:
    return [cls, *(c for child in cls.__subclasses__() for c in tree(child))]


@pytest.mark.parametrize("cls", tree(errors.GpuRemoteError), ids=lambda cls: cls.__name__)
def test_every_error_is_explained(cls: type[GpuRemoteError]) -> None:
    again = "yes" if cls.retryable else "no"
    _, code, retry, advice = row(text("operations"), f"`{cls.__name__}`")
    assert (code, retry) == (str(cls.code), again)
    assert len(advice) > 20


def serve_parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser().add_subparsers()
    serve.add_parser(commands)
    found: argparse.ArgumentParser = commands.choices["serve"]
    return found


def test_every_option_of_serve_is_explained() -> None:
    parser = serve_parser()
    shown = set(re.findall(r"--[a-z-]+", parser.format_help())) - {"--help"}
    assert len(shown) >= 12
    for action in parser._actions:
        option = action.option_strings[-1]
        if option not in shown:
            continue
        usage = option if action.nargs == 0 else f"{option} {action.metavar or 'BACKEND'}"
        cells = row(text("operations"), f"`{usage}`")
        if action.nargs == 0:
            assert cells[-1] == "off"
        elif action.default not in ("", None):
            assert cells[-1] == f"`{action.default}`"
        shown.discard(option)
    assert shown == set(), "explained nowhere"


@pytest.mark.parametrize("code", [0, cli.FAILED, cli.USAGE, cli.UNREACHABLE, cli.INTERRUPTED])
def test_every_exit_code_is_explained(code: int) -> None:
    assert row(text("operations"), f"{code} ")


# -- quickstart ----------------------------------------------------------------------------------


def test_every_option_of_a_url_is_explained() -> None:
    known: set[str] = set()
    for url in ("local://?zz=1", "gpu://host?zz=1"):
        with pytest.raises(InvalidURL) as caught:
            parse_url(url)
        known.update(caught.value.message.partition("known: ")[2].split(", "))
    assert {"transport", "backend", "cafile"} <= known
    target = Target("gpu")
    for name in known:
        default = row(text("quickstart"), f"`{name}`")[-1]
        if name in ("connect_timeout", "grace"):
            assert float(default) == getattr(target, name)


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_variable_is_explained(field: dataclasses.Field[object]) -> None:
    default = row(text("quickstart"), f"`GPUREMOTE_{field.name.upper()}`")[-1]
    assert default == (f"`{field.default}`" if field.default not in ("", b"") else "")


# -- architecture --------------------------------------------------------------------------------


def test_the_layers_are_those_that_are_checked() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    layers = setup["importlinter:contract:layers"]["layers"].strip().splitlines()
    built = [{n for n in re.split(r"[ |]+", layer) if not n.startswith("(")} for layer in layers]
    rows = re.findall(r"^\| \d \| ([^|]*) \|", text("architecture"), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", cell)) for cell in rows] == [
        layer for layer in built if layer
    ]


# -- protocol ------------------------------------------------------------------------------------


def test_the_diagram_is_the_table_of_states() -> None:
    assert f"```mermaid\n{diagram()}\n```" in text("protocol")


@pytest.mark.parametrize("name", [name for name in dir(caps) if name.isupper()])
def test_every_cap_is_listed_with_its_value(name: str) -> None:
    assert row(text("protocol"), f"`{name}`")[1] == f"{getattr(caps, name):,}"


def test_no_cap_is_listed_that_is_gone() -> None:
    listed = re.findall(r"^\| `([A-Z_]+)` \|", text("protocol"), re.MULTILINE)
    assert set(listed) == {name for name in dir(caps) if name.isupper()}


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_every_record_is_listed(op: Op) -> None:
    assert f"| {op.value} | {op.name} |" in text("protocol")


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_every_kind_of_message_is_listed(kind: Kind) -> None:
    assert f"| {kind.value} | {kind.name} |" in text("protocol")


@pytest.mark.parametrize(
    "message",
    [Hello, Welcome, Refusal, Challenge, Proof, Opened, Route, Attach],
    ids=lambda cls: cls.__name__,
)
def test_every_key_of_the_handshake_is_listed(message: type) -> None:
    assert dataclasses.is_dataclass(message)
    names = {field.name for field in dataclasses.fields(message)} - {"versions"}
    listed = row(text("protocol"), message.__name__.upper())[1]
    assert set(re.findall(r"`(\w+)`", listed)) == names


def test_flags_dtypes_and_scalars_are_listed() -> None:
    page = text("protocol")
    for flag, name in (CONTINUED, "CONTINUED"), (CANCELLED, "CANCELLED"), (IGNORABLE, "IGNORABLE"):
        assert f"| {flag} | {name} |" in page
    (sentence,) = re.findall(r"The dtypes that may travel are ([^.]*)\.", " ".join(page.split()))
    assert set(re.findall(r"`(\w+)`", sentence)) == set(DTYPES)
    for code in WEAK:
        assert row(page, f"`{code}` Python")


# -- numbers in sentences ------------------------------------------------------------------------

KIB, MIB = 1 << 10, 1 << 20
LEAST = caps.SHARED_LEAST // MIB
LIMITS = PlanCaps()
SENTENCES = [
    ("architecture", f"issued {issuing.FLUSH_NS // 1000} µs or more after the last batch"),
    ("architecture", f"up to {issuing.FLUSH_NS_MAX / 1e6:.1f} ms"),
    ("architecture", f"large ({issuing.FLUSH_BYTES // KIB} KiB)"),
    ("architecture", f"kept ({core.MAX_FAILURES} of them)"),
    ("architecture", f"Up to {caps.INLINE_PAYLOAD // KIB} KiB go into the batch"),
    ("architecture", f"So do up to {caps.MAX_INLINE // KIB} KiB"),
    ("architecture", f"below {_sockets.NEAR * 1000:.0f} ms)"),
    ("architecture", f"sends up to {uploading.GROUP} arrays"),
    ("architecture", f"looks for the answer for up to {1e6 * _looking.WITHIN:.0f} µs"),
    ("architecture", f"looks for the next one for up to {1e6 * _looking.WITHIN:.0f} µs"),
    ("architecture", f"longer than {1000 * _looking.REST:.0f} ms"),
    ("architecture", f"(of at most {core.LATE >> 20} MiB)"),
    ("architecture", f"more than {worker.BUSY_AFTER * 1000:.0f} ms"),
    ("architecture", f"{link.MAX_PAUSE:.0f} s at most"),
    ("architecture", f"URL's `grace` ({Target('gpu').grace:.0f} s)"),
    ("architecture", f"server's `--grace` ({serve_parser().get_default('grace'):.0f} s)"),
    ("architecture", f"{caps.WINDOW_BYTES // MIB} MiB may be on its way"),
    ("operations", f"replaced after {stock.RESTOCK_AFTER} s"),
    (
        "operations",
        f"shorter of the server's `--grace` and the client's `grace=` "
        f"({Target('gpu').grace:.0f} s by default)",
    ),
    ("protocol", f"Version {MAX_VERSION}."),
    ("protocol", f"Below {FIRST_PLAN} it is one of these kinds"),
    ("protocol", f"{_framing.MAX_HEADER // MIB} MiB per header, {_framing.MAX_REGIONS:,} regions"),
    (
        "protocol",
        f"{_framing.MAX_CHUNK // MIB} MiB per DATA frame (a sender makes "
        f"{_outgoing.CHUNK // MIB} MiB)",
    ),
    (
        "protocol",
        f"may have {LIMITS.operands} operands, {LIMITS.params} values in its parameters, "
        f"{LIMITS.depth} levels of lists, and strings of {LIMITS.text} characters",
    ),
    ("quickstart", f"port {DEFAULT_PORT} if none is given"),
    ("quickstart", f"{caps.WINDOW_BYTES // MIB} MiB of messages ahead"),
    (
        "security",
        f"at most {caps.MAX_HELLO // KIB} KiB and {daemon.HANDSHAKE_TIMEOUT:.0f} s. "
        f"With {daemon.MAX_HANDSHAKES} of them",
    ),
    ("security", f"silent for {daemon.PATIENCE:.0f} s"),
    (
        "security",
        f"{reception.MAX_HANDSHAKES} TLS handshakes at a time, "
        f"{reception.HANDSHAKE_TIMEOUT:.0f} s each",
    ),
    ("security", f"after {tls.KEY_BYTES >> 30} GiB that one end has sent"),
    ("protocol", f"nobody comes for is ended after {daemon.UNCLAIMED:.0f} s"),
    ("transports", f"At most {tls.AHEAD // KIB} KiB are encrypted before"),
    ("transports", f"that nobody has used for {shared.KEPT:.0f} s"),
    ("transports", f"eight arrays or {uploading.STAGED_BYTES // MIB} MiB"),
    ("transports", f"A result of {shm.LEAST_LED // KIB} KiB or more (up to"),
    ("transports", f"After {shm.PATIENCE // 1000} µs without news"),
    ("transports", f"say how much is there, every {shm.CHUNK // MIB} MiB"),
    (
        "transports",
        f"goes through {_pieces.BLOCKS} blocks of {_pieces.PIECE // MIB} MiB instead",
    ),
    ("transports", f"buffer is asked to hold {shm_setup.BUFFER // MIB} MiB"),
    ("transports", f"{shm.MAX_STAGED // MIB} MiB that would have to be copied there first"),
    ("transports", f"for up to {base.LONG_BURST // MIB} MiB, if the kernel takes them at once"),
    ("transports", f"in an event loop {_sending.BURST // MIB}"),
    ("transports", f"chunks of {_outgoing.CHUNK // MIB} MiB"),
    ("transports", f"up to {tcp.IDLE // KIB} KiB"),
    ("transports", f"same slot of {rdma_control.SLOT // KIB} KiB"),
    ("transports", f"A ring has {rdma_control.RECEIVES} slots"),
    ("transports", f"pieces of {staging.SLAB // MIB} MiB pass through two slabs"),
    (
        "transports",
        f"no more than {rdma_payload.EAGER // KIB} KiB on average "
        f"({rdma_payload.EAGER_MANY // MIB} MiB in all)",
    ),
    ("transports", f"pieces of {rdma_setup.PIECE // MIB} MiB"),
    ("transports", f"payload of {rdma_inbound.STRIPED // MIB} MiB or more is cut"),
    ("transports", f"until {rdma_memory.CACHED_BYTES >> 30} GiB are kept"),
    (
        "transports",
        f"Timeout {pyverbs_provider.TIMEOUT} (67 ms), {pyverbs_provider.RETRIES} retries",
    ),
    ("transports", f"round trip below {congestion.SHORT_WAY * 1000:.0f} ms"),
    ("transports", f"Below {rule.LONG_WAY * 1000:.0f} ms nothing else is done"),
    ("transports", f"ceil({rule.SLACK:.0f} * bandwidth * delay / window)"),
    ("transports", f"from 1 to {rule.MAX_LANES}"),
    ("transports", f"tells nothing, {rule.ASSUMED_BANDWIDTH / 1e6:.0f} MB/s are assumed"),
    ("transports", f"a burst of at most {lanes_setup.BURST // MIB} MiB comes in"),
    ("transports", f"A burst ends after {lanes_setup.BURST_TIME} s"),
    ("transports", f"payloads below {lanes.LARGE // KIB} KiB, stay on"),
    (
        "transports",
        f"pieces of {striping.LARGEST // MIB} MiB, towards its end down to "
        f"{striping.SMALLEST // KIB} KiB",
    ),
    ("transports", f"no more than {lanes.UNSENT // KIB} KiB unsent"),
    ("transports", f"waited for, {lanes.LINGER:.0f} s at most"),
    ("transports", f"compressed < {compression.Rule.MARGIN} * raw"),
    ("transports", f"keep uploads](operations.md#uploads-that-are-kept) of {LEAST} MiB or more"),
    ("transports", f"look for it at the server while {known.DIGESTS} * digest <= raw"),
    ("transports", f"after {known.ENOUGH // MIB} MiB of them"),
    ("transports", f"what is there ({caps.SKETCH} bytes each)"),
    ("transports", f"again after {known.REFRESH:.0f} s or more"),
    ("transports", f"looks at {digests.SAMPLES * digests.SAMPLE // KIB} KiB of an upload"),
    ("protocol", f"of {digests.SAMPLES} pieces of {digests.SAMPLE} bytes, piece k"),
    ("operations", f"keeps uploads of {LEAST} MiB or more"),
    ("operations", f"at most {caps.SHARED_MOST:,} uploads"),
    ("operations", f"`{options.CONTENT_CACHE >> 30}GiB` or a sixteenth of the memory with a token"),
    (
        "transports",
        f"one piece in {compression.Rule.SAMPLE} is a sample, and fewer, down to one in "
        f"{8 * compression.Rule.SAMPLE}",
    ),
    ("protocol", f"| {lane_frames.SPREAD} | SPREAD |"),
    ("protocol", f"payload of {lanes.LARGE // KIB} KiB or more"),
    ("protocol", f"A piece has at most {lane_frames.MAX_PIECE // MIB} MiB"),
    ("protocol", f"at most {lane_frames.MAX_AHEAD:,} payloads ahead"),
    ("protocol", f"{lanes_setup.PART // KIB} KiB each, {lanes_setup.BURST // MIB} MiB at most"),
    ("protocol", f"at most {lanes_setup.PINGS} times, each answered"),
    (
        "protocol",
        f"({compression.NUMBERS['zstd']} zstd, {compression.NUMBERS['lz4']} lz4) to fewer",
    ),
]


@pytest.mark.parametrize(("page", "sentence"), SENTENCES)
def test_numbers_are_those_of_the_code(page: str, sentence: str) -> None:
    assert sentence in " ".join(text(page).split())


def test_pages_are_plain_text() -> None:
    """No characters that look like others or can't be seen."""
    for page in PAGES:
        odd = {c for c in page.read_text() if unicodedata.category(c) in ("Cf", "Co", "Zs")} - {" "}
        assert odd == set(), page
