"""Who answers requests: Horovod, MPI, or N simulated ranks in one process."""
