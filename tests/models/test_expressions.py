"""Expressions over module names: the matches of re, without trying each, and without a process."""

import random
import re
import subprocess
import sys
from multiprocessing import spawn

import pytest
from torch import nn

import lorafast
from lorafast import LoRA
from lorafast.models import expression_limits, expressions
from lorafast.models.adapt_spec import AdaptSpec

NAMES = [
    "a",
    "a.a",
    "b.a",
    "ab.b",
    "a-b.a_b",
    "a.b.a",
    "b.ab.a",
    "aab",
    "a.aab.b",
    "axb.ba",
    "a+b.a",
]
PIECES = ["a", "b", "ab", ".", r"\.", r"\-", "_b", r"a\+b", "x", "-"]
ORDINARY = [
    r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    r".*\.(?:q|k|v)_proj",
    r".*(q_proj|down_proj)$",
    r"^model\.layers\.[0-9]+\..*proj$",
    r"model.layers.1\.(mlp|self_attn).\w+",
    r"model\.layers\.0\.mlp\.down_proj|model\.layers\.1\.mlp\.down_proj",
    r".*layers\.(0|1)\.(self_attn|mlp)\.[^.]+",
]
UNBOUNDED = [r"(?!x).*q_proj", r"(a+)+.*", r"(.|.)*", r"(?:a|b.*)+", r"(a)\1.*", ".?" * 60]


def by_re(texts, name, ends):
    """The numbers of all expressions that match, as PEFT matches one."""
    if ends:
        return [i for i, text in enumerate(texts) if re.match(rf"(.*\.)?({text})$", name)]
    return [i for i, text in enumerate(texts) if re.fullmatch(text, name)]


def literal(draw):
    """An expression of fixed letters, perhaps anchored or of alternatives."""
    parts = [
        "".join(draw.choices(PIECES, k=draw.randint(0, 4))) for _ in range(draw.choice((1, 1, 2)))
    ]
    return "|".join(draw.choice(("", "^")) + part + draw.choice(("", "$")) for part in parts)


@pytest.mark.parametrize("ends", [False, True])
def test_matches_are_those_of_re(ends):
    draw = random.Random(0)
    matched = 0
    for _ in range(300):
        texts = [literal(draw) for _ in range(5)]
        if draw.random() < 0.3:
            texts.insert(
                draw.randrange(6), draw.choice([".*b", r"(a|b)\..*", "a*b?.a", r"[^b]\w*"])
            )
        want = {name: by_re(texts, name, ends) for name in NAMES}
        first = {name: numbers[0] for name, numbers in want.items() if numbers}
        for untrusted in (False, True):
            assert expressions.first_matches(texts, NAMES, untrusted, ends) == first, texts
        matched += len(first)
        if ends:
            unused = [i for i in range(len(texts)) if not any(i in want[name] for name in NAMES)]
            assert expressions.first_unused(texts, NAMES) == (texts[unused[0]] if unused else None)
    assert matched > 300


def test_alternatives_with_an_escaped_bar_are_those_of_re():
    for text in (r"a\|b", r"a\\|b", r"a|b\|", r"\||a"):
        names = ["a", "b", "a|b", "a\\", "b|", "|"]
        want = {name: 0 for name in names if re.fullmatch(text, name)}
        assert expressions.first_matches([text], names) == want


class Layers(nn.Module):
    """The names of a model with a number of layers, and little else."""

    def __init__(self, count):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(count)
        )


@pytest.mark.parametrize("form", ["{}", "^{}", "^{}$"])
def test_a_pattern_for_each_layer_is_looked_up(form, monkeypatch, tmp_path):
    """Trying 2,400 anchored patterns on as many layers took ten minutes."""
    monkeypatch.setattr(expressions, "_matcher", None)
    monkeypatch.setattr(subprocess, "run", None)
    count = 300
    names = [f"model.layers.{i}.proj" for i in range(count)]
    keys = [form.format(name if form == "{}" else re.escape(name)) for name in names]
    ranks = {key: 1 + i % 3 for i, key in enumerate(keys)}
    model = lorafast.adapt(Layers(count), LoRA(r=4), names, rank_pattern=ranks)
    layers = [layer["proj"] for layer in model.model.layers]
    assert [layer.r for layer in layers] == [1 + i % 3 for i in range(count)]
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(Layers(count), tmp_path)
    assert [layer["proj"].r for layer in loaded.model.layers] == [layer.r for layer in layers]


def test_an_unused_pattern_is_named():
    with pytest.raises(ValueError, match=r"rank_pattern: '\^nope\$' matches no adapted layer"):
        lorafast.adapt(Layers(2), LoRA(r=4), rank_pattern={"proj": 2, "^nope$": 3, "neither": 1})


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_expressions_of_a_file_need_no_process(text, ends, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    names = [
        f"model.layers.{i}.{part}"
        for i in range(48)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "norm")
    ]
    found = expressions.first_matches([text], names, untrusted=True, ends=ends)
    assert found
    assert found == {name: 0 for name in names if by_re([text], name, ends)}


@pytest.mark.parametrize("text", UNBOUNDED)
def test_others_of_a_file_run_in_a_process(text, monkeypatch):
    names, ran = ["a.q_proj", "aa.q", "b"], []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: ran.append(args) or run(*args, **kw))
    want = {name: 0 for name in names if re.fullmatch(text, name)}
    assert expressions.first_matches([text], names) == want
    assert not ran
    assert expressions.first_matches([text], names, untrusted=True) == want
    assert len(ran) == 1


@pytest.mark.parametrize("name", [10, 10_000])
def test_what_long_names_make_slow_runs_in_a_process(name):
    text = r".*a.*b.*c"
    assert expression_limits.are_bounded([text], ["x" * name], ends=False) == (name == 10)


@pytest.mark.parametrize("executable", [None, "", "/bin/sh", "/opt/Blender/blender"])
def test_an_embedded_interpreter_starts_no_other_program(executable, monkeypatch, tmp_path):
    python, run = sys.executable, subprocess.run
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(spawn, "_python_exe", executable)
    monkeypatch.setattr(subprocess, "run", None)
    model = lorafast.adapt(Layers(2), LoRA(r=2), r".*\.proj", rank_pattern={r"^.*\.1\.proj": 1})
    lorafast.save_adapter(model, tmp_path)
    assert lorafast.load_adapter(Layers(2), tmp_path).model.layers[1]["proj"].r == 1
    with pytest.raises(
        ValueError, match="is no Python that could be started: call multiprocessing"
    ):
        expressions.first_matches(["(a+)+b"], ["ab"], untrusted=True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(spawn, "_python_exe", python)
    assert expressions.first_matches(["(a+)+b"], ["ab"], untrusted=True) == {"ab": 0}


def test_plain_names_of_a_selector_are_looked_up():
    spec = AdaptSpec(LoRA(r=1), ["0.proj", "layers.1.proj"], exclude_modules=["1.proj"])
    model = lorafast.adapt(
        Layers(11), spec.adapter, spec.target_modules, exclude_modules=["1.proj"]
    )
    adapted = [
        i
        for i, layer in enumerate(model.model.layers)
        if isinstance(layer["proj"], lorafast.Linear)
    ]
    assert adapted == [0]
    with pytest.raises(ValueError, match="'nope' matches no module"):
        lorafast.adapt(Layers(2), LoRA(r=1), ["proj", "nope"])
