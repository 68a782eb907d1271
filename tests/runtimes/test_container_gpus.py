"""By which of an engine's ways a container gets its devices."""

import pytest

from tenure.runtimes.container import _device_driver, _device_request


class Answers:
    def __init__(self, **info):
        self.info = info

    def call(self, method, path):
        assert (method, path) == ("GET", "/info")
        return self.info


@pytest.mark.parametrize(
    ("info", "driver"),
    [
        ({}, ""),
        ({"Runtimes": None, "DiscoveredDevices": None}, ""),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, "nvidia"),
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=GPU-0"}]}, "cdi"),
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "vendor.com/fpga=0"}]}, ""),
    ],
)
def test_the_engine_says_how_it_gives_devices(info, driver):
    assert _device_driver(Answers(**info)) == driver


def test_devices_are_asked_for_by_uuid():
    assert _device_request("nvidia", ("GPU-0",)) == {"Driver": "nvidia", "DeviceIDs": ["GPU-0"], "Capabilities": [["gpu"]]}
    assert _device_request("cdi", ("GPU-0",)) == {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-0"]}
