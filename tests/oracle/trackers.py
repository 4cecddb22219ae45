"""Checks what `train --report-to` writes with the trackers' own programs: the records of wandb and SwanLab as these read them, and
a run on a real MLflow server, each against logging.jsonl, also of a run that was resumed. Then `wandb sync` and `swanlab sync` send
their files to a stand-in of their servers.

    pip install wandb swanlab mlflow && cargo build --release
    python tests/oracle/trackers.py target/release/dpo-host
"""

import gzip
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path


def expected(run):
    """Every number of the log: its name in trackers, its step, its value."""
    rows = []
    for line in (run / "logging.jsonl").read_text().splitlines():
        line = json.loads(line)
        evaluation = any(name.startswith("eval_") for name in line)
        for name, value in line.items():
            if name != "global_step" and isinstance(value, (int, float)) and evaluation == name.startswith("eval_"):
                name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                rows.append((name, line["global_step"], float(value)))
    return sorted(rows)


def wandb_records(path):
    """wandb's own reader of these files is in Go; the format is that of its Python up to 0.19 (datastore.py)."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, record = path.read_bytes(), 7, b""
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum, at
        at += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            parsed = pb.Record()
            parsed.ParseFromString(record)
            yield parsed


def check_wandb(run, finished):
    (folder,) = (run / "wandb").iterdir()
    (file,) = folder.glob("run-*.wandb")
    records = list(wandb_records(file))
    assert [r.num for r in records] == list(range(1, len(records) + 1))
    start = next(r.run for r in records if r.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert (start.project, start.display_name, config["beta"]) == ("tracked", run.name, 0.5), start
    rows = []
    for history in (r.history for r in records if r.HasField("history")):
        items = {item.nested_key[0]: json.loads(item.value_json) for item in history.item}
        step = items.pop("train/global_step")
        rows += [(name, step, float(v)) for name, v in items.items() if not name.startswith("_")]
    assert sorted(rows) == expected(run)
    exits = [r.exit.exit_code for r in records if r.HasField("exit")]
    assert exits == [0 if finished else 255], exits
    return start.run_id


def check_swanlab(run, finished):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (folder,) = (run / "swanlab").iterdir()
    (file,) = folder.glob("run-*.swanlab")
    reader, rows, columns, ends = DataStoreReader(), [], set(), []
    reader.open(file)
    for data in reader:
        record = Record()
        record.ParseFromString(data)
        if record.HasField("start"):
            assert (record.start.project, record.start.name) == ("tracked", run.name), record
        if record.HasField("save"):
            import yaml

            assert yaml.safe_load(record.save.payload)["beta"]["value"] == 0.5
        if record.HasField("column"):
            columns.add(record.column.column_key)
        if record.HasField("scalar"):
            assert record.scalar.key in columns
            rows.append((record.scalar.key, record.scalar.step, record.scalar.value.number))
        if record.HasField("finish"):
            ends.append(record.finish.state)
    assert sorted(rows) == expected(run)
    assert ends == [1 if finished else 3], ends


def check_mlflow(run, uri, status):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tracked"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name, found.data.params["beta"]) == (status, run.name, "0.5"), found
    rows = []
    for name in found.data.metrics:
        rows += [(m.key, m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
    # Steps that are taken again have the same losses and other times; the server keeps those it had.
    steady = [[r for r in rows if r[0] not in TIMES] for rows in (sorted(rows), expected(run))]
    assert steady[0] == steady[1] and len(rows) == len(expected(run))


TIMES = ["train/tokens_per_second", "train/elapsed_s", "train/memory_gib"]


class Cloud(http.server.BaseHTTPRequestHandler):
    """As much of wandb's and SwanLab's servers as their `sync` needs; keeps what it is sent."""

    sent = []

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        self.sent.append((self.path, body))
        here = f"http://{self.headers['host']}"
        owner = {"name": "tracked", "username": "me", "path": "me/tracked", "group": {"username": "me"}}
        said = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            names = asked.get("variables") or {}
            project = {"id": "p", "name": "tracked", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "x", "name": names.get("name"), "displayName": "run", "config": "{}", "project": project}
            files = [{"name": f, "uploadUrl": f"{here}/up/{f}"} for f in names.get("files") or []]
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            data["createRunFiles"] = {"runID": "x", "uploadHeaders": [], "files": files}
            said = {"data": data}
        elif "login" in self.path:
            said = {"sid": "s", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": {"username": "me"}}
        elif self.path.endswith("/experiment"):
            said = {"cuid": "experiment", "name": "run", "slug": "run"}
        elif self.path.startswith("/api/project/"):
            said = {"cuid": "p", "visibility": "PRIVATE", "_count": {"experiments": 0}} | owner
        said = json.dumps(said).encode()
        self.send_response(201 if self.path.endswith("/experiment") else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_PUT = do_PATCH = answer


def check_sync(run, work):
    """Both `sync` commands send every number, at its step."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    programs = Path(sys.executable).parent
    home = os.environ | {"HOME": str(work), "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    (of_wandb,), (of_swanlab,) = (run / "wandb").iterdir(), (run / "swanlab").iterdir()
    subprocess.run([programs / "wandb", "sync", of_wandb], env=home, cwd=work, check=True)
    id = of_swanlab.name.rsplit("-")[-1]
    subprocess.run([programs / "swanlab", "sync", "-h", address, "-k", "0" * 21, "--id", id, of_swanlab], env=home, cwd=work, check=True)
    rows, scalars = [], []
    for path, body in Cloud.sent:
        if path.endswith("file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                line = json.loads(line)
                step = line.pop("train/global_step")
                rows += [(name, step, float(v)) for name, v in line.items() if not name.startswith("_")]
        if path == "/api/house/metrics":
            scalars += [(m["key"], m["index"], m["data"]) for m in json.loads(body)["metrics"]]
    assert sorted(rows) == expected(run), (len(rows), len(expected(run)))
    assert sorted(scalars) == expected(run), (len(scalars), len(expected(run)))
    (experiment,) = [json.loads(body) for path, body in Cloud.sent if path.endswith("/experiment")]
    assert experiment["cuid"] == id, experiment
    (state,) = [json.loads(body)["state"] for path, body in Cloud.sent if path.endswith("/state")]
    assert state == "FINISHED", state


def main():
    binary, work = Path(sys.argv[1]).resolve(), Path(tempfile.mkdtemp())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{work}/mlflow.db", "--artifacts-destination", str(work / "artifacts")]
    mlflow = [Path(sys.executable).parent / "mlflow", "server", "--port", port, *store]
    server = subprocess.Popen(mlflow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"MLFLOW_TRACKING_URI": uri}
    try:
        for _ in range(240):
            time.sleep(0.5)
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
        run = work / "run"
        trackers = ["--report-to", "wandb", "swanlab", "mlflow", "--project", "tracked"]
        train = ["train", "--device", "cpu", "--output-dir", run, "--logging-steps", "1", "--save-steps", "2", *trackers]
        subprocess.run([binary, *train, "--max-steps", "4"], check=True)
        first = check_wandb(run, True)
        check_swanlab(run, True)
        check_mlflow(run, uri, "FINISHED")
        # A run that goes on is the same run, with every step once: two steps that are taken again, then two more.
        for steps, checkpoint in [("4", run / "checkpoint-2"), ("6", "latest")]:
            resume = ["--max-steps", steps, "--resume-from-checkpoint", checkpoint]
            subprocess.run([binary, *train, *resume], check=True)
            assert check_wandb(run, True) == first
            check_swanlab(run, True)
            check_mlflow(run, uri, "FINISHED")
        check_sync(run, work)
    finally:
        server.terminate()
    print("the trackers read every number once")


main()
