"""Show the examples of docstrings as code: everything from `>>>` to the next empty line."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


def fenced(text: str) -> str:
    """Put a fence around every example.

    >>> print(fenced("Say a number.\\n\\n>>> 1 + 1\\n2\\n\\nThe end.").replace("`" * 3, "---"))
    Say a number.
    <BLANKLINE>
    ---python
    >>> 1 + 1
    2
    ---
    <BLANKLINE>
    The end.
    """
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        if line.strip().startswith(">>>") and not inside:
            lines.append("```python")
            inside = True
        if inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join(lines[:-1])


class Doctests(Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
