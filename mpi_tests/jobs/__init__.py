"""Tests that launch jobs of their own and look at how these end."""
