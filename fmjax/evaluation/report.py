"""The table of an evaluation, as Markdown: each figure beside its error and how it was made.

A record holds its "protocol" and the "rows" of its table, `(figure, value, how)` each.
"""

import pathlib
from typing import Any

from fmjax.harness.records import write_json, write_text


def write(folder: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes evaluation.json and evaluation.md."""
    write_json(folder / "evaluation.json", result)
    write_text(folder / "evaluation.md", table(result))


def table(result: dict[str, Any]) -> str:
    """The table of evaluation.json's content."""
    protocol = result["protocol"]
    head = (
        f"{protocol['experiment']}, step {protocol['step']}, parameters: {protocol['parameters']}"
    )
    lines = [f"| {head} | value | how |", "|---|---|---|"]
    return "\n".join(lines + [f"| {a} | {b} | {c} |" for a, b, c in result["rows"]]) + "\n"


def rows_of_images(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of an image run."""
    return _bits(result["likelihood"]) + _image_quality(result["quality"]) + _cost(result)


def rows_of_points(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of a run on points."""
    return _nats(result["likelihood"]) + _point_quality(result["quality"]) + _cost(result)


def budget_of_images(result: dict[str, Any], curve_examples: int) -> list[str]:
    """What more samples, images or time would buy, from the errors that were found."""
    quality, bound = result["quality"], result["likelihood"]["bounds"][0]
    fd, num = quality["frechet_distance"], quality["num_samples"]
    error, images = bound["standard_error"], result["likelihood"]["num_images"]
    lines = [
        f"{quality['distance']}: its error of {fd['standard_error_of_one_seed']:.2g} halves with "
        f"--num-samples {4 * num}, and its bias, which falls with their number, with "
        f"{2 * num}; figures of other numbers can't be compared.",
    ]
    if error is not None:
        lines.append(
            f"Bits/dim: the error of {error:.2g} halves with --eval-examples {4 * images}, where "
            "the split has so many."
        )
    if not curve_examples:
        lines.append("Quality against cost, solver by solver: --curve-examples 500.")
    return lines


def _cost(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    likelihood, quality, protocol = result["likelihood"], result["quality"], result["protocol"]
    sampler = quality["sampler"]
    if "class_accuracy" in quality or likelihood.get("given"):
        sampler += f", guidance {protocol['flags']['guidance']:g}"
    sampling, solving = quality["seconds"], likelihood["seconds"]
    where = f"{protocol['device_count']} x {protocol['device_kind']}, compilation included"
    return [
        ("evaluations per sample", f"{quality['num_evaluations']:.0f}", sampler),
        ("seconds", f"{sampling:.0f} sampling, {solving:.0f} likelihood", where),
    ]


def _bits(likelihood: dict[str, Any]) -> list[tuple[str, str, str]]:
    how = likelihood["estimator"]
    estimate = how["divergence"].capitalize() + (
        " probes" if "," in how["divergence"] else " trace"
    )
    images = f"{likelihood['images']}; {estimate}"
    rows = []
    for bound in likelihood["bounds"]:
        error = bound["standard_error_of_the_divergence"]
        part = "" if error is None else f"; of the error {error:.4f} is the divergence's"
        one = bound["standard_error_of_one_image"]
        part += "" if one is None else f", {one:.3f} on one image"
        low = bound["too_low_by_at_most"]
        part += "" if low is None else f"; the probes' noise lowers it by at most {low:.4f}"
        error = bound["standard_error"]
        figure = f"{bound['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")
        kind = "at most" if bound["is_a_bound"] else "estimate of the bound"
        rows.append((f"bits/dim, {kind}: {bound['bound']}", figure, images + part))
    error = likelihood["solver_error"]
    rows.append(
        (
            "bits/dim, the solver's own error",
            f"{error['difference']:+.5f}",
            f"tolerance {error['tolerance']:g} less {error['tolerance'] / 10:g}, "
            f"{error['num_images']} images, same draws",
        )
    )
    return rows


def _nats(likelihood: dict[str, Any]) -> list[tuple[str, str, str]]:
    error = likelihood["solver_error"]
    mass, given = likelihood.get("density_integral"), likelihood.get("given")
    given = f", given {given}" if given else ""
    return [
        (
            "log-likelihood, nats per point",
            f"{likelihood['nats_per_point']:.4f} ± {likelihood['standard_error']:.4f}",
            f"{likelihood['num_points']} held-out points{given}, exact divergence",
        ),
        (
            "its solver's own error",
            f"{error['difference']:+.1e}",
            f"tolerance {error['tolerance']:g} less {error['tolerance'] / 10:g}; at most "
            f"{error['largest_difference']:.1e} at a point",
        ),
        *([] if mass is None else [("integral of the density", f"{mass:.4f}", "1 is right")]),
    ]


def _image_quality(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    reference = quality["reference"]
    how = (
        f"{quality['num_samples']} samples x {len(quality['seeds'])} seeds against "
        f"{reference['num_images']} images of {reference['dataset']} {reference['split']}"
    )
    names = {
        "frechet_distance": quality["distance"],
        "kid": "KID under the same encoder",
        "inception_score": "Inception score under the same encoder",
        "class_accuracy": "class accuracy under the same encoder",
    }
    kid = how.replace(f"{reference['num_images']} images", f"the first {quality['kid_images']}")
    found = [(label, quality[name]) for name, label in names.items() if name in quality]
    return [
        (label, _over_seeds(figure), kid if label.startswith("KID") else how)
        for label, figure in found
    ]


def _point_quality(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    how = f"{quality['num_samples']} samples x {len(quality['seeds'])} seeds, held-out points"
    how += f", {quality['units']}" if quality.get("units") else ""
    floor = f"{how}; fresh data: {_over_seeds(quality['wasserstein2_of_fresh_data'])}"
    mmd = quality["squared_mmd"]
    return [
        ("2-Wasserstein distance", _over_seeds(quality["wasserstein2"]), floor),
        ("squared MMD", _over_seeds(mmd), f"{how}; {mmd['kernel']}"),
    ]


def _over_seeds(figure: dict[str, Any]) -> str:
    """Mean, spread over the seeds, and the error that one seed's splits show."""
    spread, error = (
        figure["standard_deviation_over_seeds"],
        figure.get("standard_error_of_one_seed"),
    )
    text = f"{figure['mean']:.4g}"
    text += "" if spread is None else f" ± {spread:.2g} over seeds"
    return text + ("" if error is None else f" (one seed: ± {error:.2g})")
