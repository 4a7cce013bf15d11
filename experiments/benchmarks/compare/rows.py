"""The rows of the comparison, as data: which sides run, which cases meet, and what to reach."""

from typing import NamedTuple


class Line(NamedTuple):
    """A line of the table.

    Attributes:
      label: what is measured.
      unit: of a rate, where more is better, or "s" or "ms", where less is.
      ours: fmjax's case, as "side/case".
      peers: the peer's cases; the fastest of them is the one compared with.
      reach: the ratio to reach, or None.
    """

    label: str
    unit: str
    ours: str
    peers: tuple[str, ...] = ()
    reach: float | None = None


class Row(NamedTuple):
    """A row: processes by name, `module:function`; a name that ends in "1" gets one thread."""

    title: str
    peer: str
    sides: dict[str, str]
    lines: tuple[Line, ...]


_ALL = ("torch/contiguous", "torch/channels_last")
_LOOPS = ("torch/loop", "torch 1/loop")
_MLP = "2-D MLP (3 x 64), batch 256"
_ODE = {"fmjax": "fm_ode:{}", "fmjax 1": "fm_ode:{}", "torch": "torch_ode:{}"}
_ODE |= {"fmjax devices": "fm_ode:{}_over_devices", "torch 1": "torch_ode:{}"}
_PLACES = {"fmjax": "", "fmjax 1": ", fmjax on one core", "fmjax devices": ", a device per core"}
EQUAL = " equal error"  # ends the name of a case at a looser tolerance


def _ode(function: str) -> dict[str, str]:
    return {side: target.format(function) for side, target in _ODE.items()}


def _solve(label: str, case: str, end: str, reach: float) -> Line:
    side, num = case.split("/")
    label += ", 2e-5 (error below the peer's)" if end else ", 1e-5"
    label += _PLACES[side]
    return Line(label, "ms", case + end, (f"torch/{num}", f"torch 1/{num}"), reach)


def _pairing(batch: int, reach: float) -> Line:
    peers = (f"torch/{batch}", f"torch 1/{batch}")
    label = f"OT pairing of {batch}, 3072-dimensional"
    return Line(label, "ms", f"fmjax/{batch}", peers, reach)


ROWS: dict[str, Row] = {
    "unet_training": Row(
        "CIFAR-10 U-Net (35.7M), forward + backward + Adam + clip + EMA, batch 16",
        "torchcfm",
        {"fmjax": "fm_unet:training_cases", "torch": "torch_unet:training"},
        (Line("CIFAR-10 U-Net (35.7M), training, batch 16", "images/s", "fmjax/jit", _ALL, 1.0),),
    ),
    "unet_forward": Row(
        "the same, forward only",
        "torchcfm",
        {"fmjax": "fm_unet:forward_cases", "torch": "torch_unet:forward"},
        (Line("CIFAR-10 U-Net (35.7M), forward, batch 16", "images/s", "fmjax/jit", _ALL, 1.0),),
    ),
    "mlp_training": Row(
        _MLP,
        "torchcfm",
        {"fmjax": "fm_mlp:training_cases", "fmjax 1": "fm_mlp:training_cases"}
        | {"torch": "torch_mlp:training", "torch 1": "torch_mlp:training"},
        (
            Line(f"{_MLP}, one step per dispatch", "steps/s", "fmjax/one", _LOOPS),
            Line("the same, 100 steps per dispatch", "steps/s", "fmjax/hundred", _LOOPS, 5.0),
            Line("one step per dispatch, fmjax on one core", "steps/s", "fmjax 1/one", _LOOPS),
            Line("100, fmjax on one core", "steps/s", "fmjax 1/hundred", _LOOPS, 5.0),
        ),
    ),
    "sampling": Row(
        "adaptive sampling, tolerance 1e-5",
        "torchdiffeq dopri5",
        _ode("sampling"),
        tuple(
            _solve(f"adaptive sampling of {n} 2-D points", f"{side}/{n}", "", r)
            for n, r, sides in ((1024, 1.5, list(_PLACES)), (16, 5.0, ["fmjax", "fmjax 1"]))
            for side in sides
        ),
    ),
    "log_density": Row(
        "exact log-density, tolerance 1e-5",
        "flow_matching",
        _ode("log_density"),
        tuple(
            _solve("exact log-density of 1024 2-D points", f"{side}/1024", end, 5.0)
            for end in ("", EQUAL)
            for side in _PLACES
        ),
    ),
    "image_log_density": Row(
        "exact log-density of images",
        "flow_matching",
        {"fmjax": "fm_ode:image_log_density", "torch": "torch_ode:image_log_density"},
        (Line("exact log-density of 16 8x8x1 images, 1e-5", "ms", "fmjax/16", ("torch/16",)),),
    ),
    "pairing": Row(
        "OT pairing",
        "torchcfm and POT",
        {"fmjax": "fm_pairing:pairing", "torch": "torch_pairing:pairing"}
        | {"torch 1": "torch_pairing:pairing"},
        tuple(_pairing(batch, 1.0) for batch in (128, 512, 2048)),
    ),
    "input": Row(
        "input pipeline",
        "torch DataLoader",
        {"fmjax": "fm_input:reading", "torch": "torch_input:reading"},
        (
            Line("reading: PNG records to uint8", "images/s", "fmjax/read", ("torch/read",)),
            Line("batches of 16 from memory", "images/s", "fmjax/batch", ("torch/batch",)),
        ),
    ),
    "compile": Row(
        "compile time",
        "none",
        {"fmjax": "fm_compile:compiling"},
        (
            Line("U-Net's training step, compiled, cold", "s", "fmjax/cold"),
            Line("the same, from JAX's persistent cache", "s", "fmjax/cached"),
            Line("with the CPU's kernels, cold", "s", "fmjax/cold cpu"),
            Line("the same, from JAX's persistent cache", "s", "fmjax/cached cpu"),
        ),
    ),
}
