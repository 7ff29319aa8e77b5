"""What the code itself must not do, wherever it is written next: read from its syntax tree."""

from __future__ import annotations

import ast

import pytest

from tests.unit.test_architecture import ROOT, imports, sources, tree_of

FILES = sources("stages", "rewards", "configs", "launch")
PICKLE = {"stages/nodes/once.py"}  # between processes of one node, in a folder that only this user can enter, of a random name
SOCKETS = {"launch/meeting.py"}  # where nodes meet: JSON lines, and nothing of what is said is run


def calls(path):
    """(dotted name, keyword arguments) of every call in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize(
    "forbidden",
    ["numpy.load", "np.load", "pickle.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen", "marshal.loads", "shelve.open", "joblib.load"],
)
def test_nothing_opens_code_or_runs_text(forbidden):
    assert not [str(path.relative_to(ROOT)) for path in FILES for name, _ in calls(path) if name == forbidden]


def test_pickles_are_read_in_one_place():
    assert {str(path.relative_to(ROOT)) for path in FILES for name, _ in calls(path) if name == "pickle.loads"} == PICKLE


def test_no_shell_and_no_code_of_models():
    for path in FILES:
        for name, words in calls(path):
            assert words.get("shell", "False") == "False", f"{path}: {name}"
            assert words.get("trust_remote_code", "False") == "False", f"{path}: {name}"
            assert words.get("weights_only", "False" if name == "torch.load" else "True") == "True", f"{path}: {name}"


def test_nothing_serves():
    """There is no HTTP server; whoever adds one binds it to loopback and comes by here."""
    servers = {"http.server", "socketserver", "xmlrpc.server", "wsgiref", "gradio", "fastapi", "uvicorn", "flask", "aiohttp.web"}
    assert not [f"{path.relative_to(ROOT)} imports {name}" for path in FILES for name in imports(path) if name in servers]
    listening = {str(path.relative_to(ROOT)) for path in FILES for name, _ in calls(path) if name.endswith(("create_server", "HTTPServer"))}
    assert listening == SOCKETS
