"""jtune trains on text: a row with an image or the like stops the run, and never loses it without a word."""

import json

import datasets
import pytest
from sets import load, write

from jtune.data.sources import columns
from jtune.errors import DataError

PICTURE = {"type": "image_url", "image_url": {"url": "a.png"}}
TEXT = {"type": "text", "text": "What is it?"}
OPENAI = {"formatting": "openai"}
SHAREGPT = {"formatting": "sharegpt"}


@pytest.fixture(autouse=True)
def said_anew():
    columns.note_once.cache_clear()


def openai(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A cat."}], **more}


def sharegpt(question, **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}], **more}


def alpaca(question, **more):
    return {"instruction": question, "output": "A cat.", **more}


def answered(template, folder, rows, info=None, name="a.jsonl", **args):
    write(folder, name, rows, info)
    row = load(folder, "a", template=template, **args).train[0]
    return template.tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "info", "fault"),
    [
        ([openai(TEXT), openai(TEXT, PICTURE)], OPENAI, "an image in a message"),
        ([openai(TEXT), openai({"type": "input_audio"})], OPENAI, "audio in a message"),
        ([openai(TEXT), openai({"video": "a.mp4"})], OPENAI, "a video in a message"),
        ([sharegpt("q"), sharegpt([TEXT, PICTURE])], SHAREGPT, "an image in a message"),
        ([openai(TEXT, images=[]), openai(TEXT, images=["a.png"])],
         OPENAI | {"columns": {"images": "images"}}, "an image in column 'images'"),
        ([alpaca("q", pics=[]), alpaca("q", pics=["a.png"])],
         {"columns": {"prompt": "instruction", "response": "output", "videos": "pics"}}, "a video in column 'pics'"),
        ([sharegpt("q", image=None), sharegpt("<image>\nq", image="a.png")], SHAREGPT, "an image in column 'image'"),
        ([alpaca("q", image=""), alpaca("<image>q", image="a.png")], None, "an image in column 'image'"),
        ([alpaca("q", images=[]), alpaca("<audio>q", images=["a"])], {}, "audio in column 'images'"),
    ],
)  # fmt: skip
def test_a_row_with_an_image_stops_the_run(rows, info, fault, streaming, template, tmp_path):
    write(tmp_path, "a.jsonl", rows, info)
    with pytest.raises(DataError) as error:
        load(tmp_path, "a", template=template, **({"streaming": True} if streaming else {}))
    assert str(error.value) == (
        f"a.jsonl:2: {fault}: jtune trains on text. Take the row, or what is not text in it, out of the data"
    )


@pytest.mark.parametrize("kind", ["images", "videos", "audios"])
def test_a_file_named_directly_has_its_images_in_columns_of_usual_names(kind, template, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(alpaca("q", **{kind: held})) + "\n" for held in ([], ["a"], ["b"])))
    with pytest.raises(DataError, match=rf"b.jsonl:2: .* in column '{kind}': jtune trains on text \(2 rows have such"):
        load(tmp_path, "b.jsonl", template=template)


def test_empty_columns_and_text_parts_are_learned(template, tmp_path):
    held = answered(template, tmp_path, [openai(TEXT, TEXT, images=[], videos=None)], OPENAI)
    assert "What is it?What is it?" in held
    assert "What is it?" in answered(template, tmp_path, [sharegpt([TEXT])], SHAREGPT)
    listed = {"columns": {"prompt": "instruction", "response": "output", "images": "images"}}
    assert "A cat." in answered(template, tmp_path, [alpaca("q", images=[None])], listed)


def test_placeholders_without_anything_to_place_are_said(template, tmp_path):
    write(tmp_path, "a.jsonl", [alpaca("Why <video>?"), alpaca("<image>q"), alpaca("q")])
    report = load(tmp_path, "a", template=template).report.sets[0]
    assert report.remarks() == [
        "train: 2 rows hold `<video>`, `<image>`, which is text to jtune: no image, video or audio is read "
        "(first: a.jsonl:1)"
    ]


def test_a_column_of_pictures_that_is_not_used_is_never_decoded(template, tmp_path):
    features = {name: datasets.Value("string") for name in ("instruction", "output")}
    features |= {"image": datasets.Image(), "cover": datasets.List(datasets.Image())}
    row = {"instruction": "q", "output": "A cat.", "image": {"bytes": b"no picture"}, "cover": [{"bytes": b"none"}]}
    datasets.Dataset.from_list([row], datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        assert load(tmp_path, "a.parquet", template=template, streaming=streaming).report.sets[0].kept == 1
