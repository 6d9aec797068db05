"""Write launch_scripts/paper: for each of the paper's models the command that submits its layout to a SLURM cluster.

    python tools/write_launch_scripts.py

The layouts are those of launch_scripts/layouts, on as many GPUs as they were found for. After those were written anew,
write these: `tests/unit/test_launch_presets.py` compares them.
"""

import re
from pathlib import Path

from megamoe.plan.cluster import load_cluster

ROOT = Path(__file__).parents[1]
LAYOUTS, FOLDER = ROOT / "launch_scripts" / "layouts", ROOT / "launch_scripts" / "paper"
_HEAD = re.compile(r"# (\S+): the fastest layout that fits (\d+) GPUs of cluster (\S+) ")

SCRIPT = """\
#!/usr/bin/env bash
# Submit {name} to a SLURM cluster: {nodes} nodes of {gpus} GPUs, in the layout planned for {cluster}.
#
#   bash launch_scripts/paper/{name}.sh data.train='[{{path: /data/text}}]' run.dir=/runs/{name} \\
#       --account me --time 24:00:00 --dry-run
#
# What follows the name is what `megamoe submit` takes, and wins over what stands here; options that are the same for
# all jobs of a site fit into a file (--cluster-settings, or MEGAMOE_CLUSTER_SETTINGS).
# Written by tools/write_launch_scripts.py.
set -euo pipefail

source "$(dirname "${{BASH_SOURCE[0]}}")/../environment.sh"
find_environment
exec "$python" -m megamoe submit "$root/launch_scripts/layouts/{name}.yaml" --nodes {nodes} --gpus-per-node {gpus} \\
    --cluster {cluster} run.dir=runs/{name} "$@"
"""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for layout in sorted(LAYOUTS.glob("*.yaml")):
        path = FOLDER / f"{layout.stem}.sh"
        path.write_text(script_of(layout), encoding="utf-8")
        path.chmod(0o755)


def script_of(layout: Path) -> str:
    """The launch script of one layout, whose first line says for which cluster it is."""
    found = _HEAD.match(layout.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{layout} does not say which GPUs it is for: write it anew by tools/write_layouts.py")
    name, num_gpus, cluster = found[1], int(found[2]), found[3]
    gpus = load_cluster(cluster).ranks_per_node
    return SCRIPT.format(name=name, nodes=num_gpus // gpus, gpus=gpus, cluster=cluster)


if __name__ == "__main__":
    main()
