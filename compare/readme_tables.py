"""The README's tables, each from the shipped files that it is about."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from textwrap import fill
from typing import Any

from subquad.compare import claims, shipped
from subquad.compare.catalog import markdown, times
from subquad.compare.kernel_cases import Sizes
from subquad.compare.output import short, without_outputs
from subquad.compare.results import load
from subquad.layers import available

Row = Mapping[str, Any]
VARIANTS = {  # of the cases of compare kernels, in a reader's words
    "no decay": "no decay",
    "constant decay": "a fixed decay a head",
    "scalar decay": "a decay a head and token",
    "vector decay": "a decay a channel",
    "short conv": "width 4, SiLU",
    "norm, gate": "RMS of a head, SiLU gate",
}


def prose(*sentences: str) -> list[str]:
    """Lines of at most 120 characters."""
    return fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False).splitlines()


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows)]


def source(document: Mapping[str, Any]) -> str:
    """Where figures come from: the command, the machine, the versions and the date."""
    kept = {name: version for name, version in document["versions"].items() if version and name != "python"}
    versions = ", ".join(f"{name} {str(version).split('+')[0]}" for name, version in kept.items())
    command = " ".join(without_outputs(document["command"].split()))
    return f"`{command}` on {document['machine']['name']}; {versions}; {document['created']}"


def layers() -> list[str]:
    measured, _ = times()
    settings = measured.settings
    about = f"Times: width {settings['d_model']}, batch {settings['batch']}, {settings['dtype']}, threads: "
    about += f"{measured.machine['threads']} ({source(shipped.document('costs_cpu'))})."
    return [*markdown(available()), "", *prose(about)]


def transformers_cpu() -> list[str]:
    document = shipped.document("transformers_cpu")
    settings = document["settings"]
    about = (
        f"Width {settings['d_model']}, {settings['layers']} layers, {settings['tokens']:,} tokens read and "
        f"{settings['new_tokens']} decoded, batch 1, threads: {settings['threads']}"
    )
    rows = []
    for row in document["rows"]:
        cells = [row["model"]]
        for phase in ("prefill", "decode"):
            cells += [f"{row[f'{phase} tokens/s, {library}']:,.0f}" for library in ("ours", "transformers")]
            cells.append(f"{row[f'{phase} ratio']:.2f}")
        rows.append(cells)
    heading = ("model", "prefill, ours", "theirs", "ratio", "decode, ours", "theirs", "ratio")
    return [*prose(f"{about} ({source(document)})."), "", *table(heading, rows)]


def kernels_h200() -> list[str]:
    document, earlier = shipped.document("kernels_h200"), shipped.document("kernels_h200_peers")
    measured = {(row["case"], row["shape"], row["library"]) for row in document["rows"]}
    rows = document["rows"] + [
        row for row in earlier["rows"] if (row["case"], row["shape"], row["library"]) not in measured
    ]
    about = (
        f"Milliseconds in {document['settings']['dtype']}, heads of width 128; copies at "
        f"{document['settings']['copy_tb_s']:.2f} TB/s ({source(document)}). Other libraries in brackets as a multiple "
        f"of ours."
    )
    heading = ("op", "batch x tokens", "forward", "floor", "over floor", "forward and backward", "others")
    notes = [
        line
        for row in rows
        if row["library"] == "ours" and row["note"]
        for line in ["", *prose(f"{_name(row)}, {_size(row)}: {row['note']}.")]
    ]
    return [*prose(about, _measured_earlier(rows, measured, earlier)), "", *table(heading, kernel_rows(rows)), *notes]


def _measured_earlier(rows: Sequence[Row], measured: Collection[tuple[str, str, str]], earlier: Row) -> str:
    """What is to be said of the other libraries' figures that no run of ours took."""
    shown = {(row["case"], row["shape"]) for row in rows if row["library"] == "ours"}
    old = {row["library"] for row in earlier["rows"] if (row["case"], row["shape"]) in shown} - {
        library for _, _, library in measured
    }
    if not old:
        return ""
    versions = earlier["versions"]
    names = ", ".join(versions[library] for library in versions if library in old)
    return (
        f"Those of an earlier run (torch {versions['torch'].split('+')[0]}, triton {versions['triton']}, "
        f"{earlier['machine']['name']}): {names}{'; ' + earlier['settings']['note'] if 'fla' in old else ''}."
    )


def kernel_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Of the rows of `compare kernels`: one for each case and shape of ours, the other libraries in its last cell."""
    cells, last = [], None
    for case in dict.fromkeys(row["case"] for row in rows):
        for row in rows:
            if row["case"] != case or row["library"] != "ours" or row["forward ms"] is None:
                continue
            others = [_other(other, row) for other in rows if _is_peer(other, row)]
            figures = [_ms(row["forward ms"]), _ms(row["forward floor ms"]), _times(row["forward / floor"])]
            figures.append(_ms(row["train ms"]))
            name = "" if case == last else _name(row)
            cells.append([name, _size(row), *figures, "; ".join(others)])
            last = case
    return cells


def _name(row: Row) -> str:
    return f"`{row['op']}`, {VARIANTS.get(row['case'], row['case'])}"


def _size(row: Row) -> str:
    sizes = Sizes.parse(row["shape"])
    return f"{sizes.B} x {sizes.T:,}"


def _is_peer(other: Row, row: Row) -> bool:
    same = all(other[key] == row[key] for key in ("case", "shape"))
    return same and other["library"] not in ("ours", "torch") and other["forward ms"] is not None


def _other(other: Row, ours: Row) -> str:
    found = []
    for phase in ("forward", "train"):
        ms, mine = other[f"{phase} ms"], ours[f"{phase} ms"]
        ratio = f" ({ms / mine:.1f}x)" if ms is not None and mine is not None else ""
        found += [f"{_ms(ms)}{ratio}"] if ms is not None else []
    return f"{other['library']} {', '.join(found)}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def decode(name: str) -> list[str]:
    """Tokens a second at each context, one row a model, and the state at the longest."""
    measured, document = load(shipped.path(name)), shipped.document(name)
    settings = measured.settings
    points = {(p.subject, p.tokens): p for p in measured.points}
    contexts = sorted({p.tokens for p in measured.points})
    rows = []
    for subject in measured.subjects():
        mine = [points.get((subject, n)) for n in contexts]
        speeds = ["" if p is None or p.ms is None else f"{1e3 * settings['batch'] / p.ms:,.0f}" for p in mine]
        states = ["" if p is None or p.state_bytes is None else short(p.state_bytes, "B") for p in mine]
        rows.append([subject, *speeds, states[0], states[-1]])
    heading = ["model", *(f"tokens/s at {n:,}" for n in contexts), f"state at {contexts[0]:,}", f"at {contexts[-1]:,}"]
    notes = dict.fromkeys(p.note for p in measured.points if p.note and p.ms is not None)
    about = f"Batch {settings['batch']}, {settings['dtype']} ({'; '.join([source(document), *notes])})."
    return [*prose(about), "", *table(heading, rows)]


def survey(device: str) -> list[str]:
    """The models that surveys tabulate: cost as stated, its value, the measured exponent and what that says."""
    measured = shipped.costs(device)
    settings, found = measured.settings, [row for row in claims.rows(measured) if row["table"] == "survey"]
    about = (
        f"Width {settings['d_model']}, batch {settings['batch']}, {settings['dtype']}; times of the mixing op alone "
        f"({source(shipped.document(f'costs_{device}'))})."
    )
    sources = "; ".join(dict.fromkeys(f"{row['model']}: {row['source']}" for row in found))
    heading = ("model", "cost", "stated", "its value", "power of T", "measured, 95 %", "verdict")
    return [*prose(about), "", *table(heading, survey_rows(found)), "", *prose(f"Stated by: {sources}.")]


def survey_rows(found: Sequence[Row]) -> list[list[str]]:
    cells, last = [], None
    for row in found:
        name = "" if row["model"] == last else f"{row['model']} ({row['form']})"
        value = "" if row["formula"] is None else f"{short(row['formula'])} at {row['tokens']:,}"
        powers = [round(row[end], 2) + 0 for end in ("exponent", "low", "high") if row[end] is not None]  # no -0.00
        exponent = "{:.2f} ({:.2f} to {:.2f})".format(*powers) if powers else ""
        verdict = row["verdict"].split(":")[0]
        if row["note"] and verdict in claims.FAR:
            verdict += f" ({row['note']})"
        cells.append([name, row["claim"], row["stated"], value, row["expected"] or "", exponent, verdict])
        last = row["model"]
    return cells


TABLES: dict[str, Callable[[], list[str]]] = {
    "layers": layers,
    "transformers cpu": transformers_cpu,
    "kernels h200": kernels_h200,
    "recall": lambda: import_module("subquad.compare.recall").shipped_claims(),  # loads Lightning
    **{f"survey {device}": partial(survey, device) for device in shipped.devices()},
    **{name.replace("_", " "): partial(decode, name) for name in shipped.names() if name.startswith("decode_")},
}
