"""What the docs show works: Python blocks run, commands run or are parsed, links and images lead somewhere.

Blocks of a page share their names and run in order. What cannot run here says why, in a comment before the block:
`<!-- not run: needs two nodes -->`; `<!-- run first: x = 1 -->` holds lines that a reader need not see.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import moecomm
from bench.bench_dispatch_combine import parser as bench_parser
from moecomm import errors
from moecomm.cli import main as moecomm_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.stem not in ("changelog", "contributing")]
BLOCK = re.compile(r"((?:<!-- (?:not run|run first):.*?-->\n+)*)^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(what the comments before say, text) of every block that is to run."""
    found = [(before, text) for before, name, text in BLOCK.findall(page.read_text("utf-8")) if name == language]
    return [(before, text) for before, text in found if "<!-- not run:" not in before]


def commands(page: Path) -> list[str]:
    """Commands behind a `$`, with continued lines joined and comments taken off."""
    text = "\n".join(block for _, block in blocks(page, "console")).replace("\\\n", " ")
    return [line[2:].split("  #")[0].strip() for line in text.splitlines() if line.startswith("$ ")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for before, text in blocks(page, "python"):
        hidden = [part.strip() for part in re.findall(r"<!-- run first:(.*?)-->", before, re.DOTALL)]
        for source in [*hidden, text]:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_are_right(page: Path, tmp_path: Path) -> None:
    """Those of the library run in this process; of launched scripts and benchmarks the files and options are there."""
    for command in commands(page):
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "moecomm"] and words[3:5] != ["bench", "dispatch_combine"]:
            with contextlib.redirect_stdout(io.StringIO()):
                assert moecomm_command(words[3:]) == 0, command
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif words[0] in ("git", "pip"):
            continue
        else:
            check_script(command, words)


def check_script(command: str, words: list[str]) -> None:
    """A script that is started: it exists, and a benchmark takes the options."""
    scripts = [word for word in words if word.endswith(".py")]
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    assert scripts or modules, f"{command}: starts neither a script nor a module"
    for script in scripts:
        assert (ROOT / script).exists(), command
    if "bench_dispatch_combine" in command or "bench dispatch_combine" in command:
        start = next(i for i, word in enumerate(words) if "dispatch_combine" in word)
        bench_parser().parse_args(words[start + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    targets = [
        t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")
    ]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_examples_of_docstrings_are_shown_as_code() -> None:
    names = runpy.run_path(str(ROOT / "docs/doctests.py"))
    assert names["fenced"]("a\n\n>>> 1\n1") == "a\n\n```python\n>>> 1\n1\n```"


def test_files_of_the_repository_become_pages() -> None:
    """A link into the docs stays one, a link elsewhere becomes the name."""
    rewrite = runpy.run_path(str(ROOT / "docs/hooks.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri="changelog.md"))
    text = rewrite("", page)
    assert "](docs/" not in text and "](bench/" not in text and text.startswith("# Changelog")
    page.file.src_uri = "index.md"
    assert rewrite("as it is", page) == "as it is"


def test_every_error_has_its_section() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    classes = [name for name in vars(errors) if isinstance(vars(errors)[name], type) and name.endswith("Error")]
    assert len(classes) > 5
    assert not [name for name in classes if name != "MoECommError" and f"\n## {name}\n" not in text]


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    listed = set(re.findall(r"^::: .*\.(\w+)$", text, re.MULTILINE))
    assert not set(moecomm.__all__) - listed - {"__version__"}


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run first: x = 1 -->\n```python\nassert x == 2\n```\n\n```console\n$ python nothing.py  # no\n```\n"
    )
    ((before, text),) = blocks(page, "python")
    assert "x = 1" in before and text == "assert x == 2\n"
    (command,) = commands(page)
    with pytest.raises(AssertionError, match=r"python nothing\.py"):
        check_script(command, shlex.split(command))


def test_diagrams_are_those_that_are_drawn() -> None:
    place = ROOT / "docs/diagrams.py"
    drawn = runpy.run_path(str(place))["DIAGRAMS"]
    assert len(drawn) >= 6
    assert not [name for name, draw in drawn.items() if (place.parent / f"assets/{name}.svg").read_text() != draw()]
