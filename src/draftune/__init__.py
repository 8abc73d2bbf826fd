"""draftune: fine-tune diffusion and flow image models on a reward by backpropagation through sampling.

`__init__.pyi` lists the public names and their modules. They are imported on first use, so that `draftune --help` does
not wait for torch.
"""

import ast as _ast
import os as _os
from importlib import import_module as _import_module
from pathlib import Path as _Path

__version__ = "0.1.0"

# diffusers imports bitsandbytes if it is installed. That downloads kernels from the hub and runs them, on CPUs with
# AVX512-BF16 and on MPS, if the package `kernels` is installed too. It does without them if their path is none.
_no_kernels = [f"kernels-community/{name}=no-kernel" for name in ("quantization-bitsandbytes", "bitsandbytes-mps")]
_os.environ["LOCAL_KERNELS"] = ":".join([*_no_kernels, *filter(None, [_os.environ.get("LOCAL_KERNELS")])])

_modules = {
    alias.name: node.module
    for node in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = list(_modules)


def __getattr__(name: str) -> object:
    if name not in _modules:
        raise AttributeError(f"module 'draftune' has no attribute {name!r}")
    return getattr(_import_module(str(_modules[name])), name)
