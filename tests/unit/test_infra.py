"""What infra/ and ray_cluster.yaml say: valid by the schemas of who reads it, and the same as the code beside it."""

import copy
import gzip
import os
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayclip.cli.main import get_command
from rayclip.orchestration.cluster.resources import MOST_LABELS, Capacity, most_of, resource_request, shortage
from rayclip.orchestration.cluster.runtime_env import check_paths
from rayclip.serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
CRDS = "RAYCLIP_KUBERAY_CRDS"
"""Names a folder of KubeRay's custom resource definitions, helm-chart/kuberay-operator/crds of ray-project/kuberay,
each gzipped. Without it what is written here is checked alone."""
KUBERAY = sorted((ROOT / "infra/kuberay").glob("*.yaml"))


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kuberay(kind):
    return [d for path in KUBERAY for d in documents(path) if d["kind"] == kind]


def cluster_spec(resource):
    return resource["spec"].get("rayClusterSpec") or resource["spec"]["rayClusterConfig"]


RAY = [*kuberay("RayJob"), *kuberay("RayService")]


# --- AWS


@pytest.fixture(scope="module")
def ray_cluster():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_takes_the_cluster_on_aws(ray_cluster):
    prepared = prepare_config(copy.deepcopy(ray_cluster))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert {name: kind["max_workers"] for name, kind in types.items() if name != "head"} == {"gpu": 4, "loader": 4}
    spot = {name: "InstanceMarketOptions" in kind["node_config"] for name, kind in types.items()}
    assert spot == {"head": False, "gpu": True, "loader": True}
    assert "GPU" not in types["loader"]["resources"]
    assert all(
        "pip install" not in command for command in prepared["head_setup_commands"][len(prepared["setup_commands"]) :]
    )
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "availble_node_types": {}})


def test_the_cluster_on_aws_installs_what_was_tested_and_asks_for_a_token(ray_cluster):
    installs = [command for command in ray_cluster["setup_commands"] if "pip install" in command]
    assert installs and all("-c ~/rayclip/constraints.txt" in command for command in installs)
    sources = [source for source in ray_cluster["file_mounts"].values() if source.startswith(".")]
    assert all((ROOT / source).exists() for source in sources)
    assert any("RAY_AUTH_MODE=token" in command for command in ray_cluster["setup_commands"])
    assert "~/.ray/auth_token" in ray_cluster["file_mounts"]


def test_the_cluster_on_aws_says_how_far_it_grows(ray_cluster):
    (start,) = [command for command in ray_cluster["head_start_ray_commands"] if "--head" in command]
    said = dict(pair.split("=") for pair in re.search(r"--labels=(\S+)", start)[1].split(","))
    types = [kind for kind in ray_cluster["available_node_types"].values() if "max_workers" in kind]
    most = {name: sum(k["resources"].get(name, 0) * k["max_workers"] for k in types) for name in MOST_LABELS}
    assert most_of([said]) == most
    assert sum(kind["max_workers"] for kind in types) == ray_cluster["max_workers"]


# --- Kubernetes


def strict(schema):
    """A structural schema that refuses what Kubernetes would drop in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed = not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema
        result |= {"additionalProperties": False} if closed else {}
    return result


@pytest.fixture(scope="module")
def schemas():
    if CRDS not in os.environ:
        pytest.skip(f"NOT CHECKED against KubeRay's own definitions: {CRDS} must name their folder")
    found = {}
    for path in sorted(Path(os.environ[CRDS]).glob("*.yaml.gz")):
        definition = yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the definition leaves open
        found[definition["spec"]["names"]["kind"]] = schema
    assert found.keys() >= {"RayJob", "RayService"}, f"{CRDS}={os.environ[CRDS]} lacks RayJob or RayService"
    return found


def errors_of(schemas, resource):
    validator = jsonschema.Draft202012Validator(schemas[resource["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


def test_kuberay_takes_the_manifests(schemas):
    assert len(RAY) == 3
    for resource in RAY:
        assert errors_of(schemas, resource) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "shutdownAfterJobFinish"), True),
        (("spec", "backoffLimit"), "three"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "container"), []),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 1),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(schemas, path, value):
    resource = copy.deepcopy(kuberay("RayJob")[0])
    target = resource
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    assert len(errors_of(schemas, resource)) == 1


FIELDS = {
    "RayJob": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"}
    | {"rayClusterSpec"},
    "RayService": {"serveConfigV2", "rayClusterConfig"},
}
"""Of a spec, those that ours have: KubeRay drops what it does not know in silence, so a slip is a missing setting."""
OPTIONAL = {
    "submissionMode",
    "excludeHeadPodFromServeSvc",
    "runtimeEnvYAML",
    "activeDeadlineSeconds",
    "upgradeStrategy",
    "suspend",
}
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
PORTS = {6379: "gcs-server", 8265: "dashboard", 10001: "client", 8000: "serve", 8080: "metrics"}


@pytest.mark.parametrize("resource", RAY, ids=lambda resource: resource["metadata"]["name"])
def test_a_manifest_has_the_fields_that_kuberay_reads(resource):
    assert resource["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", resource["metadata"]["name"])
    spec = resource["spec"]
    assert FIELDS[resource["kind"]] <= spec.keys() <= FIELDS[resource["kind"]] | OPTIONAL
    cluster = cluster_spec(resource)
    assert CLUSTER_FIELDS <= cluster.keys() <= CLUSTER_FIELDS | {"enableInTreeAutoscaling", "autoscalerOptions"}
    workers = cluster["workerGroupSpecs"]
    assert HEAD_FIELDS <= cluster["headGroupSpec"].keys() <= HEAD_FIELDS | {"labels", "serviceType"}
    assert all(WORKER_FIELDS <= group.keys() <= WORKER_FIELDS | {"labels"} for group in workers)
    assert len({group["groupName"] for group in workers}) == len(workers)
    assert all(0 <= g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in workers)


@pytest.mark.parametrize("resource", RAY, ids=lambda resource: resource["metadata"]["name"])
def test_a_pod_has_one_image_its_ports_and_what_it_takes(resource):
    cluster = cluster_spec(resource)
    pods = [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len(containers) == len(pods), "Ray runs in the first container; a second would take room unasked"
    images = {container["image"] for container in containers}
    assert all(re.fullmatch(r"rayclip\S*:[a-z0-9][\w.-]*", image) and ":latest" not in image for image in images)
    for container in containers:
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= limits.keys() and requests == limits, "else Ray takes the pod for larger than it is"
        ports = {port["containerPort"]: port["name"] for port in container.get("ports", [])}
        assert ports.items() <= PORTS.items()
    for pod in pods:
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("resource", RAY, ids=lambda resource: resource["metadata"]["name"])
def test_a_cluster_on_kubernetes_asks_for_a_token_and_says_how_far_it_grows(resource):
    spec = cluster_spec(resource)
    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    nodes = [(limits_of(group), group["maxReplicas"]) for group in spec["workerGroupSpecs"]]
    has_gpu = [bool(limits["GPU"]) for limits, _ in nodes]
    assert has_gpu == [True, False]
    most = {name: sum(limits[name] * count for limits, count in nodes) for name in MOST_LABELS}
    assert most_of([spec["headGroupSpec"]["labels"]]) == most


def limits_of(group):
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}


@pytest.mark.parametrize("resource", kuberay("RayJob"), ids=lambda resource: resource["metadata"]["name"])
def test_a_job_on_kubernetes_is_one_that_there_is(resource):
    spec = resource["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] and spec["ttlSecondsAfterFinished"]
    python, option, module, path, *overrides = shlex.split(spec["entrypoint"])
    assert (python, option) == ("python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    config, summary = get_command(module.removeprefix("jobs.")).parse([path, *overrides])
    problems, shared = check_paths(config, summary, [], ROOT)
    assert not problems and all(path.startswith("/shared/") for path in shared)
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (
        shortage(
            resource_request(config), Capacity([limits_of(g) for g in groups for _ in range(g["maxReplicas"])], {})
        )
        is None
    )


def test_the_service_on_kubernetes_is_the_one_in_infra_serve():
    (service,), (environment,) = kuberay("RayService"), kuberay("ConfigMap")
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert served == yaml.safe_load((ROOT / "infra/serve/gpu.yaml").read_text())
    ServeConfig.model_validate(served["applications"][0]["args"])
    lines = [line for line in (ROOT / "infra/serve/environment").read_text().splitlines() if not line.startswith("#")]
    assert environment["data"] == {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    spec = cluster_spec(service)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": environment["metadata"]["name"]}}]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/etc/rayclip"]


# --- images


@pytest.mark.parametrize("path", ["infra/docker/Dockerfile", "infra/mlflow/Dockerfile"])
def test_an_image_copies_what_is_there_and_installs_what_was_tested(path):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY") and "--from" not in line]
    sources = {source for line in copied for source in line}
    assert sources and all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / path).with_name("Dockerfile.dockerignore")
    if ignored.exists():
        assert sources == {line[1:] for line in ignored.read_text().splitlines() if line.startswith("!")}
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    names = {line.partition("==")[0].lower() for line in constraints}
    pinned = re.findall(r"\b([a-z0-9-]+)==([0-9.]+)", text)
    assert all(f"{name}=={version}" in constraints for name, version in pinned if name in names)
    installs = [command for command in re.split(r"&&|\n", text) if "pip install" in command]
    assert all("constraints.txt" in command for command in installs)
    users = [line.split()[1] for line in text.splitlines() if line.startswith("USER")]
    assert users and users[-1].partition(":")[0] == "1000"
    assert "python:3.11-" in text or "ARG PYTHON=3.11" in text


def test_the_images_that_manifests_name_are_those_that_are_built():
    built = set(re.findall(r"-t (\S+)", "".join(p.read_text() for p in (ROOT / "infra").rglob("Dockerfile"))))
    texts = [p.read_text() for folder in ("kuberay", "mlflow") for p in (ROOT / "infra" / folder).glob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"image: (rayclip\S+)", text)}
    assert named and named <= built
