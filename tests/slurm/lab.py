"""A real SLURM on this machine for as long as tests run: munged, slurmctld and a slurmd for each node.

Every node is a slurmd with a host name of its own (a UTS namespace) and claims more CPUs than there are. Nothing needs
systemd, cgroups, or a controller that exists already; the daemons are children of this process and end with it.
"""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
HOSTS_FILE = Path("/etc/hosts")
CPUS_PER_NODE, GPUS_PER_NODE = 8, 2
START_SECONDS, STOP_SECONDS, COMMAND_SECONDS = 30.0, 10.0, 60.0


class LabMissing(Exception):
    """No SLURM can be run here; the message says why."""


def install() -> None:
    """Install SLURM by apt-get where it is missing. Raises LabMissing where that cannot be."""
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *SYSTEM_FOLDERS])
    if os.geteuid() != 0:
        raise LabMissing("slurmd needs root here")
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        raise LabMissing("host names of nodes need a UTS namespace, which `unshare --uts` cannot make here")
    if all(shutil.which(name) for name in (*DAEMONS, "sbatch")):
        return
    if shutil.which("apt-get") is None:
        raise LabMissing("SLURM is not installed, and there is no apt-get to install it")
    environment = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        if done.returncode:
            raise LabMissing(f"apt-get cannot install SLURM: {(done.stderr or done.stdout).strip()[-200:]}")


def free_ports(number: int) -> list[int]:
    """So many that differ, for none is let go of before all are chosen."""
    with ExitStack() as chosen:
        sockets = [chosen.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class SlurmLab:
    """Nodes in two partitions: `main` only signals before a time limit, however busy this machine is; `strict` ends
    jobs. `with SlurmLab(folder, features) as lab:` starts it, and cancels and ends all."""

    def __init__(self, folder: Path, features: Sequence[str]) -> None:
        """`features`: of each node, what --constraint may ask for."""
        self.folder = folder
        self.features = {f"mmlab{number}": feature for number, feature in enumerate(features, 1)}
        self._daemons: dict[str, subprocess.Popen] = {}

    @property
    def nodes(self) -> list[str]:
        return list(self.features)

    @property
    def _hosts_mark(self) -> str:
        return f"# {self.folder}"

    @property
    def environment(self) -> dict[str, str]:
        """What clients need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "SlurmLab":
        install()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def command(self, *arguments: str, check: bool = True) -> str:
        """Output of a SLURM client."""
        done = subprocess.run(
            arguments, env=dict(os.environ) | self.environment, capture_output=True, text=True, check=False,
            timeout=COMMAND_SECONDS,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol knows of a job, by its names: JobState, Restarts, ExcNodeList, NodeList, ..."""
        words = self.command("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: Callable[[], object], description: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{description}: not within {seconds:g} s\n{self.state()}"
            time.sleep(0.1)

    def wait_for_end(self, job_id: str, seconds: float = 400.0) -> str:
        """The state in which a job left the queue."""
        self.wait_for(lambda: not self.command("squeue", "-h", "-j", job_id, check=False), f"end of {job_id}", seconds)
        return self.job(job_id)["JobState"]

    def state(self) -> str:
        return self.command("squeue", check=False) + "\n" + self.command("sinfo", "-N", "-l", check=False)

    def kill_node(self, node: str) -> None:
        """As if its power went: slurmd, and every process of a job that runs there."""
        self._daemons[node].kill()
        self._daemons[node].wait(STOP_SECONDS)
        self._kill_processes_on(node)

    def start_node(self, node: str) -> None:
        self._daemons[node] = self._daemon(
            "unshare", "--uts", "sh", "-c", f"hostname {node}; exec slurmd -D -N {node}", log=node
        )

    def _kill_processes_on(self, node: str) -> None:
        for pid in self._processes_on(node):
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, 9)

    def _processes_on(self, node: str) -> list[int]:
        """Tasks, and slurmstepd above them, which has no environment of a task but is its ancestor."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            names = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            if names.get(b"SLURMD_NODENAME") == node.encode() and names.get(b"SLURM_CONF") == str(
                self.folder / "slurm.conf"
            ).encode():
                found |= {int(folder.name)} | _step_daemons_above(int(folder.name))
        return sorted(found)

    def _daemon(self, *command: str, log: str) -> subprocess.Popen:
        """A child that ends when this process does, however that ends."""
        with open(self.folder / f"{log}.log", "ab") as output:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=dict(os.environ) | self.environment, stdout=output,
                stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        with open(HOSTS_FILE, "a") as hosts:
            hosts.write(f"127.0.0.1 {' '.join(self.nodes)} {self._hosts_mark}\n")
        (folder / "slurm.conf").write_text(self._configuration())
        self._pretend_gpus()
        # slurmd 22.05 loads a plugin for cgroups even where nothing uses it; this one's start touches nothing.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        self._daemons["munged"] = self._daemon("munged", "--foreground", "--force", *files, log="munged")
        self.wait_for((folder / "munge.socket").exists, "munged", START_SECONDS)
        self._daemons["slurmctld"] = self._daemon("slurmctld", "-D", log="slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self.is_ready, "nodes that are idle", START_SECONDS)

    def _pretend_gpus(self) -> None:
        """Devices that nobody opens: slurmd refuses plain files. Jobs get CUDA_VISIBLE_DEVICES as on a real node."""
        for number in range(GPUS_PER_NODE):
            subprocess.run(["mknod", self.folder / f"nvidia{number}", "c", "195", str(number)], check=True)
        files = f"{self.folder}/nvidia[0-{GPUS_PER_NODE - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={files}\n")

    def is_ready(self) -> bool:
        states = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def stop(self) -> None:
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            jobs = self.command("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:
                self.command("scancel", "--full", "--signal=KILL", *jobs, check=False)
                self.command("scancel", *jobs, check=False)
        for node in self.nodes:
            self._kill_processes_on(node)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(STOP_SECONDS)
        self._daemons.clear()
        lines = HOSTS_FILE.read_text().splitlines(keepends=True)
        HOSTS_FILE.write_text("".join(line for line in lines if self._hosts_mark not in line))

    def _configuration(self) -> str:
        """A credential also is what a requeued job waits for to run out: cred_expire. Times are short for tests."""
        host, folder = socket.gethostname().split(".")[0], self.folder
        controller_port, *ports = free_ports(1 + len(self.nodes))
        settings = {
            "ClusterName": "lab",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller_port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire=5",
            "CredType": "cred/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SlurmdParameters": "config_overrides",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0",
            "FirstJobId": random.randrange(1, 60_000),  # ranks meet at ports by job: another lab has others
            "GresTypes": "gpu",
            "JobRequeue": 1,
            "ReturnToService": 2,
            "EnforcePartLimits": "ALL",
            "KillWait": 20,
            "MinJobAge": 3600,
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 10,
            "MailProg": "/bin/true",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for (node, feature), port in zip(self.features.items(), ports, strict=True):
            lines.append(
                f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={node} Port={port} CPUs={CPUS_PER_NODE} "
                f"RealMemory=8000 Gres=gpu:{GPUS_PER_NODE} Feature={feature} State=UNKNOWN"
            )
        nodes = ",".join(self.nodes)
        lines.append(f"PartitionName=main Nodes={nodes} Default=YES OverTimeLimit=UNLIMITED State=UP")
        lines.append(f"PartitionName=strict Nodes={nodes} State=UP")
        return "\n".join(lines) + "\n"


def _step_daemons_above(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            break
        if name.startswith("slurmstepd"):
            found.add(pid)
        pid = int(fields[1])
    return found
