"""The run as JUnit XML, for CI: a test suite for each subject, a test case for each case."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(record: dict[str, Any]) -> str:
    """The XML of a record. What may differ and does is skipped there, with its message."""
    root = ElementTree.Element("testsuites", name="multibn conform")
    for subject in record["subjects"]:
        found = [each for each in record["judgements"] if each["subject"] == subject["name"]]
        counts = {status: sum(each["status"] == status for each in found) for status in ("fail", "skip", "differs")}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=subject["name"],
            tests=str(len(found)),
            failures=str(counts["fail"]),
            errors="0",
            skipped=str(counts["skip"] + counts["differs"]),
            timestamp=record["made"].removesuffix("+00:00"),
        )
        for each in found:
            test = ElementTree.SubElement(suite, "testcase", classname=subject["name"], name=each["case"])
            if each["status"] == "fail":
                failure = ElementTree.SubElement(test, "failure", message=_clean(each["message"]))
                failure.text = _clean(f"{each['message']}\n{each['snippet']}")
            elif each["status"] != "pass":
                ElementTree.SubElement(test, "skipped", message=_clean(each["message"]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold; a subject's own messages may have any."""
    return _NOT_XML.sub("\ufffd", text)
