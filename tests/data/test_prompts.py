"""Prompts that samples are drawn for: the files that suites have, mistakes in them, and the batches made of them."""

import json

import pytest
from test_datamodule import Ranks, datamodule

from vfm_vae.cli import short_errors
from vfm_vae.data.prompts import Prompt, SamplePrompts, read_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "pink"}], "prompt": "a photo of a pink cow"},
]


def test_a_line_of_a_text_file_is_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffein Häuschen\r\na cow, "pink" \r\na cow, "pink"\n#3'.encode())
    assert read_prompts(file) == [Prompt(text) for text in ("ein Häuschen", 'a cow, "pink"', 'a cow, "pink"', "#3")]


def test_empty_lines_are_skipped_and_said_unless_they_end_the_file(tmp_path, recwarn):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n\n \n")
    assert [prompt.text for prompt in read_prompts(str(file))] == ["a", "b"] and not recwarn.list
    file.write_text("\na\n\nb\n\n")
    with pytest.warns(UserWarning, match=r"prompts: 2 empty lines of '.*prompts.txt' are skipped"):
        assert [prompt.text for prompt in read_prompts(str(file))] == ["a", "b"]


def test_lines_of_json_are_kept_with_their_prompts(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in GENEVAL) + "\n")
    assert read_prompts(file) == [Prompt(record["prompt"], record=record) for record in GENEVAL]
    file.write_text('{"caption": "c", "prompt": "a", "text": "b"}\n{"caption": "c", "text": "b"}\n{"caption": "c"}\n')
    assert [prompt.text for prompt in read_prompts(file)] == ["a", "b", "c"]


def test_files_of_a_folder_are_named_prompts_in_their_order(tmp_path):
    for name, text in {"b10": "ten\n", "b1": "one,\nand more", "._b1": "hidden"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("none")
    (tmp_path / "older.txt").mkdir()
    assert read_prompts(tmp_path) == [Prompt("one,\nand more", "b1"), Prompt("ten", "b10")]


def test_halves_of_characters_are_question_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"prompt": "a \ud800 cat"}')
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.jsonl")] == ["a ? cat"]
    assert [prompt.text for prompt in read_prompts(["a \udcff cat"])] == ["a ? cat"]  # a byte on a command line


def test_prompts_that_are_empty_are_kept_and_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": ""}\n{"prompt": "a"}\n')
    with pytest.warns(
        UserWarning, match=r"prompts: 1 of the 2 in '.*a.jsonl' are empty; their images may show anything"
    ):
        assert [prompt.text for prompt in read_prompts(tmp_path / "a.jsonl")] == ["", "a"]


BAD = {
    "a.txt": ("größer".encode("latin-1"), "line 1 is not UTF-8; convert the file, for instance with `iconv -f LAT"),
    "b.txt": ("a\nb".encode("utf-16"), "line 1 is not UTF-8; convert the file, for instance with `iconv -f UTF-16"),
    "a.jsonl": (b'{"prompt": "a"}\n{"prompt"}', "a.jsonl', line 2 is no JSON (Expecting ':' delimiter at column 10)"),
    "b.jsonl": (b'{"prompts": "a"}', "b.jsonl', line 1 has no text named prompt or text or caption"),
    "c.jsonl": (b'{"prompt": ["a"]}', "c.jsonl', line 1 has no text named prompt"),
    "d.jsonl": (b"[" * 100_000, "d.jsonl', line 1 can't be read as JSON"),
    "e.jsonl": (b'{"number": %s}' % (b"9" * 5000), "e.jsonl', line 1 can't be read as JSON"),
    "c.txt": (b"\n\n", "c.txt' holds none; give at least one"),
    "d.txt/a.txt": ("größer".encode("latin-1"), "d.txt/a.txt' is not UTF-8"),
    "e.txt/a.md": (b"a", "e.txt' holds none; give at least one"),
    "a.csv": (b"a", "a.csv' is no file .txt or .jsonl, and no folder; give one, or prompts as a list"),
    "": (b"", "missing.txt' is no file .txt or .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_a_run_with_one_line(tmp_path, capsys, name):
    content, message = BAD[name]
    if name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="2"), short_errors():
        datamodule(tmp_path, prompts=str(tmp_path / (name.split("/")[0] or "missing.txt")))
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: prompts: ") and message in told[0] and len(told) == 2  # and how to learn more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [], "num_samples": None}, "prompts: the list holds none"),
        ({"prompts": ""}, "prompts: '' is no file .txt or .jsonl, and no folder"),
        ({"prompts": ["a"], "num_samples": 3}, "num_samples: prompts say how many samples there are; leave one"),
        ({"prompts": ["a"], "images_per_prompt": 0}, "images_per_prompt: must be at least 1, given 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        datamodule(tmp_path, **options)


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_follow_prompts_and_need_no_data(stage, ranks):
    seen = {}
    for rank in range(ranks):
        data = datamodule("nowhere", prompts=["a", "b", "c"], images_per_prompt=3, val_batch_size=4)
        data.trainer = Ranks(rank, ranks)
        data.setup(stage)
        assert isinstance(data.samples, SamplePrompts) and [prompt.text for prompt in data.samples.prompts] == [*"abc"]
        loaders = data.predict_dataloader() if stage == "predict" else [data.test_dataloader()]
        for batch in (batch for loader in loaders for batch in loader):
            assert not batch.has_images and batch.labels.tolist() == [-1] * len(batch.labels)
            seen |= dict(zip(batch.index.tolist(), batch.text.captions, strict=True))
    padding = {-1: "c"} if ranks == 2 else {}  # which makes ranks equal
    assert seen == dict(enumerate("aaabbbccc")) | padding


def test_validation_and_training_see_the_data_all_the_same(tree):
    data = datamodule(tree, prompts=["a"])
    data.setup("fit")
    assert all(next(iter(loader())).has_images for loader in (data.train_dataloader, data.val_dataloader))
