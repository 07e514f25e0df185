"""What the README shows works: its example runs, its links lead somewhere, the benchmark has its place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import run_torchrun

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_the_example_runs(launcher: str, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "layer.py"
    script.write_text(example + "\nassert y.shape == x.shape and x.grad.abs().sum() > 0 and w.grad is not None\n")
    if launcher == "torchrun":
        done = run_torchrun(script, folder=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    result = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_benchmark_has_its_place() -> None:
    assert len(re.findall(r"<!-- bench:begin -->\n(?:.*\n)*?<!-- bench:end -->\n", README)) == 1
