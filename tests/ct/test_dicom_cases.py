"""The reader does with every file of the table of cases what the table says."""

import pytest
from dicom_cases import CASES, Case, outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}")
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_the_reader_does_as_the_table_says(case: Case, tmp_path):
    assert outcome(case, tmp_path) == case.expected
