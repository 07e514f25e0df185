"""`import deep_ep` gives moecomm's, in this process, in a script, and in the processes that it spawns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming_from_deepep.md"


def test_the_script_of_the_page_and_what_it_spawns(tmp_path: Path, free_port: int) -> None:
    """As a reader would: saved, started, nothing changed but the number of ranks."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[0]
    assert "import deep_ep\n" in code and "moecomm" not in code
    (tmp_path / "roundtrip.py").write_text(code.replace("TOP_K = 4,", "TOP_K = 2,"))
    command = [sys.executable, "-m", "moecomm.deep_ep", "roundtrip.py"]
    environment = {
        "MASTER_PORT": str(free_port),
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        found = re.fullmatch(rf"rank {rank}: \d+ rows for 8 experts, error (0\.0\d+)", line)
        assert found and float(found[1]) < 0.05, line


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
from deep_ep.hybrid_ep_buffer import indices_to_map
assert importlib.util.find_spec("deep_ep") is not None
assert deep_ep.Buffer is moecomm.deep_ep.Buffer and deep_ep.topk_idx_t.itemsize == 8
"""


def test_another_deep_ep_is_not_replaced_behind_its_back() -> None:
    done = subprocess.run([sys.executable, "-c", CLASH], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
