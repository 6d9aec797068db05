"""Nothing that a plan assumes is hidden in code."""

from megamoe.plan import compute, lifetime, network, timing
from megamoe.plan.assumptions import assumptions
from megamoe.plan.cluster import figures, load_cluster

UNITS = {"SECONDS_PER_DAY"}  # no assumption


def test_every_constant_of_the_code_and_of_the_cluster_is_listed():
    cluster = load_cluster("v100-32gb")
    listed = assumptions(cluster)
    values = [each.value for each in listed]
    for module in (compute, lifetime, network, timing):
        for name, value in vars(module).items():
            if name.isupper() and name not in UNITS and isinstance(value, int | float):
                assert value in values, f"{module.__name__}.{name}"
    names = {each.name for each in listed}
    assert {key for key, value in figures(cluster).items() if value is not None} <= names
    assert "peak_flops_per_second.bf16" not in names  # a V100 has none
    assert len(names) == len(listed)
    assert all(len(each.source) > 10 for each in listed)


def test_a_figure_that_the_user_set_is_said_to_be_the_users(tmp_path):
    path = tmp_path / "ours.yaml"
    path.write_text("cluster: h200\nfailures_per_node_day: 0.1\n")
    by_name = {each.name: each for each in assumptions(load_cluster(str(path)))}
    assert by_name["failures_per_node_day"].value == 0.1
    assert by_name["failures_per_node_day"].source == f"set in {path}"
    assert "datasheet" in by_name["memory_bytes_per_second"].source
