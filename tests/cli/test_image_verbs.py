"""`tenure image build run list rm` as a user meets them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from tests.image_place import why_no_image

from tenure.cli import exits
from tenure.cli.main import run
from tenure.runtimes.rooted import why_no_root

pytestmark = pytest.mark.real

PROGRAM = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Door(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(open("word.txt", "rb").read() + str(os.path.exists("/root")).encode())
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Door).serve_forever()
"""


@pytest.fixture(scope="module")
def place():
    """A folder that is not below /tmp, where an image can have nothing of its own."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    if why := why_no_root() or why_no_image():
        pytest.skip(why)
    folder = os.path.join(os.path.expanduser("~"), f".tenure-test-images-{os.getpid()}")
    os.makedirs(folder)
    yield folder
    end_s = time.monotonic() + 30.0  # a broker that leaves may still write there
    while os.path.exists(folder) and time.monotonic() < end_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


@pytest.fixture
def tenure(capsys, place, monkeypatch):
    """Return a function that runs a command line in the folder and gives code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("TENURE_HOME", os.path.join(place, "home"))

    def call(*argv):
        code = run(["image", *argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_program_is_built_listed_run_and_removed(tenure, place):
    from tenure.sockets import free_port

    port = str(free_port())
    with open("serve.py", "w") as file:
        file.write(PROGRAM)
    with open("word.txt", "w") as file:
        file.write("from the image ")
    code, out, err = tenure(
        "build",
        "words",
        "--form",
        "root",
        "--exercise",
        "curl -s localhost:$TENURE_PORT/",
        "--",
        sys.executable,
        "serve.py",
        port,
    )
    assert code == exits.OK, err
    assert "symbol and debug tables: - " in out or "symbol and debug tables: kept" in out
    code, out, _ = tenure("list", "--json")
    (image,) = json.loads(out)
    assert image["manifest"]["ports"] == [int(port)]
    assert image["manifest"]["seccomp"] == "seccomp.json"  # behind which it runs below
    os.remove("word.txt")  # the image has its own
    assert ask_while_it_runs(["words", "--memory", "256MiB"], port) == b"from the image True"
    said = []
    chosen = ["words", "--memory", "256MiB", "--form", "auto", "--goal", "cold_start<60s"]
    assert ask_while_it_runs(chosen, port, said) == b"from the image True"
    assert "form root meets cold_start<60s, memory<256.0 MiB" in "".join(said), "the run before has shown that it does"
    code, _, err = tenure("run", "words", "--form", "auto", "--isolation", "container")
    assert code == exits.WRONG_INPUT
    assert "not root: it keeps the program apart as a process only" in err
    code, out, _ = tenure("list")
    assert "words" in out
    assert tenure("rm", "words")[0] == exits.OK
    assert json.loads(tenure("list", "--json")[1]) == []


def ask_while_it_runs(argv, port, said=None):
    """Run an image in a process of its own, ask it once, end it by Ctrl-C, and return what it answered.

    port: and path. said: a list that gets the lines of its output.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tenure.cli", "image", "run", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = [] if said is None else said
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    try:
        end_s = time.monotonic() + 60.0
        while not any("Ctrl-C ends the lease" in line for line in said):
            assert process.poll() is None, "".join(said)
            assert time.monotonic() < end_s, "".join(said)
            time.sleep(0.05)
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20.0).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60.0) == exits.OK, "".join(said)
        return answer
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("build", "serve"), "one model"),
        (("build", "serve", "no-such.onnx"), "no-such.onnx"),
        (("build", "x"), "its program"),
        (("build", "x", "--form", "zip", "--", "true"), "forms are root, oci, microvm"),
        (("build", "x", "--keep", "nothing", "--", "true"), "can be kept"),
        (("build", "X Y", "--", "true"), "name"),
        (("build", "x", "--kernel", "/", "--", "true"), "Add microvm"),
        (("build", "x", "--form", "root,microvm", "--kernel", "/nowhere", "--", "true"), "no kernel at /nowhere"),
        (("build", "x", "--", "no-such-program"), "no-such-program"),
        (("run", "nothing"), "there is no image"),
        (("run", "nothing", "--form", "iso"), "there is no image"),
        (("run", "nothing", "--form", "auto", "--goal", "p99<5ms"), "there is no image"),
        (("rm", "nothing"), "there is no image"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(tenure, argv, words):
    code, _, err = tenure(*argv)
    assert code in (exits.WRONG_INPUT, exits.NOT_FOUND)
    assert words in err


def test_a_program_below_tmp_is_refused(tenure, tmp_path):
    (tmp_path / "x.py").write_text("print(1)")
    code, _, err = tenure("build", "x", "--form", "root", "--", sys.executable, str(tmp_path / "x.py"))
    if str(tmp_path).startswith("/tmp/"):
        assert code == exits.WRONG_INPUT
        assert "cannot be in an image" in err


@pytest.mark.timeout(300)  # a slow machine starts the server a dozen times
def test_a_served_model_is_built_and_answers_from_its_root_behind_its_profile(tenure, place):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negate", kinds[:1], kinds[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "negate.onnx")
    code, out, err = tenure(
        "build", "serve", "negate.onnx", "--form", "root,oci", "--keep", "packages,symbols,docs,sources,zip,folders"
    )
    assert code == exits.OK, err
    assert "OpenSSL: - " in out
    (image,) = json.loads(tenure("list", "--json")[1])
    assert image["manifest"]["seccomp"] == "seccomp.json"
    assert image["manifest"]["forms"]["root"]["cold_start_s"] > 0
    assert "/srv/models/negate.onnx" in image["manifest"]["entry"]
    os.remove("negate.onnx")
    from tenure.sockets import free_port

    port, other = str(free_port()), str(free_port())
    options = ["--http-port", port, "--grpc-port", other, "--memory", "512MiB"]
    asked = ask_while_it_runs(["negate", *options], f"{port}/v2/models/negate")
    assert json.loads(asked)["outputs"][0]["name"] == "y"
