"""`hf-e5 push` with the real `huggingface_hub` client against a loopback Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest

from hf_e5.data.build import build_dataset
from hf_e5.errors import InputError
from hf_e5.hub import detect_repo_type
from support import SAMPLE, read_jsonl
from support.hub_server import HubServer


NAME = "user/triplets"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A dataset of a few hundred real records."""
    folder = tmp_path_factory.mktemp("built")
    with open(SAMPLE, encoding="utf-8") as sample:
        (folder / "records.jsonl").write_text("".join(islice(sample, 300)), encoding="utf-8")
    build_dataset([folder / "records.jsonl"], folder / "triplets", test_size=0.2)
    return folder / "triplets"


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "triplets")


def start(hub: HubServer, home: Path, *command: str, **env: str) -> subprocess.Popen:
    # The client reads HF_ENDPOINT when it is imported: each client is a process of its own.
    variables = {**os.environ, **hub.env(), "HF_HOME": str(home / "hf_home"), **env}
    return subprocess.Popen(
        [sys.executable, *command], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def push(hub: HubServer, folder: Path, *flags: str, name: str = NAME, **env: str) -> tuple[int, str, str]:
    process = start(hub, folder.parent, "-m", "hf_e5.cli", "push", str(folder), name, *flags, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run_python(hub: HubServer, home: Path, code: str) -> str:
    process = start(hub, home, "-c", code)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: HubServer, kind: str = "dataset", name: str = NAME) -> dict[str, bytes]:
    files = hub.files(kind, name)
    del files[".gitattributes"]
    return files


def test_push_creates_a_private_repository_in_one_commit(hub, folder):
    code, out, _ = push(hub, folder)
    assert code == 0
    assert f"{hub.endpoint}/datasets/{NAME}" in out and "private" in out and f'load_dataset("{NAME}")' in out
    repo = hub.repos["dataset", NAME]
    assert repo.private
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert pushed(hub) == contents(folder)


def test_push_sends_only_what_changed_and_deletes_old_shards(hub, folder):
    push(hub, folder)
    sent = hub.count("PUT")
    assert sent == sum(name.endswith((".parquet", ".png")) for name in contents(folder))

    code, out, _ = push(hub, folder)
    assert code == 0 and "up to date" in out
    assert hub.count("PUT") == sent and len(hub.repos["dataset", NAME].commits) == 2

    old = folder / "data" / "sts" / "train-00000-of-00001.parquet"
    shutil.copy(
        folder / "data" / "bitext" / "train-00000-of-00001.parquet", old.with_name("train-00000-of-00002.parquet")
    )
    (old.with_name("train-00001-of-00002.parquet")).write_bytes(old.read_bytes() + b"more")
    old.unlink()
    assert push(hub, folder)[0] == 0
    assert hub.count("PUT") == sent + 1  # one shard is new; the other's content is stored already
    assert len(hub.repos["dataset", NAME].commits) == 3
    assert pushed(hub) == contents(folder)


def test_files_of_others_in_the_repository_stay(hub, folder):
    (folder / "NOTES.md").write_text("mine")
    push(hub, folder)
    (folder / "NOTES.md").unlink()
    (folder / "README.md").write_text("---\nlanguage: [en]\n---\nchanged")
    assert push(hub, folder)[0] == 0
    assert pushed(hub) == {**contents(folder), "NOTES.md": b"mine"}


def test_killed_push_leaves_the_repository_and_the_next_one_completes_it(hub, folder):
    begun, reached = [], threading.Event()

    def hold_the_fourth_file(method, path):
        if method != "PUT":
            return None
        begun.append(path)
        if len(begun) <= 3:
            return None
        while len(hub.repos["dataset", NAME].uploaded) < 3:
            time.sleep(0.01)
        reached.set()
        time.sleep(2)
        return "drop"

    hub.intercept = hold_the_fourth_file
    process = start(hub, folder.parent, "-m", "hf_e5.cli", "push", str(folder), NAME)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    repo = hub.repos["dataset", NAME]
    assert len(repo.commits) == 1 and set(repo.head.tree) == {".gitattributes"}
    survived = set(repo.uploaded)
    assert len(survived) == 3

    hub.intercept = lambda method, path: None
    before = hub.count("PUT")
    assert push(hub, folder)[0] == 0
    assert pushed(hub) == contents(folder)
    new = [request.split("/")[-2] for request in hub.requests if request.startswith("PUT")][before:]
    assert len(new) == len(set(new)) == len(repo.uploaded) - 3 and not survived & set(new)

    target = folder.parent / "downloaded"
    code = f"""
from huggingface_hub import snapshot_download
snapshot_download({NAME!r}, repo_type="dataset", local_dir={str(target)!r})
"""
    run_python(hub, folder.parent, code)
    shutil.rmtree(target / ".cache")
    (target / ".gitattributes").unlink()
    downloaded = {name: sha256(data).hexdigest() for name, data in contents(target).items()}
    assert downloaded == {name: sha256(data).hexdigest() for name, data in contents(folder).items()}


@pytest.mark.parametrize("fault", [503, "drop", "lose"])
def test_push_survives_a_failing_commit(hub, folder, fault):
    """Also one that was made, but whose answer got lost: it is not made twice."""
    faults = [fault]
    hub.intercept = lambda method, path: faults.pop() if "/commit/" in path and faults else None
    code, _, err = push(hub, folder)
    assert code == 0 and "trying again" in err
    assert len(hub.repos["dataset", NAME].commits) == 2
    assert not [refusal for refusal in hub.refused if "nothing to commit" in refusal]
    assert pushed(hub) == contents(folder)


def test_refused_file_is_one_line_and_changes_nothing(hub, folder):
    hub.intercept = lambda method, path: 403 if method == "PUT" else None
    code, _, err = push(hub, folder)
    assert code == 2 and "the push failed" in err and "Traceback" not in err
    assert len(hub.repos["dataset", NAME].commits) == 1


@pytest.mark.slow
def test_storage_that_stays_away_is_one_line_after_the_retries(hub, folder):
    """Here the Xet client itself fails: this server does not speak its protocol."""
    code, _, err = push(hub, folder, HF_HUB_DISABLE_XET="0")
    assert code == 2 and err.count("trying again") == 4
    assert "the push failed" in err and "push again to go on" in err and "Traceback" not in err
    assert len(hub.repos["dataset", NAME].commits) == 1


def test_commit_of_someone_else_meanwhile_is_not_overwritten(hub, folder):
    def commit_first(method, path):
        repo = hub.repos.get(("dataset", NAME))
        if "/commit/" in path and len(repo.commits) == 1:
            theirs = {"path": "theirs.txt", "content": "aGk=", "encoding": "base64"}
            hub.commit(
                repo, "main", [{"key": "header", "value": {"summary": "theirs"}}, {"key": "file", "value": theirs}]
            )

    hub.intercept = commit_first
    code, _, err = push(hub, folder)
    assert code == 2 and "A commit has happened since" in err
    assert [commit.title for commit in hub.repos["dataset", NAME].commits] == ["initial commit", "theirs"]
    assert push(hub, folder)[0] == 0
    assert pushed(hub) == {**contents(folder), "theirs.txt": b"hi"}


def test_token(hub, folder):
    """Needed, checked, and neither printed nor written anywhere."""
    code, out, err = push(hub, folder, HF_TOKEN="")
    assert code == 2 and "hf auth login" in err and not hub.repos
    code, _, err = push(hub, folder, HF_TOKEN="hf_wrong")
    assert code == 2 and "Invalid credentials" in err and "hf_wrong" not in err and not hub.repos
    code, _, err = push(hub, folder, name="somebody/else")
    assert code == 2 and "You don't have the rights" in err and not hub.repos

    code, out, err = push(hub, folder)
    assert code == 0 and hub.token not in out + err
    assert not any(hub.token.encode() in content for content in contents(folder.parent).values())


def test_wrong_names_bad_cards_and_offline_mode_are_one_line(hub, folder):
    for name in ("triplets", "user/two words", "a/b/c"):
        code, _, err = push(hub, folder, name=name)
        assert code == 2 and f"hf-e5 push: {name}:" in err and "Traceback" not in err
    code, _, err = push(hub, folder, HF_HUB_OFFLINE="1")
    assert code == 2 and "the push failed" in err and "offline" in err
    assert not hub.repos
    (folder / "README.md").write_text("---\nlanguage: [Klingonian]\n---\n")
    code, _, err = push(hub, folder)
    assert code == 2 and "README.md" in err and "Klingonian" in err and "Traceback" not in err
    assert len(hub.repos["dataset", NAME].commits) == 1 and not hub.count("PUT")


def test_public_only_when_asked_for(hub, folder):
    assert push(hub, folder, "--public")[0] == 0
    assert not hub.repos["dataset", NAME].private
    code, _, err = push(hub, folder)
    assert code == 2 and "exists and is public" in err


def test_load_dataset_from_the_hub(hub, folder):
    push(hub, folder)
    out = run_python(
        hub,
        folder.parent,
        f"""
import json
from datasets import load_dataset
rows = {{
    "all": load_dataset({NAME!r}),
    "sts": load_dataset({NAME!r}, "sts"),
    "streamed": {{split: list(stream) for split, stream in load_dataset({NAME!r}, "sts", streaming=True).items()}},
}}
print(json.dumps({{name: {{split: list(data) for split, data in splits.items()}} for name, splits in rows.items()}}))
""",
    )
    rows = json.loads(out)
    records = read_jsonl(SAMPLE)[:300]
    by_split = {split: {row["id"] for row in data} for split, data in rows["all"].items()}
    assert by_split["train"] | by_split["test"] == {record["id"] for record in records}
    assert not by_split["train"] & by_split["test"]
    assert rows["streamed"] == rows["sts"]
    sts = sorted(rows["sts"]["train"] + rows["sts"]["test"], key=lambda row: row["id"])
    expected = sorted((record for record in records if record["task_type"] == "sts"), key=lambda row: row["id"])
    assert [{**row, "placeholders": json.loads(row["placeholders"])} for row in sts] == expected


def test_push_model(hub, tmp_path):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    files = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "1_Pooling/config.json": b"{}"}
    for name, content in {**files, "model.safetensors": bytes(100_000), ".cache": b"not to be pushed"}.items():
        (folder / name).write_bytes(content)
    code, out, _ = push(hub, folder, name="user/model")
    assert code == 0 and 'SentenceTransformer("user/model")' in out
    assert hub.repos["model", "user/model"].private
    assert pushed(hub, "model", "user/model") == {**files, "model.safetensors": bytes(100_000)}

    # The merged model is replaced by an adapter: what an adapter does not have must not stay beside it.
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")
    sent = hub.count("PUT")
    assert push(hub, folder, name="user/model")[0] == 0
    assert set(pushed(hub, "model", "user/model")) == {
        "README.md",
        "1_Pooling/config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert hub.count("PUT") == sent  # the same content under another name


@pytest.mark.slow
def test_pushed_model_loads_in_sentence_transformers(hub, tiny_checkpoint, tmp_path):
    from hf_e5 import E5Model, export_sentence_transformer

    model = E5Model.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "checkpoint")
    instruction = "Given a question, retrieve passages"
    export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "model", instruction=instruction)
    assert push(hub, tmp_path / "model", name="user/model")[0] == 0
    assert pushed(hub, "model", "user/model") == contents(tmp_path / "model")
    code = """
import json
from sentence_transformers import SentenceTransformer
print(json.dumps(SentenceTransformer("user/model", device="cpu").encode_query(["how tall is K2"])[0].tolist()))
"""
    vector = json.loads(run_python(hub, tmp_path, code).splitlines()[-1])
    assert vector == pytest.approx(model.encode(["how tall is K2"], instruction=instruction)[0].tolist(), abs=1e-5)


def test_adapter_on_a_local_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(InputError, match="loads nowhere else; export it with `merge`"):
        detect_repo_type(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}))
    assert detect_repo_type(tmp_path) == "model"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found nothing"),
        (["notes.txt"], "found notes.txt"),
        (["config.json", "data/x/train.parquet"], "expected a dataset"),
        (["config.json", "trainer_state.json"], "a training checkpoint"),
    ],
)
def test_folder_that_is_neither_a_dataset_nor_a_model(tmp_path, files, message):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(InputError, match=message):
        detect_repo_type(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        detect_repo_type(tmp_path / "missing")


def send(hub: HubServer, method: str, url: str, body: bytes | list | dict, token: str | None) -> tuple[int, dict]:
    """One request without the client, to see that the server itself refuses what is wrong."""
    if isinstance(body, list):
        body = b"".join(json.dumps(line).encode() + b"\n" for line in body)
    elif isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_server_is_strict(hub):
    content = b"some bytes"
    oid = sha256(content).hexdigest()
    api, token = f"{hub.endpoint}/api", hub.token
    assert send(hub, "POST", f"{api}/repos/create", {"name": "d", "type": "dataset"}, None)[0] == 401
    create = {"name": "d", "type": "dataset", "visibility": "private"}
    assert send(hub, "POST", f"{api}/repos/create", create, token)[0] == 200
    assert send(hub, "POST", f"{api}/repos/create", create, token)[0] == 409
    assert send(hub, "GET", f"{api}/datasets/user/d", b"", None)[0] == 401  # private
    assert send(hub, "GET", f"{api}/datasets/user/d", b"", "hf_wrong")[0] == 401

    batch = {"operation": "upload", "hash_algo": "sha256", "objects": [{"oid": oid, "size": len(content)}]}
    batch_url = f"{hub.endpoint}/datasets/user/d.git/info/lfs/objects/batch"
    assert send(hub, "POST", batch_url, batch, None)[0] == 401
    href = send(hub, "POST", batch_url, batch, token)[1]["objects"][0]["actions"]["upload"]["href"]

    head = hub.repos["dataset", "user/d"].head.oid
    commit_url = f"{api}/datasets/user/d/commit/main"
    header = {"key": "header", "value": {"summary": "one", "parentCommit": head}}
    lfs = {"key": "lfsFile", "value": {"path": "x.parquet", "algo": "sha256", "oid": oid, "size": len(content)}}
    assert "was not uploaded" in send(hub, "POST", commit_url, [header, lfs], token)[1]["error"]
    assert "BadDigest" in send(hub, "PUT", href, b"other byte", None)[1]["error"]
    assert "EntityTooSmall" in send(hub, "PUT", href, b"some", None)[1]["error"]
    assert "the token must not" in send(hub, "PUT", href, content, token)[1]["error"]
    assert send(hub, "PUT", href.replace("signature=", "signature=0"), content, None)[0] == 403
    assert not hub.repos["dataset", "user/d"].uploaded
    assert send(hub, "PUT", href, content, None)[0] == 200

    wrong_size = {"key": "lfsFile", "value": {**lfs["value"], "size": 3}}
    assert send(hub, "POST", commit_url, [header, wrong_size], token)[0] == 400
    regular = {"key": "file", "value": {"path": "y.parquet", "content": "aGk=", "encoding": "base64"}}
    assert "as an LFS file" in send(hub, "POST", commit_url, [header, regular], token)[1]["error"]
    assert send(hub, "POST", commit_url, [header, lfs, lfs], token)[0] == 400
    assert send(hub, "POST", commit_url, [header, lfs], None)[0] == 401
    assert len(hub.repos["dataset", "user/d"].commits) == 1
    assert send(hub, "POST", commit_url, [header, lfs], token)[0] == 200
    assert send(hub, "POST", commit_url, [header, lfs], token)[0] == 412  # its parent is no longer the head
    again = {"key": "header", "value": {"summary": "two"}}
    assert "nothing to commit" in send(hub, "POST", commit_url, [again, lfs], token)[1]["error"]
    assert len(hub.repos["dataset", "user/d"].commits) == 2


def test_the_server_answers_ranges(hub):
    create = {"name": "d", "type": "dataset"}
    send(hub, "POST", f"{hub.endpoint}/api/repos/create", create, hub.token)
    content = hub.files("dataset", "user/d")[".gitattributes"]
    url = f"{hub.endpoint}/datasets/user/d/resolve/main/.gitattributes"
    for value, part in [("bytes=3-9", content[3:10]), ("bytes=5-", content[5:]), ("bytes=-4", content[-4:])]:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": value})) as response:
            assert response.status == 206 and response.read() == part
