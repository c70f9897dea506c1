"""Run notebooks in the kernel of another environment than the one that this runs in."""

import json
import os
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager


def kernel_of(argv: list[str], folder: Path) -> AsyncKernelManager:
    """A manager of a kernel that `argv` starts; `folder` gets its description.

    Args:
      argv: the program and its arguments, before those that name the connection.
      folder: where to write the description.
    """
    spec = {
        "argv": [*argv, "-f", "{connection_file}", "--IPKernelApp.log_level=40"],
        "display_name": "elsewhere",
        "language": "python",
    }
    (folder / "elsewhere").mkdir(parents=True, exist_ok=True)
    (folder / "elsewhere" / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    found = KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="elsewhere", kernel_spec_manager=found)


def bare_environment(**changes: str) -> dict[str, str]:
    """This process's environment variables without those that lead Python to its packages.

    Nor the one that torch, once it has compiled something, leaves for its children.
    """
    own = ("PYTHONPATH", "PYTHONHOME", "TORCHINDUCTOR_CACHE_DIR")
    return {**{k: v for k, v in os.environ.items() if k not in own}, **changes}
