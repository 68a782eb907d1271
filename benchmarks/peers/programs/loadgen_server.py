"""MLPerf LoadGen, scenario Server, against a `VirtualServer` in its own process.

One argument, a JSON object: server (kind, seed, requests, rate_per_s), rate_per_s, requests, schedule_seed, limit_s, folder
(where LoadGen writes its logs; they are the answer).
"""

import heapq
import json
import sys
import threading
import time

import mlperf_loadgen
from procs import ask_for_real_time
from virtual_latency import VirtualServer


class Responder:
    """Completes each query when the virtual server says so, in a thread of its own."""

    def __init__(self, server):
        self._server, self._due, self._changed = server, [], threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def issue(self, queries):
        """What LoadGen calls, in the order of its schedule."""
        arrived_s = time.perf_counter()
        with self._changed:
            for query in queries:
                heapq.heappush(self._due, (self._server.answer_s(arrived_s), query.id))
            self._changed.notify()

    def _run(self):
        while True:
            with self._changed:
                left_s = self._due[0][0] - time.perf_counter() if self._due else 1.0
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                _, number = heapq.heappop(self._due)
            mlperf_loadgen.QuerySamplesComplete([mlperf_loadgen.QuerySampleResponse(number, 0, 0)])


def main():
    """Run one test."""
    case = json.loads(sys.argv[1])
    ask_for_real_time()
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = mlperf_loadgen.TestScenario.Server
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = case["rate_per_s"]
    settings.server_target_latency_ns = round(case["limit_s"] * 1e9)
    settings.server_target_latency_percentile = 0.99
    settings.min_query_count = case["requests"]
    settings.min_duration_ms = 0
    settings.schedule_rng_seed = case["schedule_seed"]
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = case["folder"], False
    log = mlperf_loadgen.LogSettings()
    log.log_output, log.enable_trace = output, True
    responder = Responder(VirtualServer(**case["server"]))
    sut = mlperf_loadgen.ConstructSUT(responder.issue, lambda: None)
    samples = mlperf_loadgen.ConstructQSL(64, 64, lambda loaded: None, lambda unloaded: None)
    mlperf_loadgen.StartTestWithLogSettings(sut, samples, settings, log, "")
    mlperf_loadgen.DestroyQSL(samples)
    mlperf_loadgen.DestroySUT(sut)


if __name__ == "__main__":
    main()
