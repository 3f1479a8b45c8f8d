"""Which layers belong together in pictures: those whose cards name the same kind of op."""

from collections.abc import Iterable

from subquad.compare.fits import REFERENCE
from subquad.layers import available

FAMILIES = ("attention and sparse", "linear attention", "delta rules", "scans and SSMs", "convolutions", "others")
OPS = {
    "linear_attention": "linear attention",
    "delta_rule": "delta rules",
    "dplr_rule": "delta rules",
    "scan": "scans and SSMs",
    "selective_scan": "scans and SSMs",
    "lti": "scans and SSMs",
    "long_conv": "convolutions",
    "short_conv": "convolutions",
}
# One layer or two a family, those that most people have heard of.
REPRESENTATIVE = (REFERENCE, "Retention", "Mamba2", "GatedDeltaNet", "RWKV7", "Mamba", "S4", "Hyena")


def family(subject: str) -> str:
    """Of a label such as "Attention, window 512"; what is no layer of ours is among the others."""
    layer = available().get(subject.split(",")[0])
    for op in (layer.card.op if layer and layer.card else "").split(", "):
        if op in OPS:
            return OPS[op]
        if op.endswith("attention"):
            return "attention and sparse"
    return "others"


def by_family(subjects: Iterable[str]) -> dict[str, list[str]]:
    """The families that have members among the subjects, in a fixed order."""
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for subject in subjects:
        found[family(subject)].append(subject)
    return {name: members for name, members in found.items() if members}
