"""Two hosts: network namespaces joined by a cable, a torchrun in each. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from parallel.launched import TOY, Launched, end, environment_of, family, torchrun
from train.tiny import recipe

from skymoe.base.config import dump_config
from skymoe.ckpt.config import DiffConfig
from skymoe.ckpt.run import run_diff
from skymoe.train.run import run

pytestmark = pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need root and ip"
)


class Host(NamedTuple):
    """A namespace with one interface."""

    name: str
    interface: str
    address: str

    def command(self, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, words)]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr}")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other and nobody else; removed in any case, with all that runs in them."""
    unique = uuid.uuid4().hex[:6]
    pair = tuple(Host(f"sky{unique}{end}", f"sky{unique}{end}", f"10.213.0.{end + 1}") for end in range(2))
    try:
        for host in pair:
            ip("netns", "add", host.name)
        left, right = pair
        ip(
            "link",
            "add",
            left.interface,
            "netns",
            left.name,
            "type",
            "veth",
            "peer",
            right.interface,
            "netns",
            right.name,
        )
        for host in pair:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.name, "link", "set", host.interface, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield left, right
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


@pytest.fixture
def nodes(hosts, tmp_path, request) -> Iterator[list[Launched]]:
    """toy.py under a torchrun on each host; parameters: how they meet, and the arguments of toy.py."""
    rendezvous, arguments = request.param
    environment = {"TOY_SLOW": "0.05"} if len(arguments) > 1 else {}
    master = hosts[0].address
    running = []
    try:
        for number, host in enumerate(hosts):
            meet = {
                "static": ["--node-rank", number, "--master-addr", master, "--master-port", 29571],
                "c10d": [
                    "--rdzv-backend",
                    "c10d",
                    "--rdzv-endpoint",
                    f"{master}:29571",
                    "--rdzv-id",
                    "two-hosts",
                    "--rdzv-conf",
                    f"is_host={1 - number}",
                ],  # torchrun would ask a name service who it is
            }[rendezvous]
            words = ["--nnodes", 2, "--nproc-per-node", 1, "--local-addr", host.address, *meet, TOY, *arguments]
            output = tmp_path / f"host{number}.txt"
            running.append(
                Launched(host.command(*torchrun(*words)), output, GLOO_SOCKET_IFNAME=host.interface, **environment)
            )
        yield running
    finally:
        for node in running:
            for pid in node.tree():
                end(pid)
            node.process.wait()


def test_the_cable_is_the_only_way(hosts):
    left, right = hosts
    interfaces = subprocess.run(left.command("ip", "-br", "link"), capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[0].partition("@")[0] for line in interfaces.splitlines()) == ["lo", left.interface]
    code = f"import socket; s = socket.create_server(({right.address!r}, 0)); print(s.getsockname()[0])"
    said = subprocess.run(right.command("python3", "-c", code), capture_output=True, text=True, check=True).stdout
    assert said.strip() == right.address


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [("static", (4,)), ("c10d", (4,))], indirect=True, ids=["static", "c10d"])
def test_two_hosts_add_up(nodes):
    codes = [node.wait() for node in nodes]
    said = "".join(node.said for node in nodes)
    assert codes == [0, 0], said
    assert said.count("total 16.0\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [("static", (100_000, "none", -1, -1, 8))], indirect=True, ids=["static"])
def test_a_rank_that_dies_on_the_other_host_is_named(nodes):
    nodes[0].wait_for(lambda: all(len(ranks_of(node)) == 1 for node in nodes))
    watcher, victim = nodes
    watcher.wait_for(lambda: "step 20" in watcher.said)
    (pid,) = ranks_of(victim)
    rank = environment_of(pid)["RANK"]
    os.kill(pid, signal.SIGKILL)
    assert [node.wait() for node in nodes] == [1, 1]
    assert f"error: rank {rank} gives no sign of life" in watcher.said


def ranks_of(node: Launched) -> list[int]:
    return [pid for pid in family(node.process.pid) if "RANK" in environment_of(pid)]


@pytest.mark.slow
def test_training_on_two_hosts_is_training_on_one(hosts, tmp_path):
    """A pipeline across the cable, two ranks a host; stopped, and gone on with."""
    config = recipe(tmp_path, steps=4, batch={"sequences": 4, "micro_sequences": 1}, schedule={"kind": "constant"})
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    run(config)
    for steps in (2, 4):
        running = []
        for number, host in enumerate(hosts):
            meet = ["--node-rank", number, "--master-addr", hosts[0].address, "--master-port", 29573]
            train = ["-m", "skymoe", "train", tmp_path / "recipe.yaml", f"run.dir={tmp_path / 'hosts'}"]
            words = ["--nnodes", 2, "--nproc-per-node", 2, "--local-addr", host.address, *meet, *train]
            command = host.command(*torchrun(*words, f"steps={steps}", "parallel.pp=2", "parallel.dp=2"))
            output = tmp_path / f"host{number}-{steps}.txt"
            running.append(Launched(command, output, GLOO_SOCKET_IFNAME=host.interface))
        try:
            codes = [node.wait() for node in running]
            assert codes == [0, 0], "".join(node.said for node in running)
        finally:
            for node in running:
                for pid in node.tree():
                    end(pid)
                node.process.wait()
    report = run_diff(DiffConfig(left=config.run.dir, right=tmp_path / "hosts"))
    largest = max(row.max_abs or 0.0 for row in report.differences if row.what == "bits")
    assert report.num_tensors > 10 and largest < 1e-5, report.differences
