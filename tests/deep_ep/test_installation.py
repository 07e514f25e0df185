"""`import deep_ep` gives moecomm's, in this process, in a script, and in the processes that it spawns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch, torch.multiprocessing as mp
import deep_ep
from deep_ep.utils.envs import init_dist

def rank_main(local_rank, num_ranks):
    import deep_ep as again
    from deep_ep.hybrid_ep_buffer import indices_to_map
    assert again.__name__ == deep_ep.__name__ == "moecomm.deep_ep"
    rank, size, group = init_dist(local_rank, num_ranks)
    buffer = deep_ep.Buffer(group)
    idx = torch.tensor([[rank, 1 - rank]])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
    given = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    recv, *_, handle, _ = buffer.dispatch(torch.full((1, 4), rank + 1.0), **given)
    assert recv[:, 0].tolist() == [1.0, 2.0]
    assert buffer.combine(recv, handle)[0].tolist() == [[2.0 * (rank + 1)] * 4]
    print(f"rank {rank} of {size} is done", flush=True)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    assert sys.argv[1:] == ["--ranks", "2"], sys.argv
    mp.spawn(rank_main, args=(2,), nprocs=2)
"""


def test_a_script_and_what_it_spawns(tmp_path: Path, free_port: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "moecomm.deep_ep", str(script), "--ranks", "2"]
    environment = {
        "MASTER_PORT": str(free_port),
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 is done", "rank 1 of 2 is done"]


CLASH = """
import sys, types
sys.modules["deep_ep"] = types.ModuleType("deep_ep")
import moecomm.deep_ep
try:
    moecomm.deep_ep.install()
except moecomm.ConfigError as error:
    assert "another deep_ep has been imported" in str(error), error
del sys.modules["deep_ep"]
moecomm.deep_ep.install()
moecomm.deep_ep.install()
import importlib.util
import deep_ep.utils.refs
assert importlib.util.find_spec("deep_ep") is not None
assert deep_ep.Buffer is moecomm.deep_ep.Buffer and deep_ep.topk_idx_t.itemsize == 8
"""


def test_another_deep_ep_is_not_replaced_behind_its_back() -> None:
    done = subprocess.run([sys.executable, "-c", CLASH], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
