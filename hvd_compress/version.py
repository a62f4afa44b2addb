"""The version, read by setup.cfg, the fingerprint check and users."""

__version__ = "0.1.0"
