"""Tests that run inside a launched job: every rank runs every test, in step with the others."""
