"""Stated costs beside measured ones: the models that surveys tabulate, and every layer by its card.

A claim is a cost as its paper states it. Its exponent in the length is set beside the one fitted to what was measured
(subquad.compare.fits), of the mixing op alone where that was measured, and the verdict is

    agrees                        the stated exponent lies in the fitted interval, taken at least 0.1 to both sides of
                                  the measured exponent (0.15 where 2 is stated, 0.05 for a decoded token and a state)
    below: 0.7, 1 stated          slower growth; what does not grow with the length still costs most, or the form that
                                  runs here does better (the note says so)
    disagrees: 1.4, 1 stated      faster growth
    unsettled: 0.3 to 1.8         the interval is wider than 1
    not measured, not stated

A sum whose terms grow differently, T (T / block + W), has no one exponent at a finite length: it is taken from the
FLOPs counted at the same lengths, if that lies between those of its terms. A logarithm adds up to 0.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from subquad.compare.fits import Fit, Quantity, fit
from subquad.compare.growth import Cost, read
from subquad.compare.output import short
from subquad.compare.results import Measurements, Phase, Point
from subquad.layers import available

Row = dict[str, Any]
WIDE = 1.0  # an interval that settles nothing
FAR = ("below", "disagrees")


@dataclass(frozen=True)
class Claim:
    """One stated cost of a layer."""

    what: str
    phase: Phase
    quantity: Quantity
    stated: str


@dataclass(frozen=True)
class Model:
    """A representative model as surveys of efficient sequence models tabulate it, and the layer that is it here."""

    name: str
    layer: str
    form: str  # in training
    stated: tuple[str, str, str, str]  # training compute, training memory, prefill, a decoded token
    source: str
    note: str = ""  # where our form is not the one whose cost is stated


# T tokens, D the width, N values of state a channel.
MODELS = (
    Model(
        "Transformer",
        "Attention",
        "parallel",
        ("O(T^2 D)", "O(T^2)", "O(T^2 D)", "O(T D)"),
        "Vaswani et al. 2017, arXiv:1706.03762",
        "memory: fused attention never holds the T x T scores",
    ),
    Model(
        "S4",
        "S4",
        "FFT convolution",
        ("O(T D log T)", "O(T D)", "O(T D log T)", "O(N D)"),
        "Gu et al. 2022, arXiv:2111.00396",
        "compute: ours convolves within chunks, O(T D (N + 64)), and carries the state between them",
    ),
    Model(
        "Mamba",
        "Mamba",
        "parallel scan",
        ("O(T D N)", "O(T D)", "O(T D N)", "O(N D)"),
        "Gu and Dao 2023, arXiv:2312.00752",
    ),
    Model(
        "Hyena",
        "Hyena",
        "FFT convolution",
        ("O(T D log T)", "O(T D)", "O(T D log T)", "O(T D)"),
        "Poli et al. 2023, arXiv:2302.10866; decoding in Massaroli et al. 2023, arXiv:2310.18780",
    ),
    Model(
        "RetNet",
        "Retention",
        "chunks",
        ("O(T D (C + N))", "O(T D)", "O(T D (C + N))", "O(N D)"),
        "Sun et al. 2023, arXiv:2307.08621",
    ),
    Model(
        "RWKV",
        "RWKV4",
        "scan",
        ("O(T D)", "O(T D)", "O(T D)", "O(D)"),
        "Peng et al. 2023, arXiv:2305.13048",
    ),
)
COMPUTE: tuple[tuple[str, Phase, Quantity], ...] = (
    ("training compute", "train", "ms"),
    ("training memory", "train", "peak_bytes"),
    ("prefill", "prefill", "ms"),
    ("decode a token", "decode", "ms"),
)
SHORT = {"training compute": "train", "training memory": "memory", "decode a token": "decode"}


def complete(measurements: Measurements) -> bool:
    """Whether the layers of all representative models were measured."""
    return {model.layer for model in MODELS} <= {_name(subject) for subject in measurements.subjects("layer")}


def table(measurements: Measurements) -> Group:
    """The survey's models, where any was measured, and every measured layer."""
    found = rows(measurements)
    survey = [row for row in found if row["table"] == "survey"]
    parts = [_survey(survey)] if any(row["exponent"] is not None for row in survey) else []
    return Group(*parts, _zoo([row for row in found if row["table"] == "layers"]))


def rows(measurements: Measurements) -> list[Row]:
    """A row a claim, all with the same keys.

    tokens is the longest length measured; formula the stated cost's value there, flops what was counted there; expected
    the stated exponent; exponent, low and high the fitted one; kind tells whose, the whole layer's or its op's.
    """
    return [*_survey_rows(measurements), *_layer_rows(measurements)]


def _survey_rows(measurements: Measurements) -> Iterator[Row]:
    subjects = measurements.subjects("layer")
    for model in MODELS:
        subject = next((s for s in subjects if _name(s) == model.layer and "window" not in _arguments(s)), model.layer)
        letters = _letters(model.layer, measurements)
        for claim in (Claim(*what, stated) for what, stated in zip(COMPUTE, model.stated, strict=True)):
            row = _row(measurements, subject, claim, read(claim.stated), ())
            row |= {"table": "survey", "model": model.name, "form": model.form, "source": model.source}
            row["note"] = model.note if claim.what.endswith(model.note.split(":")[0]) else ""
            if row["tokens"] is not None:
                row["formula"] = read(claim.stated).value(letters | {"T": row["tokens"]})
            yield row


def _layer_rows(measurements: Measurements) -> Iterator[Row]:
    for subject in measurements.subjects("layer"):
        card = getattr(available().get(_name(subject)), "card", None)
        if card is None:
            continue
        costs = (card.train, card.train, card.decode, card.state)
        state: tuple[str, Phase, Quantity] = ("state", "decode", "state_bytes")
        for what, stated in zip((COMPUTE[0], COMPUTE[2], COMPUTE[3], state), costs, strict=True):
            text, cost = _of_subject(stated, subject)
            # A window's cache has as many slots as the window.
            constants = ("S",) if "window" in _arguments(subject) else ()
            row = _row(measurements, subject, Claim(*what, text), cost, constants)
            yield row | {"table": "layers", "model": _name(subject), "source": card.paper}


def _row(measurements: Measurements, subject: str, claim: Claim, cost: Cost | None, constants: tuple[str, ...]) -> Row:
    points = _points(measurements, subject, claim)
    known = [p for p in points if getattr(p, claim.quantity) is not None]
    found, longest = _fit(known, claim.quantity), known[-1] if known else None
    counted = fit([p for p in points if found and p.tokens in found.lengths], "flops") if points else None
    expected = None if cost is None else _expected(cost.exponents(constants), counted, claim.quantity)
    return {
        "table": "",
        "model": "",
        "layer": subject,
        "form": "",
        "claim": claim.what,
        "stated": claim.stated,
        "source": "",
        "note": "",
        "tokens": longest.tokens if longest else None,
        "formula": None,
        "flops": longest.flops if longest and claim.quantity == "ms" else None,
        "expected": None if expected is None else _span(*expected),
        "exponent": found.exponent if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "kind": longest.kind if longest else None,
        "verdict": verdict(expected, found, claim),
    }


def _points(measurements: Measurements, subject: str, claim: Claim) -> list[Point]:
    """Of the op alone where it has the figures for a fit, else of the layer."""
    alone = list(measurements.select("op", claim.phase, subject))
    if _fit(alone, claim.quantity) is not None:
        return alone
    points = list(measurements.select("layer", claim.phase, subject))
    if claim.quantity == "state_bytes" and not any(p.state_bytes is not None for p in points):
        return list(measurements.select("layer", "prefill", subject))  # whose state is as large
    return points


def _fit(points: Sequence[Point], quantity: Quantity) -> Fit | None:
    """fits.fit, and an exponent 0 for what is nothing at every length."""
    known = [p for p in points if getattr(p, quantity) is not None]
    if len(known) > 2 and not any(getattr(p, quantity) for p in known):
        p = known[0]
        return Fit(p.subject, p.kind, p.phase, quantity, 0.0, 0.0, 0.0, tuple(p.tokens for p in known))
    return fit(points, quantity)


def _expected(exponents: tuple[float, float], counted: Fit | None, quantity: Quantity) -> tuple[float, float]:
    """From the slowest to the fastest term, or what the counted FLOPs say within that."""
    low, high = exponents
    if counted is None or quantity != "ms" or high - low < 0.5:
        return low, high
    found = min(max(counted.exponent, low), high)
    return found, found


def verdict(expected: tuple[float, float] | None, found: Fit | None, claim: Claim) -> str:
    """What the measurement says of the claim."""
    if expected is None:
        return "not stated"
    if found is None:
        return "not measured"
    least = 0.05 if claim.phase == "decode" else 0.15 if expected[1] >= 1.5 else 0.1
    low, high = min(found.low, found.exponent - least), max(found.high, found.exponent + least)
    if high - low > WIDE:
        return f"unsettled: {found.low:.2f} to {found.high:.2f}, {_span(*expected)} stated"
    if low <= expected[1] and high >= expected[0]:
        return "agrees"
    way = FAR[low > expected[1]]
    return f"{way}: {found.exponent:.2f}, {_span(*expected)} stated"


def _span(low: float, high: float) -> str:
    low, high = round(low, 2), round(high, 2)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _name(subject: str) -> str:
    return subject.split(",")[0]


def _arguments(subject: str) -> dict[str, str]:
    """Of a label such as "Attention, window 512"."""
    words = (part.split(" ", 1) for part in subject.split(", ")[1:])
    return {name: "".join(value) for name, *value in words}


def _of_subject(stated: str, subject: str) -> tuple[str, Cost | None]:
    """The alternative of a card's cost that holds with the subject's arguments, first the one without a condition."""
    given = _arguments(subject)
    kinds = set(given) | ({"bidirectional"} if given.get("causal") == "False" else set())
    first, *others = stated.split("; ")
    chosen = next((o for o in others if o.split()[0] in kinds), first)
    if chosen in ("-", "sum"):
        return chosen, None
    return chosen, read(chosen)


def _letters(layer: str, measurements: Measurements) -> dict[str, float]:
    """D, C, and N, values of state a channel: what one sequence's constant state has at this width, over D."""
    d_model = measurements.settings.get("d_model", 1)
    sizes = [p.state_bytes for p in measurements.select("layer", "decode", layer) if p.state_bytes]
    batch = measurements.settings.get("batch", 1)
    return {"D": d_model, "C": 64, "N": sizes[0] / 4 / batch / d_model if sizes else 1}


def _survey(found: list[Row]) -> Table:
    title = "Models: cost as stated, its value at the longest length measured, exponents in the length"
    result = _table(title, ("model", "in training", "claim", "stated", "value", "exponent", "measured", "verdict"))
    for column in result.columns[4:7]:
        column.justify = "right"
    for i, row in enumerate(found):
        new = i == 0 or found[i - 1]["model"] != row["model"]
        last = i + 1 == len(found) or found[i + 1]["model"] != row["model"]
        result.add_row(
            row["model"] if new else "",
            row["form"] if new else "",
            SHORT.get(row["claim"], row["claim"]),
            row["stated"],
            short(row["formula"]),
            row["expected"],
            _measured(row),
            row["verdict"].split(":")[0],
            end_section=last,
        )
    notes = [f"{row['model']}, {row['note']}" for row in found if row["note"] and row["verdict"].startswith(FAR)]
    result.caption = escape("; ".join(dict.fromkeys(notes))) or None
    return result


def _measured(row: Row) -> str:
    half = "" if row["exponent"] is None else f" ±{(row['high'] - row['low']) / 2:.2f}"
    return f"{_exponent(row)}{half}"


def _zoo(found: list[Row]) -> Table:
    claims = ("training compute", "prefill", "decode a token", "state")
    title = "Layers: exponents in the length, as the card states them : as measured"
    result = _table(title, ("layer", *(SHORT.get(claim, claim) for claim in claims), "verdict"))
    result.columns[0].no_wrap = max((len(row["layer"]) for row in found), default=0) <= 24
    for layer in dict.fromkeys(row["layer"] for row in found):
        mine = {row["claim"]: row for row in found if row["layer"] == layer}
        cells = [f"{row['expected'] or '-'} : {_exponent(row)}" for row in map(mine.__getitem__, claims)]
        said = {SHORT.get(claim, claim): mine[claim]["verdict"].split(":")[0] for claim in claims}
        odd = [f"{claim} {word}" for claim, word in said.items() if word not in ("agrees", "not stated")]
        told = "agrees" if "agrees" in said.values() else "not stated"
        result.add_row(escape(layer), *cells, ", ".join(odd) or told)
    return result


def _table(title: str, headings: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    result.padding, result.pad_edge = (0, 1, 0, 0), False
    for heading in headings:
        last = heading == "verdict"
        result.add_column(heading, no_wrap=not last, overflow="fold", min_width=len("disagrees") if last else None)
    return result


def _exponent(row: Row) -> str:
    return "-" if row["exponent"] is None else f"{round(row['exponent'], 2) + 0:.2f}"  # no -0.00
