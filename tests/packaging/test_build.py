"""Installing: the four situations of setup.py in fresh virtual environments, and the rules of imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("clang++")
NOWHERE = "/nonexistent"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation needs, so that no build product of the working tree takes part."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("crop", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with setuptools and pybind11 alone, to lend to a fresh environment: no torch is in sight of a build."""
    folder = tmp_path_factory.mktemp("tools")
    packages = Path(sysconfig.get_path("purelib"))
    for pattern in ("setuptools*", "_distutils_hack", "pybind11*"):
        for path in packages.glob(pattern):
            (folder / path.name).symlink_to(path)
    return folder


class Install:
    """`pip install` of the source into a fresh environment, with chosen environment variables."""

    def __init__(self, source: Path, build_tools: Path, where: Path, **settings: str) -> None:
        venv.create(where, with_pip=False, symlinks=True)
        self.python = where / "bin" / "python"
        self.packages = next(where.glob("lib/python*/site-packages"))
        (self.packages / "tools.pth").write_text(str(build_tools))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CROP_", "CUDA_HOME", "CXX"))}
        env |= {"CXXFLAGS": "-O0", "MAX_JOBS": "2", "PIP_NO_INDEX": "1"} | settings
        # pip of the running interpreter works on the other environment; --python would need a pip that knows it.
        command = [
            sys.executable,
            "-m",
            "pip",
            f"--python={self.python}",
            "install",
            "--no-deps",
            "--no-build-isolation",
        ]
        done = subprocess.run([*command, "-v", str(source)], env=env, capture_output=True, text=True)
        self.ok, self.log = done.returncode == 0, done.stdout + done.stderr

    def alone(self, script: str) -> str:
        """Output of a script in the environment itself, which has no torch."""
        done = subprocess.run([self.python, "-c", script], capture_output=True, text=True, check=True, cwd="/")
        return done.stdout.strip()

    def with_torch(self, script: str) -> str:
        """Output of a script in the running interpreter, which imports the installed copy."""
        env = os.environ | {"PYTHONPATH": str(self.packages)}
        # An editable installation of this repository would lend its compiled module to the copy.
        script = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n" + script
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


# Loads the compiled module by itself: crop/__init__.py needs torch.
LOAD = """
import importlib.util, pathlib, sysconfig
path, = pathlib.Path(sysconfig.get_path("purelib"), "crop").glob("_C.*.so")
spec = importlib.util.spec_from_file_location("crop._C", path)
C = importlib.util.module_from_spec(spec); spec.loader.exec_module(C)
"""
SELECT = """
import array
score, kept = array.array("f", [1, 3, 2]), array.array("q", [-7] * 2)
code = C.select({device}, {target}, score.buffer_info()[0], 0, 0, 0, [2], kept.buffer_info()[0], 1, 3, 2)
print(code, list(kept), C.last_error())
"""
USE = """
import torch, crop
from crop.ops.build_info import build_info
info = build_info()
print(crop.__file__, info["native"], info["cuda"], crop.select(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist())
"""


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_compiler_only(source: Path, build_tools: Path, tmp_path: Path) -> None:
    install = Install(source, build_tools, tmp_path / "v", CUDA_HOME=NOWHERE)
    assert install.ok, install.log
    assert "crop: build=cpu" in install.log
    assert "cpu_isas" in install.alone(LOAD + "print(C.build_info())")
    assert install.alone(LOAD + SELECT.format(device=-1, target=1)) == "0 [1, 2]"
    assert install.alone(LOAD + SELECT.format(device=0, target=0)).startswith("-1 [-7, -7] crop was built without CUDA")
    assert install.with_torch(USE) == f"{install.packages}/crop/__init__.py True False [[1, 2]]"
    for name in ("weights", "__init__.py", "head.safetensors", "scenes/faces/DejaVuSans.ttf", "scenes/faces/LICENSE"):
        assert (install.packages / "crop/embedded" / name).exists()
    assert list((install.packages / "crop/embedded/weights").glob("*.safetensors"))
    assert "crop.cli.main:main" in install.alone(
        "from importlib.metadata import entry_points; print([e.value for e in entry_points(name='crop')])"
    )


@pytest.mark.skipif(NVCC is None or CXX is None, reason="no nvcc or no C++ compiler")
def test_nvcc(source: Path, build_tools: Path, tmp_path: Path) -> None:
    install = Install(source, build_tools, tmp_path / "v", CROP_CUDA_ARCHS="90", CROP_BUILD="cuda")
    assert install.ok, install.log
    assert "crop: build=cuda" in install.log
    assert "spilled" not in install.log
    assert install.alone(LOAD + "print(C.has_cuda, C.build_info()['cuda_archs'])") == "True 90 90+PTX"
    assert install.alone(LOAD + SELECT.format(device=-1, target=1)) == "0 [1, 2]"
    needed = subprocess.run(["ldd", *install.packages.glob("crop/_C.*.so")], capture_output=True, text=True).stdout
    assert not re.search(r"libcudart|libcuda\.|torch", needed), needed  # the module loads without driver and toolkit
    if not Path("/dev/nvidia0").exists():
        answer = install.alone(LOAD + SELECT.format(device=0, target=0))
        assert re.match(r"(35|100) \[-7, -7\] CUDA error \d+: .*driver|(100) .*no CUDA-capable", answer), answer


def test_neither(source: Path, build_tools: Path, tmp_path: Path) -> None:
    install = Install(source, build_tools, tmp_path / "v", CUDA_HOME=NOWHERE, CXX=NOWHERE)
    assert install.ok, install.log
    assert "crop: build=python" in install.log
    assert "py3-none-any" in install.log and not list(install.packages.glob("crop/_C*"))
    warnings = {line.strip() for line in install.log.splitlines() if "WARNING: crop" in line}
    assert len(warnings) == 1
    assert install.with_torch(USE) == f"{install.packages}/crop/__init__.py False False [[1, 2]]"


def test_cuda_without_nvcc(source: Path, build_tools: Path, tmp_path: Path) -> None:
    install = Install(source, build_tools, tmp_path / "v", CUDA_HOME=NOWHERE, CROP_BUILD="cuda", CXX=sys.executable)
    assert not install.ok
    assert (
        "CROP_BUILD=cuda: no nvcc found. Install the CUDA toolkit, set CUDA_HOME, or unset CROP_BUILD." in install.log
    )
    assert not list(install.packages.glob("crop"))


def setup_answer(**settings: str) -> str:
    env = os.environ | settings
    done = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True)
    return f"{done.returncode} {done.stderr}"


def test_forced_choices() -> None:
    assert setup_answer(CROP_BUILD="python").startswith("0 crop: build=python")
    assert "CROP_BUILD=cpu: no GCC or Clang found" in setup_answer(CROP_BUILD="cpu", CXX=NOWHERE)
    assert "CROP_BUILD must be cuda, cpu or python, got 'gpu'" in setup_answer(CROP_BUILD="gpu")


@pytest.fixture
def pretended(tmp_path: Path) -> dict[str, str]:
    """Settings of a build whose programs compile nothing: each notes its arguments in a file and makes the file they name."""

    def program(path: Path, then: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/{path.name}.log\n{then}\n')
        path.chmod(0o755)
        return path

    touch = 'for word; do [ "$before" = -o ] && : > "$word"; before=$word; done; exit 0'
    answers = (
        "--version) echo release 13.0, V13.0.88 ;; --list-gpu-code) printf 'sm_%s\\n' 75 80 86 90 100 110 103 120 ;;"
    )
    program(tmp_path / "bin/nvcc", f'case "$1" in {answers} *) {touch} ;; esac')
    launcher, compiler = program(tmp_path / "launcher", 'exec "$@"'), program(tmp_path / "compiler", touch)
    return {"CUDA_HOME": str(tmp_path), "CROP_BUILD": "cuda", "CXX": f"{launcher} {compiler} -m64"}


def pretend(tmp_path: Path, settings: dict[str, str]) -> tuple[int, str, dict[str, list[list[str]]]]:
    """Exit code, standard error, and per pretended program the arguments of its calls."""
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CROP_", "CXX", "MAX_JOBS"))} | settings
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    logs = {path.stem: [line.split() for line in path.read_text().splitlines()] for path in tmp_path.glob("*.log")}
    return done.returncode, done.stderr, logs


def value_after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_compiler_behind_a_launcher(tmp_path: Path, pretended: dict[str, str]) -> None:
    """C++ goes through the launcher; nvcc gets the compiler itself. Every object has a file of its own."""
    code, error, logs = pretend(tmp_path, pretended)
    assert code == 0, error
    compiler = str(tmp_path / "compiler")
    assert len(logs["launcher"]) == len(logs["compiler"]) >= 3 + 4  # common and bindings, cpu
    assert all(call[:2] == [compiler, "-m64"] for call in logs["launcher"])
    compiled = [call for call in logs["nvcc"] if "-o" in call]
    assert {value_after("-ccbin", call) for call in compiled} == {compiler}
    objects = [value_after("-o", call) for call in logs["compiler"] + compiled]
    assert len(set(objects)) == len(objects)
    missing = pretended | {"CXX": f"{tmp_path}/launcher {NOWHERE}"}
    assert "no GCC or Clang found" in pretend(tmp_path, missing)[1]


@pytest.mark.parametrize(
    "wanted, archs",
    [("80 90", "80 90"), ("8.0;9.0+PTX", "80 90"), ("sm_90", "90"), ("90,80", "80 90"), ("9.0a 12.0 80, 8.0", "80 90 120"),
     (" ", "80 86 90 100 120")],
)  # fmt: skip
def test_names_of_architectures(tmp_path: Path, pretended: dict[str, str], wanted: str, archs: str) -> None:
    code, error, logs = pretend(tmp_path, pretended | {"CROP_CUDA_ARCHS": wanted, "MAX_JOBS": " 2 "})
    assert code == 0, error
    built = {" ".join(re.findall(r",code=(\w+)", " ".join(call))) for call in logs["nvcc"] if "-c" in call}
    names = archs.split()
    assert built == {" ".join([f"sm_{arch}" for arch in names] + [f"compute_{names[-1]}"])}
    told = [word for call in logs["compiler"] if "bindings" in " ".join(call) for word in call]
    assert f"{names[-1]}+PTX" in " ".join(told)


@pytest.mark.parametrize(
    "setting, value, sentence",
    [("CROP_CUDA_ARCHS", "80 sm_70", "that nvcc and the kernels know (80 86 90 100 103 110 120), got 'sm_70'"),
     ("CROP_CUDA_ARCHS", "native", "that nvcc and the kernels know (80 86 90 100 103 110 120), got 'native'"),
     ("CROP_CUDA_ARCHS", "7.5", "that nvcc and the kernels know (80 86 90 100 103 110 120), got '7.5'"),
     ("MAX_JOBS", "0", "MAX_JOBS must be a whole number from 1 on, got '0'"),
     ("MAX_JOBS", "many", "MAX_JOBS must be a whole number from 1 on, got 'many'")],
)  # fmt: skip
def test_wrong_settings_are_told_first(
    tmp_path: Path, pretended: dict[str, str], setting: str, value: str, sentence: str
) -> None:
    code, error, logs = pretend(tmp_path, pretended | {setting: value})
    assert code != 0 and sentence in error and len(error.strip().splitlines()) == 1
    assert "compiler" not in logs and all(call[0].startswith("--") for call in logs["nvcc"])


def test_isolated_build_installs_its_requirements() -> None:
    """Under build isolation pip asks the build backend what to install first; there is no pyproject.toml to tell it."""
    script = "from setuptools.build_meta import __legacy__ as b; print(b.get_requires_for_build_wheel())"
    env = os.environ | {"CROP_BUILD": "python" if CXX is None else "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert ("pybind11" in done.stdout.splitlines()[-1]) == (CXX is not None)
    assert "torch" not in done.stdout.splitlines()[-1]


def test_only_one_module_imports_the_kernels() -> None:
    users = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("crop/**/*.py") if "crop._C" in path.read_text()]
    code = [
        name for name in users if re.search(r"^[^#\n]*(import|find_spec)\S*.*crop\._C", (ROOT / name).read_text(), re.M)
    ]
    assert code == ["crop/backend.py"]


def test_kernels_know_nothing_of_torch() -> None:
    for path in filter(Path.is_file, (ROOT / "csrc").rglob("*")):
        includes = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)], path


def test_import_is_light() -> None:
    script = "import sys, torch, crop; print('transformers' in sys.modules, torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
