"""Real processes: they answer as one device does, listen on the loopback interface, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine.models import write_fp8, write_model
from engine.ranks import difference, random_prompts, serve
from safetensors.torch import load_file, save_file

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, MachineError
from skymoe.engine.assignment import LastWord, last_word
from skymoe.engine.config import EngineConfig
from skymoe.engine.group import ServingGroup, open_group
from skymoe.engine.step import Chunk, StepPlan
from skymoe.model.load import load

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

STEP = StepPlan((Chunk((5, 6, 7), 0, (0,), 1),))


def config(path: Path, **changes: object) -> EngineConfig:
    options = {"page_size": 4, "max_batch": 4, "dtype": DType.FLOAT32, "timeout_s": 30.0, "threads": 1, **changes}
    return EngineConfig(model=path, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_model(tmp_path_factory.mktemp("plain") / "m", "skywork_wide")
    return write_fp8(source, tmp_path_factory.mktemp("fp8") / "m", "block")


@pytest.fixture(scope="module")
def group(path: Path) -> Iterator[ServingGroup]:
    with open_group(config(path, tp=3)) as ranks:
        yield ranks


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.05)


def listening(pid: int) -> list[str]:
    """Addresses of the sockets of a process that listen."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                address = bytes.fromhex(words[1].partition(":")[0])
                if name == "tcp6":
                    found.append(words[1])
                else:
                    found.append(socket.inet_ntoa(address[::-1]))
    return found


# ---- a group that lives (before any test kills one of its own)


def test_logits_are_those_of_the_one_device_model(path: Path, group: ServingGroup) -> None:
    """FP8, 6 heads and 6 experts of 2 blocks on 3 ranks, the gate normalized."""
    assert group.plan.split.columns == (128, 128, 0) and group.weights == "fp8" and group.kv_dtype == "fp32"
    prompts = random_prompts(97, (40, 3, 11))
    found = serve(group.run, prompts, page_size=4, num_pages=group.num_pages)
    model = load(path, torch.float32)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt]))[0] for prompt in prompts]
    assert max(difference(*pair) for pair in zip(found, expected, strict=True)) < 1e-5
    assert [sum(row) for row in group.expert_tokens()] == [2 * 54] * 3


def test_a_plan_of_any_length_arrives(group: ServingGroup) -> None:
    """Shorter than the first message, and much longer."""
    assert group.run(STEP).shape == (1, 97)
    long = Chunk(tuple(range(90)) + tuple(range(30)), 0, tuple(range(30)), 2)
    many = tuple(Chunk((i,), 0, (30 + i,), 1) for i in range(90))
    assert group.num_pages >= 120
    assert len(StepPlan((long, *many)).encode()) > 600
    assert group.run(StepPlan((long, *many))).shape == (92, 97)
    assert group.run(StepPlan((Chunk((1,), 0, (0,), 0),))).shape == (0, 97)


def test_every_socket_is_on_the_loopback_interface(group: ServingGroup) -> None:
    for pid in (os.getpid(), *group.pids):
        assert set(listening(pid)) <= {"127.0.0.1"}
    assert sum(len(listening(pid)) for pid in group.pids) > 0


@pytest.mark.slow
def test_followers_end_with_close(path: Path) -> None:
    with open_group(config(path, tp=2)) as ranks:
        (pid,) = ranks.pids
        assert alive(pid)
    wait_until_gone(pid)
    ranks.close()
    with pytest.raises(MachineError, match="ended"):
        ranks.run(STEP)


def test_one_rank_needs_no_process(path: Path) -> None:
    with open_group(config(path)) as ranks:
        assert ranks.pids == ()
        ranks.check()
        assert ranks.run(STEP).shape == (1, 97)


# ---- deaths


def test_a_killed_follower_is_named_and_takes_the_others_along(path: Path) -> None:
    ranks = open_group(config(path, tp=3))
    pids = ranks.pids
    ranks.run(STEP)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(MachineError, match=rf"rank 2 \(pid {pids[1]}, killed by SIGKILL\)"):
        while True:
            ranks.run(STEP)
    wait_until_gone(*pids)
    with pytest.raises(MachineError, match="ended"):
        ranks.check()


@pytest.mark.slow
def test_a_follower_that_dies_within_a_step_is_named(path: Path) -> None:
    """It is stopped first, so that rank 0 and the other wait in a sum when it is killed."""
    ranks = open_group(config(path, tp=3))
    pid = ranks.pids[0]
    os.kill(pid, signal.SIGSTOP)
    killer = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({pid}, 9)"], stdin=subprocess.DEVNULL
    )
    with pytest.raises(MachineError, match=rf"rank 1 \(pid {pid}, killed by SIGKILL\)"):
        ranks.run(STEP)
    killer.wait()
    wait_until_gone(*ranks.pids)


@pytest.mark.slow
def test_a_follower_that_is_stopped_is_named_after_the_time_out(path: Path) -> None:
    ranks = open_group(config(path, tp=2, timeout_s=1.0))
    os.kill(ranks.pids[0], signal.SIGSTOP)
    with pytest.raises(MachineError, match=rf"rank 1 \(pid {ranks.pids[0]}\) is stopped"):
        ranks.run(STEP)
    wait_until_gone(*ranks.pids)


@pytest.mark.slow
def test_idle_ranks_wait_longer_than_the_time_out(path: Path) -> None:
    with open_group(config(path, tp=2, timeout_s=1.0)) as ranks:
        time.sleep(2.5)
        ranks.check()
        assert ranks.run(STEP).shape == (1, 97)


@pytest.mark.parametrize("where", [pytest.param("main", marks=pytest.mark.slow), "thread"])
def test_no_follower_outlives_rank_0(path: Path, where: str) -> None:
    """Killed, also in a thread other than the main one: the kernel's own signal to children would not do."""
    code = f"""if True:
        import sys, threading, time
        from pathlib import Path
        from skymoe.engine.config import EngineConfig
        from skymoe.engine.group import open_group
        def work():
            ranks = open_group(EngineConfig(model=Path({str(path)!r}), tp=3, threads=1))
            print(*ranks.pids, flush=True)
            time.sleep(600)
        if sys.argv[1] == "thread":
            threading.Thread(target=work).start()
        else:
            work()
    """
    with subprocess.Popen([sys.executable, "-c", code, where], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
    wait_until_gone(*pids)


def test_what_a_follower_finds_is_told_by_rank_0(path: Path, tmp_path: Path) -> None:
    """A damaged code in columns that only rank 1 reads."""
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.4.w2.weight"
    tensors[name].view(torch.uint8)[7, 130] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(FormatError, match=r"experts\.4\.w2\.weight(.|\n)*found by rank 1"):
        open_group(config(tmp_path, tp=2))


def test_last_words() -> None:
    word = last_word(FormatError("x is broken", where="file", why="because", hint="mend it"))
    told = LastWord.model_validate_json(word.model_dump_json()).as_error("rank 3")
    assert isinstance(told, FormatError)
    assert str(told) == "file: x is broken\n  why: because\n  try: mend it"
    defect = last_word(KeyError("q")).as_error("rank 3 (pid 9)")
    assert isinstance(defect, MachineError) and "rank 3 (pid 9) failed: KeyError" in str(defect)


@pytest.mark.slow
def test_the_follower_is_not_for_hands() -> None:
    command = [sys.executable, "-m", "skymoe.engine.follower"]
    result = subprocess.run(command, input=b'{"rank": 1}\n', capture_output=True, check=False)
    assert result.returncode == 2 and b"not by hand" in result.stderr
