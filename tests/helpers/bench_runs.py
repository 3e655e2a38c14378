"""Short runs of lorafast-bench linear, model and generate."""

import functools
from unittest import mock

import torch
from torch import nn

from lorafast.bench import cli
from lorafast.bench.cases import encoder, model
from lorafast.bench.measure import timing
from lorafast.bench.report.record import Results

K, N, R = 24, 40, 4
LINEAR = ["linear", "--shape", f"{K}x{N}", "--rank", str(R), "--tokens", "8,3"]
LINEAR += ["--rounds", "2", "--warmup", "1", "--device", "cpu"]
MODEL = ["model", "--device", "cpu", "--seq", "8", "--rounds", "1", "--warmup", "1"]
GENERATE = ["generate", "--device", "cpu", "--layers", "1", "--hidden", "64", "--rank", "4"]
GENERATE += ["--prompt", "5", "--tokens", "3", "--rounds", "1", "--warmup", "1"]
BLOCK = ["block", "--device", "cpu", "--hidden", "64", "--heads", "4", "--intermediate", "96"]
BLOCK += ["--tokens", "12", "--rank", "4", "--rounds", "1", "--warmup", "1"]
EXPERTS = ["experts", "--device", "cpu", "--shape", f"{K}x{N}", "--rank", str(R)]
EXPERTS += ["--experts", "8", "--tokens", "20", "--rounds", "1", "--warmup", "1"]


def run(tmp_path, options):
    """Run `linear` with these options, in one string, or with a list of words.

    Returns the exit status, the rows and the file.
    """
    return _run(tmp_path, LINEAR, options)


def run_model(tmp_path, options):
    """Run `model` with these options. Returns the exit status and the rows."""
    return _run(tmp_path, MODEL, options)[:2]


def run_generate(tmp_path, options):
    """Run `generate` with these options. Returns the exit status, the rows and the file."""
    return _run(tmp_path, GENERATE, options)


def _run(tmp_path, command, options):
    out = tmp_path / "out.json"
    words = options.split() if isinstance(options, str) else options
    # Without repeats within a sample: these times are not read.
    with mock.patch.object(timing, "MIN_SAMPLE_MS", 0.0):
        status = cli.main([*command, "--json", str(out), *words])
    return status, (Results.read(out).records if out.exists() else []), out


def run_experts(tmp_path, options):
    """Run `experts` with these options. Returns the exit status, the rows and the file."""
    return _run(tmp_path, EXPERTS, options)


def run_block(tmp_path, options):
    """Run `block` with these options. Returns the exit status, the rows and the file."""
    return _run(tmp_path, BLOCK, options)


def by_label(rows, **fields):
    """Return the rows with these fields, by label."""
    return {
        r.label: r for r in rows if all(getattr(r, name) == value for name, value in fields.items())
    }


@functools.cache
def _encoder(name, dtype, device, layers, words):
    loaded = encoder.Encoder(name, dtype, device)
    loaded.model.encoder.layer = loaded.model.encoder.layer[:layers]
    if words is not None:
        table, right = loaded.model.get_input_embeddings().weight.detach(), loaded.batch
        loaded.model.set_input_embeddings(
            nn.Embedding(words, table.shape[1], _weight=table[:words].clone())
        )

        def batch(examples, seq):
            found = right(examples, seq)
            return found | {"input_ids": found["input_ids"] % words}

        loaded.batch = batch
    return loaded


def shorten_encoder(monkeypatch, layers=1, words=None):
    """Let `model` measure the first layers of the encoder alone, loaded once per process.

    words: so many rows of the embedding are left, which is copied for every check. Tokens beyond
    them count from the first one again.
    """

    def load(name, dtype, device):
        return _encoder(name, dtype, torch.device(device), layers, words)

    monkeypatch.setattr(model, "Encoder", load)
