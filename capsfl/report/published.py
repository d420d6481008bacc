"""Figures that others published for several classes on chest CT, to stand beside a study of several classes.

Each row says what its source says, an abstract or a report on the paper, and nothing from memory. Data, patients,
scanners and the unit of a decision differ from study to study and from ours, so no row can be compared with another.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """What a paper reports.

    Attributes:
        method: what the network is called.
        paper: authors, year, journal.
        data: whose scans, and what is told apart.
        figures: what is reported, in the paper's own measures.
        source: where the figures were read: a DOI, a PubMed Central or a preprint number.
    """

    method: str
    paper: str
    data: str
    figures: str
    source: str


PUBLISHED = (
    Published(
        "COVNet",
        "Li et al. 2020, Radiology",
        "4,356 exams of 3,322 patients from six hospitals: COVID-19, community-acquired pneumonia, neither",
        "COVID-19: sensitivity 0.90, specificity 0.96; the other pneumonia and diseases: sensitivity 0.87, "
        "specificity 0.92",
        "as Radiology Business reports it",
    ),
    Published(
        "DRE-Net",
        "Song et al. 2021, IEEE/ACM Trans. Comput. Biol. Bioinform. 18(6):2775",
        "88 patients with COVID-19, 100 with bacterial pneumonia, 86 healthy",
        "COVID-19 against both others: recall 0.93, precision 0.86; against bacterial pneumonia: AUC 0.95, "
        "recall 0.96, precision 0.79",
        "PMC8851430",
    ),
    Published(
        "location-attention ResNet",
        "Xu et al. 2020",
        "COVID-19, influenza-A viral pneumonia, healthy",
        "accuracy 0.867 over the three groups",
        'manuscript "Deep Learning System to Screen Coronavirus Disease 2019 Pneumonia"',
    ),
    Published(
        "modified Inception",
        "Wang et al. 2021",
        "1,065 pictures: COVID-19, typical viral pneumonia",
        "internal: accuracy 0.895, specificity 0.88, sensitivity 0.87; external: 0.793, 0.83, 0.67",
        "PMC7904034",
    ),
    Published(
        "Jin et al.\u2019s system",
        "Jin et al. 2020, preprint",
        "3,203 scans of the internal test: COVID-19, influenza, other pneumonia, none",
        "COVID-19: AUC 0.972, sensitivity 0.902, specificity 0.958",
        "medRxiv 2020.03.20.20039834v3",
    ),
)
"""In the order of their years."""
