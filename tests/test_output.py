"""Tables on a narrow screen."""

import pandas as pd
import pytest

from bdm_cli import output
from bdm_cli.output import Format, show


@pytest.mark.parametrize("width", [60, 200])
def test_a_narrow_table_breaks_lines_and_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(output, "FILE_WIDTH", width)
    show(pd.DataFrame([[f"cell nr{i}" for i in range(9)]], columns=[f"head of{i}" for i in range(9)]), Format.table)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    words = "".join(c for c in text if c.isalnum())
    assert all(f"nr{i}" in words and f"of{i}" in words for i in range(9))
