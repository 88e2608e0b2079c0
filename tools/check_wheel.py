# SPDX-License-Identifier: Apache-2.0
"""
Builds the sdist and the wheel, and proves that the wheel works on its own: it holds every module of the checkout and
nothing else, installs into a fresh environment without extras, and every module imports from there.

    python tools/check_wheel.py
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "diffusers_dyna"
# Runs in the fresh environment, in an empty folder. Arguments: the modules.
IMPORT_ALL = """
import importlib, pathlib, sys, sysconfig
site_packages = pathlib.Path(sysconfig.get_path("purelib"))
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    if not pathlib.Path(module.__file__).is_relative_to(site_packages):
        sys.exit(f"{name} was imported from {module.__file__}, not from {site_packages}")
print(f"{len(sys.argv) - 1} modules import from the installed wheel")
"""


def fail(message: str) -> None:
    sys.exit(f"wheel check: {message}")


def source_files() -> set[str]:
    """The files of the package in the checkout, as the wheel should name them."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    files |= {f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "pipelines").rglob("*.*")}
    return {file for file in files if "__pycache__" not in file}


def check_wheel_files(names: list[str]) -> None:
    files = {name for name in names if name.startswith(f"{PACKAGE}/")}
    if foreign := sorted(
        name for name in names if name not in files and not name.split("/")[0].endswith(".dist-info")
    ):
        fail(f"the wheel holds files outside the package: {', '.join(foreign)}")
    if missing := sorted(source_files() - files):
        fail(f"the wheel lacks {', '.join(missing)}: see `packages` and `package_data` in setup.cfg")
    if extra := sorted(files - source_files()):
        fail(f"the wheel holds {', '.join(extra)}, which the checkout lacks")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        fail("the wheel lacks the LICENSE")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, environment, elsewhere = Path(folder, "dist"), Path(folder, "venv"), Path(folder, "elsewhere")
        # Without --sdist and --wheel, the wheel is built from the sdist: files that the sdist lacks show.
        build = subprocess.run(
            [sys.executable, "-m", "build", "--outdir", dist, ROOT],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if build.returncode:
            fail(f"the build failed\n{build.stdout}")
        (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        names = zipfile.ZipFile(wheel).namelist()
        check_wheel_files(names)
        with tarfile.open(sdist) as archive:
            if not any("/pipelines/" in name for name in archive.getnames()):
                fail("the sdist lacks pipelines/")
        print(f"{wheel.name}: {len(names)} files; {sdist.name}", flush=True)

        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        constraint = ["--constraint", ROOT / "constraints.txt"]
        pip_install = [python, "-m", "pip", "install", "-qq", "--no-compile"]
        subprocess.run([*pip_install, "--upgrade", "pip"], check=True)
        subprocess.run([python, ROOT / "tools" / "install_torch.py", *constraint], check=True)
        subprocess.run([*pip_install, *constraint, wheel], check=True)

        modules = [name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")]
        modules = sorted(name.replace("/", ".") for name in modules)
        elsewhere.mkdir()
        subprocess.run([python, "-c", IMPORT_ALL, *modules], cwd=elsewhere, check=True)


if __name__ == "__main__":
    main()
