"""A round record says of how many patients each hospital's epsilon is, or nothing where hospitals are the unit."""

from dataclasses import replace

import pytest

from capsfl.ledger.errors import RecordError
from capsfl.ledger.records import from_canonical, record_id

ROWS = (("north", 12, "1.5"), ("south", 30, None))


def test_patients_come_back_and_are_part_of_what_is_signed(round_record):
    plain = round_record(1)
    record = replace(plain, patients=ROWS)
    assert from_canonical(record.to_canonical()) == record
    assert "patients" not in plain.to_canonical()
    assert len({record_id(plain), record_id(record), record_id(replace(record, patients=ROWS[:1]))}) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "give a tuple"),
        ([("north", 1, None)], "give a tuple"),
        ((("north", 1),), "give rows of 3"),
        ((("north", -1, None),), "use an integer"),
        ((("north", True, None),), "use an integer"),
        ((("north", 1, "-2.0"),), "non-negative"),
        ((("north", 1, 2.0),), "non-negative"),
        ((("a/b", 1, None),), "printable"),
        (ROWS[::-1], "sort the rows"),
        ((ROWS[0], ROWS[0]), "sort the rows"),
    ],
)
def test_rows_that_may_not_stand_there_are_refused(round_record, rows, message):
    with pytest.raises(RecordError, match=message):
        replace(round_record(1), patients=rows)
