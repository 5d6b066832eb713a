"""docs/launch.md: what can be known of it without a cluster."""

import ast
import re
import subprocess
import tomllib

import pytest
import yaml
from support.project import ROOT

from configs import default
from wavelet_jax.config import keys

PAGE = (ROOT / "docs" / "launch.md").read_text()
BASH = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def flags() -> set[str]:
    """Names of all flags that the code defines, and of absl's negated ones."""
    found = set()
    for path in [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "wavelet_jax").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ".DEFINE" not in (name := ast.unparse(node.func)):
                continue
            if isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
                found |= {f"no{node.args[0].value}"} if name.endswith("_bool") else set()
    return found


@pytest.mark.parametrize("script", BASH)
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("text", YAML)
def test_manifests_are_yaml_with_a_kind_and_a_name(text):
    documents = list(yaml.safe_load_all(text))
    assert documents
    for document in documents:
        assert document.keys() >= {"apiVersion", "kind", "metadata", "spec"}
        assert document["metadata"]["name"]


def test_the_job_fits_its_slice_and_its_queue():
    """Chips by topology, by pods and by quota are the same; one pod's end starts all again; names meet."""
    documents = {document["kind"]: document for text in YAML for document in yaml.safe_load_all(text)}
    jobset, queue = documents["JobSet"], documents["LocalQueue"]
    [slices] = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    selector = pod["nodeSelector"]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert slices["replicas"] * job["parallelism"] * chips == rows * columns
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == documents["ClusterQueue"]["metadata"]["name"]
    [group] = documents["ClusterQueue"]["spec"]["resourceGroups"]
    assert group["flavors"][0]["resources"][0]["nominalQuota"] == rows * columns
    assert group["flavors"][0]["name"] == documents["ResourceFlavor"]["metadata"]["name"]
    assert documents["ResourceFlavor"]["spec"]["nodeLabels"] == selector
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def commands() -> list[str]:
    """Every command of `train.py` and `eval.py` in the page, on one line, in scripts and in manifests."""
    found = re.findall(r"python (?:train|eval)\.py .*", re.sub(r"\\\n", " ", "\n".join(BASH)))
    for text in YAML:
        found += re.findall(r"- python\n +- (?:train|eval)\.py\n(?: +- -.*\n)+", text)
    return found


def test_flags_and_keys_of_the_commands_exist():
    assert len(commands()) >= 8
    there, known = set(keys.json_values(default.get_config())), flags()
    assert {"config", "workdir", "compile_only", "nocompile_only", "topology", "profile_steps"} <= known
    for command in commands():
        for flag in re.findall(r"(?:^|\s)--([\w.]+)", command):
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in there, flag
            else:
                assert flag in known, flag


def test_flags_and_keys_of_the_text_exist():
    there = set(keys.json_values(default.get_config()))
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    ours = flags()
    others = {"signal", "worker"}  # of sbatch and gcloud
    for flag in re.findall(r"`--([\w]+)", text):
        assert flag in ours | others, flag
    for key in re.findall(rf"`(?:config\.)?((?:{'|'.join(default.get_config())})\.\w+)`", text):
        assert key in there or key == "train.py", key


def test_configs_of_the_commands_exist():
    for command in commands():
        for path in re.findall(r"--config=(\S+?)(?::\w+)?(?:\s|$)", command):
            assert (ROOT / path).exists(), path


def test_paths_that_the_page_names_exist():
    for path in re.findall(r"`((?:tests|wavelet_jax|configs|docs)/[\w./]+)`", PAGE):
        assert (ROOT / path).exists(), path


def test_the_image_is_that_of_the_manifests():
    """Its name and folder, and an extra that the package has."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    jobset = next(document for text in YAML for document in yaml.safe_load_all(text) if document["kind"] == "JobSet")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    built = re.search(r"docker build --build-arg EXTRA=(\w+) --tag (\S+) \.", "\n".join(BASH))
    assert f"docker build {built[0].removeprefix('docker build ')}" in dockerfile
    assert built[2] == container["image"]
    assert re.search(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)[1] == container["workingDir"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {built[1], *re.findall(r"`EXTRA=(\w+)`", PAGE)} <= extras.keys()
    copied = {path for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for path in line.split()}
    assert all((ROOT / path).exists() for path in copied)
