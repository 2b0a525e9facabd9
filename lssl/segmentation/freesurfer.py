"""Names of FreeSurfer's label numbers (FreeSurferColorLUT.txt), which tell left from right.

SynthSeg, FastSurfer, SAMSEG and others use the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["freesurfer_names"]

SIDED = {  # left number, right number, structure; numbers below 1000 are of aseg.mgz
    "Cerebral-Exterior": (1, 40),
    "Cerebral-White-Matter": (2, 41),
    "Cerebral-Cortex": (3, 42),
    "Lateral-Ventricle": (4, 43),
    "Inf-Lat-Vent": (5, 44),
    "Cerebellum-Exterior": (6, 45),
    "Cerebellum-White-Matter": (7, 46),
    "Cerebellum-Cortex": (8, 47),
    "Thalamus": (10, 49),
    "Caudate": (11, 50),
    "Putamen": (12, 51),
    "Pallidum": (13, 52),
    "Hippocampus": (17, 53),
    "Amygdala": (18, 54),
    "Insula": (19, 55),
    "Operculum": (20, 56),
    "Lesion": (25, 57),
    "Accumbens-area": (26, 58),
    "Substancia-Nigra": (27, 59),
    "VentralDC": (28, 60),
    "undetermined": (29, 61),
    "vessel": (30, 62),
    "choroid-plexus": (31, 63),
    "F3orb": (32, 64),
    "aOg": (33, 65),
    "mOg": (35, 67),
    "pOg": (36, 68),
    "WM-hypointensities": (78, 79),
    "non-WM-hypointensities": (81, 82),
    "F1": (83, 84),
    "Amygdala-Anterior": (96, 97),
}
MIDDLE = {
    14: "3rd-Ventricle",
    15: "4th-Ventricle",
    16: "Brain-Stem",
    21: "Line-1",
    22: "Line-2",
    23: "Line-3",
    24: "CSF",
    72: "5th-Ventricle",
    77: "WM-hypointensities",
    80: "non-WM-hypointensities",
    85: "Optic-Chiasm",
    165: "Skull",
    192: "Corpus_Callosum",
    251: "CC_Posterior",
    252: "CC_Mid_Posterior",
    253: "CC_Central",
    254: "CC_Mid_Anterior",
    255: "CC_Anterior",
    258: "Head-ExtraCerebral",
}
CORTEX = (  # Desikan-Killiany, aparc: 1000 + number on the left, 2000 + number on the right; white matter 3000, 4000
    "unknown",
    "bankssts",
    "caudalanteriorcingulate",
    "caudalmiddlefrontal",
    "corpuscallosum",
    "cuneus",
    "entorhinal",
    "fusiform",
    "inferiorparietal",
    "inferiortemporal",
    "isthmuscingulate",
    "lateraloccipital",
    "lateralorbitofrontal",
    "lingual",
    "medialorbitofrontal",
    "middletemporal",
    "parahippocampal",
    "paracentral",
    "parsopercularis",
    "parsorbitalis",
    "parstriangularis",
    "pericalcarine",
    "postcentral",
    "posteriorcingulate",
    "precentral",
    "precuneus",
    "rostralanteriorcingulate",
    "rostralmiddlefrontal",
    "superiorfrontal",
    "superiorparietal",
    "superiortemporal",
    "supramarginal",
    "frontalpole",
    "temporalpole",
    "transversetemporal",
    "insula",
)


def _table() -> tuple[dict[int, str], dict[int, int]]:
    """Name of each number, and the right partner of each left number."""
    names, partner = dict(MIDDLE), {}
    for structure, (left, right) in SIDED.items():
        names |= {left: f"Left-{structure}", right: f"Right-{structure}"}
        partner[left] = right
    for kind, base in (("ctx", 1000), ("wm", 3000)):
        for number, area in enumerate(CORTEX):
            names |= {base + number: f"{kind}-lh-{area}", base + 1000 + number: f"{kind}-rh-{area}"}
            partner[base + number] = base + 1000 + number
    return names, partner


def freesurfer_names(values: Iterable[int], left_share: Callable[[int], float]) -> dict[int, str]:
    """Names of the values if they follow FreeSurfer's scheme; empty otherwise.

    The scheme is FreeSurfer's under two conditions. More of its left-right pairs are complete than lack a side, and in
    every complete pair the left structure lies further left. Tumour labels such as 1, 2, 3, or an atlas with
    alternating left and right numbers, fail one of them.

    Args:
        values: label values that occur.
        left_share: value → the share of its voxels in the left half of the volumes.
    """
    names, partner = _table()
    present = set(values)
    pairs = [(left, right) for left, right in partner.items() if left in present and right in present]
    alone = sum((left in present) != (right in present) for left, right in partner.items())
    if len(pairs) <= alone or any(left_share(left) <= left_share(right) for left, right in pairs):
        return {}
    return {value: names[value] for value in sorted(present & set(names))}
