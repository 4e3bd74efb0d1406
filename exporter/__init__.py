"""A diffusers transformer and a plan in, a bundle of ONNX graphs out."""

from __future__ import annotations

from exporter.export import export_bundle

__all__ = ["export_bundle"]
