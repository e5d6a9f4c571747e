"""The files of ``docs/deploy``, as far as can be seen without Docker, Kubernetes and a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends.sglang.diagnose.containers import Container, containers

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
POLICY = "/etc/hicache-io/policy.yaml"


def loaded(name: str) -> Any:
    return YAML(typ="safe").load(DEPLOY / name)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no `{program}` on PATH")


def test_the_document_names_each_of_them() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(deploy/([\w.-]+)\)", text))
    assert named == {path.name for path in DEPLOY.iterdir()} - {"Dockerfile.dockerignore"}


def compose(model: str = "MODEL") -> str:
    """As Compose reads it, with the variable filled in."""
    return re.sub(r"\$\{MODEL:\?[^}]*\}", model, (DEPLOY / "compose.yml").read_text(encoding="utf-8"))


def kubernetes(model: str = "MODEL") -> str:
    return (DEPLOY / "kubernetes.yml").read_text(encoding="utf-8").replace("Qwen/Qwen3-8B", model)


def server(text: str) -> Container:
    (found,) = containers(text)
    return found


@pytest.mark.parametrize("text", [compose(), kubernetes()], ids=["compose", "kubernetes"])
def test_a_container_serves_with_the_policy_and_metrics(text: str) -> None:
    found = server(text)
    assert found.variables == {"SGLANG_HICACHE_IO_POLICY": POLICY}
    assert found.words[:2] == ["sglang", "serve"]
    wanted = {"--enable-hierarchical-cache", "--hicache-io-backend=auto", "--enable-metrics", "--port=30000"}
    assert wanted <= set(found.words)


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize("text", [compose, kubernetes], ids=["compose", "kubernetes"])
def test_the_server_of_a_file_would_start(text: Any, tmp_path: Path) -> None:
    """By SGLang's own resolution of its options."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "num_key_value_heads": 4}
    model |= {"vocab_size": 512, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(model))
    given = text(str(tmp_path)).replace(POLICY, str(DEPLOY / "policy.yaml"))
    explain = ["explain", "--gpu-arch", "sm90", "--json", "--server-args", given]
    done = CliRunner().invoke(app, explain)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["backend"] == "hybrid"
    assert found["fence_forward"] == ["extend", "decode"]


@pytest.mark.parametrize(
    "text",
    [
        (DEPLOY / "policy.yaml").read_text(),
        next(YAML(typ="safe").load_all(kubernetes()))["data"]["policy.yaml"],
    ],
    ids=["file", "ConfigMap"],
)
def test_the_policies_are_valid_and_take_nothing_away(text: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["policy", "validate", str(path)])
    assert result.exit_code == 0, result.output
    assert YAML(typ="safe").load(text) == {"version": 1, "extends": "default", "rules": []}


def test_what_compose_mounts_is_there() -> None:
    file = loaded("compose.yml")
    for name, service in file["services"].items():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).resolve().is_file(), f"{name}: {source}"
                assert mode == ["ro"], f"{name}: {volume}"
            else:
                assert source in file["volumes"], f"{name}: {source}"
            assert target.startswith("/")
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} listens beyond this machine"
    build = file["services"]["sglang"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert file["services"]["sglang"]["ulimits"] == {"memlock": -1}


def test_compose_is_wired_up() -> None:
    """Prometheus scrapes the server and loads the alerts, Grafana asks that Prometheus."""
    services = loaded("compose.yml")["services"]
    targets = {volume.split(":")[1] for service in services.values() for volume in service["volumes"]}
    prometheus = loaded("prometheus.yml")
    ((target,),) = (each["targets"] for job in prometheus["scrape_configs"] for each in job["static_configs"])
    host, _, port = target.partition(":")
    assert f"--port={port}" in services[host]["command"]
    assert set(prometheus["rule_files"]) <= targets
    (source,) = loaded("grafana.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (provider,) = loaded("grafana-dashboards.yml")["providers"]
    shown = f"{provider['options']['path']}/hicache-io.json"
    assert shown in targets
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown


@needs("promtool")
def test_prometheus_takes_its_file(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus.yml").read_text().replace("/etc/prometheus", str(DEPLOY))
    (tmp_path / "prometheus.yml").write_text(text)
    ran = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 rules found" in ran.stdout


def test_kubernetes_is_wired_up() -> None:
    config, deployment, service = YAML(typ="safe").load_all(kubernetes())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["policy"]["configMap"]["name"] == config["metadata"]["name"]
    assert [f"{mounts['policy']}/{key}" for key in config["data"]] == [POLICY]
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    assert {each["targetPort"] for each in service["spec"]["ports"]} == {port["name"]}
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    (size,) = (int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--hicache-size="))
    limit = container["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Gi")) > size, "the host pool does not fit"


@pytest.mark.parametrize(
    ("written", "instead", "why"),
    [
        ("readinessProbe:", "readynessProbe:", "readynessProbe"),
        ("failureThreshold: 120", "failureThreshold: many", "failureThreshold"),
        ("{add: [IPC_LOCK]}", "[IPC_LOCK]", "capabilities"),
    ],
)
def test_kubernetes_takes_the_objects(written: str, instead: str, why: str) -> None:
    """By the schemas of its newest version that the validator brings; and not with a mistake in them."""

    def validate(text: str) -> None:
        for each in YAML(typ="safe").load_all(text):
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)

    validate(kubernetes())
    with pytest.raises(kubernetes_validate.ValidationError) as error:
        validate(kubernetes().replace(written, instead))
    assert why in f"{error.value.json_path} {error.value.message}"


def test_the_image_is_built_of_what_the_package_is_made_of() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    steps = [line.split()[0] for line in dockerfile.splitlines() if line and not line.startswith("#")]
    assert steps == ["ARG", "FROM", "RUN"]
    assert re.search(r"^FROM lmsysorg/sglang:", dockerfile, re.MULTILINE)
    let_in = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    about = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert let_in == folders | about


@needs("systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With programs that are here."""
    text = (DEPLOY / "sglang.service").read_text()
    assert text.count("/opt/sglang/bin/") == 2
    for name in ("hicache-io", "sglang"):
        (tmp_path / name).symlink_to("/bin/true")
    unit = tmp_path / "sglang.service"
    unit.write_text(text.replace("/opt/sglang/bin", str(tmp_path)))
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    # It reads the machine's other units too, and says what it thinks of them.
    ours = [line for line in ran.stderr.splitlines() if "sglang.service" in line]
    assert (ran.returncode, ours) == (0, [])


def test_the_unit_has_memory_to_pin_and_the_policy() -> None:
    lines = (DEPLOY / "sglang.service").read_text().splitlines()
    assert "LimitMEMLOCK=infinity" in lines
    assert f"Environment=SGLANG_HICACHE_IO_POLICY={POLICY}" in lines
