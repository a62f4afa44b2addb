"""The suite. `python -m mpi_tests` runs all of it; see __main__.py."""
