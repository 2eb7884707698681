"""A dataset_info.json reads from its folder and from the hub, not from elsewhere on this machine."""

import gzip
import json
import lzma

import pytest

from jtune.data.sources.load import load_table, open_table
from jtune.data.sources.registry import find_datasets
from jtune.errors import DataError

ROW = '{"instruction": "Say 1.", "output": "1"}\n'


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """dataset_dir and a folder beside it, with the same file in each."""
    for name in ("data", "private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(ROW)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data", tmp_path / "private"


def said(folder, entry):
    (folder / "dataset_info.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(DataError) as found:
        find_datasets(["a"], str(folder))
    assert "allow_outside_dataset_dir: true" in str(found.value)
    find_datasets(["a"], str(folder), allow_outside=True)
    return str(found.value)


OUT = (
    "Move the file into dataset_dir and give file_name, name its path in `dataset:`, or set "
    "allow_outside_dataset_dir: true"
)


@pytest.mark.parametrize(
    "given",
    [
        *("/etc/hosts", "private/rows.jsonl", "data/../private/rows.jsonl", "~/rows.jsonl", "*.jsonl"),
        *("file:///etc/hosts", "FILE:///etc/hosts", "local:///etc/hosts", "simplecache::file:///etc/hosts"),
        *("simplecache::/etc/hosts", "zip://rows.jsonl::/etc/rows.zip", "zip://a::zip://b::file:///c.zip"),
        *("reference://::/etc/refs.json", "dir::/etc", "memory://a", "git:///etc:a", "https://h/a::file:///etc/hosts"),
        *("unknown://a", "://a", "https"),
    ],
)
def test_a_cloud_file_name_is_on_another_machine(folders, given):
    assert said(folders[0], {"cloud_file_name": given}).endswith(
        f"entry 'a': cloud_file_name {given!r} is no address of another machine. {OUT}"
    )


@pytest.mark.parametrize(
    "given",
    [
        *("https://host/rows.jsonl", "s3://bucket/*.jsonl", "gs://b/rows.csv", "hf://datasets/a/b/rows.csv"),
        *("simplecache::s3://b/rows.csv", "zip://rows.csv::https://host/rows.zip"),
    ],
)
def test_addresses_of_other_machines_are_taken(folders, given):
    (folders[0] / "dataset_info.json").write_text(json.dumps({"a": {"cloud_file_name": given}}))
    assert [(entry.source, entry.path) for entry in find_datasets(["a"], str(folders[0]))] == [("url", given)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("/etc", "is no id of the hub, as in owner/name"),
        ("./data", "is no id of the hub, as in owner/name"),
        ("../private", "is no id of the hub, as in owner/name"),
        ("~/private", "is no id of the hub, as in owner/name"),
        ("file:///etc", "is no id of the hub, as in owner/name"),
        ("hf://datasets//etc", "is no id of the hub, as in owner/name"),
        ("a/b/c", "is no id of the hub, as in owner/name"),
        ("owner/script.py", "is no id of the hub, as in owner/name"),
        *(
            (name, "is a reader of local files, no id of the hub")
            for name in ("json", "csv", "text", "parquet", "arrow")
        ),
        ("private", "is also a local path, which would be read instead of the hub"),
        ("data/deeper", "is also a local path, which would be read instead of the hub"),
    ],
)
def test_a_hub_id_is_on_the_hub(folders, given, why):
    (folders[0] / "deeper").mkdir()
    expected = f"entry 'a': hf_hub_url {given!r} {why}. {OUT}"
    assert said(folders[0], {"hf_hub_url": given, "folder": "sub"}).endswith(expected)
    if given != "a/b/c":
        with pytest.raises(DataError, match="allow_outside_dataset_dir"):
            find_datasets([given], "ONLINE")


@pytest.mark.parametrize("within", ["/etc", "..", "a/../../b", "file:///etc", "x::/etc", "~"])
def test_a_folder_of_the_hub_is_in_its_repository(folders, within):
    assert said(folders[0], {"hf_hub_url": "owner/name", "folder": within}).endswith(
        f"entry 'a': hf_hub_url 'owner/name': folder {within!r} lies outside that repository. {OUT}"
    )
    for entry in ({}, {"folder": "sub/folder"}, {"folder": None}):
        (folders[0] / "dataset_info.json").write_text(json.dumps({"a": {"hf_hub_url": "owner/name", **entry}}))
        assert find_datasets(["a"], str(folders[0]))[0].path == "owner/name"


@pytest.mark.parametrize(
    "given", ["../private/rows.jsonl", "/etc/hosts", "simplecache::/etc/hosts", "sub/../../private"]
)
def test_a_file_name_lies_in_the_folder(folders, given):
    message = f"entry 'a': file_name {given!r} lies outside {folders[0]}. {OUT}"
    assert said(folders[0], {"file_name": given}).endswith(message)


@pytest.mark.parametrize("kind", ["file", "folder", "in a folder", "through a folder", "to a link"])
def test_a_link_that_leads_out_is_refused(folders, kind):
    data, private = folders
    target, name = private / "rows.jsonl", "link"
    if kind == "folder":
        target = private
    elif kind == "in a folder":
        (data / "sub").mkdir()
        name = "sub/link"
    elif kind == "through a folder":
        (data / "sub").symlink_to(private)
        name = "sub/rows.jsonl"
    elif kind == "to a link":
        (data / "second").symlink_to(target)
        target = data / "second"
    if kind != "through a folder":
        (data / name).symlink_to(target)
    given = "sub" if kind == "in a folder" else name
    led = private if kind == "folder" else private / "rows.jsonl"
    assert said(data, {"file_name": given}).endswith(
        f"entry 'a': file_name {given!r}: the link {data / name} leads to {led}, outside {data}. {OUT}"
    )
    with pytest.raises(DataError, match="leads to"):  # without an entry, too
        find_datasets([given], str(data))
    assert find_datasets([given], str(data), allow_outside=True)[0].path == str(data / given)


@pytest.mark.parametrize("given", ["rows.jsonl\0", "x" * 300])
def test_a_name_that_is_none_for_the_system_is_a_fault_of_the_data(given, folders):
    (folders[0] / "dataset_info.json").write_text(json.dumps({"a": {"file_name": given}}))
    with pytest.raises(DataError):
        load_table(find_datasets(["a"], str(folders[0]))[0])
    with pytest.raises(DataError, match="is neither in"):
        find_datasets([given], str(folders[0]))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.xz", "rows.csv.bz2", "short.jsonl.gz", "short.jsonl.xz"])
@pytest.mark.parametrize("read", [load_table, open_table])
def test_a_compressed_file_that_is_damaged_is_a_fault_of_the_data(name, read, folders):
    whole = (gzip if name.endswith("gz") else lzma).compress(ROW.encode() * 50)
    (folders[0] / name).write_bytes(whole[:-9] if name.startswith("short") else ROW.encode())
    with pytest.raises(DataError, match=f"cannot read dataset '{name}'"):
        read(find_datasets([name], str(folders[0]))[0])


def test_links_that_stay_inside_and_the_users_own_paths_are_read(folders):
    data, private = folders
    (data / "link").symlink_to(data / "rows.jsonl")
    found = lambda name, folder=data: find_datasets([name], str(folder))[0].path
    assert found("link") == str(data / "link")
    assert found(str(private / "rows.jsonl")) == str(private / "rows.jsonl")
    assert found("../private/rows.jsonl") == f"{data}/../private/rows.jsonl"
    assert found("private/rows.jsonl") == "private/rows.jsonl"
    moved = data.parent / "moved"  # dataset_dir itself may be a link
    moved.symlink_to(data)
    assert found("rows.jsonl", moved) == str(moved / "rows.jsonl")


def test_a_snapshot_of_the_hubs_cache_is_whole(tmp_path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0").write_text(ROW)
    (snapshot / "rows.jsonl").symlink_to("../../blobs/0")
    assert find_datasets(["rows.jsonl"], str(snapshot))[0].path == str(snapshot / "rows.jsonl")


@pytest.mark.parametrize("key", ["file_name", "cloud_file_name", "hf_hub_url"])
@pytest.mark.parametrize("value", [7, None, "", ["a"], {}])
def test_a_place_is_text(folders, key, value):
    (folders[0] / "dataset_info.json").write_text(json.dumps({"a": {key: value}}))
    with pytest.raises(DataError) as found:
        find_datasets(["a"], str(folders[0]))
    assert str(found.value).endswith(f"entry 'a': {key} must be text, found {json.dumps(value)}")
