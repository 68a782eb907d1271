"""What one writes in an afternoon: FastAPI, raw bytes in and out, the model called in the handler. PORT THREADS NAME=FILE …"""

import sys

import fastapi
import numpy as np
import onnxruntime
import uvicorn

app = fastapi.FastAPI()
sessions = {}


@app.get("/ready")
async def ready():
    """Say that requests are welcome."""
    return {}


@app.post("/{model}")
async def predict(model: str, request: fastapi.Request):
    """Run the model on raw FP32 bytes; the shape after the first dimension is the model's."""
    session, input, row, output = sessions[model]
    x = np.frombuffer(await request.body(), np.float32).reshape(-1, *row)
    return fastapi.Response(session.run([output], {input: x})[0].tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    port, threads, *models = sys.argv[1:]
    for name, path in (model.split("=", 1) for model in models):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        taken = session.get_inputs()[0]
        sessions[name] = session, taken.name, taken.shape[1:], session.get_outputs()[0].name
    uvicorn.run(app, host="127.0.0.1", port=int(port), access_log=False, log_level="warning")
