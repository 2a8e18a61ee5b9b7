"""Where ranks meet, over which interface, and what is written into the environment."""

import socket
import sys
import types
from typing import Any

import psutil
import pytest

from spectral_scale.cluster import interface, mpi, rendezvous, slurm
from spectral_scale.cluster.adopt import adopt_launcher
from spectral_scale.cluster.detect import LauncherFlags
from spectral_scale.cluster.rendezvous import PORTS, find_rendezvous, job_port
from spectral_scale.errors import ConfigError
from spectral_scale.parallel.rank_info import RankInfo

NONE = LauncherFlags()
STEP = RankInfo(rank=1, world_size=4, local_rank=1, local_world_size=2, source="a SLURM step (x)")
MPI = RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2, source="Open MPI (x)")
JOB = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}


def test_node_lists() -> None:
    assert slurm.expand_hosts("n1") == ["n1"]
    assert slurm.expand_hosts("gpu[08-10,3],login1") == [
        "gpu08",
        "gpu09",
        "gpu10",
        "gpu3",
        "login1",
    ]
    assert slurm.expand_hosts("r[1-2]n[1,3]-ib") == ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]
    for wrong in ("n[1-", "n[a-b]", "", "n1,,n2", "n]1["):
        with pytest.raises(ConfigError, match="node list"):
            slurm.expand_hosts(wrong)


def test_tasks_on_each_node() -> None:
    def tasks(text: str, node: str) -> int | None:
        return slurm.tasks_on_node({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node})

    assert [tasks("2(x2),1", str(i)) for i in range(4)] == [2, 2, 1, None]
    assert tasks("odd", "0") is None
    assert slurm.tasks_on_node({}) is None


def test_what_is_given_wins() -> None:
    environment = {"MASTER_ADDR": "a", "MASTER_PORT": "1234"}
    found = find_rendezvous(STEP, NONE, environment | JOB)
    assert (found.address, found.port) == ("a", 1234)
    flags = LauncherFlags(master_addr="b", master_port=99)
    found = find_rendezvous(STEP, flags, environment)
    assert (found.address, found.port) == ("b", 99)
    found = find_rendezvous(STEP, LauncherFlags(master_port=99), JOB)
    assert (found.address, found.port) == ("127.0.0.1", 99)


def test_a_slurm_job_gives_its_first_node_and_a_port_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = find_rendezvous(STEP, NONE, JOB)
    assert (found.address, found.port) == ("127.0.0.1", job_port("77", "0", ""))
    assert found.port in PORTS and "job 77" in found.source
    assert find_rendezvous(STEP, NONE, JOB | {"SLURM_STEP_ID": "1"}).port != found.port
    two = JOB | {"SLURM_STEP_NODELIST": "localhost,nowhere.invalid"}
    assert find_rendezvous(STEP, NONE, two).address == "localhost"
    lost = JOB | {"SLURM_STEP_NODELIST": "nowhere[1-2].invalid"}
    monkeypatch.setattr(slurm, "node_address", lambda host: {"nowhere1.invalid": "10.0.0.7"}[host])
    assert find_rendezvous(STEP, NONE, lost).address == "10.0.0.7"
    monkeypatch.setattr(slurm, "node_address", lambda host: None)
    with pytest.raises(ConfigError, match=r"nowhere1\.invalid.* set MASTER_ADDR"):
        find_rendezvous(STEP, NONE, lost)
    with pytest.raises(ConfigError, match="no node list"):
        find_rendezvous(STEP, NONE, {"SLURM_JOB_ID": "77"})


def test_mpi_meets_by_its_job_or_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    proxy = types.SimpleNamespace(name=lambda: "hydra_pmi_proxy", pid=31)
    tree = types.SimpleNamespace(parents=lambda: [types.SimpleNamespace(name=lambda: "sh"), proxy])

    def agree(rank_info: RankInfo, address: str, port: int) -> tuple[str, int]:
        asked.append(address)
        return "10.0.0.1", 4321

    monkeypatch.setattr(mpi, "agree_on_address", agree)
    one_host = find_rendezvous(MPI, NONE, {"PMIX_NAMESPACE": "7"})
    assert (one_host.address, one_host.port) == ("127.0.0.1", job_port("7"))
    assert asked == []
    unnamed = find_rendezvous(MPI, NONE, {})
    assert (unnamed.address, unnamed.port, asked) == ("10.0.0.1", 4321, ["127.0.0.1"])
    with monkeypatch.context() as under_mpich:
        under_mpich.setattr(psutil, "Process", lambda: tree)
        by_parent = find_rendezvous(MPI, NONE, {})
    assert (by_parent.address, by_parent.port) == ("127.0.0.1", job_port("hydra_pmi_proxy 31"))
    monkeypatch.setattr(rendezvous.interface, "address_of", lambda name: f"address of {name}")
    apart = RankInfo(rank=1, world_size=2, local_world_size=1, source="Open MPI (x)")
    flags = LauncherFlags(network_interface="ib0")
    assert find_rendezvous(apart, flags, {"PMIX_NAMESPACE": "7"}).address == "10.0.0.1"
    assert asked[1:] == ["address of ib0"]


def test_nothing_tells() -> None:
    rank_info = RankInfo(rank=0, world_size=2, source="torch environment (x)")
    with pytest.raises(ConfigError, match="nothing says where they meet.*torchrun"):
        find_rendezvous(rank_info, NONE, {"SLURM_JOB_ID": "1"})
    for port in ("0", "x", "65536", "-1"):
        with pytest.raises(ConfigError, match="is no port"):
            find_rendezvous(rank_info, NONE, {"MASTER_ADDR": "a", "MASTER_PORT": port})


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        interface, "addresses", lambda: {"lo": ["127.0.0.1"], "ib0": ["10.1.0.2"], "down": []}
    )
    ways = {"127.0.0.1": "127.0.0.1", "me": "127.0.1.1", "far": "10.1.0.2", "192.0.2.1": "10.1.0.2"}
    monkeypatch.setattr(interface, "local_address_towards", lambda address, port: ways[address])
    assert interface.interface_towards("127.0.0.1", 1) == "lo"
    assert interface.interface_towards("far", 1) == "ib0"
    assert interface.interface_towards("me", 1) == "ib0", "a name for 127.0.1.1 leads nowhere"
    both = interface.interface_settings("far", 1, None, {})
    assert both == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}
    kept = interface.interface_settings("far", 1, None, {"NCCL_SOCKET_IFNAME": "eth"})
    assert kept == {"GLOO_SOCKET_IFNAME": "ib0"}
    given = interface.interface_settings("far", 1, "lo", {"NCCL_SOCKET_IFNAME": "eth"})
    assert given == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(ConfigError, match="'down' is not up.*lo, ib0"):
        interface.interface_settings("far", 1, "down", {})


def test_the_real_interfaces_hold_loopback() -> None:
    assert interface.interface_towards("127.0.0.1", 1) == next(
        name for name, own in interface.addresses().items() if "127.0.0.1" in own
    )
    assert interface.interface_towards("nowhere.invalid", 1) is None


def test_adopting_writes_torch_s_variables() -> None:
    environment = JOB | {
        "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
    }  # fmt: skip
    placement = adopt_launcher(NONE, environment)
    assert placement.rank_info.rank == 1 and "SLURM" in placement.note
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert expected.items() <= environment.items()
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert f"port {environment['MASTER_PORT']}" in placement.note
    again = adopt_launcher(NONE, environment)
    assert again.rank_info.rank == 1 and "torch" in again.rank_info.source


def test_one_process_changes_nothing() -> None:
    environment = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    placement = adopt_launcher(NONE, environment)
    assert placement.warning is not None and "put srun before" in placement.warning
    assert environment == {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert adopt_launcher(NONE, {}).warning is None


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", rendezvous.free_port()))


class World:
    """An MPI communicator as one rank sees it."""

    def __init__(self, rank: int, size: int, sent: bytes) -> None:
        self.rank, self.size, self.sent = rank, size, sent

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def Bcast(self, data: bytearray, root: int) -> None:
        data[:] = self.sent.ljust(len(data))


def test_an_mpi_library_that_is_not_the_launcher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every rank would be the first of one, and wait for the others at its own port."""
    fake = types.ModuleType("mpi4py")
    fake.MPI = types.SimpleNamespace(  # type: ignore[attr-defined]
        COMM_WORLD=World(1, 2, b"10.0.0.1 77"), Get_library_version=lambda: "Open MPI v9\0\nmore"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    assert mpi.agree_on_address(MPI, "mine", 5) == ("10.0.0.1", 77)
    fake.MPI.COMM_WORLD = World(0, 1, b"")
    with pytest.raises(ConfigError, match=r"\(Open MPI v9\) says 0 of 1.*set MASTER_ADDR"):
        mpi.agree_on_address(MPI, "mine", 5)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"pip install 'spectral-scale\[mpi\]'"):
        mpi.agree_on_address(MPI, "mine", 5)
