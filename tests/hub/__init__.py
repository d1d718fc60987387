"""Tests that talk to a local Hub through the `huggingface_hub` client."""
