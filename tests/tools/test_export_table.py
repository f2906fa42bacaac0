"""The table of exported files outlives what makes its rows."""

import os

import pytest

pytest.importorskip("onnx")
export_table = pytest.importorskip("linsight.tools.export_table")


def test_a_row_is_what_its_process_returns():
    assert export_table.by_child(str.split, "any by nothing") == ["any", "by", "nothing"]


@pytest.mark.parametrize(("end", "code"), [((os.abort,), -6), ((os._exit, 3), 3)])
def test_a_process_that_ends_early_is_a_row_that_says_so(end, code):
    said = f"not written: the process ended with {code}"
    assert export_table.by_child(*end) == ["", "", said, ""]


def test_an_error_is_a_row_that_says_so():
    cells = export_table.results_of("no_such_model", "classification", export_table.Format.onnx)
    assert cells[2].startswith("not written: ")
    assert "no_such_model" in cells[2]
