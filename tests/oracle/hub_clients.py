"""Checks that the hub of the tests speaks as the hubs do, and `dpo-host push` as their clients: huggingface_hub and modelscope push
to it and fetch from it what `push` has pushed.

    cargo build --release -p dpo-tests --bin loopback-hub && cargo build --release
    pip install huggingface_hub modelscope
    python tests/oracle/hub_clients.py target/release
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir() if p.is_file()}


def start(binaries, *args):
    hub = subprocess.Popen([binaries / "loopback-hub", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return hub, hub.stdout.readline().strip()


def same(ours, fetched, names):
    got = {name: fetched.get(name) for name in names}
    assert got == {name: ours[name] for name in names}, (got, ours)


def main():
    binaries = Path(sys.argv[1]).resolve()
    work = Path(tempfile.mkdtemp())
    run = work / "run"
    train = ["train", "--device", "cpu", "--max-steps", "2", "--output-dir", run]
    subprocess.run([binaries / "dpo-host", *train], check=True, capture_output=True)
    names = ["adapter_model.safetensors"]
    theirs = work / "theirs"
    theirs.mkdir()
    (theirs / "theirs.safetensors").write_bytes(os.urandom(345_678))
    (theirs / "theirs.json").write_text("{}")

    # Whole files, then files in parts of 100,000 bytes.
    for parts in [[], ["100000"]]:
        hub, address = start(binaries, *parts)
        os.environ |= {
            "HF_ENDPOINT": address, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / f"hf{len(parts)}"),
            "MODELSCOPE_ENDPOINT": address, "MODELSCOPE_DOMAIN": address, "MODELSCOPE_API_TOKEN": "secret",
            "MODELSCOPE_CACHE": str(work / f"ms{len(parts)}"), "MODELSCOPE_HOME": str(work / "ms-home"),
        }  # fmt: skip
        subprocess.run([binaries / "dpo-host", "push", "me/ours", run, "--base-model", "owner/base"], check=True)
        subprocess.run([sys.executable, "-c", HUGGING_FACE, str(theirs), str(work / f"fetched{len(parts)}")], check=True)
        same(digests(run), digests(work / f"fetched{len(parts)}"), names)
        same(digests(theirs), digests(work / f"fetched{len(parts)}-theirs"), ["theirs.safetensors", "theirs.json"])
        hub.kill()

    hub, address = start(binaries)
    os.environ |= {"MODELSCOPE_ENDPOINT": address, "MODELSCOPE_DOMAIN": address}
    subprocess.run([binaries / "dpo-host", "push", "ms::me/ours", run], check=True)
    subprocess.run([sys.executable, "-c", MODELSCOPE, str(theirs), str(work / "fetched-ms")], check=True)
    same(digests(run), digests(work / "fetched-ms"), names)
    same(digests(theirs), digests(work / "fetched-ms-theirs"), ["theirs.safetensors", "theirs.json"])
    hub.kill()
    print("the hubs' own clients and push agree")


# What push has pushed, fetched; its card read; another folder pushed by the client, and fetched.
HUGGING_FACE = """
import sys
from huggingface_hub import HfApi, ModelCard, snapshot_download
api, (theirs, to) = HfApi(), sys.argv[1:]
snapshot_download("me/ours", local_dir=to)
card = ModelCard.load(to + "/README.md")
assert card.data.base_model == "owner/base" and card.data.library_name == "peft", card.data
assert card.data.pipeline_tag == "text-generation" and {"dpo", "lora", "dpo-host"} <= set(card.data.tags), card.data
api.create_repo("me/theirs", private=True, exist_ok=True)
commit = api.upload_folder(repo_id="me/theirs", folder_path=theirs, commit_message="theirs")
print("huggingface_hub pushed", commit.oid)
snapshot_download("me/theirs", local_dir=to + "-theirs")
"""

MODELSCOPE = """
import sys
from modelscope.hub.api import HubApi
from modelscope import snapshot_download
theirs, to = sys.argv[1:]
snapshot_download("me/ours", local_dir=to)
api = HubApi()
api.upload_folder(repo_id="me/theirs", folder_path=theirs, repo_type="model", commit_message="theirs")
print("modelscope pushed")
snapshot_download("me/theirs", local_dir=to + "-theirs")
"""

main()
