"""What ``make gpu-check`` runs; ``__main__`` says what that is."""
