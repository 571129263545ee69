"""A pytest plugin: the compiled extension is the file that the environment's SANITIZED names."""

import importlib.machinery
import importlib.util
import os
import sys

NAME = "cogvx_kernels._C"


def load(path: str) -> None:
    """Make it the extension, for what has not been imported yet."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(module)
    sys.modules[NAME] = module


load(os.environ["SANITIZED"])


def pytest_report_header() -> str:
    from cogvx_kernels import _extension

    return f"extension: {_extension._C.__file__}"
