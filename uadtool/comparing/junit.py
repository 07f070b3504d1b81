"""Gates as JUnit XML, which CI servers show beside other tests."""

import re
from typing import Sequence
from xml.etree import ElementTree

from uadtool.comparing.gates import Verdict
from uadtool.terminal import printable

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


def as_junit(verdicts: Sequence[Verdict]) -> bytes:
    """A test case for each gate. Its failure or error holds the lines of all models that do not meet the gate."""
    counts = {
        "tests": str(len(verdicts)),
        "failures": str(sum(bool(verdict.failures) for verdict in verdicts)),
        "errors": str(sum(bool(verdict.error) for verdict in verdicts)),
    }
    suites = ElementTree.Element("testsuites", {"name": "uadtool", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "uadtool compare", **counts, "skipped": "0"})
    for gate, failures, error in verdicts:
        name = _clean(str(gate))
        case = ElementTree.SubElement(suite, "testcase", {"classname": "uadtool.compare", "name": name})
        lines = [_clean(line) for line in ([str(error)] if error else failures)]
        if lines:
            problem = ElementTree.SubElement(case, "error" if error else "failure", {"message": "; ".join(lines)})
            problem.text = "\n".join(lines)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + bytes(ElementTree.tostring(suites, encoding="utf-8"))


def _clean(text: str) -> str:
    return _NOT_XML.sub(lambda found: printable(found[0]), text)
