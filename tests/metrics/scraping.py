"""What Prometheus would read."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def parsed(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, in the order of the labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """The samples that a server hands out."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200
        return parsed(answer.read().decode())
