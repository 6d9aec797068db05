"""Cluster files: every figure has a source, an installed package finds them, mistakes are named in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.errors import ConfigError
from megamoe.plan.cluster import EFFICIENCY_FILE, cluster_names, figures, load_cluster

ROOT = Path(__file__).parents[2]
SHIPPED = ("a100-40gb", "a100-80gb", "h100-80gb", "h200", "h800", "v100-32gb")


def test_the_shipped_clusters_are_those_that_are_promised():
    assert cluster_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_figure_has_a_source_and_no_source_is_of_nothing(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert set(cluster.sources) == set(figures(cluster))
    assert all(len(source) > 10 for source in cluster.sources.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_figures_of_a_cluster_are_plausible(name):
    """A slip of a power of ten, or of bits for bytes, shows in one of these."""
    cluster = load_cluster(name)
    assert cluster.memory_bytes < int(name.rpartition("-")[2].removesuffix("gb") if "-" in name else 141) * 1.07e9
    assert cluster.overhead_bytes < cluster.memory_bytes / 4
    assert 20 <= cluster.memory_bytes_per_second / cluster.memory_bytes <= 45  # HBM is read in 22 to 50 ms
    assert 100 <= cluster.peak("fp16") / cluster.memory_bytes_per_second <= 300  # FLOPs for a byte
    assert 4 <= cluster.intra_node.bytes_per_second / cluster.inter_node.bytes_per_second <= 24
    assert cluster.inter_node.latency_seconds > cluster.intra_node.latency_seconds


def test_fitted_constants_say_so():
    sources = load_cluster("h100-80gb").sources
    fitted = [key for key, source in sources.items() if "plan_accuracy.py" in source]
    assert len(fitted) == 6, fitted


def test_a_precision_that_the_accelerator_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"run.precision bf16 .* V100 .*: use fp32 or fp16"):
        load_cluster("v100-32gb").peak("bf16")


def test_an_own_file_starts_from_a_shipped_one(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text("cluster: h100-80gb\ninter_node: {bytes_per_second: 25e9}\nefficiency: {memory: 0.5}\n")
    ours, shipped = load_cluster(str(path)), load_cluster("h100-80gb")
    assert ours.name == "ours"
    assert ours.inter_node.bytes_per_second == 25e9
    assert ours.inter_node.latency_seconds == shipped.inter_node.latency_seconds
    assert ours.efficiency.memory == 0.5
    assert ours.efficiency.product == shipped.efficiency.product
    assert ours.peak("bf16") == shipped.peak("bf16")


WHOLE = (ROOT / "megamoe" / "plan" / "clusters" / "h100-80gb.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: h100\n", r'cluster is "h100" in \S*own.yaml: it must be one of a100-40gb'),
        ("cluster: h100-80gb\nmemory_byte: 3\n", r'unknown key "memory_byte" in \S*own.yaml: did you mean "memory_b'),
        ("cluster: h100-80gb\ninter_node: {latency: 3}\n",
         r'unknown key "inter_node.latency" in \S*own.yaml: did you mean "inter_node.latency_seconds"'),
        ("cluster: h100-80gb\nranks_per_node: 0\n", r"ranks_per_node is 0 in \S*own.yaml: it must be a whole num"),
        ("cluster: h100-80gb\nefficiency: {memory: 1.5}\n",
         r"efficiency.memory is 1.5 in \S*own.yaml: it must be a number above 0 and of at most 1"),
        ("cluster: h100-80gb\nmemory_bytes_per_second: fast\n",
         r'memory_bytes_per_second is "fast" in \S*own.yaml: it must be a number above 0'),
        (WHOLE.replace("ranks_per_node: 8\n", ""), r"ranks_per_node is missing in \S*own.yaml: it must be a whole"),
        ("cluster: h100-80gb\nintra_node: 3\n", r"intra_node is 3 in \S*own.yaml: it must be a group of bytes_per_sec"),
        ("[1, 2]\n", r"own.yaml does not hold groups of settings"),
        ("cluster: [\n", r"cannot read \S*own.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_cluster(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_cluster_names_the_nearest():
    with pytest.raises(ConfigError, match=r'no cluster or file "a100-80": did you mean "a100-80gb"'):
        load_cluster("a100-80")
    with pytest.raises(ConfigError, match=r"the clusters are a100-40gb, a100-80gb"):
        load_cluster("tpu")
    with pytest.raises(ConfigError, match=r"no cluster or file"):
        load_cluster("../efficiency")


def test_an_installed_package_finds_its_clusters(tmp_path):
    """Built as it would be installed, and asked from elsewhere."""
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "--build-lib",
             str(tmp_path / "lib"), "egg_info", "--egg-base", str(tmp_path)]  # fmt: skip
    done = subprocess.run(build, check=False, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    program = (
        "import megamoe.plan.cluster as c; assert c.__file__.startswith(LIB), c.__file__; "
        "print(*c.cluster_names()); c.load_cluster('h200'); assert c.EFFICIENCY_FILE.exists()"
    ).replace("LIB", repr(str(tmp_path / "lib")))
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "lib"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(SHIPPED)
    assert EFFICIENCY_FILE.name == "efficiency.yaml"
