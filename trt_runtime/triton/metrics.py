"""Counters of the served model's own, on Triton's metrics page beside the server's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


class Metrics:
    """Pictures, requests by how they ended, transformer calls by bucket, bytes of caches.

    Triton itself counts a request that is refused or cancelled as a success.
    pb_utils: the module Triton gives its Python models. args: what it gives `initialize`.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        kinds = pb_utils.MetricFamily
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._instance = {"instance": args["model_instance_name"]}
        self._pictures = kinds(
            name="arrowhead_pictures_total", description="Pictures sent", kind=kinds.COUNTER
        )
        self._requests = kinds(
            name="arrowhead_requests_total",
            description="Requests by result: finished, refused, cancelled, failed",
            kind=kinds.COUNTER,
        )
        self._steps = kinds(
            name="arrowhead_steps_total",
            description="Transformer calls by bucket",
            kind=kinds.COUNTER,
        )
        self._cache_bytes = kinds(
            name="arrowhead_cache_bytes",
            description="Bytes of head caches that are allocated",
            kind=kinds.GAUGE,
        )
        self._made: dict[tuple[object, ...], Any] = {}

    def finished(self, pictures: int) -> None:
        """Count a request that got its pictures."""
        self._metric(self._pictures).increment(pictures)
        self.ended("finished")

    def ended(self, result: str) -> None:
        """Count a request by its result."""
        self._metric(self._requests, result=result).increment(1)

    def ran(self, buckets: Sequence[int], cache_bytes: int) -> None:
        """Count one call's steps, and tell what the caches take now."""
        for bucket, count in Counter(buckets).items():
            self._metric(self._steps, bucket=str(bucket)).increment(count)
        self._metric(self._cache_bytes, **self._instance).set(cache_bytes)

    def _metric(self, family: Any, **labels: str) -> Any:
        """Give the family's metric with these labels; it lives as long as this object."""
        key = (id(family), *labels.values())
        if key not in self._made:
            self._made[key] = family.Metric(labels=self._labels | labels)
        return self._made[key]
