"""Two hosts on one machine: network namespaces joined by a cable, an sshd on each, and a hostfile that names them.

Needs root, `ip`, `sshd`, `ssh` and `pdsh` (Debian: openssh-server, pdsh). Files are shared, as on a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "tppo0"  # the same on both hosts, as gloo is told one name


@dataclass(frozen=True)
class Hosts:
    """Names of the namespaces, their addresses, the hostfile, and where an `ssh` lies that knows the key."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    hostfile: Path
    ssh: Path

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """`environment` in which pdsh and deepspeed find that ssh first, and gloo the interface."""
        path = f"{self.ssh.parent}:{environment['PATH']}"
        return {**environment, "PATH": path, "GLOO_SOCKET_IFNAME": INTERFACE, "TPPO_VENV": "none"}

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command on the first host."""
        return ["ip", "netns", "exec", self.names[0], *arguments]


def missing() -> str:
    """What is lacking here; empty when two hosts can be made."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program in ("ip", "ssh", "ssh-keygen", "pdsh"):
        if shutil.which(program) is None:
            return f"needs {program}"
    if not Path("/usr/sbin/sshd").exists():
        return "needs sshd"
    name = f"tppo-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make the hosts, with keys and configuration in `folder`; afterwards take them down with all that runs there."""
    number = os.getpid() % 250
    names = (f"tppo-a-{os.getpid()}", f"tppo-b-{os.getpid()}")
    addresses = (f"10.77.{number}.1", f"10.77.{number}.2")
    servers: list[subprocess.Popen] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", INTERFACE, "netns", names[0], "type", "veth",
             "peer", "name", INTERFACE, "netns", names[1])  # fmt: skip
        for name, address in zip(names, addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in (INTERFACE, "lo"):
                _run("ip", "-n", name, "link", "set", device, "up")
        ssh = _keys(folder)
        servers = [_serve(folder, name) for name in names]
        for address in addresses:
            _await_ssh(names[0], ssh, address)
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
        yield Hosts(names, addresses, hostfile, ssh)
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-KILL", *pids], check=False) if pids else None
        for server in servers:
            server.wait()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _keys(folder: Path) -> Path:
    """Keys of host and user, and an `ssh` that uses them."""
    for name in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  LogLevel ERROR\n  BatchMode yes\n"
    )
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    return ssh


def _serve(folder: Path, name: str) -> subprocess.Popen:
    Path("/run/sshd").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host_key"),
         "-o", f"AuthorizedKeysFile={folder}/authorized_keys", "-o", "StrictModes=no", "-o", "UsePAM=no",
         "-o", "PidFile=none", "-o", "PermitRootLogin=yes", "-o", "MaxStartups=50"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _await_ssh(name: str, ssh: Path, address: str) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(["ip", "netns", "exec", name, str(ssh), address, "true"], capture_output=True).returncode:
        assert time.monotonic() < deadline, f"no sshd answers at {address}"
        time.sleep(0.2)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
