"""Serve a bundle with NVIDIA Triton Inference Server: repository, model, server, client, load."""
