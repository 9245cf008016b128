"""The package itself: its public names, its imports, its types, and its messages."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import preft_client
from preft_client import Adapters, AsyncAdapters, AsyncClient, AsyncStream, Client, Stream, messages

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "client" / "preft_client"
FORBIDDEN = ("torch", "vllm", "ray", "preft", "preft_loadgen", "transformers", "fastapi", "uvicorn", "yaml", "numpy")
PUBLIC = """
Adapter AdapterExists AdapterPage AdapterPlace AdapterUnavailable Adapters AsyncAdapters AsyncClient
AsyncStream BadReply Choice Client ConfigError ConnectionFailed DeadlineExceeded Delta EngineFailed Generation
InvalidAdapter InvalidRequest Message ModelNotFound NotAllowed NotSupported NumbersNotFinite Parameters Parsed
PreftError Prompt QueueFull RateLimited ServerError ShuttingDown SourceNotFound Stream StreamBroken TLS
TokenLogprob TooManyBytes ToolCall ToolCallDelta TransferFailed Unauthenticated Unavailable Usage Worker WorkerLost
"""
METHODS = {
    Client: "adapters chat close generate parse ready stream stream_chat wait_ready workers",
    Adapters: "add get list page pin places remove unpin upload wait",
    Stream: "cancel generation read",
}
TWINS = [(Client, AsyncClient), (Adapters, AsyncAdapters), (Stream, AsyncStream)]


def test_public_names() -> None:
    assert sorted(preft_client.__all__) == PUBLIC.split()
    for name in preft_client.__all__:
        assert hasattr(preft_client, name)


@pytest.mark.parametrize(("blocking", "asynchronous"), TWINS)
def test_both_styles_have_the_same_calls(blocking: type, asynchronous: type) -> None:
    def calls(cls: type) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if not name.startswith("_")}

    own, other = calls(blocking), calls(asynchronous)
    assert set(own) | ({"adapters"} if blocking is Client else set()) >= set(METHODS[blocking].split()) - {"generation"}
    assert set(own) == set(other)
    for name, method in own.items():
        assert inspect.signature(method).parameters == inspect.signature(other[name]).parameters, name
        assert method.__doc__
    constructors = [inspect.signature(cls).parameters for cls in (Client, AsyncClient)]
    assert constructors[0] == constructors[1]


def in_process(code: str) -> None:
    path = [str(ROOT / folder) for folder in ("client", "services", "loadgen")]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {path}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_import_is_light() -> None:
    """It works where nothing else of the project can be imported."""
    in_process(
        f"forbidden = {FORBIDDEN}\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in forbidden: raise ImportError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import preft_client, preft_client.client\n"
        "preft_client.Client('grpc://127.0.0.1:1').close()\n"
        "preft_client.Client('http://127.0.0.1:1').close()\n"
        "assert not set(forbidden) & set(sys.modules)\n"
    )


@pytest.mark.parametrize("first", ["preft_client", "preft.rpc.inference_pb2"])
def test_the_server_and_the_client_fit_in_one_process(first: str) -> None:
    """Both have messages of the same names."""
    in_process(
        f"import {first}\n"
        "import preft_client.messages as ours\n"
        "from preft.rpc import adapters_pb2, common_pb2, inference_pb2\n"
        "request = ours.message_class('GenerateRequest')(model='m', n=2, sampling={'top_k': 3})\n"
        "theirs = inference_pb2.GenerateRequest.FromString(request.SerializeToString())\n"
        "assert (theirs.model, theirs.n, theirs.sampling.top_k) == ('m', 2, 3)\n"
        "assert type(request) is not type(theirs)\n"
    )


def test_another_version_of_the_servers_messages_does_no_harm() -> None:
    in_process(
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "file = descriptor_pb2.FileDescriptorProto(name='preft/rpc/inference.proto', package='preft.v1')\n"
        "file.message_type.add(name='GenerateRequest')\n"
        "descriptor_pool.Default().Add(file)\n"
        "from preft_client.messages import message_class\n"
        "message_class('GenerateRequest')(model='m')\n"
    )


def test_the_messages_are_what_protoc_makes_today(tmp_path: Path) -> None:
    generated = ROOT / "services" / "preft" / "rpc" / "inference_pb2_grpc.py"
    installed = importlib.metadata.version("grpcio-tools")
    if f"GRPC_GENERATED_VERSION = '{installed}'" not in generated.read_text():
        pytest.skip(f"the code was generated with another grpcio-tools than {installed}")
    out = tmp_path / "api.binpb"
    files = [f"proto/{name}.proto" for name in ("common", "inference", "adapters")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Ipreft/rpc=proto", f"--descriptor_set_out={out}", *files]
    subprocess.run(command, cwd=ROOT, check=True)
    assert out.read_bytes() == (PACKAGE / "api.binpb").read_bytes(), "api.binpb is stale: run make proto"
    with pytest.raises(KeyError):
        messages.message_class("PrefillRequest")


def test_only_the_declared_dependencies_are_imported() -> None:
    project = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    declared = {name.split(">")[0] for name in project["dependencies"]}
    assert declared == {"grpcio", "httpx", "protobuf", "pydantic"}
    allowed = {"grpc", "httpx", "google", "pydantic", "pydantic_core", "preft_client"} | set(sys.stdlib_module_names)
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # those for type checkers alone are in a block of their own
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed, path


def test_type_checkers_see_the_types(tmp_path: Path) -> None:
    """As a user's project does: the wrong lines are errors, the right ones aren't."""
    (tmp_path / "use.py").write_text(
        "from preft_client import AsyncClient, Client, Parsed\n"
        "from pydantic import BaseModel\n"
        "class City(BaseModel):\n"
        "    name: str\n"
        "with Client() as client:\n"
        "    text: str = client.generate('hi', model='m', max_tokens=3).text\n"
        "    parsed: Parsed[City] = client.parse([], City, model='m')\n"
        "    name: str = parsed.value.name\n"
        "    client.generate('hi', model='m', max_tokens='3')  # wrong\n"
        "    client.generate('hi', model='m', temprature=0)  # wrong\n"
        "    client.generate('hi')  # wrong\n"
        "async def use(client: AsyncClient) -> str:\n"
        "    async with client.stream('hi', model='m') as stream:\n"
        "        async for delta in stream:\n"
        "            return delta.text\n"
        "    return client.generate('hi', model='m').text  # wrong\n"
    )
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {ROOT / 'client'}\ncache_dir = {tmp_path}\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "use.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = {
        int(line.split(":")[1]) for line in ran.stdout.splitlines() if line.startswith("use.py") and "error" in line
    }
    wrong = [
        number for number, line in enumerate((tmp_path / "use.py").read_text().splitlines(), 1) if "# wrong" in line
    ]
    assert sorted(found) == wrong, ran.stdout
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.long
def test_the_wheel_alone_is_enough(tmp_path: Path) -> None:
    """`pip install ./client` in a new environment."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    wheels = tmp_path / "wheels"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(ROOT / "client")], check=True)
    [wheel] = wheels.iterdir()
    subprocess.run([*pip, "install", "--quiet", str(wheel)], check=True)
    code = (
        "import preft_client, importlib.metadata as m; c = preft_client.Client('grpc://127.0.0.1:1', retries=0)\n"
        "assert m.version('preft-client') == preft_client.__version__\n"
        "try: c.generate('hi', model='m')\n"
        "except preft_client.ConnectionFailed: print('fine')\n"
    )
    ran = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout == "fine\n", ran.stderr
    listed = subprocess.run(
        [*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout.lower()
    assert not [name for name in ("torch", "vllm", "ray", "preft-serve") if f"\n{name}==" in listed]
