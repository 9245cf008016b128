"""The Kubernetes manifests: Kubernetes' own schemas, and names, ports, paths and times that fit together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from preft.cli import parser
from preft.core.settings import Settings
from preft.gateway.text.tokenizer import Tokenizer
from support.deployed_settings import read_deployed
from support.monitored import DEPLOY, app_with_workers
from support.small_tokenizers import byte_level

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
STOP_SECONDS = 15  # of a stop, beside shutdown_timeout: docs/configuration.md
PODS = ("gateway", "prefill", "decode")
KUBERAY = "kuberay.yaml"  # instead of prefill.yaml and decode.yaml
KUBERAY_SCHEMA = Path(__file__).parents[2] / "data" / "kuberay" / "raycluster.json"


def manifests(*kinds: str) -> Iterator[dict[str, Any]]:
    for name in KUSTOMIZATION["resources"]:
        for manifest in yaml.safe_load_all((FOLDER / name).read_text()):
            if not kinds or manifest["kind"] in kinds:
                yield manifest


def pods() -> dict[str, dict[str, Any]]:
    """Pod templates by the name of their Deployment or StatefulSet."""
    return {one["metadata"]["name"]: one["spec"]["template"] for one in manifests("Deployment", "StatefulSet")}


def container(name: str) -> dict[str, Any]:
    (only,) = pods()[name]["spec"]["containers"]
    return dict(only)


def settings_of(name: str, folder: Path) -> Settings:
    """The settings with which the pod starts. The pod's address is 10.1.2.3."""
    environment = {one["name"]: one.get("value", "10.1.2.3") for one in container(name)["env"]}
    assert environment.pop("PREFT_CONFIG") == "/etc/preft/cluster.yaml"
    return read_deployed(FOLDER / "cluster.yaml", folder, environment)


def test_kubernetes_knows_every_field() -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    broken = next(manifests("Deployment"))
    broken["spec"]["template"]["spec"]["terminationGraceSeconds"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_kustomize_has_every_file_and_image() -> None:
    files = {*KUSTOMIZATION["resources"], *KUSTOMIZATION["configMapGenerator"][0]["files"], "kustomization.yaml"}
    assert files | {KUBERAY} == {path.name for path in FOLDER.iterdir()}
    images = {image["name"] for image in KUSTOMIZATION["images"]}
    assert {container(name)["image"] for name in PODS} == images


@pytest.mark.parametrize("name", PODS)
def test_a_pod_starts_with_its_settings(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    program, *arguments = container(name)["args"]
    assert program == "preft"
    assert parser().parse_args(arguments).command == ("gateway" if name == "gateway" else "worker")
    settings.check_internal_host("10.1.2.3")
    if name == "gateway":
        assert settings.peer_host == "10.1.2.3"
        settings.check_public_host()
    else:
        assert arguments == ["worker", "--role", name]
        assert settings.worker.advertise_host == "10.1.2.3"


@pytest.mark.parametrize("name", PODS)
def test_ports_and_probes_exist(name: str, tmp_path: Path) -> None:
    settings, own = settings_of(name, tmp_path), container(name)
    (port,) = own["ports"]
    assert port["containerPort"] == (settings.port if name == "gateway" else settings.worker.port)
    probes = {kind: own[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness") if f"{kind}Probe" in own}
    assert "readiness" in probes
    assert {next(probe[how] for how in ("httpGet", "tcpSocket") if how in probe)["port"] for probe in probes.values()} \
        == {port["name"]}  # fmt: skip
    if name == "gateway":
        paths = {route.path for route in app_with_workers(Tokenizer.load(byte_level(tmp_path))).routes}  # type: ignore[attr-defined]
        assert {probe["httpGet"]["path"] for probe in probes.values()} == {"/health", "/ready"} <= paths


@pytest.mark.parametrize("name", PODS)
def test_requests_have_time_to_end(name: str, tmp_path: Path) -> None:
    before = container(name).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    wait = settings_of(name, tmp_path).shutdown_timeout + STOP_SECONDS + int(before[1])
    assert pods()[name]["spec"]["terminationGracePeriodSeconds"] >= wait
    assert name != "gateway" or int(before[1]) >= 5


def test_names_lead_to_pods() -> None:
    templates = pods()
    labels = {name: template["metadata"]["labels"] for name, template in templates.items()}
    ports = {name: {port["name"] for port in container(name)["ports"]} for name in templates}
    chosen = set()
    for service in manifests("Service"):
        (name,) = [name for name, own in labels.items() if service["spec"]["selector"].items() <= own.items()]
        assert {port.get("targetPort", port["name"]) for port in service["spec"]["ports"]} <= ports[name]
    for budget in manifests("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"]
        chosen |= {name for name, own in labels.items() if wanted.items() <= own.items()}
    assert chosen == set(PODS)
    for one in manifests("Deployment", "StatefulSet"):
        name = one["metadata"]["name"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    assert {own["app"] for own in labels.values() if own.get("part-of") == "preft"} == set(PODS)


@pytest.mark.parametrize("name", [*PODS, "redis"])
def test_volumes_and_the_files_in_them_exist(name: str) -> None:
    """Every file that the settings name lies in a mounted volume, and every secret is a file."""
    spec, own = pods()[name]["spec"], container(name)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    claims = {one["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] for one in manifests("StatefulSet")}
    mounts = {mount["mountPath"]: mount["name"] for mount in own["volumeMounts"]}
    assert set(mounts.values()) == volumes.keys() | (claims if name == "redis" else set())
    if name == "redis":
        return
    given = (FOLDER / "cluster.yaml").read_text() + str(own["env"])
    for path in re.findall(r"(/(?:run|var|model)[\w/.-]*)", given):
        (volume,) = [mounts[mount] for mount in mounts if path == mount or path.startswith(f"{mount}/")]
        items = volumes[volume].get("secret", {}).get("items")
        assert items is None or Path(path).name in {item["path"] for item in items}
    secrets = {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
    assert secrets == {"preft", "preft-tls", *(["preft-keys"] if name == "gateway" else [])}
    assert not [one for one in own["env"] if "secretKeyRef" in str(one)]


@pytest.mark.parametrize("name", [*PODS, "redis"])
def test_a_container_can_do_little(name: str) -> None:
    spec, own = pods()[name]["spec"], container(name)["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (
        spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is own["allowPrivilegeEscalation"] is False
    )
    assert own["capabilities"] == {"drop": ["ALL"]}


@pytest.fixture
def kuberay() -> list[dict[str, Any]]:
    """The RayCluster, and the manifests beside it."""
    return list(yaml.safe_load_all((FOLDER / KUBERAY).read_text()))


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": cluster["spec"]["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]
    }


def test_kuberay_knows_every_field(kuberay: list[dict[str, Any]]) -> None:
    cluster, *others = kuberay
    schema = json.loads(KUBERAY_SCHEMA.read_text())
    jsonschema.validate(cluster, schema)
    for manifest in others:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    for name, group in groups(cluster).items():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    cluster["spec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate(cluster, schema)


def test_kuberay_pods_start_what_the_settings_ask_for(kuberay: list[dict[str, Any]], tmp_path: Path) -> None:
    cluster, serve, *budgets = kuberay
    (own,) = serve["spec"]["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value", "10.1.2.3") for one in own["env"] if one["name"].startswith("PREFT_")}
    assert environment.pop("PREFT_CONFIG") == "/etc/preft/cluster.yaml"
    settings = read_deployed(FOLDER / "cluster.yaml", tmp_path, environment)
    assert settings.ray_address == f"{cluster['metadata']['name']}-head-svc:6379"
    for role in settings.roles:
        group = groups(cluster)[role]
        assert settings.engine(role).fill_nodes
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == settings.engine(role).resources
        spec = group["template"]["spec"]
        (ray,) = spec["containers"]
        drain = {one["name"]: one["value"] for one in ray["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert settings.shutdown_timeout < float(drain) < spec["terminationGracePeriodSeconds"]
        assert str(ray["readinessProbe"]["tcpSocket"]["port"]) == group["rayStartParams"]["node-manager-port"]
        assert {one["mountPath"] for one in ray["volumeMounts"]} > {"/model", "/run/secrets/preft-tls", "/dev/shm"}
    labels = [groups(cluster)[role]["template"]["metadata"]["labels"] for role in settings.roles]
    wanted = [budget["spec"]["selector"]["matchLabels"] for budget in budgets]
    assert sorted(map(str, wanted)) == sorted(str({"app": label["app"]}) for label in labels)
    grace = serve["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= settings.shutdown_timeout + STOP_SECONDS
    assert {image["name"] for image in KUSTOMIZATION["images"]} == {own["image"], ray["image"]}


def test_kuberays_head_can_be_lost(kuberay: list[dict[str, Any]]) -> None:
    """Its tables are in the Redis of the manifests, and `preft serve` waits for it as long as KubeRay's nodes do."""
    cluster, serve, *_ = kuberay
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    (redis,) = (one["metadata"]["name"] for one in manifests("Service") if one["spec"]["selector"] == {"app": "redis"})
    assert options["redisAddress"] == f"{redis}:6379"
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    command = re.search(rf"create secret generic {secret['name']} (.*\n.*)", (FOLDER / KUBERAY).read_text())
    assert command is not None
    assert f"--from-literal={secret['key']}=" in command[1]
    (own,) = serve["spec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"} in own["env"]


def test_the_documented_commands_make_what_the_pods_mount() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()
    used = {item["key"] for name in pods() for volume in pods()[name]["spec"]["volumes"]
            for item in volume.get("secret", {}).get("items", ())}  # fmt: skip
    tls = set(re.findall(r"/run/secrets/preft-tls/([\w.]+)", (FOLDER / "cluster.yaml").read_text()))
    keys = set(re.findall(r"/run/secrets/preft-keys/([\w.]+)", str(container("gateway")["env"])))
    assert len(keys) == 1
    assert set(re.findall(r"--from-file=(\w[\w.]*)", page)) == used | tls | keys
    for name in ("preft", "preft-tls", "preft-keys"):
        assert re.search(rf"create secret \w+ {name} ", page)
