"""`bdm efficiency`: the numbers of Eqs. 16-17 for the networks of the recipes, beside the paper's."""

import pytest

from bdm_cli.errors import BdmError
from bdm_cli.jobs import efficiency


def test_w1a4_ldm_4_beside_table_5():
    table = efficiency.run("1/4", "ldm4-bedrooms")
    assert list(zip(table["Bits"], table["Edges"], strict=True)) == [("32/32", 32), ("1/4", 8), ("1/4", 32)]
    assert table["Size (MiB)"].round(1).tolist() == [1045.4, 34.2, 37.1]
    assert table["OPs (G)"].round(2).tolist() == [96.02, 6.05, 6.05]
    assert table["Scales (MiB)"].tolist() == [0, 0.37, 0.36]
    assert table["Size saving"].tolist() == [1, 30.6, 28.2]
    assert table["OPs saving"].tolist() == [1, 15.9, 15.9]
    assert table["Paper: Size (MB)"].tolist() == [1045.4, 35.8, 35.8]
    assert table["Paper: OPs (G)"].tolist() == [96.0, 6.3, 6.3]


def test_ldm_8_has_a_size_in_table_2_and_no_ops():
    table = efficiency.run("2/8", "ldm8-churches")
    assert table["Size (MiB)"].round(1).tolist()[::2] == [1125.2, 73.8]
    assert table["OPs (G)"].round(2).tolist()[0] == 18.64
    assert table["Paper: Size (MB)"].tolist() == [1125.2, 74.1, 74.1]
    assert table["Paper: OPs (G)"].isna().all()


def test_every_network_of_the_recipes_is_counted():
    table = efficiency.run("1/4")
    assert set(table["Model"]) == set(efficiency.models())
    assert len(table) == 3 * table["Model"].nunique()
    quantized = table[table["Bits"] == "1/4"]
    assert (quantized["Size saving"] > 10).all()
    assert (quantized["OPs saving"] > 10).all()


def test_full_precision_is_one_row():
    assert efficiency.run("32/32", "ldm4-bedrooms")["Size (MiB)"].round(1).tolist() == [1045.4]


@pytest.mark.parametrize(("text", "bits"), [("1/4", (1, 4)), (" 8/8 ", (8, 8)), ("1/32", (1, 32)), ("32/32", (32, 32))])
def test_bits(text, bits):
    assert efficiency.parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "4", "1-4", "0/4", "1/9", "1/16", "W1A4", "1/4/8", "a/b", "-1/4", "1/", "001/4"])
def test_bits_that_are_refused(text):
    with pytest.raises(BdmError, match=r"cannot read --bits .*\n  allowed: .*1\.\.8, or 32"):
        efficiency.parse_bits(text)


def test_unknown_model():
    with pytest.raises(BdmError, match=r"unknown model 'ldm4-bedroom'\. Did you mean 'ldm4-bedrooms'\?"):
        efficiency.run("1/4", "ldm4-bedroom")
