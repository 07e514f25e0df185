"""`import deep_ep` gives moecomm's, in this process, in a script, and in the processes that it spawns."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moecomm.deep_ep import Buffer, install
from moecomm.errors import ConfigError
from moecomm.testing import run_ranks

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


def clash(rank: int) -> None:
    """In a process of its own, where nobody has imported deep_ep."""
    assert "deep_ep" not in sys.modules
    sys.modules["deep_ep"] = types.ModuleType("deep_ep")
    with pytest.raises(ConfigError, match="another deep_ep has been imported"):
        install()
    del sys.modules["deep_ep"]
    install()
    install()
    ours = importlib.import_module("deep_ep")
    importlib.import_module("deep_ep.utils.refs")
    assert callable(importlib.import_module("deep_ep.hybrid_ep_buffer").indices_to_map)
    assert importlib.util.find_spec("deep_ep") is not None
    assert ours.Buffer is Buffer and ours.topk_idx_t.itemsize == 8


def test_another_deep_ep_is_not_replaced_behind_its_back() -> None:
    run_ranks(clash, 1, backend=None)
