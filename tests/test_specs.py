"""Read files into mappings with positions, and mappings into layers; errors have a path and a position."""

import ast
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

import atn_norms as an
from atn_norms import specs
from atn_norms.registry import Options, SpecError


class Part(Options):
    a: int = 1
    rate: float = 1.0
    parts: "tuple[Part, ...]" = ()


def complaint(text: str | bytes, name: str, folder: Path) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        specs.validate(Part, *specs.read(path))
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: 3\nparts:\n  - {a: 4}\n  - a: x\n", "a.yaml:4:5: parts[1].a: got 'x'; expected an integer"),
        ("a.yaml", "a: 3\nb: 4\n", "a.yaml:2:1: b: got an unknown key; expected one of a, rate, parts"),
        (
            "a.yaml",
            "parts:\n  - &x {rate: y}\n  - <<: *x\n",
            "a.yaml:2:9: parts[1].rate: got 'y'; expected a number",
        ),
        ("a.yaml", "a: 3\na: 4\n", "a.yaml:2:1: got the key 'a' twice; expected it once"),
        ("a.yaml", "a: [3\n", "a.yaml:2:1: expected ',' or ']'"),
        (
            "a.yaml",
            "\ta: 3\n",
            "a.yaml:1:1: found character '\\t' that cannot start any token. YAML indents with blanks",
        ),
        ("a.yaml", "a: 1\n b: 2\n", "a.yaml:2:3: mapping values are not allowed here. Keys of a mapping start in one"),
        ("a.yaml", "a: - 1\n", "a.yaml:1:4: sequence entries are not allowed here. A list starts on its own line"),
        ("a.yaml", "a: *x\n", "a.yaml:1:4: found undefined alias 'x'"),
        (
            "a.yaml",
            "parts: &x [*x]\n",
            "a.yaml:1:8: got an alias (*name) inside the value that it names; expected a finite value",
        ),
        ("a.yaml", "a: 1\nparts: &x {<<: *x}\n", "a.yaml:2:8: got an alias (*name) inside the value that it names"),
        ("a.yaml", "parts: " + "[" * 120 + "]" * 120, "a.yaml:1:108: nested too deeply; expected at most 100 levels"),
        ("a.json", '{"parts": ' + "[" * 120 + "]" * 120 + "}", "a.json:1:110: nested too deeply"),
        ("a.toml", "a = " + "1" * 5001, "a.toml:1:5: got an integer of 5001 digits; expected at most 50 digits"),
        ("a.toml", "a = " + "[" * 5000, "a.toml: nested too deeply; expected at most 100 levels"),
        ("a.toml", "a." * 500 + "b = 1", "a.toml:1:1: nested too deeply; expected at most 100 levels"),
        ("a.toml", "x = 1\ny = {b = 1, " + "a . " * 100 + "b=1}", "a.toml:2:13: nested too deeply; expected at most"),
        ("a.toml", '["a".b' + ".c" * 99 + "]", "a.toml:1:2: nested too deeply; expected at most 100 levels"),
        ("a.toml", "rate = 1.5\na = '" + "a." * 500 + "'", "a.toml: a: got 'a.a.a."),
        ("a.yaml", "a: !<" + "x" * 301 + "> 1", "a.yaml:1:4: got a tag of over 300 characters; expected at most 300"),
        ("a.yaml", "a: !" + "%41" * 101 + " 1", "a.yaml:1:4: got a tag of over 300 characters; expected at most 300"),
        ("a.yaml", "a: !<" + "x" * 299 + "> 1", "a.yaml:1:4: could not determine a constructor for the tag"),
        ("a.yaml", "a: 1\n---\na: 2\n", "a.yaml:2:1: expected a single document in the stream, but found another"),
        ("a.yaml", "a: !!python/object:os.system 3\n", "a.yaml:1:4: could not determine a constructor for the tag"),
        ("a.yaml", "a: !!int x\n", "a.yaml:1:4: got 'x'; expected a valid int"),
        ("a.yaml", "a: 1\nb: \0\n", "a.yaml:2:4: got the character '\\x00'; YAML does not allow it"),
        ("a.yaml", "a: !!bool x\n", "a.yaml:1:4: got 'x'; expected a valid bool"),
        ("a.yaml", "a: !!int ''\n", "a.yaml:1:4: got ''; expected a valid int"),
        ("a.yaml", "a: 2024-13-45\n", "a.yaml:1:4: got '2024-13-45'; expected a valid timestamp (month"),
        ("a.yaml", "parts:\n- a: 1" + "0" * 400, "a.yaml:2:3: parts[0].a: got an integer of more than 50 digits"),
        ("a.yaml", b"a: 1\n# \xff\n", "a.yaml:2:3: got bytes that are not UTF-8; expected UTF-8 text"),
        ("a.yaml", "a: " + "1" * 5001, "a.yaml:1:4: got '1111"),
        ("a.yaml", "parts: " + "[" * 3000 + "]" * 3000, "a.yaml:1:108: nested too deeply"),
        ("a.yaml", "", "a.yaml: got nothing; expected a mapping (key: value)"),
        ("a.yml", "- 1\n", "a.yml: got list; expected a mapping (key: value)"),
        (
            "a.json",
            '{"a": 1,\n "parts": [{}, {"a": "x,{", "b": 1}]}',
            "a.json:2:17: parts[1].a: got 'x,{'; expected an integer",
        ),
        ("a.json", '{"a": 1,\n "b": 2}', "a.json:2:2: b: got an unknown key"),
        ("a.json", '{"parts": [{"a": 1,\n"a": 2}]}', "a.json:2:1: got the key 'parts[0].a' twice; expected it once"),
        ("a.json", '{"a": 1,}', f"a.json:1:{8 if sys.version_info >= (3, 13) else 9}: "),
        ("a.json", '{"rate": NaN}', "a.json:1:10: got NaN; expected a finite number"),
        ("a.json", '{"a":' * 5000 + "1" + "}" * 5000, "a.json:1:501: nested too deeply; expected at most 100 levels"),
        (
            "a.json",
            '{"a": ' + "1" * 5001 + "}",
            "a.json:1:7: got an integer of 5001 digits; expected at most 50 digits",
        ),
        ("a.json", '{"a": 1' + "0" * 400 + "}", "a.json:1:7: got an integer of 401 digits"),
        ("a.json", '{"b": "\\ud800"}', "a.json:1:2: b: got '\\ud800'; expected text without lone surrogates"),
        ("a.json", "[" * 100_000, "a.json:1:101: nested too deeply"),
        ("a.json", "3", "a.json: got int; expected a mapping (key: value)"),
        ("a.toml", '[[parts]]\na = "x"\n', "a.toml: parts[0].a: got 'x'; expected an integer"),
        ("a.toml", "a = \n", "a.toml:1:5: invalid value"),
        ("a.toml", "a = 1\na = 2\n", "a.toml"),
        ("a.txt", "a: 1\n", "a.txt: got unknown kind of file '.txt'; expected one of .yaml, .yml, .json, .toml"),
    ],
)
def test_a_fault_in_a_file_has_its_position(name, text, message, tmp_path):
    assert message in complaint(text, name, tmp_path)


@pytest.mark.parametrize("repeat", ["[{}]", "{{<<: [{}]}}"])
def test_exponential_aliases_are_rejected_at_once(repeat, tmp_path):
    levels = "".join(f"l{i}: &l{i} {repeat.format(', '.join([f'*l{i - 1}'] * 9))}\n" for i in range(1, 10))
    text = "l0: &l0 {a: 1}\n" + levels
    started = time.monotonic()
    message = complaint(text, "a.yaml", tmp_path)
    assert time.monotonic() - started < 5
    assert "values with every alias (*name) written out; expected at most 100000" in message


def test_an_invalid_file_name_is_rejected():
    with pytest.raises(SpecError, match="expected a name that a file can have"):
        specs.build("a\0b.yaml")


@pytest.mark.parametrize("name", ["fifo.yaml", "zero.json", "kernel.toml"])
def test_only_regular_files_are_read(name, tmp_path):
    """Reading a pipe would block, and reading a device would exhaust the memory."""
    path = tmp_path / name
    if name == "fifo.yaml":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if name == "zero.json" else "/dev/ptmx")
    with pytest.raises(SpecError, match=f"{name}: got a special file; expected a readable file"):
        specs.read(path)


TOO_LARGE = {
    "a.yaml": ("a: [" + "1," * 400_000 + "]", "a.yaml:1:19999: got more than 10000 values in one text"),
    "b.yaml": ("a: " + "x" * 1_000_000, "b.yaml: got a file of more than 1000000 bytes; expected a readable file"),
    "a.json": ('{"a": [' + "1," * 200_000 + "1]}", "a.json:1:1: got more than 100000 values; expected at most 100000"),
    "b.json": ("[" * 1_000_001, "b.json: got a file of more than 1000000 bytes; expected a readable file"),
    "a.toml": ("a = [" + "1," * 200_000 + "]", "a.toml: got more than 100000 values; expected at most 100000"),
    "b.toml": ("a" * 1_000_001, "b.toml: got a file of more than 1000000 bytes; expected a readable file"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_file_that_is_too_large_is_rejected(name, tmp_path):
    text, message = TOO_LARGE[name]
    assert message in complaint(text, name, tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "a." * 495_000 + "b = 1"),
        ("a.toml", "[" + "a." * 495_000 + "b]"),
        ("a.yaml", "a: !<" + "x" * 990_000 + "> 1"),
        ("a.yaml", "a: !" + "%41" * 330_000 + " 1"),
        ("a.yaml", "a: !!timestamp " + "1" * 990_000),
        ("a.yaml", 'a: "' + "\\x41" * 240_000 + '"'),
        ("a.json", '{"' + "k" * 990_000 + '": [1,}'),
        ("a.json", "[" * 990_000),
    ],
    ids=["key", "table", "tag", "escaped tag", "timestamp", "escapes", "long key", "levels"],
)
def test_no_content_takes_long_to_reject(name, text, tmp_path):
    """Parsers that need quadratic time took 12 s and more for these files."""
    started = time.process_time()
    message = complaint(text, name, tmp_path)
    assert time.process_time() - started < 6
    assert len(message) < 500, message


def test_a_setting_is_read_like_a_file():
    assert specs.value("{a: [1, none]}", "--set x") == {"a": [1, "none"]}
    for text in ("&x [*x]", "2024-13-45", "1" * 5000, "[" * 3000 + "]" * 3000, "[1", "[" * 120 + "]" * 120):
        with pytest.raises(SpecError, match="^--set x: [^\n]+$"):
            specs.value(text, "--set x")


def test_a_fault_of_several_options_is_placed_at_one_of_them(tmp_path):
    path = tmp_path / "model.yaml"
    for text, message in [
        ("cell: lstm\ninput_size: 2\nhidden_size: 3\nwindow: 5\n", "model.yaml:4:1: window: got a 'sliding' window"),
        (
            "cell: lstm\ninput_size: 2\nbackend: nativ\nhidden_size: 3\n",
            "model.yaml:3:1: backend: got unknown backend 'nativ'",
        ),
        (
            "cell: gru\ninput_size: 2\nhidden_size: 3\nnorm:\n  sites:\n    cc: layer\n",
            "model.yaml:6:5: norm.sites.cc: got unknown site",
        ),
    ]:
        path.write_text(text)
        with pytest.raises(SpecError) as caught:
            an.build(path)
        assert str(caught.value).replace(f"{tmp_path}/", "").startswith(message)


def test_long_values_are_shortened_in_messages():
    long = "x" * 5000
    for change in ({"norm": long}, {"norm": {"kind": long}}, {"hidden_size": long}, {long: 1}, {"norm": [long]}):
        with pytest.raises(SpecError) as caught:
            an.build({"cell": "lstm", "input_size": 2, "hidden_size": 3} | change)
        assert len(str(caught.value)) < 500, change


@pytest.mark.parametrize("exponent", [200, 400, 5000])
def test_a_number_that_is_too_large_is_rejected_with_its_path(exponent):
    model = {"cell": "lstm", "input_size": 2, "hidden_size": 3, "norm": {"kind": "layer", "eps": 1.0}}
    for path, change in (("hidden_size", {"hidden_size": 10**exponent}), ("window", {"window": 10**exponent})):
        with pytest.raises(SpecError, match=path):
            an.build(model | change)
    with pytest.raises(SpecError, match=r"norm\.eps"):
        an.build(model | {"norm": {"kind": "layer", "eps": 10**exponent}})


def test_a_missing_file_names_the_nearest_file(tmp_path):
    (tmp_path / "study.yaml").write_text("a: 1\n")
    with pytest.raises(
        SpecError, match=r"studdy\.yaml: got no such file; expected a file; did you mean 'study\.yaml'\?"
    ):
        specs.read(tmp_path / "studdy.yaml")
    with pytest.raises(SpecError, match=r"x\.yaml: got no such file; expected a file$"):
        specs.read(tmp_path / "nowhere" / "x.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match=r"folder\.yaml: got Is a directory"):
        specs.read(tmp_path / "folder.yaml")


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert specs.read(tmp_path / "a.json")[0] == {}


def test_numbers_and_words_follow_yaml_1_2():
    data, _ = specs.parse("rate: 1e-3\nword: none\nnothing:\nno: yes\n", "a.yaml")
    assert data == {"rate": 0.001, "word": "none", "nothing": None, "no": "yes"}


keys = st.text("abc_ é\"'{}[]:,#\\\n7", min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab \"'{}[]:,\\\n", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def paths(data: Any, above: tuple[Any, ...] = ()):
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for step, value in inside:
        yield (*above, step)
        yield from paths(value, (*above, step))


def text_at(text: str, place: str) -> str:
    line, column = map(int, place.split(":")[1:])
    return text.split("\n")[line - 1][column - 1 :]


@given(st.dictionaries(keys, values, min_size=1, max_size=3), st.sampled_from([None, 0, 2]))
def test_every_key_of_a_json_text_has_its_position(data, indent):
    text = json.dumps(data, indent=indent)
    read, where = specs.parse(text, "a.json")
    assert read == data
    for path in paths(data):
        value = data
        for step in path:
            value = value[step]
        # the position of a list item is its value, that of a mapping entry its key
        start = json.dumps(path[-1]) if isinstance(path[-1], str) else json.dumps(value)[:1]
        assert text_at(text, where(path)).startswith(start), path
        assert where((*path, "absent", 3)) == where(path)


names = st.text("abcdef", min_size=1, max_size=4).filter(lambda name: name not in ("null", "true", "false"))
plain = st.recursive(
    st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(names, plain, min_size=1, max_size=3), st.sampled_from([None, False, True]))
def test_every_key_of_a_yaml_text_has_its_position(data, flow):
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    out = io.StringIO()
    yaml.dump(data, out)
    read, where = specs.parse(out.getvalue(), "a.yaml")
    assert read == data
    for path in paths(data):
        key = path[-1]
        if isinstance(key, str):
            assert text_at(out.getvalue(), where(path)).startswith(key), path


MODEL = {"cell": "gru", "input_size": 2, "hidden_size": 3, "norm": {"kind": "layer", "eps": 1e-3}, "window": 4}


@pytest.mark.parametrize("suffix", ["yaml", "json", "toml"])
def test_a_layer_comes_from_any_file_alike(suffix, tmp_path):
    text = {
        "yaml": "cell: gru\ninput_size: 2\nhidden_size: 3\nnorm: {kind: layer, eps: 1e-3}\nwindow: 4\n",
        "json": json.dumps(MODEL),
        "toml": 'cell = "gru"\ninput_size = 2\nhidden_size = 3\nwindow = 4\nnorm = {kind = "layer", eps = 1e-3}\n',
    }[suffix]
    path = tmp_path / f"model.{suffix}"
    path.write_text(text)
    wanted = specs.build(MODEL).spec
    assert specs.build(path).spec == specs.build(str(path)).spec == specs.build(wanted).spec == wanted
    assert specs.build(path, dtype=torch.float64).weight_ih_l0.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norm": "laier"},
            r"^norm: got unknown normalizer 'laier'; expected one of batch, layer, rms, none; did you mean 'layer'\?$",
        ),
        (
            {"norm": {"kind": "layer", "esp": 1.0}},
            r"^norm\.esp: got an unknown key; expected one of .*eps.*; did you mean 'eps'\?$",
        ),
        ({"hidden_size": True}, r"^hidden_size: got True; expected an integer$"),
        ({"hiden_size": 3}, r"^hiden_size: got an unknown key; .*did you mean 'hidden_size'\?$"),
        (
            {"window": {"kind": "exponential", "half_life": float("inf")}},
            r"^window\.half_life: got inf; expected a finite number",
        ),
        ({"window": 0}, r"^window: got 0; expected at least 1$"),
        ({"window": 2.5}, r"^window: got float 2.5; expected an integer, a window's kind \(one of cumulative"),
        ({"window": "10"}, r"^window: got str '10'; expected an integer, a window's kind"),
    ],
)
def test_an_impossible_mapping_is_rejected_with_the_reason(change, message):
    with pytest.raises(SpecError, match=message):
        specs.build(MODEL | change)


def test_an_impossible_size_is_rejected_at_once(tmp_path):
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(MODEL | {"hidden_size": 10**9}))
    started = time.monotonic()
    with pytest.raises(SpecError, match=r"huge\.json:.*hidden_size"):
        specs.build(path)
    assert time.monotonic() - started < 1


def test_an_error_of_building_names_the_file(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL | {"backend": "torch"}))
    with pytest.raises(SpecError, match=r"model\.json: backend: 'torch' cannot run this layer"):
        specs.build(path)


def test_build_rejects_other_objects():
    with pytest.raises(TypeError, match="source: got int 3; expected a mapping, a path or a LayerSpec"):
        specs.build(3)  # pyright: ignore[reportArgumentType]


def test_the_schema_of_a_layer_shows_every_kind():
    text = json.dumps(specs.schema(an.LayerSpec))
    for kind in ("layer", "batch", "rms", "sliding", "cumulative", "exponential", "lstm", "gru", "rnn"):
        assert f'"{kind}"' in text


def test_no_code_passes_a_whole_sentence_to_a_spec_error():
    """An error has fields (`position`, `path`, `got`, `expected`), from which one function builds the text."""
    sentences = []
    for path in sorted((Path(__file__).parents[1] / "atn_norms").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "SpecError":
                whole = len(node.args) == 1 and not node.keywords
                sentences += [f"{path.name}:{node.lineno}"] if whole else []
    assert sentences == []


@pytest.mark.parametrize(
    ("missing", "near"),
    [
        ("modle.safetensors", "model.safetensors"),
        ("tagger.safetensors", None),
        ("stduy.yaml", "study.yml"),
        ("x", None),
    ],
)
def test_the_nearest_file_is_compared_without_a_shared_suffix(tmp_path, missing, near):
    from atn_norms.errors import nearest_file

    for name in ("model.safetensors", "ok.safetensors", "study.yml"):
        (tmp_path / name).touch()
    assert nearest_file(tmp_path / missing) == near
