"""A run of lorafast-bench linear that takes no time to speak of."""

from lorafast.bench import commands
from lorafast.bench.record import Results

K, N, R = 24, 40, 4
SMALL = [
    "linear",
    "--shape",
    f"{K}x{N}",
    "--rank",
    str(R),
    "--tokens",
    "8,3",
    "--rounds",
    "2",
    "--warmup",
    "1",
    "--device",
    "cpu",
]


def run(tmp_path, *more):
    """The exit status, the rows and the file of a small run."""
    out = tmp_path / "out.json"
    status = commands.main([*SMALL, "--json", str(out), *more])
    return status, (Results.read(out).records if out.exists() else []), out
