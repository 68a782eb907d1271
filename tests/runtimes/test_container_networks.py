"""Networks of tenants, past what an engine has addresses for."""

import contextlib
import ipaddress

import pytest

from tenure.runtimes.container_engine import Engine, EngineError
from tenure.runtimes.container_network import OURS, TenantNetworks, routed


@pytest.mark.real
@pytest.mark.docker
def test_a_tenant_past_the_engines_own_addresses_has_a_network_all_the_same(docker):
    engine, others = Engine(str(docker.socket)), []

    def fill():
        for number in range(64):
            others.append(engine.call("POST", "/networks/create", {"Name": f"other-{number}", "Driver": "bridge"})["Id"])

    try:
        with pytest.raises(EngineError):
            fill()
        networks = TenantNetworks(engine, "full")
        for tenant in ("ada", "bob"):
            network = engine.call("GET", f"/networks/{networks.ensure(tenant)}")
            others.append(network["Id"])
            assert ipaddress.IPv4Network(network["IPAM"]["Config"][0]["Subnet"]).subnet_of(OURS)
        assert networks.ensure("bob") == network["Name"]
    finally:
        for network in others:
            with contextlib.suppress(EngineError):  # unused ones of ours were dropped for the next
                engine.call("DELETE", f"/networks/{network}")


def test_routes_are_read_as_the_kernel_writes_them(tmp_path):
    table = tmp_path / "route"
    table.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "tn-1\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    assert routed(str(table)) == [ipaddress.IPv4Network("172.17.0.0/16")]
    assert routed(str(tmp_path / "none")) == []
