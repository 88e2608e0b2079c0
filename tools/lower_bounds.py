# SPDX-License-Identifier: Apache-2.0
"""
Prints a constraints file with the lower bounds of `setup.cfg`: `diffusers>=0.41` becomes `diffusers==0.41`.

    python tools/lower_bounds.py > constraints-floor.txt

The tools of the `dev` extra, everything else in `constraints.txt` and PyTorch stay at the versions tested: old builds
of PyTorch without CUDA are not available for every Python.
"""

import configparser
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[\w.-]+")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds(setup_cfg: str) -> dict[str, str]:
    """The version after `>=` of each requirement outside the `dev` extra, by normalized name."""
    config = configparser.ConfigParser()
    config.read_string(setup_cfg)
    blocks = [config["options"]["install_requires"]]
    blocks += [block for extra, block in config["options.extras_require"].items() if extra != "dev"]
    bounds = {}
    for line in "\n".join(blocks).split("\n"):
        match = re.match(r"([\w.-]+)>=([\w.]+)", line.strip())
        if match and normalized(match[1]) != "torch":
            bounds[normalized(match[1])] = match[2]
    return bounds


def main() -> None:
    bounds = lower_bounds((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    for name, version in bounds.items():
        print(f"{name}=={version}")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        match = NAME.match(line)
        if match and normalized(match[0]) not in bounds:
            print(line)


if __name__ == "__main__":
    main()
