"""Checks what `train --report-to` writes with the trackers' own programs: the records of wandb and SwanLab as these read them, and
a run on a real MLflow server, each against logging.jsonl, also of a run that was resumed.

    pip install wandb swanlab mlflow && cargo build --release
    python tests/oracle/trackers.py target/release/dpo-host
"""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path


def expected(run):
    """Every number of the log: its name in trackers, its step, its value."""
    rows = []
    for line in (run / "logging.jsonl").read_text().splitlines():
        line = json.loads(line)
        for name, value in line.items():
            if name != "global_step" and isinstance(value, (int, float)):
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
    finally:
        server.terminate()
    print("the trackers read every number once")


main()
