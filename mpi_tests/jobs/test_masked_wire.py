"""Masked exchange moves as many bytes less as weights are pruned: counted by the kernel, not by us."""

import os
import re
import shutil
import subprocess

import pytest

from .launch import SCRIPTS, command_of, start

SPARSITY = 0.9
DENSE_BYTES = 5 * 4 * 1000 * 1000 * 4  # of 5 steps of four float32 matrices


def namespace_with_loopback() -> list[str]:
    """Begins a command that runs in a network namespace of its own. Skips the test where there are none."""
    needed = all(map(shutil.which, ("unshare", "ip", "ss"))) and os.getuid() == 0
    prefix = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not needed or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces need root, unshare, ip and ss")
    return prefix


@pytest.mark.parametrize(("launcher", "kind"), [("horovod-mpi", "horovod"), ("mpi4py", "mpi")])
def test_a_compressed_phase_moves_what_the_sparsity_leaves(launcher, kind):
    over_tcp = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_if_include": "lo"}
    over_tcp["HOROVOD_CYCLE_TIME"] = "50"  # ms: its negotiation costs bytes by the time, not by the gradient
    command = command_of(launcher, 2, SCRIPTS / "masked_wire.py", kind)
    ended = start([*namespace_with_loopback(), *command], **over_tcp).end(60)
    assert ended.code == 0, str(ended)
    found = re.findall(r"phase \d: carried (\d+), counted (\d+)", ended.of_rank(0))
    (dense, dense_counted), (compressed, compressed_counted) = [(int(a), int(b)) for a, b in found]
    assert dense_counted == DENSE_BYTES
    assert compressed_counted == pytest.approx((1 - SPARSITY) * DENSE_BYTES)
    assert dense > DENSE_BYTES  # both ranks send; were the counter blind, the rest would say nothing
    assert compressed / dense == pytest.approx(1 - SPARSITY, rel=0.01)
