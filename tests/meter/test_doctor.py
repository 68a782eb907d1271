import socket
import threading

import pytest

from tenure.meter import doctor
from tenure.meter.doctor import diagnose

EXPECTED = {
    "python",
    "machine",
    "user namespaces",
    "network namespaces",
    "iproute2",
    "docker",
    "podman",
    "gpu",
    "kvm",
    "home",
    "clock",
}


@pytest.mark.real
def test_every_part_is_looked_at_and_what_is_missing_says_what_it_takes(tmp_path):
    findings = diagnose(tmp_path)
    names = [finding.name for finding in findings]
    assert set(names) >= EXPECTED
    assert any(name.startswith("cgroups") for name in names)
    assert {"extra scikit-learn", "extra torch", "extra boto3"} <= set(names)
    assert len(names) == len(set(names))
    for finding in findings:
        assert finding.found
        assert finding.means
        assert bool(finding.remedy) == (finding.ok is not True), finding
        assert "looking failed" not in finding.found, finding


@pytest.mark.real
def test_a_home_that_is_not_there_yet_is_fine_and_is_not_made(tmp_path):
    home = tmp_path / "a" / "b"
    [finding] = [finding for finding in diagnose(home) if finding.name == "home"]
    assert finding.ok
    assert not (tmp_path / "a").exists()


def test_a_check_that_falls_over_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("odd machine")

    monkeypatch.setattr(doctor, "_kvm", broken)
    findings = {finding.name: finding for finding in diagnose(tmp_path)}
    assert findings["kvm"].ok is None
    assert "odd machine" in findings["kvm"].found
    assert findings["clock"].ok


def test_a_home_below_a_file_is_reported_not_raised(tmp_path):
    (tmp_path / "file").write_text("")
    [finding] = [finding for finding in diagnose(tmp_path / "file" / "home") if finding.name == "home"]
    assert finding.ok is False
    assert "TENURE_HOME" in finding.remedy


@pytest.mark.parametrize(
    ("answer", "ok"), [(b"HTTP/1.0 200 OK\r\n\r\nOK", True), (b"HTTP/1.0 500 Oops\r\n\r\n", None), (b"", None)]
)
def test_an_engine_counts_only_if_its_socket_answers(tmp_path, answer, ok):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        server.settimeout(10)

        def serve():
            line, _ = server.accept()
            with line:
                line.recv(1024)
                line.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        finding = doctor._engine("docker", [tmp_path / "none", path], "install it")
        thread.join(10)
    assert finding.ok is ok
    assert str(path) in finding.found


def test_without_cgroups_the_doctor_names_what_holds_instead_and_calls_nothing_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_may_make_group", lambda _: False)
    found = [finding for finding in diagnose(tmp_path) if finding.name.startswith("cgroups")]
    assert found
    for finding in found:
        assert finding.ok is None
        assert "advisory" in finding.means
        assert finding.remedy
