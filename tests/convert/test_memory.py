"""Peak memory of a conversion is that of its largest tensors, not of the model: measured by the kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process begins with the peak of the one that started it: this small one stands between.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
assert status == 0
print(usage.ru_maxrss * 1024)
"""


def peak_bytes(dense: Path, out: Path) -> int:
    """ru_maxrss of a real `skymoe upcycle`, receipt included."""
    options = ["--experts", "8", "--quiet", "--set", "receipt_tokens=8", "--set", "max_shard_bytes=300000000"]
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "skymoe", "upcycle", str(dense), str(out), *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.slow
def test_four_times_the_model_in_the_same_memory(oracle, tmp_path):
    """4 and 16 layers of 19 MB; eight copies write 0.6 and 2.4 GB."""
    sizes = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=6, num_key_value_heads=6, vocab_size=4000)
    peaks, written = [], []
    for layers in (4, 16):
        dense = oracle.make(tmp_path / "dense", "llama", num_hidden_layers=layers, **sizes)
        peaks.append(peak_bytes(dense, tmp_path / "moe"))
        written.append(sum(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")))
        for directory in (dense, tmp_path / "moe"):
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
    assert written[1] > 3.5 * written[0]
    assert peaks[1] < peaks[0] + 40e6  # three times the model would be 2 GB more
