"""Compare the table of docs/failure-recovery.md with the injected faults."""

import re
from importlib import import_module
from pathlib import Path

from tests.faults import registry

HERE = Path(__file__).parent


def test_the_page_shows_the_faults_that_are_injected():
    wanted = registry.table(import_module(f"tests.faults.{path.stem}") for path in sorted(HERE.glob("test_*.py")))
    page = (HERE.parents[1] / "docs" / "failure-recovery.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^\| event .*?(?=\n\n)", page, flags=re.M | re.S)
    assert shown == wanted, f"docs/failure-recovery.md should show\n\n{wanted}\n"
    assert wanted.count("\n") >= 20
