"""What every room may use: readers, whole files in one step, locks, hashes, progress, the memory of the process."""
