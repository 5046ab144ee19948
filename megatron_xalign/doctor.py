"""What this machine has and can do for xalign, what is missing for which feature, and how to get it.

Optional packages are imported in a process of their own: a library built for another torch or driver can end the
process that imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.training.precision import recipes_for

Finding = dict[str, Any]

_IMPORT_SECONDS = 120
_PACKAGES = (
    "torch", "megatron-core", "numpy", "nltk", "tokenizers", "safetensors", "msgspec", "zstandard", "psutil", "triton",
    "transformer-engine", "transformer-engine-torch", "flash-attn", "apex", "transformers", "matplotlib", "jinja2",
    "pyarrow", "sentencepiece", "tiktoken", "gigatoken", "eld", "datatrove",
)
# What has to import for a feature to work, what it is for, and how to get it.
_OPTIONAL = (
    (
        "transformer_engine.pytorch", "Transformer Engine", "FP8, fused layers on NVIDIA GPUs",
        "pip install --no-build-isolation 'transformer-engine[core_cu{cuda},pytorch]>=2.9{te_bound}'. Its PyTorch part "
        "is built from source against the installed torch, about 12 minutes on two cores: first pip install setuptools "
        "wheel pybind11 ninja packaging; then set CUDA_HOME=<a CUDA {cuda} toolkit with nvcc> "
        "CUDNN_PATH={site}/nvidia/cudnn CPATH={site}/nvidia/cu{cuda}/include:{site}/nvidia/cudnn/include:"
        "{site}/nvidia/nccl/include "
        "NVTE_FRAMEWORK=pytorch MAX_JOBS=2. 'cudnn.h: No such file' means that CUDNN_PATH is wrong. A container of "
        "NVIDIA's with PyTorch has it built.",
    ),
    (
        "flash_attn", "flash-attn", "flash attention outside Transformer Engine",
        "pip install flash-attn --no-build-isolation: built from source against the installed torch, needs nvcc and, "
        "without a prebuilt wheel, an hour or more on few cores; MAX_JOBS=2 limits its memory (several GiB a job). "
        "Without it torch's scaled dot product attention is used, which has a flash kernel of its own.",
    ),
    (
        "amp_C", "apex", "fused optimizer kernels where Transformer Engine is missing",
        "from NVIDIA's source repository, with its C++ and CUDA extensions; the package named apex in the registry is "
        "another project: do not install it. Without it torch's own kernels are used.",
    ),
    ("pyarrow", "pyarrow", "parquet input", "pip install 'megatron-xalign[parquet]'"),
    ("sentencepiece", "sentencepiece", "SentencePiece tokenizers", "pip install 'megatron-xalign[sentencepiece]'"),
    ("gigatoken", "gigatoken", "tokenising several times faster", "pip install 'megatron-xalign[gigatoken]'"),
    ("transformers", "transformers", "comparing exported models", "pip install 'megatron-xalign[convert]'"),
    ("matplotlib", "matplotlib", "reports", "pip install 'megatron-xalign[report]'"),
)
def examine() -> dict[str, Any]:
    """Look at everything.

    Returns:
        ``versions`` {package: version or None}, ``machine``, ``compilers``, ``torch``, ``devices`` (name, compute
        capability, memory in GiB, FP8 recipes), ``optional`` [{name, works, for, how, error}], ``limits``,
        ``problems`` (sentences: what will fail and the way out); JSON-able.
    """
    torch = _torch()
    found: dict[str, Any] = {
        "versions": {"megatron-xalign": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.release()}", "architecture": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)), "memory_gib": _memory_gib(),
        },
        "compilers": {
            name: _first_line([name, "--version"]) for name in ("g++", "clang++", "nvcc", "hipcc", "cmake", "ninja")
        },
        "torch": torch["backends"],
        "devices": torch["devices"],
        "optional": [
            _try(module, name, purpose, how.format(**_places(torch["backends"])))
            for module, name, purpose, how in _OPTIONAL
        ],
        "limits": _limits(),
    }
    found["features"] = _features(found)
    found["problems"] = _problems(found)
    return found


def _places(backends: dict[str, Any]) -> dict[str, str]:
    """What the ways to get a library name: this Python's packages, torch's CUDA, the bound of the installed core."""
    core = _version("megatron-core") or ""
    return {
        "site": sysconfig.get_paths()["purelib"],
        "cuda": str(backends.get("cuda") or "13").split(".")[0],
        "te_bound": ",<2.12" if core.startswith("0.16.") else "",
    }


def _features(found: dict[str, Any]) -> list[Finding]:
    """What a user would ask for, whether it works here, and what is missing where it does not."""
    works = {item["name"]: item["works"] for item in found["optional"]}
    devices, torch = found["devices"], found["torch"]
    gpu = bool(devices)
    recipes = sorted({recipe for device in devices for recipe in device["fp8_recipes"]})
    te, nccl = works["Transformer Engine"], bool(torch.get("nccl"))
    why_fp8 = (
        "an NVIDIA GPU of compute capability 8.9 or higher" if not recipes else "" if te else "Transformer Engine"
    )
    table = (
        ("training on the CPU (gloo)", bool(torch.get("gloo")), "torch with gloo"),
        ("training on GPUs (NCCL)", gpu and nccl, "a GPU that torch can use" if not gpu else "torch with NCCL"),
        ("bf16 on GPUs", gpu and all(device["bf16"] for device in devices), "GPUs of compute capability 8.0 or higher"),
        ("FP8 by Transformer Engine", not why_fp8, why_fp8),
        ("FP8 arithmetic of this project (backend.layers: local)", not torch.get("error"), "torch"),
        ("flash attention", gpu and (te or works["flash-attn"] or not torch.get("error")), "a GPU"),
        ("fused AdamW", gpu and (te or works["apex"]), "a GPU" if not gpu else "Transformer Engine or apex"),
        ("checking exports (xalign convert check)", works["transformers"], "transformers"),
        ("reports with figures", works["matplotlib"], "matplotlib"),
    )
    return [{"name": name, "works": bool(fine), **({} if fine else {"needs": needs})} for name, fine, needs in table]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """Backends and devices of torch, seen by a process of its own."""
    code = """
import json, torch, torch.distributed as dist
devices = []
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        devices.append({"name": facts.name, "capability": [facts.major, facts.minor],
                        "memory_gib": round(facts.total_memory / 2**30, 1)})
print(json.dumps({"backends": {
    "cuda": torch.version.cuda, "rocm": torch.version.hip, "cuda_available": torch.cuda.is_available(),
    "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(),
    "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
}, "devices": devices}))
"""
    import json

    ended, output, error = _run([sys.executable, "-c", code])
    if ended != 0:
        return {"backends": {"error": error or f"exit code {ended}"}, "devices": []}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    for device in found["devices"]:
        is_rocm = found["backends"]["rocm"] is not None
        device["fp8_recipes"] = list(recipes_for(tuple(device["capability"]), is_rocm))
        device["bf16"] = is_rocm or device["capability"] >= [8, 0]
    return found


def _try(module: str, name: str, purpose: str, how: str) -> Finding:
    ended, _, error = _run([sys.executable, "-c", f"import {module}"])
    if ended == 0:
        return {"name": name, "works": True, "for": purpose}
    absent = re.search(r"No module named '([\w.]+)'", error or "")
    # A part that is missing in a package that is there is another thing: apex of the registry has no optimizers.
    missing = absent is not None and absent[1] == module.split(".")[0]
    last = (error or "").strip().splitlines()[-1:] or [f"ended with exit code {ended}"]
    return {
        "name": name, "works": False, "for": purpose, "how": how, "error": "not installed" if missing else last[0]
    }


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code (negative: a signal), standard output and standard error."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"did not end within {_IMPORT_SECONDS} seconds"
    except OSError as error:
        return -1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    ended, output, _ = _run(command)
    lines = [line for line in output.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0].strip() if ended == 0 and lines else None


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _limits() -> dict[str, Any]:
    def soft(which: int) -> int | None:
        value = resource.getrlimit(which)[0]
        return None if value == resource.RLIM_INFINITY else value

    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "open_files": soft(resource.RLIMIT_NOFILE),
        "processes": soft(resource.RLIMIT_NPROC),
        "stack_bytes": soft(resource.RLIMIT_STACK),
        "locked_memory_bytes": soft(resource.RLIMIT_MEMLOCK),
        "shared_memory_gib": None if shared is None else round(shared.free / 2**30, 1),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _problems(found: dict[str, Any]) -> list[str]:
    """What will not work as it is, each with its way out."""
    checks: list[Callable[[dict[str, Any]], str | None]] = [
        _torch_works, _core_matches_python, _compiler_is_there, _files_may_be_opened, _shared_memory_is_there,
        _memory_may_be_locked, _processes_may_be_started, _a_driver_fits, _apex_is_nvidias, _clock_is_right,
    ]
    return [problem for check in checks if (problem := check(found)) is not None]


def _torch_works(found: dict[str, Any]) -> str | None:
    error = found["torch"].get("error")
    return f"torch cannot be imported: {str(error).strip().splitlines()[-1]}. Install it again." if error else None


def _core_matches_python(found: dict[str, Any]) -> str | None:
    core = found["versions"]["megatron-core"]
    if core is None:
        return "megatron-core is not installed; training needs it: pip install megatron-core."
    if not re.match(r"0\.(16|17|18|19)\.", core):
        return f"megatron-core {core} is not one of the supported versions, 0.16.1 to 0.19.x."
    return None


def _compiler_is_there(found: dict[str, Any]) -> str | None:
    if any(found["compilers"][name] for name in ("g++", "clang++")):
        return None
    return "no C++ compiler: installing xalign from source needs g++ 9 or newer (apt-get install g++ python3-dev)."


def _files_may_be_opened(found: dict[str, Any]) -> str | None:
    limit = found["limits"]["open_files"]
    if limit is None or limit >= 4096:
        return None
    return f"only {limit} files may be open at once; mixtures of many token files need more: ulimit -n 65536."


def _shared_memory_is_there(found: dict[str, Any]) -> str | None:
    free = found["limits"]["shared_memory_gib"]
    if free is None or free >= 0.5:
        return None
    return f"/dev/shm has {free} GiB; data workers and NCCL need about 1 GiB: start the container with --shm-size=8g."


def _memory_may_be_locked(found: dict[str, Any]) -> str | None:
    limit = found["limits"].get("locked_memory_bytes")
    if not found["devices"] or limit is None or limit >= 1 << 30 or not Path("/sys/class/infiniband").is_dir():
        return None
    return f"only {limit:,} bytes may be locked in memory; NCCL over InfiniBand needs more: ulimit -l unlimited."


def _processes_may_be_started(found: dict[str, Any]) -> str | None:
    limit = found["limits"].get("processes")
    if limit is None or limit >= 1024:
        return None
    return f"only {limit} processes and threads may be started; data workers and torch need more: ulimit -u 4096."


def _apex_is_nvidias(found: dict[str, Any]) -> str | None:
    version = found["versions"].get("apex")
    if version is None or not version.startswith("0.9."):
        return None
    return (
        f"apex {version} is a web toolkit of that name, not NVIDIA's apex, and Megatron-Core would take it for that: "
        "pip uninstall apex."
    )


def _a_driver_fits(found: dict[str, Any]) -> str | None:
    if found["torch"].get("cuda_available") or shutil.which("nvidia-smi") is None:
        return None
    ended, output, _ = _run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if ended != 0 or not output.strip():
        return None
    return (
        f"there is a GPU ({output.strip().splitlines()[0]}) that torch {found['versions']['torch']} (CUDA "
        f"{found['torch'].get('cuda')}) cannot use; install the torch build for this driver's CUDA version."
    )


def _clock_is_right(found: dict[str, Any]) -> str | None:
    # Files from the future make tools that compare times rebuild for ever.
    newest = Path(__file__).stat().st_mtime
    if time.time() >= newest - 86_400:
        return None
    return f"this machine's clock says {found['limits']['utc']}, before this package was installed; set it."


def describe(found: dict[str, Any]) -> str:
    """What was found, as lines for a terminal."""
    machine, torch = found["machine"], found["torch"]
    lines = [
        f"{machine['system']} {machine['architecture']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB",
        "versions: " + ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        "compilers: " + ("; ".join(text for text in found["compilers"].values() if text) or "none"),
        f"torch: CUDA {torch.get('cuda') or 'no'}, ROCm {torch.get('rocm') or 'no'}, gloo "
        f"{'yes' if torch.get('gloo') else 'no'}, NCCL {torch.get('nccl_version') or 'no'}",
    ]
    for number, device in enumerate(found["devices"]):
        recipes = ", ".join(device["fp8_recipes"]) or (
            "none (an AMD device; Megatron's FP8 goes through Transformer Engine's CUDA kernels)"
            if torch.get("rocm") else "none (needs compute capability 8.9 or higher)"
        )
        lines.append(
            f"device {number}: {device['name']}, {device['memory_gib']} GiB, compute capability "
            f"{'.'.join(map(str, device['capability']))}, bf16 {'yes' if device['bf16'] else 'no'}; "
            f"FP8 recipes: {recipes}"
        )
    if not found["devices"]:
        lines.append(
            "no GPU: training runs on the CPU over gloo; bf16 works there, FP8 only as this project's own arithmetic."
        )
    lines += ["", "what works here"]
    for item in found["features"]:
        lines.append(f"  {'yes' if item['works'] else 'no ':3s}  {item['name']}" + (
            "" if item["works"] else f": needs {item['needs']}"
        ))
    lines += ["", "optional packages"]
    for item in found["optional"]:
        if item["works"]:
            lines.append(f"  {item['name']:20s} works      {item['for']}")
        else:
            lines += [f"  {item['name']:20s} {item['error']}", f"    for {item['for']}: {item['how']}"]
    limits = found["limits"]
    lines += [
        "",
        f"limits: {limits['open_files'] or 'unlimited'} open files, {limits['shared_memory_gib']} GiB shared memory, "
        f"clock {limits['utc']}",
        "",
    ]
    lines += [f"problem: {problem}" for problem in found["problems"]] or ["nothing is in the way of training here."]
    return "\n".join(lines)
