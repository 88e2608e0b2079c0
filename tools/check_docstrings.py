# SPDX-License-Identifier: Apache-2.0
"""
Compares the docstrings of the public classes, functions and methods with their signatures. Reads the source without
importing it.

    python tools/check_docstrings.py diffusers_dyna pipelines

A public class or function needs a docstring. A docstring of more than one paragraph needs an `Args:` section with
every parameter, in order, as

    name (`type`, *optional*, defaults to `value`): text

where a `value` that is a literal is the signature's. The parameters of `__init__`, or the fields of a dataclass or named tuple, are
documented in the docstring of the class. Prints `file:line: message` for each fault; the exit status is 1 if there is
one.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path


ENTRY = re.compile(r"\*{0,2}(?P<name>\w+)(?P<type> \(.+?\))?:(?=\s|$)", re.DOTALL)
DEFAULT = re.compile(r"defaults to `(?P<value>[^`]+)`")
REQUIRED = object()  # the default of a parameter that has none


def documented(docstring: str) -> dict[str, str | None] | None:
    """The parameters in the `Args:` section with what stands in parentheses, or `None` where there is no section."""
    match = re.search(r"^( *)Args:\n((?:\1 +.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if match is None:
        return None
    indent = len(match[2]) - len(match[2].lstrip(" "))
    # An entry starts at the indentation of the first one; what is deeper continues it.
    entries = re.split(rf"^ {{{indent}}}(?! )", match[2], flags=re.MULTILINE)[1:]
    parameters = {}
    for entry in entries:
        entry_match = ENTRY.match(entry)
        if entry_match is None:
            parameters[entry.split("\n")[0]] = None
        else:
            parameters[entry_match["name"]] = entry_match["type"]
    return parameters


def parameters_of(function: ast.FunctionDef, is_method: bool) -> dict[str, ast.expr | object]:
    """The parameters of a function with their defaults, without `self` and `cls`."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [REQUIRED] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = list(zip(positional, defaults, strict=True))
    if is_method and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list):
        pairs = pairs[1:]
    if arguments.vararg:
        pairs.append((arguments.vararg, REQUIRED))
    pairs += [(arg, default or REQUIRED) for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        pairs.append((arguments.kwarg, REQUIRED))
    return {arg.arg: default for arg, default in pairs}


def fields_of(class_def: ast.ClassDef) -> dict[str, ast.expr | object]:
    """The fields of a dataclass or named tuple with their defaults; nothing for another class."""
    kinds = (ast.unparse(node) for node in class_def.decorator_list + class_def.bases)
    if not any("dataclass" in kind or "NamedTuple" in kind for kind in kinds):
        return {}
    fields = [node for node in class_def.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: field.value or REQUIRED for field in fields}


def faults(name: str, docstring: str | None, parameters: dict, is_required: bool) -> Iterator[str]:
    if docstring is None:
        if is_required:
            yield f"`{name}` has no docstring"
        return
    entries = documented(docstring)
    if entries is None:
        if parameters and "\n\n" in docstring.strip():
            yield f"`{name}` has no `Args:` section for {', '.join(f'`{parameter}`' for parameter in parameters)}"
        return
    missing = [parameter for parameter in parameters if parameter not in entries]
    extra = [entry for entry in entries if entry not in parameters]
    if missing:
        yield f"`{name}`: `Args:` lacks {', '.join(f'`{parameter}`' for parameter in missing)}"
    if extra:
        yield f"`{name}`: `Args:` has {', '.join(f'`{entry}`' for entry in extra)}, which the signature lacks"
    if not missing and not extra and list(entries) != list(parameters):
        yield f"`{name}`: `Args:` has the order {list(entries)}, the signature {list(parameters)}"
    for parameter, text in entries.items():
        if parameter not in parameters:
            continue
        if text is None:
            yield f"`{name}`: `{parameter}` has no type: write `{parameter} (`type`): ...`"
            continue
        written, default = DEFAULT.search(text), parameters[parameter]
        if written is None:
            continue
        if default is REQUIRED:
            yield f"`{name}`: `{parameter}` is documented with a default, {written['value']}, but has none"
            continue
        try:
            values = ast.literal_eval(written["value"]), ast.literal_eval(default)
        except (SyntaxError, ValueError):  # an expression
            continue
        # The docstring of a parameter that is `None` by default says what `None` stands for.
        if values[1] is not None and values[0] != values[1]:
            yield f"`{name}`: `{parameter}` defaults to {values[1]!r}, but is documented as {values[0]!r}"


def check(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the message of each fault in one module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            for message in faults(node.name, ast.get_docstring(node), parameters_of(node, False), True):
                yield node.lineno, message
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        init = methods.pop("__init__", None)
        parameters = parameters_of(init, True) if init is not None else fields_of(node)
        for message in faults(node.name, ast.get_docstring(node), parameters, True):
            yield node.lineno, message
        for method in methods.values():
            if method.name.startswith("_") and method.name != "__call__":
                continue
            docstring = ast.get_docstring(method)
            for message in faults(f"{node.name}.{method.name}", docstring, parameters_of(method, True), False):
                yield method.lineno, message


def main(folders: list[str]) -> int:
    num_faults = 0
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.py")):
        for line, message in check(path.read_text(encoding="utf-8")):
            print(f"{path}:{line}: {message}")
            num_faults += 1
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
