"""Every bdm command of the README parses, and its recipe exists with the overrides it gives."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from bdm_cli import recipe
from bdm_cli.cli import app
from bdm_cli.paper.ablations import ABLATIONS

README = (Path(__file__).parents[1] / "README.md").read_text()


def commands() -> list[str]:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`(bdm [^`]*)`", README.replace("\n", " "))
    return sorted({line.split("#")[0].strip() for line in [*blocks.split("\n"), *inline] if line.startswith("bdm ")})


def test_there_are_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme(line):
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, arguments).params
    if name in ("train", "pretrain", "sample", "evaluate", "ablate") and given.get("recipe"):
        recipe.load(given["recipe"], given["overrides"] or [], given.get("method"))
    if name == "ablate":
        assert given["name"] in ABLATIONS
    if name == "recipes" and given["name"]:
        recipe.load(given["name"])


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_a_make_target_of_the_readme(target):
    assert re.search(rf"^{target}:", (Path(__file__).parents[1] / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((docs/[^)]*)\)", README))
def test_a_link_of_the_readme(link):
    assert (Path(__file__).parents[1] / link).is_file()
