"""Debian packages, wheels and installed Python packages as text."""
