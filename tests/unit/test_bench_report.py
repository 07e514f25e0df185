"""Plots and the interactive page: drawn from rows, and looked at by a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.harness import compared
from bench.plots import VIEWS, draw, widest_group
from bench.record import Measurement, example, write
from bench.report import main, page


def some_rows() -> list[Measurement]:
    """Three numbers of tokens, two of ranks, two skews."""
    rows = []
    uniform = [(1, 2, "uniform", 1.1), (16, 2, "uniform", 1.2), (64, 2, "uniform", 1.3), (16, 4, "uniform", 1.2)]
    for tokens, world, skew, load in [*uniform, (16, 2, "hot:1", 4.0)]:
        for path, us in (("moecomm", 10.0), ("baseline", 70.0), ("memcpy", 5.0)):
            where = {"tokens": tokens, "world": world, "skew": skew, "max_over_mean": load}
            case = f"W={world} T={tokens} {skew}"
            times = {"p20_us": us * tokens, "p50_us": 1.1 * us * tokens, "p80_us": 1.2 * us * tokens}
            rows.append(example(case=case, path=path, bytes_moved=1000 * tokens, **where, **times))
    return compared(rows)


def test_views_show_the_widest_group() -> None:
    by_name = {view.name: view for view in VIEWS}
    group = widest_group(some_rows(), by_name["latency_over_tokens"])
    assert {(row.tokens, row.world, row.skew) for row in group} == {(t, 2, "uniform") for t in (1, 16, 64)}
    assert {row.world for row in widest_group(some_rows(), by_name["scaling_over_ranks"])} == {2, 4}
    assert {row.skew for row in widest_group(some_rows(), by_name["skew"])} == {"uniform", "hot:1"}
    assert widest_group([example()], by_name["skew"]) == []


def test_every_view_is_drawn(tmp_path: Path) -> None:
    written = draw(some_rows(), tmp_path, formats=["svg"])
    assert [path.stem for path in written] == [view.name for view in VIEWS]
    assert all("moecomm" in path.read_text() or path.stat().st_size > 10_000 for path in written)


def test_the_page_needs_no_network_and_holds_all_rows() -> None:
    text = page([example(case="</script><b>x", gate="bit for bit")])
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("</script>") == 2 and "<\\/script><b>x" in text


def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    (tmp_path / "page.html").write_text(page(some_rows()))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=100)
    svg = re.search(r"<svg id=\"plot\".*?</svg>", done.stdout, re.DOTALL)
    assert svg and svg.group().count("<circle") == 9 and svg.group().count("<polyline") == 3, done.stderr[-2000:]
    assert done.stdout.count("<tr>") == 10  # a head, and three paths at three numbers of tokens


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(some_rows(), tmp_path / "run")[0]
    assert main([str(results), "--html", str(tmp_path / "x/page.html")]) == 0
    assert (tmp_path / "x/page.html").exists()
    assert main([str(results), "--html", "/proc/no/page.html"]) == 2
    assert "nothing can be written there" in capsys.readouterr().err
    assert main([str(tmp_path / "run.csv")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    write([], tmp_path / "empty")
    assert main([str(tmp_path / "empty.json")]) == 2
    assert "hold no rows; run a benchmark with --out first" in capsys.readouterr().err
