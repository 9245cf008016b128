"""docker-compose.yml and .env.example say only what the compose specification and PreFT Serve know."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from preft.core.environment import check_names, read_environment
from preft.core.settings import Settings, load_settings

ROOT = Path(__file__).parents[3]
MAIN, NODE = ROOT / "docker-compose.yml", ROOT / "docker-compose.node.yml"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
PROFILES = {"cpu": "-cpu", "gpu": ""}  # and the end of the names of the profile's services
SHARED = {"redis", "ray-tables", "prometheus", "grafana"}
WHERE_THEY_DIFFER = {"profiles", "image", "build", "volumes", "deploy"}


def example_variables() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose() -> dict[str, Any]:
    """docker-compose.yml with the defaults of its variables."""
    loaded: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", MAIN.read_text()))
    return loaded


@pytest.mark.parametrize("file", [MAIN, NODE], ids=lambda file: file.name)
def test_the_files_follow_the_compose_specification(file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_beside_the_specification_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text("services: {a: {image: b, port: ['1:1']}}")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_every_variable_is_in_the_example_with_its_default() -> None:
    used = VARIABLE.findall(MAIN.read_text())
    assert "${" not in VARIABLE.sub("", MAIN.read_text())
    assert set(used) == set(example_variables().items())


def test_the_example_explains_every_variable() -> None:
    before = ""
    for line in (ROOT / ".env.example").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before, f"{line} has no explanation"
        before = line


def test_every_file_that_is_mounted_exists() -> None:
    for name, service in compose()["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name}: {source}"
            else:
                assert source in compose()["volumes"], f"{name}: {source}"


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_has_all_services(profile: str) -> None:
    end = PROFILES[profile]
    own = {name for name, one in compose()["services"].items() if profile in one["profiles"]}
    assert own == SHARED | {f"{name}{end}" for name in ("head", "serve", "gateway", "prefill", "decode")}


def test_the_services_of_both_profiles_are_alike() -> None:
    services = compose()["services"]
    for name in [name for name in services if name.endswith("-cpu")]:
        one, other = services[name], services[name.removesuffix("-cpu")]
        assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} <= WHERE_THEY_DIFFER
    for name in ("prefill", "decode"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def settings_of(service: dict[str, Any], folder: Path) -> Settings:
    """What `preft serve` or `preft gateway` reads in the service's container."""
    environment = dict(service["environment"])
    for name, text in (("STATE", "redis://:p@redis:6379/0"), ("CLUSTER_SECRET", "s" * 64)):
        assert environment[f"PREFT_{name}_FILE"].startswith("/run/preft/")
        (folder / name).write_text(text)
        environment[f"PREFT_{name}_FILE"] = str(folder / name)
    mounted = dict(volume.split(":")[1::-1] for volume in service["volumes"])
    assert {environment["PREFT_MODEL"], environment["PREFT_ADAPTER_DIR"]} <= mounted.keys()
    check_names(environment)
    return load_settings(ROOT / mounted[environment["PREFT_CONFIG"]], None, read_environment(environment))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_setting_exists_and_fits_the_services(profile: str, tmp_path: Path) -> None:
    services, end = compose()["services"], PROFILES[profile]
    gateway = settings_of(services[f"gateway{end}"], tmp_path)
    serve = settings_of(services[f"serve{end}"], tmp_path)
    (head,) = services[f"head{end}"]["networks"]["default"]["aliases"]
    assert (
        serve.ray_address
        == f"{head}:6379"
        == services[f"{serve.roles[0].value}{end}"]["environment"]["PREFT_RAY_ADDRESS"]
    )
    assert services[f"gateway{end}"]["ports"][0].endswith(f":{gateway.port}")
    assert (gateway.host, gateway.insecure, serve.insecure) == ("0.0.0.0", True, True)
    assert set(gateway.allowed_hosts) >= {"gateway", "serve"}
    for role in serve.roles:
        assert serve.engine(role).fill_nodes
        assert serve.engine(role).resources == {role.value: 1}
        assert services[f"{role.value}{end}"]["command"] == ["node", role.value]


def test_every_process_with_ray_has_the_token() -> None:
    for name, service in compose()["services"].items():
        if name.removesuffix("-cpu") in ("head", "serve", "prefill", "decode"):
            environment = service["environment"]
            assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN_PATH"]) == (
                "token",
                "/run/preft/ray_token",
            )
            assert any(volume.split(":")[1] == "/run/preft" for volume in service["volumes"])


def test_the_heads_alone_reach_the_tables_of_ray() -> None:
    """The Redis with Ray's tables has no password."""
    loaded = compose()
    (network,) = loaded["services"]["ray-tables"]["networks"]
    assert loaded["networks"][network] == {"internal": True}
    inside = {name for name, one in loaded["services"].items() if network in one.get("networks", ())}
    assert inside == {"ray-tables", "head", "head-cpu"}
    for head in ("head", "head-cpu"):
        assert loaded["services"][head]["environment"]["RAY_REDIS_ADDRESS"] == "ray-tables:6379"


def test_every_process_with_ray_outlives_the_head_for_as_long() -> None:
    for name, service in compose()["services"].items():
        if name.removesuffix("-cpu") in ("head", "serve", "prefill", "decode"):
            assert service["environment"]["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"


def test_no_port_is_open_to_other_machines_by_default() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
