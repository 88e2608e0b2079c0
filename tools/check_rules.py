# SPDX-License-Identifier: Apache-2.0
"""
Checks the rules of CONTRIBUTING.md that a linter does not know. Reads the source without importing it.

    python tools/check_rules.py

Prints `file:line: message` for each fault; the exit status is 1 if there is one.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path


PACKAGE = "diffusers_dyna"
FOLDERS = (PACKAGE, "pipelines", "examples", "tests", "tools")
# A model or scheduler file must work when copied alone into a Hub repository.
STANDALONE = {
    f"{PACKAGE}/models": {"torch", "einops", "diffusers"},
    f"{PACKAGE}/schedulers": {"torch", "numpy", "einops", "diffusers", "torchdiffeq"},
}
OPEN_ENDS = re.compile(r"\b(T[O]DO|FIX[M]E|X[X]X)\b")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each imported module; relative ones begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def check(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the message of each fault in one file, whose path is relative to the checkout."""
    tree = ast.parse(source)
    folder = path.rsplit("/", 1)[0]
    is_package = path.startswith((f"{PACKAGE}/", "pipelines/"))

    if source.strip() and not source.removeprefix("#!/usr/bin/env python\n").startswith("# SPDX-License-Identifier:"):
        yield 1, "the file does not begin with `# SPDX-License-Identifier: Apache-2.0`"
    for number, line in enumerate(source.split("\n"), start=1):
        if match := OPEN_ENDS.search(line):
            yield number, f"{match[0]}: do it or leave it out"
    for line, module in imports(tree):
        root = module.split(".")[0]
        if root == "torchvision":
            yield line, "torchvision is not a dependency: use Pillow, `VaeImageProcessor` or tensors"
        if is_package and root in ("examples", "tests", "tools"):
            yield line, f"the package imports `{module}`, which is not installed with it"
        allowed = STANDALONE.get(folder)
        if allowed is not None and not path.endswith("__init__.py"):
            if module.startswith(".") or (root not in allowed and root not in sys.stdlib_module_names):
                yield line, f"`{module}`: a file that travels alone imports {', '.join(sorted(allowed))} only"
    if is_package:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield node.lineno, "`assert` is dropped by `python -O`: raise a ValueError or TypeError"


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    messages = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        messages += [f"{name}:{line}: {message}" for line, message in check(name, path.read_text(encoding="utf-8"))]
    print("\n".join(messages), end="\n" if messages else "")
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main())
