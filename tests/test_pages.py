"""docs/reading.md names functions and constants of the code, as [`name`](../file.py), with values in the next cell."""
import ast
import re

from conftest import ROOT

import common


def test_names_and_values_of_the_reading_path_are_those_of_the_code():
    page = (ROOT / "docs/reading.md").read_text()
    for name, file, value in re.findall(r"\[`([^`]+)`\]\(\.\./(\S+\.py)\)(?: \| `([^`]+)`)?", page):
        code = ast.unparse(ast.parse((ROOT / file).read_text())).replace(" = ", "=")     # one statement a line
        written = rf"{name}('.*default)?={re.escape(value)}(,|\)|$)" if value else rf"(def |class |'){name}\b"
        if name.startswith("PRESETS"):
            assert repr(eval(name, vars(common))) == value, name
        else:
            assert re.search(written, code, re.M), (name, file, value)
