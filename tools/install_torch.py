# SPDX-License-Identifier: Apache-2.0
"""
Installs PyTorch into the environment whose Python runs this script: the build without CUDA where there is no GPU.

    .venv/bin/python tools/install_torch.py --constraint constraints.txt

On Linux the default build of PyTorch brings gigabytes of CUDA packages. Where no GPU is found and pip would take that
build, uv, which knows where PyTorch's CPU builds are, installs one. If uv cannot, the default build works everywhere.
A PyTorch that is already installed and satisfies the constraint stays, so another build (ROCm, another CUDA version)
can be installed first.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable


PIP_INSTALL = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile"]
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)-|(pytorch-)?triton$")

Run = Callable[..., subprocess.CompletedProcess]


def ask_pip(requirement: list[str], run: Run) -> dict | None:
    """What pip would install, as its JSON report; `None` if it cannot tell."""
    dry_run = [*PIP_INSTALL, "--dry-run", "--no-deps", "--report", "-"]
    # With fast-deps pip reads a few kilobytes of the wheel where it would download all of it.
    for extra in (["--use-feature=fast-deps"], []):
        result = run([*dry_run, *extra, *requirement], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if result.returncode == 0:
            return json.loads(result.stdout)
    return None


def cuda_packages(report: dict) -> list[str]:
    """The CUDA packages that the reported wheels require on this platform."""
    # Not at the top: in a process that has loaded pip, setuptools and with it inductor cannot be imported any more.
    from pip._vendor.packaging.requirements import Requirement

    names = []
    for item in report["install"]:
        for line in item["metadata"].get("requires_dist", []):
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and CUDA_PACKAGE.match(requirement.name):
                names.append(requirement.name)
    return names


def has_nvidia_gpu(run: Run) -> bool:
    """Whether `nvidia-smi` finds a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return run(["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def install_torch(requirement: list[str], run: Run = subprocess.run) -> int:
    """
    Installs PyTorch as the module's docstring says.

    Args:
        requirement (`list[str]`): what to install, as arguments for pip and for uv.
        run (`Callable`): `subprocess.run`, or what takes its place in a test.

    Returns:
        `int`: exit status of the last installer.
    """
    report = ask_pip(requirement, run)
    if report is not None and not report["install"]:
        print("PyTorch is installed.")
        return 0
    if report is not None and cuda_packages(report) and not has_nvidia_gpu(run):
        print("No NVIDIA GPU: installing PyTorch's CPU build with uv.", flush=True)
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend=cpu"]
        constraint = requirement[1:]
        if run([*PIP_INSTALL, *constraint, "uv"]).returncode == 0 and run([*uv, *requirement]).returncode == 0:
            return 0
        print("uv could not install the CPU build: taking the default one, with gigabytes of CUDA packages.")
    print("Installing PyTorch with pip.", flush=True)
    return run([*PIP_INSTALL, *requirement]).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", help="a constraints file, for PyTorch and for uv")
    args = parser.parse_args(argv)
    return install_torch(["torch", *(["--constraint", args.constraint] if args.constraint else [])])


if __name__ == "__main__":
    sys.exit(main())
