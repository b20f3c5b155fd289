"""Two hosts on one machine: network namespaces joined by a link of limited rate. Needs root, ip and tc (iproute2).

    with TwoHosts(rate_mbit=1000) as hosts:
        result = hosts.run([python, "train.py"], [python, "train.py"], seconds=60)

The processes share processors, memory and file system, so this measures what a slow network costs. It cannot show
whether ranks notice that they are on different hosts: shared memory works between the two.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACES = ("link0", "link1")
PORT = 29500  # every namespace has all its ports free
TOOL_SECONDS, TAIL = 20, 2000
# Bytes that may pass at once. tbf needs at least one of the 64 kB packets that TCP hands to a link like this, and what
# comes between two turns of its clock.
BURST_SECONDS, LEAST_BURST = 1e-3, 128 * 1024

_count = itertools.count()


@dataclass
class Result:
    """What became of the commands of the two hosts."""

    codes: list[int]  # exit codes; negative: the signal
    outputs: list[str]  # standard output and error together
    sent: list[int]  # bytes that each host put on the link, headers included
    seconds: float

    def check(self) -> Result:
        """Itself, or RuntimeError if a command failed."""
        if any(self.codes):
            ends = "; ".join(f"host {i}: exit code {c}: {self.outputs[i][-TAIL:]}" for i, c in enumerate(self.codes))
            raise RuntimeError(f"two hosts: a command failed; {ends}")
        return self


class TwoHosts:
    """A context manager of two hosts. It removes what it made and ends the processes it started, and no others.

    Args:
        rate_mbit: of the link, in each direction, Mbit/s with headers.
        delay_ms: how long a packet may wait for its turn before it is dropped.

    Raises:
        RuntimeError: on entering, if this machine or user cannot make them; says why.
    """

    def __init__(self, rate_mbit: float = 1000.0, delay_ms: float = 50.0):
        if not rate_mbit > 0:
            raise ValueError(f"two hosts: a rate of {rate_mbit} Mbit/s; expected more than 0")
        number = next(_count)
        self.names = tuple(f"pyshard-{os.getpid()}-{number}-{host}" for host in (0, 1))
        self.rate_mbit, self._delay_ms = rate_mbit, delay_ms
        self._made: list[str] = []
        self._children: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> TwoHosts:
        burst = max(LEAST_BURST, int(self.rate_mbit * 1e6 / 8 * BURST_SECONDS))
        try:
            for name in self.names:
                _tool("ip", "netns", "add", name)
                self._made.append(name)
            first, second = self.names
            ends = ["ip", "link", "add", INTERFACES[0], "netns", first, "type", "veth"]
            _tool(*ends, "peer", "name", INTERFACES[1], "netns", second)
            for name, link, address in zip(self.names, INTERFACES, ADDRESSES, strict=True):
                _tool("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
                _tool("ip", "-n", name, "link", "set", link, "up")
                _tool("ip", "-n", name, "link", "set", "lo", "up")
                rate = [f"{self.rate_mbit:g}mbit", "burst", str(burst), "latency", f"{self._delay_ms:g}ms"]
                _tool("tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", "rate", *rate)
        except BaseException:
            self.close()
            raise
        return self

    def environment(self, host: int) -> dict[str, str]:
        """Variables by which a torch process on this host finds the other one."""
        link = INTERFACES[host]
        group = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "RANK": str(host), "WORLD_SIZE": "2"}
        return group | {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": link, "TP_SOCKET_IFNAME": link}

    def start(self, commands: Sequence[Sequence[str]], log: Any, cwd: Any = None) -> list[subprocess.Popen[Any]]:
        """Starts one command per host, in order, with its output in `log` (a file, or one per host)."""
        logs = log if isinstance(log, list) else [log, log]
        started = []
        for host, command in enumerate(commands):
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                cwd=cwd,
                env=os.environ | self.environment(host),
                stdin=subprocess.DEVNULL,
                stdout=logs[host],
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its own children can be ended with it
            )
            self._children.append(process)
            started.append(process)
        return started

    def run(self, first: Sequence[str], second: Sequence[str], seconds: float, cwd: Any = None) -> Result:
        """Runs a command on each host until both have ended.

        Raises:
            TimeoutError: one was still running after `seconds`; both have been ended.
        """
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in ADDRESSES]
            before, begin = self.sent(), time.monotonic()
            both = self.start([first, second], logs, cwd)
            late = False
            for process in both:
                try:
                    process.wait(max(0.0, begin + seconds - time.monotonic()))
                except subprocess.TimeoutExpired:
                    late = True
                    break
            took = time.monotonic() - begin
            codes = [_end(process) for process in both]
            outputs = []
            for log in logs:
                log.seek(0)
                outputs.append(log.read())
            if late:
                raise TimeoutError(
                    f"two hosts: still running after {seconds:g} s. "
                    + "; ".join(f"Host {i} ended with: {text[-TAIL:]}" for i, text in enumerate(outputs))
                )
            sent = [after - earlier for after, earlier in zip(self.sent(), before, strict=True)]
            return Result(codes, outputs, sent, took)

    def cut(self) -> None:
        """The link fails: what is sent from now on is lost, and nobody is told."""
        _tool("ip", "-n", self.names[0], "link", "set", INTERFACES[0], "down")

    def sent(self) -> list[int]:
        """Bytes that each host has put on the link so far, headers included."""
        found = []
        for name, link in zip(self.names, INTERFACES, strict=True):
            (entry,) = json.loads(_tool("ip", "-n", name, "-j", "-s", "link", "show", "dev", link))
            found.append(int(entry["stats64"]["tx"]["bytes"]))
        return found

    def close(self) -> None:
        """Ends what was started and removes the hosts; harmless when repeated."""
        for child in self._children:
            _end(child)
        self._children = []
        while self._made:
            name = self._made.pop()
            # what the commands have started in sessions of their own: whoever is in there was started by them
            for pid in _tool("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _tool("ip", "netns", "delete", name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def unavailable() -> str:
    """Why TwoHosts cannot be had here; empty if they can."""
    try:
        with TwoHosts():
            return ""
    except RuntimeError as error:
        return str(error)


def _end(process: subprocess.Popen[Any]) -> int:
    """Ends a command and its children, if they still run."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"two hosts: {command[0]} is not installed; it is in the package iproute2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS)
    if done.returncode:
        hint = "" if os.geteuid() == 0 else " This needs root."
        raise RuntimeError(f"two hosts: `{' '.join(command)}` failed: {done.stderr.strip()}.{hint}")
    return done.stdout
