"""Fixtures that several folders of tests use by name."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """A killed process and the one that compares with it must add numbers up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def align(registry, capsys):
    """`align registry WORDS` on the module's own `registry`: exit code, stdout, stderr."""
    from launch.cli import main

    def run(*words):
        code = main(["registry", words[0], "--registry", str(registry.root), *words[1:]])
        out, err = capsys.readouterr()
        return code, out, err

    return run
